"""The driver's calls that no test of whole launches reaches under the Triton that tests run beside."""
import ctypes
import types

import pytest

from lowbit_video.kernels.parameters import TensorMap
from lowbit_video.runtime import cuda_driver

ALL = 2**64 - 1
BIT = 1 << 21


@pytest.fixture
def driver(monkeypatch):
    """A driver of CUDA 13.1 that sets every bit of a tensor map."""
    library = types.SimpleNamespace(cuTensorMapEncodeTiled=lambda place, *rest: ctypes.memset(place, 255, 128) and 0)
    monkeypatch.setattr(cuda_driver, "_library", lambda: library)
    monkeypatch.setattr(cuda_driver, "_driver_version", lambda: 13010)


def word(read, shape, strides):
    """The second word of a map."""
    memory = (ctypes.c_uint64 * 16)()
    cuda_driver.tensor_map_encoder(read, shape, strides, "zero")(ctypes.addressof(memory), 1 << 30)
    assert memory[0] == memory[2] == memory[15] == ALL
    return memory[1]


@pytest.mark.parametrize("size, shape, strides, small", [
    (1, [2048, 64], [64, 1], False), (1, [2047, 64], [64, 1], True),  # 128 KiB, and a row less
    (1, [1, 131072], [1 << 40, 1], False), (1, [1, 131071], [1 << 40, 1], True),
    (2, [2, 16, 64], [60000, 64, 1], True), (2, [2, 16, 64], [65536, 64, 1], False),  # what lies between counts too
    (2, [1 << 20, 1 << 13], [1 << 13, 1], False)])
def test_maps_of_small_tensors_are_mended(driver, size, shape, strides, small):
    read = TensorMap(3, size, 6, [1] * len(shape), mended=True)
    assert word(read, shape, strides) == (ALL & ~BIT if small else ALL)
    assert word(read._replace(mended=False), shape, strides) == ALL


@pytest.mark.parametrize("version, mended", [(12000, True), (13010, True), (13020, False)])
def test_maps_of_drivers_that_need_no_mending_are_left_alone(driver, monkeypatch, version, mended):
    monkeypatch.setattr(cuda_driver, "_driver_version", lambda: version)
    assert (word(TensorMap(3, 1, 0, [64, 64], mended=True), [64, 64], [64, 1]) != ALL) == mended
