"""The Hopper kernel's own source, run by Python on NumPy arrays: what Triton's interpreter does for Triton's dialect.

Its functions run as they stand, with another `gl`: the producer and the consumers of a program are threads, barriers count
arrivals and bytes as the hardware's do, shared memory is poisoned, an address outside of a tensor is an error. Layouts mean
nothing here but where a thread's registers are told apart (`_by_thread`), and nothing is asynchronous.
"""
from __future__ import annotations

import threading
import types
from typing import Any

import ml_dtypes
import numpy as np

from lowbit_video.kernels.attention.hopper import kernel, registers, softmax
from lowbit_video.kernels.buffers import Buffer

from ptx_in_numpy import run_ptx

WARP = 32  # threads
DTYPES = {"float8e4nv": ml_dtypes.float8_e4m3fn, "bfloat16": ml_dtypes.bfloat16,
          **{name: getattr(np, name) for name in ("float16", "float32", "int8", "int16", "int32", "int64")}}


class Tensor(np.ndarray):
    """A register tensor."""

    type = types.SimpleNamespace(layout=None)

    def to(self, dtype: Any, bitcast: bool = False) -> Tensor:
        return self.view(dtype) if bitcast else self.astype(dtype)

    def permute(self, order: tuple[int, ...]) -> Tensor:
        return self.transpose(order)

    def split(self) -> tuple[Tensor, Tensor]:
        assert self.shape[-1] == 2
        return self[..., 0], self[..., 1]


class Scalar(int):
    """An integer of the kernel."""

    def to(self, dtype: Any) -> Scalar:
        return self


def _kept_scalar(do: Any) -> Any:
    def operation(self: Scalar, other: Any) -> Any:
        value = do(self, other)
        return value if value is NotImplemented else Scalar(value)

    return operation


for _name in ("add", "sub", "mul", "floordiv", "mod", "and", "xor"):
    for _full in (f"__{_name}__", f"__r{_name}__"):
        setattr(Scalar, _full, _kept_scalar(getattr(int, _full)))


class Shared(np.ndarray):
    """Shared memory; of barriers, an array of them."""

    def index(self, i: int) -> Any:
        return self[i]

    def permute(self, order: tuple[int, ...]) -> Shared:
        return self.transpose(order)

    def reinterpret(self, dtype: Any, shape: list[int], layout: Any) -> Shared:
        assert dtype == self.dtype
        return self.reshape(shape)


class Warps:
    """The threads of a program: those that run, and how many of them wait; all waiting for each other is an error at once."""

    def __init__(self) -> None:
        self.changed, self.running, self.waiting, self.error = threading.Condition(), 0, 0, None

    def fail(self, error: BaseException) -> None:
        self.error = self.error or error
        self.awake()

    def awake(self) -> None:
        """Lets all that wait look again; `changed` is held."""
        self.waiting = 0
        self.changed.notify_all()

    def check(self) -> None:
        """Raises what another warp raised, or that none is left to go on; `changed` is held."""
        if self.running and self.waiting == self.running:
            self.fail(AssertionError("every warp waits for a barrier"))
        if self.error:
            raise RuntimeError("another warp failed") from self.error


class Barrier:
    """An mbarrier: a phase ends when so many arrived and as many bytes came as were expected."""

    def __init__(self, warps: Warps) -> None:
        self.warps, self.count, self.arrived, self.bytes, self.phase = warps, 0, 0, 0, 0

    def update(self, arrivals: int, expected: int) -> None:
        with self.warps.changed:
            self.arrived, self.bytes = self.arrived + arrivals, self.bytes + expected
            assert self.arrived <= self.count, "more arrivals than the barrier counts"
            if self.arrived == self.count and self.bytes == 0:
                self.arrived, self.phase = 0, self.phase + 1
                self.warps.awake()

    def wait(self, parity: int) -> None:
        with self.warps.changed:
            while self.phase & 1 == parity & 1:
                self.warps.waiting += 1
                self.warps.check()
                self.warps.changed.wait()


class Pointer:
    """Addresses in the flat memory of one array: element offsets."""

    def __init__(self, memory: np.ndarray, offsets: Any = 0) -> None:
        self.memory, self.offsets = memory, offsets
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.memory, self.offsets + np.asarray(more, np.int64))

    def __getitem__(self, index: Any) -> Pointer:
        return Pointer(self.memory, self.offsets[index])

    def at(self, mask: Any) -> tuple[np.ndarray, np.ndarray]:
        """(offsets, mask), broadcast; an offset outside of the memory is an error where the mask is set."""
        offsets, mask = np.broadcast_arrays(np.asarray(self.offsets), True if mask is None else np.asarray(mask))
        wild = mask & ((offsets < 0) | (offsets >= self.memory.size))
        assert not wild.any(), f"address {offsets[wild][0]} of {self.memory.size} elements"
        return np.where(mask, offsets, 0), mask


def _by_thread(x: np.ndarray, count: int) -> np.ndarray:
    """[threads, count]: the registers of each thread, warp by warp.

    A thread has two rows, 8 apart. Of an accumulator [64, D] the lowest bit of a register's number tells the column and the
    next one the row; of [64, n, 4], which is what `split_scores` makes of scores, the lowest bit tells the row.
    """
    if x.ndim == 2:
        rows, columns = x.shape
        return x.reshape(rows // 16, 2, 8, columns // 8, 4, 2).transpose(0, 2, 4, 3, 1, 5).reshape(-1, count)
    if x.ndim != 3:
        return x.reshape(-1, count)
    rows, columns, lanes = x.shape
    return x.reshape(rows // 16, 2, 8, columns, lanes).transpose(0, 2, 4, 3, 1).reshape(-1, count)


def _of_threads(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) == 2:
        rows, columns = shape
        return x.reshape(rows // 16, 8, 4, columns // 8, 2, 2).transpose(0, 4, 1, 3, 2, 5).reshape(shape)
    if len(shape) != 3:
        return x.reshape(shape)
    rows, columns, lanes = shape
    return x.reshape(rows // 16, 8, lanes, columns, 2).transpose(0, 4, 1, 3, 2).reshape(shape)


def _inline_asm(text: Any, constraints: Any, given: list, dtype: Any, is_pure: bool, pack: int) -> Tensor:
    """As Triton numbers them: `pack` results, then `pack` registers of each operand. A text that votes runs warp by warp."""
    given = np.broadcast_arrays(*given)
    shape, parts = given[0].shape, [np.ascontiguousarray(_by_thread(x, pack).T) for x in given]  # [registers, threads]
    assert len(_plain(constraints).split(",")) == pack * (1 + len(given))
    made, threads = [], parts[0].shape[1]
    together = WARP if "vote" in _plain(text) else threads
    for first in range(0, threads, together):
        warp = slice(first, first + together)
        registers = {f"${pack * (1 + j) + i}": part[i, warp] for j, part in enumerate(parts) for i in range(pack)}
        run_ptx(_plain(text), registers)
        made.append(np.stack([np.asarray(registers[f"${i}"]) for i in range(pack)], -1))
    whole = _of_threads(np.concatenate(made), shape)
    return whole.astype(np.uint32 if dtype == np.int32 else dtype).view(dtype).view(Tensor)


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


def _load(pointer: Pointer, mask: Any = None, other: float = 0.0) -> Any:
    offsets, seen = pointer.at(mask)
    values = np.where(seen, pointer.memory[offsets], pointer.memory.dtype.type(other))
    return values.view(Tensor) if values.ndim else values[()]


def _store(pointer: Pointer, value: np.ndarray, mask: Any = None) -> None:
    offsets, seen = pointer.at(mask)
    pointer.memory[offsets[seen]] = np.broadcast_to(value, seen.shape)[seen]


def _wgmma(a: Any, b: Any, acc: Tensor, use_acc: bool = True, is_async: bool = False) -> Tensor:
    product = (np.asarray(a, np.float32) @ np.asarray(b, np.float32)).astype(acc.dtype)
    return (acc + product if use_acc else product).view(Tensor)


class Program:
    """One program: its `gl`, and the kernel's functions over it."""

    def __init__(self, number: int, programs: int) -> None:
        self.warps = Warps()
        smaller = lambda do: lambda a, b: (Scalar(do(a, b)) if isinstance(a, int) and isinstance(b, int) else do(a, b))
        tensor = lambda x: np.asarray(x).view(Tensor)
        gl = types.SimpleNamespace(
            **{name: np.dtype(dtype) for name, dtype in DTYPES.items()}, program_id=lambda axis: Scalar(number),
            num_programs=lambda axis: programs, cdiv=lambda a, b: Scalar(-(-a // b)), minimum=smaller(np.minimum),
            maximum=smaller(np.maximum), static_range=range, where=lambda *x: tensor(np.where(*x)),
            arange=lambda a, b, layout=None: np.arange(a, b).view(Tensor), exp2=np.exp2, log2=_log2, fma=_fma,
            max=lambda x, axis: x.max(axis), sum=lambda x, axis: x.sum(axis, dtype=x.dtype),
            zeros=lambda shape, dtype, layout=None: np.zeros(shape, dtype).view(Tensor),
            full=lambda shape, value, dtype, layout=None: np.full(shape, value, dtype).view(Tensor),
            full_like=lambda x, value: np.full_like(x, value), join=lambda a, b: np.stack([a, b], -1).view(Tensor),
            broadcast=lambda a, b: tuple(tensor(x) for x in np.broadcast_arrays(a, b)),
            convert_layout=lambda x, layout, assert_trivial=False: x, load=_load, store=_store,
            inline_asm_elementwise=_inline_asm, allocate_shared_memory=self.allocate, warp_specialize=self.run_warps,
            **{name: lambda *a, **k: None for name in ("SliceLayout", "NVMMADistributedLayout", "BlockedLayout",
                                                       "DotOperandLayout", "DistributedLinearLayout")})
        mbarrier = types.SimpleNamespace(
            MBarrierLayout=lambda: "barriers", init=lambda bar, count: setattr(_one(bar), "count", count),
            wait=lambda bar, phase: _one(bar).wait(phase), arrive=lambda bar, count=1: _one(bar).update(count, 0),
            expect=lambda bar, count: _one(bar).update(1, count))
        replaced = dict(gl=gl, reinterpret=Shared.reinterpret, mbarrier=mbarrier, async_load=_async_load, warpgroup_mma=_wgmma,
                        fence_async_shared=lambda: None,
                        block_barrier=lambda: None, p_layout=lambda columns: None,
                        warpgroup_mma_wait=lambda left, deps: deps if len(deps) > 1 else deps[0])
        self.names: dict[str, Any] = {}
        for module in (registers, softmax, kernel):
            for name, value in vars(module).items():
                if hasattr(value, "fn") and type(value).__name__ != "ConstexprFunction":
                    function = value.fn
                    self.names[name] = types.FunctionType(function.__code__, self.names, name, function.__defaults__)
                elif not name.startswith("__"):
                    self.names[name] = _plain(value)
        self.names.update(replaced, __builtins__=__builtins__)

    def allocate(self, dtype: Any, shape: list[int], layout: Any, value: Any = None) -> Shared:
        if layout == "barriers":
            made = np.empty(shape, object)
            made[...] = np.frompyfunc(lambda _: Barrier(self.warps), 1, 1)(np.zeros(shape))
            return made.view(Shared)
        made = np.full(shape, 0x7F, np.uint8 if dtype.itemsize == 1 else np.uint16).view(dtype) if value is None else value
        if value is None and dtype.itemsize == 2:
            made = np.full(shape, np.nan, dtype)
        return made.view(Shared)

    def run_warps(self, parts: list, warps: list[int], registers: list[int]) -> None:
        def one(function: Any, arguments: tuple) -> None:
            error = None
            try:
                function(*arguments)
            except BaseException as raised:  # told by the thread that waits for them all
                error = raised
            with self.warps.changed:
                self.warps.running -= 1
                if error:
                    self.warps.fail(error)
                elif self.warps.running == self.warps.waiting:
                    self.warps.awake()  # to find that nobody is left

        self.warps.running = len(parts)
        threads = [threading.Thread(target=one, args=part) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.warps.error:
            raise self.warps.error


def _log2(x: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log2(x)


def _fma(a: Any, b: Any, c: Any) -> Tensor:
    return (np.asarray(a, np.float64) * b + c).astype(np.float32).view(Tensor)


def _one(barrier: Any) -> Barrier:
    return barrier if isinstance(barrier, Barrier) else barrier.reshape(-1)[0]


def _async_load(descriptor: Any, place: list[int], barrier: Any, target: Shared) -> None:
    """A tile of a tensor by its place; what lies past the tensor's end is zero."""
    source = descriptor.array
    tile = np.zeros(descriptor.block_shape, source.dtype)
    inside = [min(size, max(0, whole - at)) for size, whole, at in zip(tile.shape, source.shape, place)]
    tile[tuple(slice(count) for count in inside)] = source[tuple(slice(at, at + n) for at, n in zip(place, inside))]
    assert min(place) >= 0 and tile.shape == target.shape and tile.dtype == target.dtype
    target[...] = tile
    _one(barrier).update(0, -tile.nbytes)


class Memory:
    """Arrays by address, as launchers get them, and the kernel's arguments as the simulated kernel takes them."""

    def __init__(self) -> None:
        self.arrays: dict[int, np.ndarray] = {}

    def buffer(self, array: np.ndarray, dtype: str | None = None) -> Buffer:
        """What launchers take of an array."""
        self.arrays[array.ctypes.data] = array
        return Buffer(array.ctypes.data, dtype or array.dtype.name)

    def of(self, argument: Any) -> Any:
        """A launched kernel's argument."""
        if hasattr(argument, "block_shape"):
            flat = self.arrays[argument.base.data_ptr()].reshape(-1)
            last = int(np.dot(np.array(argument.shape) - 1, argument.strides))
            assert last < flat.size, "a descriptor reaches past its tensor"
            array = np.lib.stride_tricks.as_strided(flat, argument.shape, [s * flat.itemsize for s in argument.strides])
            return types.SimpleNamespace(array=array, dtype=flat.dtype, layout=None, block_shape=argument.block_shape)
        if hasattr(argument, "data_ptr"):
            return Pointer(self.arrays[argument.data_ptr()].reshape(-1))
        return Scalar(argument) if isinstance(argument, int) else argument

    def kernel(self) -> Any:
        """What stands for `attn_fwd_kernel` in the launcher: runs every program of the grid, one by one."""
        memory = self

        class Kernel:
            arg_names = kernel.attn_fwd_kernel.arg_names

            def __getitem__(self, grid: tuple[int, ...]) -> Any:
                def launched(*given: Any, num_warps: int, enable_fp_fusion: bool, **constants: Any) -> None:
                    assert num_warps == 4 and enable_fp_fusion and len(given) + len(constants) == len(self.arg_names)
                    arguments = [memory.of(one) for one in given]
                    for number in range(grid[0]):
                        Program(number, grid[0]).names["attn_fwd_kernel"](*arguments, **constants)

                return launched

        return Kernel()
