"""A repeated call launches what the first one did, with its own addresses.

Triton and the GPU are played by recorders, the framework by NumPy: a plan knows tensors by address, shape, strides and dtype.
"""
import contextlib
import ctypes
import math
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from lowbit_video.engine import replay as plans
from lowbit_video.engine.options import AttentionOptions
from lowbit_video.engine.packing import Packing
from lowbit_video.engine.prologue import tensors_of
from lowbit_video.engine.run import run
from lowbit_video.engine.workspace import layout_workspace
from lowbit_video.errors import NonFiniteError, SlowerThanExactWarning
from lowbit_video.eval.speed.bench import allocations_of
from lowbit_video.kernels import compiled, launch
from lowbit_video.kernels.buffers import Buffer
from lowbit_video.kernels.formats import LOG2_E
from lowbit_video.kernels.operands import Operand, codes_of
from lowbit_video.kernels.prologue.steps import Norm, Rest, Rotary, Steps
from lowbit_video.kernels.shipped.kinds import kind_of, parameters
from lowbit_video.kernels.stand_in import TensorDescriptor as Descriptor
from lowbit_video.kernels.variants import VARIANTS, KernelVariant
from lowbit_video.pooled import Pooled
from lowbit_video.precision import Precision
from lowbit_video.runtime import detect

pytest.importorskip("triton", reason="the launchers need Triton")

from lowbit_video.kernels.attention import portable  # noqa: E402
from lowbit_video.kernels.attention.hopper import launch as hopper  # noqa: E402
from lowbit_video.kernels.quant import quant_qk  # noqa: E402


class Tensor(np.ndarray):
    """An array that says where it lies, as a framework's tensor does."""

    def data_ptr(self):
        return self.ctypes.data


def empty(shape, dtype, like=None):
    return np.zeros(shape, getattr(ml_dtypes, dtype, dtype)).view(Tensor)


def drawn(*shape, dtype="float16"):
    return np.random.default_rng().standard_normal(shape, np.float32).astype(getattr(ml_dtypes, dtype, dtype)).view(Tensor)


RUNTIME = dict(
    NAME="numpy", dtype_name=lambda t: t.dtype.name, shape=lambda t: t.shape, place=lambda t: "gpu:0", is_cpu=lambda t: False,
    strides=lambda t: tuple(s // t.itemsize for s in t.strides), signature=lambda t: (t.shape, t.strides, t.dtype, 0),
    arch=lambda t: (9, 0), stream=lambda t: 77, contiguous=lambda t: np.ascontiguousarray(t).view(Tensor),
    to_numpy=lambda t: np.asarray(t, np.float32), launch_guard=lambda t: contextlib.nullcontext(),
    wants_gradients=lambda *tensors: False, unreadable=lambda t: None)
"""What `run` asks of a runtime, on an H200."""


class Log(list):
    """A list whose `append` may be replaced."""


TYPES = {"f32": ("fp32", ctypes.c_float), "i32": ("i32", ctypes.c_int32), "i64": ("i64", ctypes.c_int64)}
"""Of a kind of number: Triton's word for it, and how it is read."""


class Compiled:
    """What Triton would have compiled for a launch; `read` finds the arguments in the parameters that the driver is given."""

    packed_metadata = (4, 1, 100)

    def __init__(self, name, log, kernel, arguments, constants):
        self.name, self.log, self.function = name, log, len(FUNCTIONS)
        self.names = [one.name for one in parameters(kernel.fn, tuple(kernel.do_not_specialize))]
        self.given = dict(zip(self.names, arguments), **constants)
        constant = {one.name for one in parameters(kernel.fn) if one.constant}
        self.kinds = {name: "constant" if name in constant else kind_of(self.given[name], name not in kernel.do_not_specialize)
                      for name in self.names}
        maps = [MAP for kind in self.kinds.values() if kind.startswith("tma")]
        self.src = types.SimpleNamespace(signature={name: self._type(kind) for name, kind in self.kinds.items()})
        self.metadata = types.SimpleNamespace(num_ctas=1, tensordesc_meta=maps)
        FUNCTIONS.append(self)

    @staticmethod
    def _type(kind):
        plain = kind.partition("/")[0]
        if kind.startswith("*") or kind.startswith("tma"):
            return plain if kind.startswith("*") else "tensordesc<>"
        return TYPES[plain][0] if plain in TYPES else "constexpr"

    def read(self, pointers):
        """All arguments in their order: what was compiled in as it was given, all else out of memory."""
        found, memory = [], iter(pointers)
        for name in self.names:
            value, kind = self.given[name], self.kinds[name]
            plain = kind.partition("/")[0]
            if kind.startswith("*"):
                value = ctypes.c_uint64.from_address(next(memory)).value
                # a kernel compiled for multiples of 16 may be given nothing else
                assert kind.endswith("/16") == (value % 16 == 0), (self.name, name, kind, hex(value))
            elif kind.startswith("tma"):
                address, rank = ctypes.c_uint64.from_address(next(memory)).value, len(value.shape)
                numbers = [type.from_address(next(memory)).value for type in [ctypes.c_int32] * rank + [ctypes.c_int64] * rank]
                value = Descriptor(Buffer(address, value.base.dtype), numbers[:rank], numbers[rank:], value.block_shape, None,
                                   value.padding)
            elif plain in TYPES:
                value = TYPES[plain][1].from_address(next(memory)).value
            found.append(value)
        assert [ctypes.c_uint64.from_address(place).value for place in memory] == [0, 0]  # scratch
        return tuple(found)


FUNCTIONS = []
"""Every `Compiled`; its number is its function's handle."""
MAP = dict(swizzle=3, elem_size=1, elem_type=0, block_size=[64, 64], fp4_padded=False)


class Driver:
    """Plays the CUDA driver: a tensor map is the address that it is of, and a launch is noted by its kernel."""

    @staticmethod
    def tensor_map_encoder(read, shape, strides, padding):
        def encode(place, address):
            ctypes.c_uint64.from_address(place).value = address

        return encode

    @staticmethod
    def kernel_launcher(function, grid, threads, shared, pointers):
        assert (threads, shared) == (128, 100)
        kernel = FUNCTIONS[function]
        return lambda stream: kernel.log.append((kernel.name, grid, stream, kernel.read(pointers)))


class Kernel:
    """Stands for a jitted kernel; the long way through Triton notes its launch as the short one does."""

    def __init__(self, kernel, name, log, long):
        self.kernel, self.arg_names, self.name, self.log, self.long = kernel, kernel.arg_names, name, log, long

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            rest = [constants[name] for name in self.arg_names[len(arguments):]]
            self.long.append(self.name)
            self.log.append((self.name, (*grid, 1, 1)[:3], 77, (*arguments, *rest)))
            return Compiled(self.name, self.log, self.kernel, arguments, constants)

        return run


@pytest.fixture
def device(monkeypatch):
    """A runtime that takes arrays for an H200's tensors; log: every launch, long: those that went through Triton."""
    from triton.runtime.driver import driver

    from lowbit_video.kernels.pooled import choose, part, tile_stats
    from lowbit_video.kernels.prologue import quant, stats, values
    from lowbit_video.kernels.quant import quant_v, token_stats

    log, long, kept = Log(), [], []
    for module, name in ((hopper, "attn_fwd_kernel"), (portable, "attn_fwd_kernel"), (quant_qk, "quant_qk_kernel"),
                         (quant_v, "quant_v_kernel"), (token_stats, "token_stats_kernel"), (token_stats, "fold_stats_kernel"),
                         *((tile_stats, f"{name}_tiles_kernel") for name in ("key", "fold", "query")), (choose, "score_kernel"),
                         (choose, "list_kernel"), (part, "pooled_part_kernel"), (stats, "prologue_stats_kernel"),
                         (stats, "fold_stats_kernel"), (quant, "prologue_quant_kernel"),
                         (values, "prologue_values_kernel")):
        monkeypatch.setattr(module, name, Kernel(getattr(module, name), f"{module.__name__}.{name}", log, long))
    monkeypatch.setattr(plans, "cuda_driver", Driver)
    monkeypatch.setattr(driver, "_active", types.SimpleNamespace(get_current_device=lambda: 0), raising=False)

    def kept_empty(shape, dtype, like):
        kept.append(empty(shape, dtype))  # kept, so that no address comes twice
        return kept[-1]

    runtime = types.SimpleNamespace(**RUNTIME, empty=kept_empty)
    monkeypatch.setattr(detect, "same_runtime", lambda **tensors: runtime)
    plans.clear()
    yield types.SimpleNamespace(log=log, long=long, kept=kept, runtime=runtime)
    plans.clear()


def flat(log, named):
    """The launches with addresses by name and offset, so that two calls can be compared."""
    def one(value):
        if hasattr(value, "strides") and hasattr(value, "base"):
            return ("descriptor", one(value.base), list(value.shape), list(value.strides), value.padding)
        if hasattr(value, "data_ptr"):
            value = value.data_ptr()
        if isinstance(value, float):
            return np.float32(value)
        if not isinstance(value, int) or value < 2**32:
            return value
        return next((name, value - t.data_ptr()) for name, t in named.items()
                    if t.data_ptr() <= value < t.data_ptr() + max(1, t.nbytes))

    return [(name, grid, stream, [one(value) for value in arguments]) for name, grid, stream, arguments in log]


def tensors(tokens=200, heads=2, head_dim=64, dtype="float16"):
    return [drawn(1, tokens, heads, head_dim, dtype=dtype) for _ in range(3)]


def call(device, q, k, v, precision, **more):
    device.log.clear()
    before = len(device.kept)
    out, lse, variant = run(q, k, v, AttentionOptions(precision, **more))
    fresh = device.kept[before:]
    named = dict(zip("qkv", (q, k, v)))
    for number, t in enumerate(fresh):
        named[f"fresh {number}"] = t
    return flat(device.log, named), variant, out, lse


CASES = [(precision, backend, lse) for precision in ("int8+fp16", "int8+fp8", "fp8+fp8", "int4+fp16", "int8/int2+fp8", "exact")
         for backend in ("triton", "hopper") for lse in (False, True)
         if backend == "triton" or precision in ("int8+fp16", "int8+fp8", "fp8+fp8", "exact")]


@pytest.mark.parametrize("precision,backend,lse", CASES)
def test_a_repeated_call_launches_the_same_on_its_own_tensors(device, precision, backend, lse):
    first, variant, out, _ = call(device, *tensors(), precision, backend=backend, return_lse=lse)
    ways = len(device.long)
    assert ways == len(first) > 0 and variant.backend == backend
    again, same, out_2, lse_2 = call(device, *tensors(), precision, backend=backend, return_lse=lse)
    assert again == first and len(device.long) == ways, "the second call went through Triton"
    assert same is variant and out_2.shape == out.shape and out_2.dtype == out.dtype and out_2.data_ptr() != out.data_ptr()
    assert (lse_2 is not None) == lse


@pytest.mark.parametrize("precision,lse", [("int8+fp8", False), ("int4+fp16", True), ("exact", False), ("exact", True)])
def test_what_the_benchmark_says_a_repeated_call_allocates(device, precision, lse):
    """Output, LSE where asked for, and workspace, of their own sizes, beside q; from a plan as the first time."""
    given = tensors()
    once = lambda: run(*given, AttentionOptions(precision, return_lse=lse))
    wanted = [((1, 200, 2, 64), "float16"), *[((1, 2, 200), "float32")] * lse]
    if precision != "exact":
        shape = (1, 2, 200, 64)
        wanted.append(((layout_workspace(shape, shape, Precision(precision), lse).size,), "uint8"))
    empty = device.runtime.empty
    for _ in range(2):
        before, ways = len(device.kept), len(device.long)
        asked = allocations_of(once, device.runtime)
        assert [one[:2] for one in asked] == wanted == [(t.shape, t.dtype.name) for t in device.kept[before:]]
        assert all(like is given[0] for *_, like in asked) and device.runtime.empty is empty
    assert len(device.long) == ways, "the second call went through Triton"
    assert list(filter(None, next(iter(plans._PLANS.values())).fresh)) == wanted
    given = None
    with pytest.raises(TypeError):
        allocations_of(once, device.runtime)
    assert device.runtime.empty is empty


@pytest.mark.parametrize("backend", ["triton", "hopper"])
def test_a_repeated_call_chooses_anew_what_it_pools(device, backend):
    """All of the choice is launched again, into the call's own workspace and output; heads that keep alike are one launch."""
    options = dict(backend=backend, return_lse=True, pooled=Pooled((0.3, 0.3, 0.5), 10))
    first, variant, _, _ = call(device, *tensors(400, 3), "int8+fp8", **options)
    names = ["key_tiles", "fold_tiles", "quant_v", "quant_qk", "quant_qk", "query_tiles", "score", "list", "list",
             "pooled_part", "attn_fwd"]
    assert [name.rpartition(".")[2] for name, *_ in first] == [f"{name}_kernel" for name in names]
    assert variant.backend == backend
    ways = len(device.long)
    again, *_ = call(device, *tensors(400, 3), "int8+fp8", **options)
    assert again == first and len(device.long) == ways
    call(device, *tensors(400, 3), "int8+fp8", **options | dict(pooled=Pooled((0.3, 0.3, 0.4), 10)))
    assert len(device.long) > ways


def steps(tokens=200, head_dim=64, eps=1e-6):
    """A LayerNorm of Q and one of K, and positions of all tokens but the first ten."""
    norms = [Norm("layer", eps, drawn(head_dim), drawn(head_dim)) for _ in "qk"]
    return Steps(*norms, Rotary(*(drawn(tokens - 10, head_dim, dtype="float32") for _ in "cs"), 10, tokens - 10))


@pytest.mark.parametrize("backend", ["triton", "hopper"])
def test_a_repeated_call_norms_by_its_own_weights(device, backend):
    """Five launches beside attention; the second call's weights and tables are where the first one's were."""
    def fused(given, steps, **more):
        device.log.clear()
        before = len(device.kept)
        run(*given, AttentionOptions("int8+fp8", backend=backend, **more), steps=steps)
        fresh = {f"fresh {number}": t for number, t in enumerate(device.kept[before:])}
        return flat(device.log, dict(zip("qkv", given)) | tensors_of(steps) | fresh)

    first = fused(tensors(), steps())
    assert [name.rpartition(".")[2] for name, *_ in first] == [f"{name}_kernel" for name in (
        "prologue_stats", "fold_stats", "quant_v", "prologue_quant", "attn_fwd")]
    for launched in (first[0], first[3]):
        assert {(name, 0) for name in ("q", "k", "q_weight", "q_bias", "k_weight", "k_bias", "cos", "sin")} <= {
            value for value in launched[3] if isinstance(value, tuple)}
    ways = len(device.long)
    assert fused(tensors(), steps()) == first and len(device.long) == ways
    call(device, *tensors(), "int8+fp8", backend=backend)
    fused(tensors(), steps(eps=1e-5))
    fused(tensors(), steps()._replace(rotary=None))
    assert len(device.long) == ways + 6 + 5 + 5
    assert fused(tensors(), steps(), scale=0.2) != first


def test_a_repeated_call_reads_its_own_pieces(device):
    """Text's and video's projections apart: nothing is joined, and the second call's are read where the first one's were."""
    def fused(text, video):
        device.log.clear()
        before, made = len(device.kept), steps()._replace(rest=Rest(*video))
        run(*text, AttentionOptions("int8+fp8"), steps=made)
        fresh = {f"fresh {number}": t for number, t in enumerate(device.kept[before:])}
        return flat(device.log, dict(zip("qkv", text)) | tensors_of(made) | fresh)

    text, video = (lambda: tensors(30, 1)), (lambda: tensors(170, 1))
    first = fused(text(), video())
    assert [name.rpartition(".")[2] for name, *_ in first] == [f"{name}_kernel" for name in (
        "prologue_stats", "fold_stats", "prologue_values", "prologue_quant", "attn_fwd")]
    assert {(f"{of}_rest", 0) for of in "qkv"} <= {value for value in first[0][3] if isinstance(value, tuple)}
    ways = len(device.long)
    assert fused(text(), video()) == first and len(device.long) == ways
    fused(tensors(31, 1), tensors(169, 1))
    assert len(device.long) == ways + 5


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("backend", ["triton", "hopper"])
def test_the_attention_kernel_gets_what_the_oracle_needs(device, backend, layout):
    """Every pointer, stride, count and factor of the last launch, by name."""
    shapes = dict(q=(2, 200, 4, 64), k=(2, 300, 2, 64), v=(2, 300, 2, 64))
    order = (0, 1, 2, 3) if layout == "NHD" else (0, 2, 1, 3)
    q, k, v = (drawn(*(shape[i] for i in order)) for shape in shapes.values())
    options = AttentionOptions("int8+fp8", layout, is_causal=True, scale=0.3, return_lse=True, backend=backend)
    out, lse, _ = run(q, k, v, options)
    parts = layout_workspace((2, 4, 200, 64), (2, 2, 300, 64), options.precision, True, False).buffers(
        device.kept[-1].data_ptr())
    name, grid, _, values = device.log[-1]
    module = hopper if backend == "hopper" else portable
    got = dict(zip(module.attn_fwd_kernel.arg_names, values))
    at = lambda argument: getattr(argument, "base", argument).data_ptr()
    out_strides = (51200, 64, 256) if layout == "NHD" else (51200, 12800, 64)
    if backend == "hopper":
        descriptors = [(at(got[f"{x}_desc"]), list(got[f"{x}_desc"].shape)) for x in "qkv"]
        assert descriptors == [(at(parts["q_codes"]), [1600, 64]), (at(parts["k_codes"]), [1200, 64]),
                               (at(parts["v_codes"]), [256, 384])]
        pointers = dict(p_o=out, p_lse=lse, p_shift=parts["lse_shift"], p_q_scale=parts["q_scale"], p_k_scale=parts["k_scale"],
                        p_v_scale=parts["v_scale"])
        numbers = dict(heads_q=4, heads_kv=2, q_len=200, kv_len=300, n_work=16, sm_scale=pytest.approx(0.3 * LOG2_E),
                       **dict(zip(("stride_ob", "stride_oh", "stride_on"), out_strides)))
        assert grid == (16, 1, 1) and got["build"].causal and got["build"].lse and got["build"].lse_shift
    else:
        pointers = dict(q=parts["q_codes"], k=parts["k_codes"], v=parts["v_codes"], out=out, lse=lse, q_scale=parts["q_scale"],
                        k_scale=parts["k_scale"], v_scale=parts["v_scale"], lse_shift=parts["lse_shift"])
        numbers = dict(Hq=4, Nq=200, Nk=300, GROUP=2, D=64, CAUSAL=True, LSE=True, SHIFTED=True, BIAS=False, VARLEN=False,
                       q_stride_b=51200, q_stride_h=12800, q_stride_n=64, k_stride_b=38400, k_stride_h=19200, k_stride_n=64,
                       v_stride_b=49152, v_stride_h=24576, v_stride_n=384, qs_stride_b=800, qs_stride_h=200, ks_stride_b=6,
                       ks_stride_h=3, lse_stride_b=800, lse_stride_h=200, sm_factor=pytest.approx(0.3 * LOG2_E),
                       **dict(zip(("out_stride_b", "out_stride_h", "out_stride_n"), out_strides)))
        assert grid[1:] == (4, 2)
    assert {key: at(got[key]) for key in pointers} == {key: value.data_ptr() for key, value in pointers.items()}
    assert {key: got[key] for key in numbers} == numbers


@pytest.mark.parametrize("dtype, product", [("float16", "float16"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")])
def test_a_float32_v_on_a_gpu_is_multiplied_in_a_type_that_holds_its_range(device, dtype, product):
    run(*tensors(dtype=dtype), AttentionOptions("int8+fp16", backend="triton"))
    got = dict(zip(portable.attn_fwd_kernel.arg_names, device.log[-1][3]))
    assert got["P_DTYPE"] == portable.P_DTYPES[product]


PAIR = ["token_stats_kernel", "fold_stats_kernel"]


@pytest.mark.parametrize("precision,statistics,others", [
    ("int8+fp16", 2, 3), ("int8+fp8", 2, 4), ("int4+fp8", 2, 4), (Precision("int8+fp16", smooth_k=False), 0, 3),
    (Precision("int4+fp16", smooth_k=False), 2, 3), ("exact", 0, 1)], ids=str)
def test_the_statistics_of_a_call_are_one_pair_of_launches(device, precision, statistics, others):
    names = [name for name, *_ in call(device, *tensors(), precision, backend="triton")[0]]
    assert [name.rpartition(".")[2] for name in names if "token_stats" in name] == PAIR[:statistics]
    assert len(names) == statistics + others


def test_what_the_launches_depend_on_takes_the_long_way_again(device):
    q, k, v = tensors()
    calls = [lambda: call(device, q, k, v, "int8+fp16"), lambda: call(device, q, k, v, "int8+fp8"),
             lambda: call(device, q, k, v, "int8+fp16", is_causal=True), lambda: call(device, q, k, v, "int8+fp16", scale=0.5),
             lambda: call(device, q, k, v, "int8+fp16", return_lse=True),
             lambda: call(device, q, k, v, "int8+fp16", backend="triton"),
             lambda: call(device, *tensors(tokens=201), "int8+fp16"),
             lambda: call(device, *(t[:, :150] for t in tensors()), "int8+fp16"),
             lambda: call(device, *tensors(dtype="bfloat16"), "int8+fp16"),
             lambda: call(device, *(t.swapaxes(1, 2) for t in tensors(tokens=2, heads=200)), "int8+fp16")]
    for one in calls:
        ways = len(device.long)
        one()
        assert len(device.long) > ways
        ways = len(device.long)
        one()
        assert len(device.long) == ways


def test_one_tensor_twice_replays_the_plan_of_two_with_its_own_address(device, monkeypatch):
    """Buffers know their origin: a plan mixes up no places where q, k and v share memory, in either order of calls."""
    (q, k, v), more = tensors(), dict(backend="triton", return_lse=True)
    for first, second in (((q, k, v), (k, k, v)), ((q, q, q), (v, k, q))):
        plans.clear()
        call(device, *first, "int8+fp8", **more)
        ways = len(device.long)
        replayed, *_ = call(device, *second, "int8+fp8", **more)
        assert len(device.long) == ways
        plans.clear()
        assert call(device, *second, "int8+fp8", **more)[0] == replayed


@pytest.mark.parametrize("backend", ["triton", "hopper"])
def test_a_first_call_is_six_frames_from_its_launch(device, backend):
    """What someone meets who follows a call by eye: attention, run, the engine, the call, the launcher, the launch."""
    import traceback

    import lowbit_video as lv

    stacks = []
    device.log.append = lambda entry: stacks.append([frame.name for frame in traceback.extract_stack()])
    lv.attention(*tensors(tokens=4096), "int8+fp8", backend=backend)
    last = stacks[-1]
    assert last[last.index("attention"):last.index("launch") + 1] == ["attention", "run", "attend", "attend",
                                                                      "launch_attn_fwd", "launch"]


def test_misaligned_tensors_have_plans_of_their_own(device):
    def shifted(by):
        return [drawn(1 * 200 * 2 * 64 + 8)[by:by + 25600].reshape(1, 200, 2, 64) for _ in range(3)]

    call(device, *shifted(0), "int8+fp16", backend="triton")
    ways = len(device.long)
    launches, *_ = call(device, *shifted(1), "int8+fp16", backend="triton")
    assert len(device.long) == 2 * ways
    again, *_ = call(device, *shifted(1), "int8+fp16", backend="triton")
    assert again == launches and len(device.long) == 2 * ways


def test_launches_of_codes_are_repeated_for_tensors_that_are_aligned_alike(device):
    """What travels between GPUs: of the same key, in other memory, on another device."""
    x, other, memory = (drawn(1 * 200 * 2 * 64 + 64) for _ in range(3))

    def once(key, x, memory):
        given = Operand(None, (1, 2, 200, 64), (25600, 64, 128), "fp16")

        def launch(x, memory):
            quant_qk.launch_quant_qk(given._replace(buffer=x), codes_of(given._replace(buffer=x), "int8", memory.at(0, "int8"),
                                                                        memory.at(25600, "float32"), None))

        device.log.clear()
        plans.again(key, device.runtime, (x, memory), launch)
        (name, _, _, arguments), = device.log
        pointers = {a.data_ptr() if hasattr(a, "data_ptr") else a for a in arguments if not isinstance(a, (str, bool, float))}
        assert {x.data_ptr(), memory.data_ptr(), memory.data_ptr() + 25600} <= pointers
        return len(device.long)

    assert [once("rows", x, memory), once("rows", other, memory), once("rows", memory, x)] == [1, 1, 1]
    assert [once("other rows", x, memory), once("other rows", x, memory)] == [2, 2]
    assert [once("rows", x[4:], memory), once("rows", other[4:], memory)] == [3, 3]
    assert [once("rows", x, memory[2:]), once("rows", other, memory[2:])] == [4, 4]
    device.runtime.place = lambda t: "gpu:1"
    assert [once("rows", x, memory), once("rows", other, memory)] == [5, 5]


@pytest.mark.parametrize("precision,spoilt,backend", [
    ("int8+fp16", "address", "triton"), ("int8+fp16", "stride", "triton"), ("int8+fp16", "last stride", "hopper"),
    ("int8+fp16", None, "hopper"), ("int8+fp8", "address", "hopper")])
def test_a_v_that_tma_cannot_read_goes_to_the_portable_kernel(device, precision, spoilt, backend):
    q, k, v = tensors()
    if spoilt == "address":
        v = drawn(v.size + 8)[1:v.size + 1].reshape(v.shape)
    elif spoilt == "stride":
        v = drawn(*v.shape[:3], 68)[..., :64]
    elif spoilt == "last stride":
        v = drawn(*v.shape[:3], 128)[..., ::2]
    assert run(q, k, v, AttentionOptions(precision))[2].backend == backend
    if backend == "triton":
        with pytest.raises(ValueError, match="hopper-int8: V's address or strides are not multiples of 16 bytes"):
            run(q, k, v, AttentionOptions(precision, backend="hopper"))


HOPPER_EXACT = next(variant for variant in VARIANTS if variant.name == "hopper-exact")


@pytest.mark.parametrize("spoilt", ["address", "stride", "last stride", None])
@pytest.mark.parametrize("place", range(3), ids="qkv".__getitem__)
def test_tensors_that_tma_cannot_read_are_refused_by_the_exact_hopper_kernel(device, place, spoilt):
    given = tensors()
    x = given[place]
    given[place] = {"address": drawn(x.size + 8)[1:x.size + 1].reshape(x.shape), "stride": drawn(*x.shape[:3], 68)[..., :64],
                    "last stride": drawn(*x.shape[:3], 128)[..., ::2], None: x}[spoilt]
    options, backend = AttentionOptions("exact", backend="hopper"), "triton"
    if spoilt in ("last stride", None):  # the first is copied
        assert run(*given, options)[2] is HOPPER_EXACT
        backend = "hopper" if HOPPER_EXACT.automatic else "triton"
    else:
        with pytest.raises(ValueError, match="hopper-exact: an address or a stride of Q, K or V is no multiple of 16 bytes"):
            run(*given, options)
    assert run(*given, AttentionOptions("exact"))[2].backend == backend


@pytest.mark.parametrize("scale", [-0.2, np.array([-0.2], np.float32).view(Tensor)], ids=["number", "tensor"])
def test_a_negative_scale_is_refused_by_the_exact_hopper_kernel(device, scale):
    assert run(*tensors(), AttentionOptions("exact", scale=scale))[2].name == "triton-exact"
    with pytest.raises(ValueError, match="hopper-exact: the scale is negative"):
        run(*tensors(), AttentionOptions("exact", scale=scale, backend="hopper"))


@pytest.mark.parametrize("head_dim, keys", [(64, 128), (128, 64)])
def test_the_exact_hopper_kernel_gets_the_callers_own_tensors(device, head_dim, keys):
    """Nothing but one launch: three descriptors of the tensors as they lie, no scales, the scale of the scores."""
    q, k, v = drawn(2, 4, 200, head_dim), drawn(2, 300, 2, head_dim).transpose(0, 2, 1, 3), drawn(2, 2, 300, head_dim)
    out, lse, _ = run(q, k, v, AttentionOptions("exact", "HND", True, 0.3, True, "hopper"))
    (_, grid, _, values), = device.log
    found = dict(zip(hopper.attn_fwd_kernel.arg_names, values))
    for x, name, rows in ((q, "q_desc", 64), (k, "k_desc", keys), (v, "v_desc", keys)):
        assert (found[name].base.data_ptr(), list(found[name].shape)) == (x.data_ptr(), list(x.shape))
        assert [2 * stride for stride in found[name].strides] == list(x.strides)
        assert found[name].block_shape == [1, 1, rows, head_dim]
    assert found["p_o"].data_ptr() == out.data_ptr() and found["p_lse"].data_ptr() == lse.data_ptr()
    assert [found[name] for name in ("p_q_scale", "p_k_scale", "p_v_scale", "p_shift", "p_list")] == [None] * 5
    assert found["sm_scale"] == pytest.approx(0.3 * LOG2_E)
    assert [found[name] for name in ("heads_q", "heads_kv", "q_len", "kv_len", "n_work")] == [4, 2, 200, 300, 16]
    assert grid[0] == 16 and (found["build"].causal, found["build"].lse, found["build"].lse_shift) == (True, True, False)


def test_a_copied_input_and_an_unknown_triton_make_no_plan(device, monkeypatch):
    run(*(drawn(1, 200, 2, 128)[..., ::2] for _ in range(3)), AttentionOptions("int8+fp16"))
    assert not plans._PLANS and not plans.not_repeated()
    monkeypatch.setattr(compiled, "TRITONS", ("2.",))
    for count in (1, 2):
        call(device, *tensors(), "int8+fp16")
        why = plans.not_repeated()
        assert not plans._PLANS and set(why.values()) == {count, 2 * count}
    assert all(f"the launcher of Triton {sys.modules['triton'].__version__} is not known" in reason for reason in why)


def test_the_number_of_plans_is_bounded(monkeypatch):
    monkeypatch.setattr(plans, "MOST_PLANS", 3)
    plans.clear()
    for number in range(5):
        plans.keep((number,), object())
    assert list(plans._PLANS) == [(2,), (3,), (4,)]
    plans.clear()


def test_a_profilers_hook_sees_every_launch(device, monkeypatch):
    import triton

    call(device, *tensors(), "int8+fp16")
    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(print)
    try:
        ways = len(device.long)
        call(device, *tensors(), "int8+fp16")
        assert len(device.long) > ways
    finally:
        hook.remove(print)


def test_a_cpu_call_has_no_plan(framework):
    plans.clear()
    run(*(framework.tensor(t) for t in tensors(tokens=8)), AttentionOptions("int8+fp16"))
    assert not plans._PLANS


def test_variants_that_run_on_a_gpu_are_all_covered():
    assert {v.backend for v in VARIANTS if v.device == "cuda"} == {"triton", "hopper"}


def test_a_repeated_varlen_call_and_its_strided_beginnings(device):
    cu = np.array([0, 0, 150, 150, 200, 200], np.int32).view(Tensor)

    def once(cu_q, cu_k):
        device.log.clear()
        run(*(drawn(200, 2, 64) for _ in range(3)), AttentionOptions("int8+fp8"), Packing(cu_q, cu_k, 150, 150))
        return {a.data_ptr() if hasattr(a, "data_ptr") else a for *_, arguments in device.log for a in arguments
                if hasattr(a, "data_ptr") or isinstance(a, int)}

    with pytest.warns(SlowerThanExactWarning, match="exact attention is faster below 2048 tokens [(]150 given[)]"):
        strided = once(cu[::2], cu[::2])  # a kernel reads them without strides: from a copy
    assert cu.data_ptr() not in strided and not plans._PLANS
    first, other = cu[::2].copy(), cu[::2].copy()
    assert first.data_ptr() in once(first, first)
    ways = len(device.long)
    assert other.data_ptr() in (again := once(other, other)) and first.data_ptr() not in again
    assert len(device.long) == ways


def test_other_longest_sequences_have_plans_of_their_own(device):
    """The grid is made from them; the tensors are alike."""
    cu, ways = np.array([0, 60, 200], np.int32).view(Tensor), []
    for longest in ((140, 140), (150, 140), (140, 150), (140, 140)):
        given = (drawn(200, 2, 64) for _ in range(3))
        run(*given, AttentionOptions("int8+fp8"), Packing(cu, cu, *longest))
        ways.append(len(device.long))
    assert ways[0] < ways[1] < ways[2] == ways[3]


def test_values_are_looked_at_in_every_call_that_asks_for_it(device):
    q, k, v = tensors()
    options = AttentionOptions("int8+fp16", check_finite=True)
    run(q, k, v, options)
    k[0, 5, 1, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="k has 1 NaN"):
        run(q, k, v, options)


def test_every_call_launches_on_the_stream_of_its_time(device):
    for stream in (77, 78, 79):
        device.runtime.stream = lambda t, stream=stream: stream
        launches, *_ = call(device, *tensors(), "int8+fp16")
    assert len(launches) > 0 and {stream for _, _, stream, _ in launches} == {79}


def test_another_device_has_plans_of_its_own(device):
    call(device, *tensors(), "int8+fp16")
    ways = len(device.long)
    device.runtime.signature = lambda t: (t.shape, t.strides, t.dtype, 1)
    call(device, *tensors(), "int8+fp16")
    assert len(device.long) == 2 * ways and len(plans._PLANS) == 2


def test_memory_that_is_aligned_less_takes_the_long_way(device):
    call(device, *tensors(), "int8+fp16", backend="triton")
    ways, aligned = len(device.long), device.runtime.empty

    def misaligned(shape, dtype, like):
        wanted = np.dtype(getattr(ml_dtypes, dtype, dtype))
        return aligned((math.prod(shape) * wanted.itemsize + 8,), "uint8", like)[8:].view(wanted).reshape(shape)

    device.runtime.empty = misaligned
    call(device, *tensors(), "int8+fp16", backend="triton")
    assert len(device.long) == 2 * ways


def test_a_failure_leaves_no_plan_and_no_recording(device, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(hopper, "attn_fwd_kernel", None)
        with pytest.raises(TypeError):
            call(device, *tensors(), "int8+fp16")
    assert not plans._PLANS and launch._STATE.recording is None
    call(device, *tensors(), "int8+fp16")
    assert len(plans._PLANS) == 1

    def no_memory(shape, dtype, like):
        raise MemoryError

    device.runtime.empty = no_memory
    device.log.clear()
    with pytest.raises(MemoryError):
        run(*tensors(), AttentionOptions("int8+fp16"))
    assert not device.log


def test_the_environment_turns_plans_off_at_any_time(device, monkeypatch):
    call(device, *tensors(), "int8+fp16")
    ways = len(device.long)
    monkeypatch.setenv(plans.ENVIRONMENT, "0")
    call(device, *tensors(), "int8+fp16")
    assert len(device.long) == 2 * ways
    plans.clear()
    call(device, *tensors(), "int8+fp16")
    assert not plans._PLANS


def test_threads_repeat_calls_each_with_its_own_tensors(device):
    def one(tokens):
        q, k, v = tensors(tokens=tokens)
        out = run(q, k, v, AttentionOptions("int8+fp8", return_lse=True))[:2]
        return [t.data_ptr() for t in (q, k, v, *out)], (q, k, v, *out)

    with ThreadPoolExecutor(8) as pool:
        for lengths in ([200] * 8, [200, 201] * 20):
            device.log.clear()
            results = list(pool.map(one, lengths))
    used = [p for pointers, _ in results for p in pointers]
    assert len(set(used)) == len(used)
    launches = [arguments for name, _, _, arguments in device.log if name.endswith("hopper.launch.attn_fwd_kernel")]
    written = {getattr(a, "data_ptr", lambda a=a: a)() for arguments in launches for a in arguments
               if hasattr(a, "data_ptr") or isinstance(a, int)}
    assert len(launches) == len(lengths) and {pointers[3] for pointers, _ in results} <= written


def test_threads_may_keep_plans_at_once(monkeypatch):
    monkeypatch.setattr(plans, "MOST_PLANS", 3)
    plans.clear()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: plans.keep((number,), object()), range(4000)))
    assert len(plans._PLANS) == 3
    plans.clear()


def test_a_spy_on_the_launcher_sees_every_first_call(device, monkeypatch):
    """What the GPU tests rely on to tell which kernel ran: no plan of an earlier call stands in once they are cleared."""
    call(device, *tensors(), "int8+fp8")
    seen, real = [], KernelVariant.load
    monkeypatch.setattr(KernelVariant, "load", lambda variant: seen.append(variant.launcher) or real(variant))
    call(device, *tensors(), "int8+fp8")
    assert not seen
    plans.clear()
    for backend in ("triton", "auto"):
        _, variant, *_ = call(device, *tensors(), "int8+fp8", backend=backend)
        assert seen[-1] == variant.launcher
    assert len(seen) == 2
