"""A kernel's hash moves with what the kernel reads, and with nothing else."""
import shutil

import pytest

from lowbit_video.kernels.shipped import source
from lowbit_video.kernels.shipped.store import manifest

HOPPER, MERGE = "attention.hopper.kernel:attn_fwd_kernel", "exchange.merge:merge_kernel"
QUANT = "quant.quant_qk:quant_qk_kernel"


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the kernels' sources; `copy(file, old, new)` changes one text in it and gives the kernels whose hash moved."""
    root = tmp_path / "kernels"
    shutil.copytree(source.ROOT, root, ignore=shutil.ignore_patterns("*.zip", "__pycache__"))
    monkeypatch.setattr(source, "ROOT", root)

    def change(file, old, new):
        text = (root / file).read_text()
        assert text.count(old) == 1, (file, old)
        before = {name: source.digest(name) for name in (HOPPER, MERGE, QUANT)}
        (root / file).write_text(text.replace(old, new))
        source._module.cache_clear()
        return {name for name, digest in before.items() if source.digest(name) != digest}

    source._module.cache_clear()
    yield change
    source._module.cache_clear()


@pytest.mark.parametrize(("file", "old", "new", "moved"), [
    ("formats.py", "P_SHIFT = 8.0", "P_SHIFT = 7.0", {HOPPER}),
    ("formats.py", "INT2_STEP = 0.498", "INT2_STEP = 0.5", {QUANT}),
    ("formats.py", "BLOCK_K = 128", "BLOCK_K = 64", {HOPPER}),
    ("fp8.py", "float(2**20 + 1)", "float(2**19 + 1)", {QUANT}),
    ("attention/hopper/registers.py", "mov.b32 s, 0;", "mov.b32 s, 1;", {HOPPER}),
    ("attention/hopper/softmax.py", "LAZY_RISE = gl.constexpr(8.0)", "LAZY_RISE = gl.constexpr(4.0)", {HOPPER}),
    ("exchange/merge.py", "b_top == float", "b_top != float", {MERGE}),
    ("exchange/merge.py", 'do_not_specialize=["H", "N",', 'do_not_specialize=["N",', {MERGE}),
    # what says nothing to a compiler, and what another kernel or only a launcher reads
    ("exchange/merge.py", '    """ROWS rows of result: out and part', '    """Some rows of result: out and part', set()),
    ("attention/hopper/kernel.py", "# the bits of 1.0 in e4m3", "# 1.0 in e4m3", set()),
    ("attention/hopper/kernel.py", "    o_k = i_kv * kv_len", "    o_k = i_kv * kv_len  # in rows", set()),
    ("quant/quant_qk.py", "TOKEN_ROWS = 64", "TOKEN_ROWS = 32", set()),
    ("quant/quant_v.py", "i_t * BLOCK < n", "i_t * BLOCK <= n", set())])
def test_hash(copy, file, old, new, moved):
    assert copy(file, old, new) == moved


def test_the_closure_reaches_what_other_files_define():
    names = set(source.closure(HOPPER))
    assert {"formats:P_SHIFT", "attention/hopper/registers:_skip_asm", "attention/hopper/softmax:line_asm"} <= names
    assert not [name for name in names if "launch" in name or "gluon_shim" in name]
    assert {name.partition(":")[0] for name in source.closure(MERGE)} == {"exchange/merge"}


def test_shipped_kernels_are_of_these_sources():
    said = manifest()["sources"]
    assert said == {name: source.digest(name) for name in said}, "sources and shipped kernels part: make shipped"
