"""The few calls to the CUDA driver that no framework answers for us, through ctypes.

A Paddle custom device keeps its tensors in CUDA memory but has no `get_device_capability`; the
driver itself does. The functions answer None, not an error, on a machine without a driver.
"""
from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence

from lowbit_video.kernels.parameters import TensorMap

CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""
MULTIPROCESSOR_COUNT = 16
"""CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT."""
POINTER_MEMORY_TYPE, POINTER_DEVICE_ORDINAL = 2, 9
"""CU_POINTER_ATTRIBUTE_MEMORY_TYPE and CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL."""
MEMORY_TYPE_DEVICE = 2
"""CU_MEMORYTYPE_DEVICE."""
SHARED_OPTIN = 97
"""CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN."""
FUNCTION_SHARED, FUNCTION_MAX_DYNAMIC_SHARED = 1, 8
"""CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES and _MAX_DYNAMIC_SHARED_SIZE_BYTES."""
PREFER_SHARED = 1
"""CU_FUNC_CACHE_PREFER_SHARED."""
PLAIN_SHARED = 48 * 1024
"""Bytes of shared memory that a function has without asking."""
L2_128B, FILL_ZERO, FILL_NAN = 2, 0, 1
"""CU_TENSOR_MAP_L2_PROMOTION_L2_128B, _FLOAT_OOB_FILL_NONE and _NAN_REQUEST_ZERO_FMA."""
MAPS_MENDED, SMALL_MAP, SMALL_MAP_BIT = 13010, 128 * 1024, 1 << 21
"""Drivers up to this version set, in the maps of tensors of fewer bytes, a bit of the second word that is to be clear.
Source: Triton from 3.7 on (backends/nvidia/driver.c), which follows CUTLASS; it counts bytes in 32 bits, we do not."""


@functools.cache
def _library() -> ctypes.CDLL | None:
    for name in ("libcuda.so.1", "libcuda.so"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        return library if library.cuInit(0) == 0 else None
    return None


def _attribute(ordinal: int, attribute: int) -> int | None:
    cuda = _library()
    value = ctypes.c_int()
    if cuda is None or cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, ordinal) != 0:
        return None
    return value.value


def device_count() -> int:
    """Number of CUDA devices that this process may see; 0 without a driver."""
    cuda, count = _library(), ctypes.c_int()
    return count.value if cuda is not None and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


@functools.cache
def capability(ordinal: int) -> tuple[int, int] | None:
    """Compute capability (major, minor) of a CUDA device by ordinal; None without a driver or such a device."""
    major, minor = _attribute(ordinal, CAPABILITY_MAJOR), _attribute(ordinal, CAPABILITY_MINOR)
    return None if major is None or minor is None else (major, minor)


@functools.cache
def multiprocessors(ordinal: int) -> int | None:
    """Streaming multiprocessors of a CUDA device; None without a driver or such a device."""
    return _attribute(ordinal, MULTIPROCESSOR_COUNT)


@functools.cache
def device_name(ordinal: int) -> str | None:
    """The device's marketing name, such as "NVIDIA H200"; None without a driver or such a device."""
    cuda = _library()
    name = ctypes.create_string_buffer(256)
    if cuda is None or cuda.cuDeviceGetName(name, len(name), ordinal) != 0:
        return None
    return name.value.decode(errors="replace")


@functools.cache
def memory_gib(ordinal: int) -> float | None:
    """The device's whole memory in GiB; None without a driver or such a device."""
    cuda, size = _library(), ctypes.c_size_t()
    if cuda is None or cuda.cuDeviceTotalMem_v2(ctypes.byref(size), ordinal) != 0:
        return None
    return size.value / 2**30


def device_of_pointer(pointer: int) -> int | None:
    """Ordinal of the CUDA device whose memory holds an address; None for host memory or without a driver."""
    cuda = _library()
    kind, ordinal = ctypes.c_uint(), ctypes.c_int()
    address = ctypes.c_uint64(pointer)
    if cuda is None or not pointer:
        return None
    if cuda.cuPointerGetAttribute(ctypes.byref(kind), POINTER_MEMORY_TYPE, address) != 0 or kind.value != MEMORY_TYPE_DEVICE:
        return None
    if cuda.cuPointerGetAttribute(ctypes.byref(ordinal), POINTER_DEVICE_ORDINAL, address) != 0:
        return None
    return ordinal.value


@functools.cache
def _primary_context(ordinal: int) -> int:
    """Handle of the primary context, which every framework of this process shares; retained for good."""
    context = ctypes.c_void_p()
    error = _library().cuDevicePrimaryCtxRetain(ctypes.byref(context), ordinal)
    if error:
        raise RuntimeError(f"CUDA error {error}: no primary context on device {ordinal}")
    return context.value


def push_device(ordinal: int) -> bool:
    """Makes a device's primary context current on this thread. Returns False, having done nothing, where it was already."""
    cuda, current = _library(), ctypes.c_void_p()
    context = _primary_context(ordinal)
    if cuda.cuCtxGetCurrent(ctypes.byref(current)) == 0 and current.value == context:
        return False
    error = cuda.cuCtxPushCurrent_v2(ctypes.c_void_p(context))
    if error:
        raise RuntimeError(f"CUDA error {error}: cannot make device {ordinal} current")
    return True


def pop_device() -> None:
    """Undoes one `push_device` that returned True."""
    _library().cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


@contextlib.contextmanager
def current(ordinal: int) -> Iterator[None]:
    """Inside, a device's primary context is current on this thread, which may never have used CUDA; put back afterwards."""
    pushed = push_device(ordinal)
    try:
        yield
    finally:
        if pushed:
            pop_device()


def _check(error: int, what: str) -> None:
    if error:
        raise RuntimeError(f"CUDA error {error}: {what}")


class Event:
    """A CUDA event with a time stamp, on raw streams, the same for both frameworks."""

    def __init__(self) -> None:
        self._handle = ctypes.c_void_p()
        _check(_library().cuEventCreate(ctypes.byref(self._handle), 0), "cannot make an event")

    def record(self, stream: int) -> None:
        _check(_library().cuEventRecord(self._handle, ctypes.c_void_p(stream)), "cannot record an event")

    def synchronize(self) -> None:
        _check(_library().cuEventSynchronize(self._handle), "an earlier launch failed")

    def elapsed_ms(self, later: Event) -> float:
        """Milliseconds from this event to a later one; both must have happened."""
        value = ctypes.c_float()
        _check(_library().cuEventElapsedTime(ctypes.byref(value), self._handle, later._handle), "cannot read a time")
        return value.value

    def __del__(self) -> None:
        if self._handle.value:
            _library().cuEventDestroy_v2(self._handle)


def fill_bytes(pointer: int, value: int, count: int, stream: int) -> None:
    """Sets `count` bytes of device memory to one value, in stream order."""
    _check(_library().cuMemsetD8Async(ctypes.c_uint64(pointer), ctypes.c_ubyte(value), ctypes.c_size_t(count),
                                      ctypes.c_void_p(stream)), "cannot fill memory")


def synchronize(stream: int) -> None:
    """Waits for a raw stream."""
    _check(_library().cuStreamSynchronize(ctypes.c_void_p(stream)), "a launch failed")


@functools.cache
def _driver_version() -> int | None:
    cuda, value = _library(), ctypes.c_int()
    return value.value if cuda is not None and cuda.cuDriverGetVersion(ctypes.byref(value)) == 0 else None


def driver_version() -> str | None:
    """The CUDA version of the driver, such as "13.0"; None without a driver."""
    version = _driver_version()
    return None if version is None else f"{version // 1000}.{version % 1000 // 10}"


def load_function(image: bytes, name: str, shared: int, ordinal: int) -> int:
    """Handle of a function of a cubin, loaded for good into the current context, which must be of that device.

    shared: bytes of dynamic shared memory that its launches will ask for; more than 48 KiB are asked for here, as Triton does.
    """
    cuda, module, function = _library(), ctypes.c_void_p(), ctypes.c_void_p()
    _check(cuda.cuModuleLoadData(ctypes.byref(module), image), f"this driver (CUDA {driver_version()}) cannot load {name}")
    _check(cuda.cuModuleGetFunction(ctypes.byref(function), module, name.encode()), f"no function {name}")
    most = _attribute(ordinal, SHARED_OPTIN) or 0
    if shared > most:
        raise RuntimeError(f"{name} needs {shared} bytes of shared memory; device {ordinal} has {most} for a block")
    if shared > PLAIN_SHARED:
        static, failed = ctypes.c_int(), f"no {shared} bytes of shared memory for {name}"
        _check(cuda.cuFuncSetCacheConfig(function, PREFER_SHARED), failed)
        _check(cuda.cuFuncGetAttribute(ctypes.byref(static), FUNCTION_SHARED, function), failed)
        _check(cuda.cuFuncSetAttribute(function, FUNCTION_MAX_DYNAMIC_SHARED, most - static.value), failed)
    return function.value


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [*((f"{of}{axis}", ctypes.c_uint) for of in ("grid", "block") for axis in "XYZ"), ("shared", ctypes.c_uint),
                ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("attribute_count", ctypes.c_uint)]


def kernel_launcher(function: int, grid: tuple[int, int, int], threads: int, shared: int, parameters: ctypes.Array
                    ) -> Callable[[int], None]:
    """`launch(stream)`, which launches a function on a raw stream with the parameters that are in memory by then.

    shared: bytes of dynamic shared memory. parameters: the address of each, whose memory the caller keeps. A grid of nothing
    launches nothing.
    """
    if 0 in grid:
        return lambda stream: None
    call, config = _library().cuLaunchKernelEx, _LaunchConfig(*grid, threads, 1, 1, shared)
    given = ctypes.byref(config), ctypes.c_void_p(function), parameters, None

    def launch(stream: int) -> None:
        config.stream = stream
        error = call(*given)
        if error:
            raise RuntimeError(f"CUDA error {error}: a kernel of grid {grid}, {threads} threads was not launched")

    return launch


def tensor_map_encoder(read: TensorMap, shape: Sequence[int], strides: Sequence[int], padding: str
                       ) -> Callable[[int, int], None]:
    """`encode(place, address)`, which writes the tensor map (128 bytes) of a tensor at an address to a place in memory.

    read: how a kernel reads it. shape, strides: in elements, the last dimension contiguous. padding: what lies outside, "zero"
    or "nan".
    """
    call, rank, size = _library().cuTensorMapEncodeTiled, len(shape), read.element_bytes
    array = lambda kind, numbers: (kind * rank)(*numbers)
    given = (array(ctypes.c_uint64, shape[::-1]),
             array(ctypes.c_uint64, [stride * size for stride in (*strides[-2::-1], 0)]),  # the last is not read
             array(ctypes.c_uint32, read.block[::-1]), array(ctypes.c_uint32, [1] * rank), 0, read.swizzle, L2_128B,
             FILL_NAN if padding == "nan" else FILL_ZERO)
    small = 1 + sum((length - 1) * stride * size for length, stride in zip(shape, (*strides[:-1], 1))) < SMALL_MAP
    mend = read.mended and small and (_driver_version() or 0) <= MAPS_MENDED

    def encode(place: int, address: int) -> None:
        error = call(ctypes.c_void_p(place), read.element_type, rank, ctypes.c_void_p(address), *given)
        if error:
            raise RuntimeError(f"CUDA error {error}: no tensor map of shape {list(shape)}, strides {list(strides)} and block "
                               f"{list(read.block)} at {address:#x}")
        if mend:
            ctypes.c_uint64.from_address(place + 8).value &= ~SMALL_MAP_BIT

    return encode
