"""The Hopper kernel without a GPU: it compiles for sm_90a as recorded, and refuses by name what it lacks."""
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="needs Triton, which exists for Linux only")

from lowbit_video.kernels.attention import gluon_shim, hopper  # noqa: E402
from lowbit_video.kernels.buffers import Buffer  # noqa: E402

SHARED_MAX = 227 * 1024  # bytes of shared memory of an sm_90 program
# (head dim, P.V, dtype, causal) -> most bytes that ptxas may spill; eval/speed/NOTES.md says where
BUILDS = {
    (64, "fp8", "float16", False): 176,
    (64, "fp16", "float16", False): 0,
    (128, "fp8", "bfloat16", True): 0,
    (128, "fp16", "bfloat16", True): 0,
}


def test_compiles_ahead_of_time_without_serialised_products():
    words = [str(int(word) if isinstance(word, bool) else word) for build in BUILDS for word in build]
    script = Path(__file__).with_name("hopper_aot.py")
    run = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    for (head_dim, pv, dtype, causal), line in zip(BUILDS, run.stdout.splitlines(), strict=True):
        told = json.loads(line)
        assert told["warnings"] == [], f"{head_dim} {pv}: ptxas serialises wgmma: {told}"
        assert told["spilled"] <= BUILDS[head_dim, pv, dtype, causal], told
        assert told["shared"] <= SHARED_MAX, told
        ops = " ".join(told["tensor_ops"])
        assert "IGMMA" in ops and ("E4M3" in ops) == (pv == "fp8"), ops
        assert (".BF16" in ops) == (dtype == "bfloat16" and pv == "fp16"), ops


def arguments(**changes):
    f32 = Buffer(1 << 20, "float32")
    given = dict(q_shape=(1, 2, 100, 64), kv_shape=(1, 2, 100, 64), q_format="int8", k_format="int8", pv_format="fp16",
                 out_strides=(12800, 64, 128), v_strides=(12800, 64, 128), q_scale=f32, k_scale=f32, sm_scale=0.125)
    return given | changes


@pytest.mark.parametrize("changes, word", [
    (dict(k_format="int4"), "formats"), (dict(pv_format="int8"), "P.V"), (dict(granularity="token"), "granularity"),
    (dict(q_shape=(1, 2, 100, 96), kv_shape=(1, 2, 100, 96)), "head dim"), (dict(arch=(8, 0)), "arch"),
    (dict(bias=Buffer(0, "float32")), "smooth_q"), (dict(sm_scale=-1.0), "negative"),
    (dict(v_strides=(12800, 64, 129)), "16 bytes")])
def test_refuses_by_name(changes, word):
    int8, half = Buffer(1 << 20, "int8"), Buffer(1 << 20, "float16")
    with pytest.raises(ValueError, match=word):
        hopper.launch_attn_fwd(int8, int8, half, half, **arguments(**changes))


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

