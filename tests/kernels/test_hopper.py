"""The Hopper kernel without a GPU: it compiles for sm_90a as recorded, and refuses by name what it lacks."""
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("triton", reason="needs Triton, which exists for Linux only")

from lowbit_video.kernels.attention import gluon_shim, reference  # noqa: E402
from lowbit_video.kernels.attention.hopper import launch, softmax  # noqa: E402
from lowbit_video.kernels.buffers import Buffer  # noqa: E402
from lowbit_video.kernels.operands import Listed, Operand, codes_of  # noqa: E402

from offline import Hopper, compiled, ptxas  # noqa: E402
from ptx_in_numpy import run_ptx  # noqa: E402

SHARED_MAX = 227 * 1024  # bytes of shared memory of an sm_90 program
BUILDS = {
    Hopper(64, "fp8", False, "shifted", "float16"): 208,
    Hopper(64, "fp8", True, "shifted", "bfloat16"): 240,
    Hopper(64, "fp16", False, "shifted", "float16"): 32,
    Hopper(64, "fp16", True, "shifted", "bfloat16"): 0,
    Hopper(128, "fp8", True, "shifted", "bfloat16"): 0,
    Hopper(128, "fp16", True, "shifted", "bfloat16"): 0,
    Hopper(64, "fp16", False, "", "float16", "fp16"): 8,
    Hopper(64, "bf16", True, "lse", "bfloat16", "bf16"): 0,
    Hopper(128, "fp16", False, "", "float16", "fp16"): 44,
    Hopper(128, "bf16", True, "lse", "bfloat16", "bf16"): 40,
}
"""Most bytes that ptxas may spill; eval/speed/NOTES.md says where."""


@pytest.mark.parametrize("case", BUILDS, ids=str)
def test_compiles_ahead_of_time_without_serialised_products(case):
    (kernel,) = compiled(case)
    told = ptxas(kernel)
    assert told["warnings"] == [], f"ptxas serialises wgmma: {told}"
    assert told["spilled"] <= BUILDS[case], told
    assert told["shared"] <= SHARED_MAX, told
    ops = " ".join(told["tensor_ops"])
    assert ("IGMMA" in ops) == (case.qk == "int8") and ("E4M3" in ops) == (case.pv == "fp8"), ops
    halves = [op for op in told["tensor_ops"] if op.startswith("HGMMA")]
    assert all((".BF16" in op) == (case.dtype == "bfloat16") for op in halves) and bool(halves) == (case.pv != "fp8"), ops


@pytest.mark.parametrize("line", [1, 3, 8])
def test_line_packs_codes_of_the_exponentials(line):
    count, scale, maximum = 16, np.float32(2.0**-9), np.float32(3.7)
    text = getattr(softmax.line_asm(count, line), "value", softmax.line_asm(count, line))
    x = np.random.default_rng(0).uniform(-9, 8, (4, count)).astype(np.float32)  # logarithms
    x[:, 0], x[0, 1], x[1, 1] = 8.0, 8.0, -np.inf
    registers = {f"${count * (1 + j) + i}": np.float32((x[j, i] + maximum) / scale) for j in range(4) for i in range(count)}
    for i in range(count):
        registers |= {f"${5 * count + i}": scale, f"${6 * count + i}": -maximum,
                      f"${7 * count + i}": np.float32(softmax.LINE_SHIFT.value - maximum)}
    run_ptx(text, registers)
    codes = np.array([[int(registers[f"${i}"]) >> 8 * j & 255 for i in range(count)] for j in range(4)], np.uint8)
    got, wanted = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64), np.exp2(x.astype(np.float64))
    straight = np.arange(count) % 8 < line
    assert (np.abs(got - wanted) <= np.where(straight, 0.105, 0.0626) * wanted + np.where(straight, 2.0**-7, 2.0**-10)).all()
    np.testing.assert_array_equal(got[:, straight], reference.line_probabilities(x[:, straight]))
    assert (got[:, 0] == 256).all() and got[1, 1] == 0  # the row's maximum, and what is masked
    assert text.count("ex2") == 4 * (~straight).sum()


def test_line_needs_hold_and_products_for_row_sums():
    with pytest.raises(ValueError, match="line=2"):
        launch.HopperConfig(128, 3, 3, 160, line=2)
    with pytest.raises(ValueError, match="sum_mma=False"):
        launch.HopperConfig(128, 3, 3, 160, hold=4, line=2, sum_mma=False)


def operands(**changes):
    """q's, k's and v's operands and the other arguments of a call that the kernel takes, some of them changed."""
    float32, shape = Buffer(1 << 20, "float32"), changes.pop("shape", (1, 2, 100, 64))
    x = Operand(Buffer(1 << 20, "float16"), shape, changes.pop("v_strides", (12800, 64, 128)), "fp16")
    q, k = (codes_of(x, "int8", Buffer(1 << 20, "int8"), float32, block) for block in (None, 128))
    k = k._replace(**{name: changes.pop(f"k_{name}") for name in ("format", "block") if f"k_{name}" in changes})
    return (q, k, x._replace(format=changes.pop("pv_format", "fp16")), x), {"sm_scale": 0.125} | changes


def exact_operands(**changes):
    """The same of a call in float16, some of its tensors changed."""
    x = Operand(Buffer(1 << 20, "float16"), (1, 2, 100, 64), (12800, 64, 128), "fp16")
    given = {name: x._replace(**changes.pop(name, {})) for name in "qkv"}
    return (*given.values(), x), {"sm_scale": 0.125} | changes


LISTS = Listed(Buffer(1 << 20, "int32"), Buffer(1 << 20, "int32"), Buffer(1 << 20, "float32"), Buffer(1 << 20, "float32"), 192)


@pytest.mark.parametrize("changes, word", [
    (dict(k=dict(format="bf16")), "formats"), (dict(v=dict(format="bf16")), "P.V format bf16"),
    (dict(v=dict(format="fp8")), "P.V format fp8"), (dict(q=dict(format="fp32"), k=dict(format="fp32")), "formats"),
    (dict(q=dict(shape=(1, 2, 100, 96))), "head dim"), (dict(arch=(10, 0)), "arch"), (dict(sm_scale=-1.0), "negative"),
    (dict(packed=object()), "packed"), (dict(listed=LISTS), "lists of key tiles are not supported with exact"),
    *((({name: dict(strides=(12800, 64, 129))}), f"16-bit {name.upper()} at") for name in "qkv"),
    *((({name: dict(buffer=Buffer((1 << 20) + 8, "float16"))}), f"16-bit {name.upper()} at") for name in "qkv")])
def test_exact_refuses_by_name(changes, word):
    given, named = exact_operands(**changes)
    with pytest.raises(ValueError, match=word):
        launch.launch_attn_fwd(*given, **named)


@pytest.mark.parametrize("changes, word", [
    (dict(k_format="int4"), "formats"), (dict(pv_format="int8"), "P.V"), (dict(k_block=None), "granularity"),
    (dict(shape=(1, 2, 100, 96)), "head dim"), (dict(arch=(8, 0)), "arch"),
    (dict(bias=Buffer(0, "float32")), "smooth_q"), (dict(sm_scale=-1.0), "negative"), (dict(packed=object()), "packed"),
    (dict(v_strides=(12800, 64, 129)), "16 bytes")])
def test_refuses_by_name(changes, word):
    given, named = operands(**changes)
    with pytest.raises(ValueError, match=word):
        launch.launch_attn_fwd(*given, **named)


def test_shim_takes_either_name_of_the_tma_load():
    source = Path(gluon_shim.__file__).read_text()
    line = next(line for line in source.splitlines() if line.strip().startswith("async_load ="))
    for names in (dict(async_load="new"), dict(async_copy_global_to_shared="old")):
        scope = dict(tma=SimpleNamespace(**names))
        exec(line.strip(), scope)
        assert scope["async_load"] == names.get("async_load", "old")


def test_shim_says_what_is_missing(monkeypatch):
    assert gluon_shim.why_not_gluon() is None
    monkeypatch.setattr(gluon_shim, "_MISSING", "cannot import name 'tma'")
    assert "cannot import name 'tma'" in gluon_shim.why_not_gluon()

