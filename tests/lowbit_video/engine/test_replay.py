"""A repeated call launches what the first one did, with its own addresses; Triton and the GPU are played by recorders."""
import contextlib
import math
import types
from concurrent.futures import ThreadPoolExecutor

import pytest

from lowbit_video.engine import replay as plans
from lowbit_video.engine.options import AttentionOptions
from lowbit_video.engine.packing import Packing
from lowbit_video.engine.run import run
from lowbit_video.errors import NonFiniteError, SlowerThanExactWarning
from lowbit_video.kernels import launch
from lowbit_video.kernels.variants import VARIANTS, KernelVariant
from lowbit_video.precision import Precision
from lowbit_video.runtime import detect

torch = pytest.importorskip("torch", reason="the tensors of these tests are PyTorch's")
pytest.importorskip("triton", reason="the launchers need Triton")
pytestmark = pytest.mark.torch


class Log(list):
    """A list whose `append` may be replaced."""


class Compiled:
    """A compiled kernel that notes its launches: (name, grid, stream, arguments)."""

    function, packed_metadata = 1234, (4, 1, 0)

    def __init__(self, name, log):
        self.name, self.log = name, log

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter_hook, exit_hook, *arguments):
        assert function == self.function and metadata is self.packed_metadata
        assert enter_hook is exit_hook is launch_metadata is None
        self.log.append((self.name, (x, y, z), stream, arguments))


class Kernel:
    """Stands for a jitted kernel; the long way through Triton notes its launch as the short one does."""

    def __init__(self, kernel, name, log, long):
        self.arg_names, self.name, self.log, self.long = kernel.arg_names, name, log, long

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            rest = [constants[name] for name in self.arg_names[len(arguments):]]
            self.long.append(self.name)
            self.log.append((self.name, (*grid, 1, 1)[:3], 77, (*arguments, *rest)))
            return Compiled(self.name, self.log)

        return run


@pytest.fixture
def device(monkeypatch):
    """A runtime that takes CPU tensors for an H200's; log: every launch, long: those that went through Triton."""
    from triton.runtime.driver import driver

    from lowbit_video.kernels.attention import portable
    from lowbit_video.kernels.attention.hopper import launch as hopper
    from lowbit_video.kernels.quant import quant_qk, quant_v, token_stats
    from lowbit_video.runtime import torch_runtime

    log, long, kept = Log(), [], []
    for module, name in ((hopper, "attn_fwd_kernel"), (portable, "attn_fwd_kernel"), (quant_qk, "quant_qk_kernel"),
                         (quant_v, "quant_v_kernel"), (token_stats, "token_stats_kernel"), (token_stats, "fold_stats_kernel")):
        monkeypatch.setattr(module, name, Kernel(getattr(module, name), f"{module.__name__}.{name}", log, long))
    monkeypatch.setattr(driver, "_active", types.SimpleNamespace(get_current_device=lambda: 0), raising=False)

    def empty(shape, dtype, like):
        kept.append(torch_runtime.empty(shape, dtype, like))  # kept, so that no address comes twice
        return kept[-1]

    played = dict(is_cpu=lambda t: False, arch=lambda t: (9, 0), stream=lambda t: 77, empty=empty,
                  launch_guard=lambda t: contextlib.nullcontext(),
                  signature=lambda t: (t.shape, t.stride(), t.dtype, 0))
    runtime = types.SimpleNamespace(**{**vars(torch_runtime), **played})
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
        if not isinstance(value, int) or value < 2**32:
            return value
        return next((name, value - t.data_ptr()) for name, t in named.items()
                    if t.data_ptr() <= value < t.data_ptr() + max(1, t.nbytes))

    return [(name, grid, stream, [one(value) for value in arguments]) for name, grid, stream, arguments in log]


def tensors(tokens=200, heads=2, head_dim=64):
    return [torch.randn(1, tokens, heads, head_dim).half() for _ in range(3)]


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
         if backend == "triton" or precision in ("int8+fp16", "int8+fp8", "fp8+fp8")]


@pytest.mark.parametrize("precision,backend,lse", CASES)
def test_a_repeated_call_launches_the_same_on_its_own_tensors(device, precision, backend, lse):
    first, variant, out, _ = call(device, *tensors(), precision, backend=backend, return_lse=lse)
    ways = len(device.long)
    assert ways == len(first) > 0 and variant.backend == backend
    again, same, out_2, lse_2 = call(device, *tensors(), precision, backend=backend, return_lse=lse)
    assert again == first and len(device.long) == ways, "the second call went through Triton"
    assert same is variant and out_2.shape == out.shape and out_2.dtype == out.dtype and out_2.data_ptr() != out.data_ptr()
    assert (lse_2 is not None) == lse


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
             lambda: call(device, *(t.bfloat16() for t in tensors()), "int8+fp16"),
             lambda: call(device, *(t.transpose(1, 2) for t in tensors(tokens=2, heads=200)), "int8+fp16")]
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
        return [torch.randn(1 * 200 * 2 * 64 + 8).half()[by:by + 25600].view(1, 200, 2, 64) for _ in range(3)]

    call(device, *shifted(0), "int8+fp16", backend="triton")
    ways = len(device.long)
    launches, *_ = call(device, *shifted(1), "int8+fp16", backend="triton")
    assert len(device.long) == 2 * ways
    again, *_ = call(device, *shifted(1), "int8+fp16", backend="triton")
    assert again == launches and len(device.long) == 2 * ways


@pytest.mark.parametrize("precision,spoilt,backend", [
    ("int8+fp16", "address", "triton"), ("int8+fp16", "stride", "triton"), ("int8+fp16", "last stride", "hopper"),
    ("int8+fp16", None, "hopper"), ("int8+fp8", "address", "hopper")])
def test_a_v_that_tma_cannot_read_goes_to_the_portable_kernel(device, precision, spoilt, backend):
    q, k, v = tensors()
    if spoilt == "address":
        v = torch.randn(v.numel() + 8).half()[1:v.numel() + 1].view(v.shape)
    elif spoilt == "stride":
        v = torch.randn(*v.shape[:3], 68).half()[..., :64]
    elif spoilt == "last stride":
        v = torch.randn(*v.shape[:3], 128).half()[..., ::2]
    assert run(q, k, v, AttentionOptions(precision))[2].backend == backend
    if backend == "triton":
        with pytest.raises(ValueError, match="hopper-int8: V's address or strides are not multiples of 16 bytes"):
            run(q, k, v, AttentionOptions(precision, backend="hopper"))


def test_a_copied_input_and_an_unknown_triton_make_no_plan(device, monkeypatch):
    run(*(torch.randn(1, 200, 2, 128).half()[..., ::2] for _ in range(3)), AttentionOptions("int8+fp16"))
    monkeypatch.setattr(launch, "LAUNCHER_VERSIONS", ("2.",))
    call(device, *tensors(), "int8+fp16")
    assert not plans._PLANS


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


def test_a_cpu_call_has_no_plan():
    plans.clear()
    run(*tensors(tokens=8), AttentionOptions("int8+fp16"))
    assert not plans._PLANS


def test_variants_that_run_on_a_gpu_are_all_covered():
    assert {v.backend for v in VARIANTS if v.device == "cuda"} == {"triton", "hopper"}


def test_a_repeated_varlen_call_and_its_strided_beginnings(device):
    cu = torch.tensor([0, 0, 150, 150, 200, 200], dtype=torch.int32)

    def once(cu_q, cu_k):
        device.log.clear()
        run(*(torch.randn(200, 2, 64).half() for _ in range(3)), AttentionOptions("int8+fp8"), Packing(cu_q, cu_k, 150, 150))
        return {a.data_ptr() if hasattr(a, "data_ptr") else a for *_, arguments in device.log for a in arguments
                if hasattr(a, "data_ptr") or isinstance(a, int)}

    with pytest.warns(SlowerThanExactWarning, match="exact attention is faster below 2048 tokens [(]150 given[)]"):
        strided = once(cu[::2], cu[::2])  # a kernel reads them without strides: from a copy
    assert cu.data_ptr() not in strided and not plans._PLANS
    first, other = cu[::2].contiguous(), cu[::2].clone()
    assert first.data_ptr() in once(first, first)
    ways = len(device.long)
    assert other.data_ptr() in (again := once(other, other)) and first.data_ptr() not in again
    assert len(device.long) == ways


def test_other_longest_sequences_have_plans_of_their_own(device):
    """The grid is made from them; the tensors are alike."""
    cu, ways = torch.tensor([0, 60, 200], dtype=torch.int32), []
    for longest in ((140, 140), (150, 140), (140, 150), (140, 140)):
        given = (torch.randn(200, 2, 64).half() for _ in range(3))
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
    device.runtime.signature = lambda t: (t.shape, t.stride(), t.dtype, 1)
    call(device, *tensors(), "int8+fp16")
    assert len(device.long) == 2 * ways and len(plans._PLANS) == 2


def test_memory_that_is_aligned_less_takes_the_long_way(device):
    call(device, *tensors(), "int8+fp16", backend="triton")
    ways, aligned = len(device.long), device.runtime.empty

    def misaligned(shape, dtype, like):
        elements, size = math.prod(shape), getattr(torch, dtype).itemsize
        return aligned((elements * size + 8,), "uint8", like)[8:].view(getattr(torch, dtype)).view(tuple(shape))

    device.runtime.empty = misaligned
    call(device, *tensors(), "int8+fp16", backend="triton")
    assert len(device.long) == 2 * ways


def test_a_failure_leaves_no_plan_and_no_recording(device, monkeypatch):
    from lowbit_video.kernels.attention.hopper import launch as hopper

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
