"""Runtimes: what they find, the driver they lend Triton, and the workspace of a call."""
import inspect
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from interpreted_run import pass_in_the_interpreter
from lowbit_video.engine.options import AttentionOptions
from lowbit_video.engine.run import run
from lowbit_video.engine.workspace import ALIGNMENT, layout_workspace
from lowbit_video.errors import UnsupportedError
from lowbit_video.kernels.formats import get_format
from lowbit_video.kernels.quant.shapes import partial_shape
from lowbit_video.precision import Precision
from lowbit_video.runtime import cuda_driver, detect
from lowbit_video.runtime.protocol import Runtime

from helpers import qkv

pytest.importorskip("triton")


def test_kernels_in_the_interpreter():
    """The kernels themselves, through the public API, in a process where Triton interprets."""
    pass_in_the_interpreter(Path(__file__).with_name("interpreted.py"))


def test_runtime_answers_alike_for_both_frameworks(framework):
    t = framework.tensor(np.arange(24).reshape(2, 3, 4), "float16")
    runtime = detect.runtime_of(t)
    assert runtime.NAME == framework.name and runtime is detect.runtime_named(framework.name)
    assert runtime.shape(t) == (2, 3, 4) and runtime.strides(t) == (12, 4, 1) and runtime.dtype_name(t) == "float16"
    assert runtime.is_cpu(t) and runtime.arch(t) is None
    empty = runtime.empty((5, 7), "float8_e4m3fn", t)
    assert runtime.shape(empty) == (5, 7) and runtime.dtype_name(empty) == "float8_e4m3fn"
    with runtime.launch_guard(t):  # nothing to do on a CPU
        pass
    assert runtime.is_cpu(detect.anchor(framework.name, "cpu"))


@pytest.mark.parametrize("axis", [1, -1])
def test_cut_gives_views_of_both_parts(framework, axis):
    array = np.arange(2 * 5 * 4, dtype="float32").reshape(2, 5, 4)
    t = framework.tensor(array)
    runtime = detect.runtime_of(t)
    for part, wanted, place in zip(runtime.cut(t, 3, axis), np.split(array, [3], axis), (0, 3), strict=True):
        assert np.array_equal(framework.numpy(part), wanted)
        assert part.data_ptr() == t.data_ptr() + array.itemsize * place * runtime.strides(t)[axis]


def test_default_device_is_the_cpu_without_a_gpu():
    if cuda_driver.device_count():
        pytest.skip("this machine has a GPU")
    pytest.importorskip("paddle")
    assert detect.default_paddle_device() == "cpu"
    assert cuda_driver.capability(0) is None and cuda_driver.device_name(0) is None
    assert cuda_driver.device_of_pointer(4096) is None


def test_default_device_finds_a_custom_device_only_if_its_memory_is_cudas(monkeypatch):
    paddle = pytest.importorskip("paddle")
    from lowbit_video.runtime import paddle_runtime

    if paddle.is_compiled_with_cuda():
        pytest.skip("this Paddle has GPUs of its own")
    real = paddle.empty
    monkeypatch.setattr(paddle.device, "get_available_custom_device", lambda: ["npu:0", "npu:1", "cudev:0", "cudev:1"])
    monkeypatch.setattr(paddle, "CustomPlace", lambda kind, index: (kind, index), raising=False)
    asked = []
    monkeypatch.setattr(paddle, "empty", lambda shape, dtype, device: asked.append(device) or real(shape, dtype=dtype))
    monkeypatch.setattr(cuda_driver, "device_of_pointer", lambda pointer: 0 if asked[-1][0] == "cudev" else None)
    assert paddle_runtime.default_device() == "cudev:0"
    assert asked == [("npu", 0), ("cudev", 0)]
    monkeypatch.setenv("FLAGS_selected_cudevs", "3")
    assert paddle_runtime.default_device() == "cudev:3", "the one that the launcher gives this process"


def test_a_runtime_answers_all_that_the_protocol_asks(framework):
    runtime = detect.runtime_named(framework.name)
    asked = {name: member for name, member in vars(Runtime).items() if inspect.isfunction(member) and not name.startswith("_")}
    assert len(asked) == 24 and runtime.NAME == framework.name
    for name, member in asked.items():
        wanted = list(inspect.signature(member).parameters.values())[1:]
        given = list(inspect.signature(getattr(runtime, name)).parameters.values())
        assert [(p.name, p.kind, p.default) for p in given] == [(p.name, p.kind, p.default) for p in wanted], name


@pytest.fixture
def driver_config(monkeypatch):
    """Triton's driver setting and our driver, with the CUDA calls recorded instead of made."""
    from triton.runtime.driver import driver as config

    from lowbit_video.runtime import triton_driver

    calls = []
    monkeypatch.setattr(cuda_driver, "push_device", lambda ordinal: calls.append(("push", ordinal)) or True)
    monkeypatch.setattr(cuda_driver, "pop_device", lambda: calls.append(("pop",)))
    monkeypatch.setattr(config, "_active", None)
    return config, triton_driver, calls


def test_driver_is_active_around_a_launch_only(driver_config, monkeypatch):
    config, triton_driver, calls = driver_config
    monkeypatch.setattr(cuda_driver, "capability", lambda ordinal: (9, 0))
    handles = iter((11, 22))
    ours = triton_driver.device_driver(3, lambda: next(handles))
    with triton_driver.active(ours):
        assert config.active is ours
        target = config.active.get_current_target()
        assert (target.backend, target.arch, target.warp_size) == ("cuda", 90, 32)
        assert config.active.get_current_device() == 3
        assert [config.active.get_current_stream(3) for _ in range(2)] == [11, 22]  # asked anew at every launch
    assert config._active is None and calls == [("push", 3), ("pop",)]
    someone_elses = object()
    config.set_active(someone_elses)
    with pytest.raises(ZeroDivisionError), triton_driver.active(ours):
        1 / 0  # noqa: B018  a launch that fails
    assert config._active is someone_elses


def test_paddles_driver_is_whole_before_the_first_launch(monkeypatch):
    """Triton's launchers look for the type of TMA descriptors once, when the first is made, and its utilities define it."""
    pytest.importorskip("paddle")
    from lowbit_video.runtime import paddle_runtime, triton_driver

    class Driver:
        asked = []

        @property
        def utils(self):
            self.asked.append(1)
            return self

    monkeypatch.setattr(triton_driver, "device_driver", lambda ordinal, stream: Driver())
    paddle_runtime._driver.cache_clear()
    try:
        assert isinstance(paddle_runtime._driver(5), Driver) and Driver.asked == [1]
    finally:
        paddle_runtime._driver.cache_clear()


def test_launches_of_two_threads_do_not_mix_drivers(driver_config):
    config, triton_driver, _ = driver_config
    drivers = [triton_driver.device_driver(i, lambda: 0) for i in range(2)]
    wrong = []

    def launch(mine):
        for _ in range(200):
            with triton_driver.active(mine):
                if config._active is not mine:
                    wrong.append(mine)

    threads = [threading.Thread(target=launch, args=(d,)) for d in drivers]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong and config._active is None


def test_triton_on_cpu_tensors_is_refused_outside_the_interpreter(framework):
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton interprets in this process")
    q, k, v = (framework.tensor(a, "float16") for a in qkv(q_len=20))
    with pytest.raises(UnsupportedError, match="needs an NVIDIA GPU"):
        run(q, k, v, AttentionOptions("int8+fp16", backend="triton"))


@pytest.mark.parametrize("spec", ["int8+fp16", "int8+fp8", "int4+fp8", "int8/int2+fp16", "fp8+fp8"])
@pytest.mark.parametrize("lse", [False, True])
def test_workspace_holds_the_quantised_copies_and_nothing_else_of_their_size(spec, lse):
    shape, precision = (2, 30, 17776, 64), Precision(spec)
    plan = layout_workspace(shape, shape, precision, lse)
    sizes = {"float32": 4}
    end = 0
    for offset, dtype, part in sorted(plan.parts.values()):
        assert offset % ALIGNMENT == 0 and offset >= end  # parts do not overlap
        end = offset + int(np.prod(part)) * sizes.get(dtype, 1)
    assert end <= plan.size
    elements = int(np.prod(shape))
    copies = sum(elements // get_format(f).codes_per_byte for f in (precision.q, precision.k))
    copies += elements * (17792 / 17776) * (precision.pv == "fp8")
    rows = elements // 64 * 4  # one float32 a row: scales per token, Q's correction, the LSE's shift
    per_row = 1 + (precision.granularity == "token") + precision.smooth_q + lse
    assert copies <= plan.size <= copies + rows * per_row + 0.08 * elements
    reduced = precision.smooth_q + precision.smooth_k + (precision.pv == "fp8")  # each tensor has scratch of its own
    assert int(np.prod(plan.parts["partial"][2])) == reduced * int(np.prod(partial_shape(shape)))


@pytest.mark.parametrize("spec, tensors", [("int4+fp16 rotate", "qk"), ("int8+fp8 rotate", "qkv")])
def test_a_rotating_call_has_scratch_for_the_ranges_of_each_tensor_that_it_reduces(spec, tensors):
    shapes = dict(q=(2, 4, 1000, 64), k=(2, 2, 3000, 64), v=(2, 2, 3000, 64))
    parts = layout_workspace(shapes["q"], shapes["k"], Precision(spec), False).parts
    wanted = 3 * sum(int(np.prod(partial_shape(shapes[name]))) for name in tensors)
    assert parts["ranges"][1:] == ("float32", (wanted,)) and "partial" not in parts


def test_values_too_small_for_float16_become_zero(framework):
    """Paddle's own cast on a CPU makes 1e-7 to 1e-4 of some."""
    runtime, like = detect.runtime_of(framework.tensor(0.0)), framework.tensor(0.0)
    values = np.exp(np.linspace(-87, 0, 4001)).astype(np.float32)
    got = framework.numpy(runtime.from_numpy(values, like, "float16"))
    np.testing.assert_array_equal(got, values.astype(np.float16).astype(np.float32))
