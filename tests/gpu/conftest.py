"""GPU tests run on one framework at a time: LOWBIT_TEST_FRAMEWORK=paddle or torch (default: one that has a GPU)."""
from __future__ import annotations

import importlib.util
import os

import numpy as np
import pytest


def _place():
    """(framework, anchor tensor on its GPU), or why there is none."""
    from lowbit_video.runtime import detect

    asked = os.environ.get("LOWBIT_TEST_FRAMEWORK")
    reasons = []
    for name in (asked,) if asked else ("torch", "paddle"):
        if importlib.util.find_spec(name) is None:
            reasons.append(f"{name} is not installed")
            continue
        like = detect.anchor(name)
        if not detect.runtime_of(like).is_cpu(like):
            return name, like
        reasons.append(f"{name} finds no GPU")
    return "; ".join(reasons)


@pytest.fixture(scope="session")
def gpu():
    """The framework under test on its GPU."""
    found = _place()
    if isinstance(found, str):
        pytest.skip(f"needs an NVIDIA GPU ({found})")
    return Gpu(*found)


class Gpu:
    """name, runtime, like (a tensor there), arch; tensor(array, dtype) and numpy(tensor) as float32; cpu(array, dtype)."""

    def __init__(self, name, like):
        from lowbit_video.runtime import detect

        self.name, self.like, self.runtime = name, like, detect.runtime_of(like)
        self.arch = tuple(self.runtime.arch(like))

    def tensor(self, array, dtype="float16"):
        array = np.ascontiguousarray(array, np.int32 if dtype == "int32" else np.float32)
        return self.runtime.from_numpy(array, self.like, dtype)

    def cpu(self, array, dtype="float16"):
        from lowbit_video.runtime import detect

        return self.runtime.from_numpy(np.ascontiguousarray(array, np.float32), detect.anchor(self.name, "cpu"), dtype)

    def release(self):
        """Gives cached memory back to the device, for the other processes that test on it."""
        import gc
        import sys

        gc.collect()
        if self.name == "torch":
            sys.modules["torch"].cuda.empty_cache()

    def copy(self, to_pointer, from_pointer, count, stream):
        """Copies bytes within the device, in stream order."""
        import ctypes

        from lowbit_video.runtime import cuda_driver

        assert cuda_driver._library().cuMemcpyAsync(ctypes.c_uint64(to_pointer), ctypes.c_uint64(from_pointer),
                                                    ctypes.c_size_t(count), ctypes.c_void_p(stream)) == 0

    def happened(self, event):
        """Whether the device has reached an event; does not wait."""
        from lowbit_video.runtime import cuda_driver

        return cuda_driver._library().cuEventQuery(event._handle) == 0

    def numpy(self, tensor):
        return np.asarray(self.runtime.to_numpy(tensor), np.float32)
