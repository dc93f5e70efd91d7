"""Compile what a launcher would launch, for any arch, with no GPU: Triton gets a driver that only names a target."""
from __future__ import annotations

import contextlib
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import jit
from triton.runtime.cache import get_cache_manager

from lowbit_video.kernels.attention import portable
from lowbit_video.kernels.attention.hopper import launch as hopper
from lowbit_video.kernels.buffers import Buffer
from lowbit_video.kernels.exchange.combine_stats import launch_combine_stats
from lowbit_video.kernels.exchange.copy_parts import launch_copy_parts, table_of
from lowbit_video.kernels.exchange.dequant_rows import launch_dequant_rows
from lowbit_video.kernels.exchange.layout import Copy
from lowbit_video.kernels.exchange.merge import launch_merge
from lowbit_video.kernels.formats import BLOCK_K, FORMAT_OF_DTYPE, QK_FORMATS, scale_block
from lowbit_video.kernels.operands import Listed, Operand, Packed, Sequences, codes_of, v_codes_of
from lowbit_video.kernels.pooled.choose import launch_lists, launch_scores
from lowbit_video.kernels.pooled.part import launch_pooled_part
from lowbit_video.kernels.pooled.tile_stats import launch_key_tiles, launch_query_tiles
from lowbit_video.kernels.pooled.tiles import query_tile
from lowbit_video.kernels.prologue.apart import launch_prologue_apart
from lowbit_video.kernels.prologue.quant import launch_prologue_quant
from lowbit_video.kernels.prologue.stats import launch_prologue_stats
from lowbit_video.kernels.prologue.steps import Norm, Rest, Rotary, Steps
from lowbit_video.kernels.prologue.values import launch_prologue_values
from lowbit_video.kernels.quant.quant_qk import launch_quant_qk
from lowbit_video.kernels.quant.quant_v import launch_quant_v
from lowbit_video.kernels.quant.token_stats import launch_stats
from lowbit_video.kernels.shipped.offline import offline

EXACT = ("fp16", "bf16", "fp32")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@contextlib.contextmanager
def compiling(arch: tuple[int, int]) -> Iterator[list]:
    """Inside, launches compile for `arch` and launch nothing; yields the list that the compiled kernels go to."""
    kernels, run = [], jit.JITFunction.run

    def compile_only(self, *args, grid, warmup=False, **options):
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))
        return kernels[-1]

    jit.JITFunction.run = compile_only
    try:
        with offline(arch):
            yield kernels
    finally:
        jit.JITFunction.run = run


def buffer(dtype: str) -> Buffer:
    """Memory that nothing will touch, well aligned."""
    return Buffer(1 << 30, dtype)


def packed() -> Packed:
    return Packed(*[Sequences(buffer("int32"), 9000)] * 2)


def resources(kernel: Any) -> dict[str, int]:
    """Registers per thread, stack (where spills go) and shared memory in bytes, as the assembler reports them."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = os.path.join(folder, "kernel.cubin")
        Path(cubin).write_bytes(kernel.asm["cubin"])
        report = subprocess.run([TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED):(\d+)", report)}
    return dict(registers=found["REG"], stack=found["STACK"], shared=kernel.metadata.shared)


class Attention(NamedTuple):
    """One build of the portable attention kernel; full: causal, packed sequences and LSE too. No build depends on tokens."""

    arch: tuple[int, int]
    q: str
    k: str
    pv: str
    head_dim: int
    dtype: str = "float16"
    granularity: str = "block"
    smooth_q: bool = False
    full: bool = False
    tokens: int = 17776
    listed: bool = False

    def __str__(self) -> str:
        formats = f"{self.q if self.q == self.k else f'{self.q}/{self.k}'}+{self.pv}"
        if self.q in EXACT:
            formats = self.q
        return f"{sm(self.arch)} {formats} D{self.head_dim} {self.dtype}{' full' if self.full else ''}{' listed' * self.listed}"


class Quantisers(NamedTuple):
    """The builds of the quantisers for K and V of one head dim, every format that an arch has, by its usual scales."""

    arch: tuple[int, int]
    head_dim: int = 128
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"{sm(self.arch)} quantisers D{self.head_dim} {self.dtype}"


class Exchange(NamedTuple):
    """The builds of the kernels that cut, join and merge what several GPUs send each other; results in `dtype`."""

    arch: tuple[int, int]
    head_dim: int = 64
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"{sm(self.arch)} exchange D{self.head_dim} {self.dtype}"


class Pooling(NamedTuple):
    """The builds of the kernels of pooled attention beside attention itself, for tensors of one head dim."""

    arch: tuple[int, int]
    head_dim: int = 64
    dtype: str = "float16"
    tokens: int = 17776

    def __str__(self) -> str:
        return f"{sm(self.arch)} pooling D{self.head_dim} {self.dtype}"


class Prologue(NamedTuple):
    """The builds of the fused prologue for tensors of one head dim, LayerNorm or RMSNorm, with rotary positions or without;
    pieces: of text's and video's projections apart."""

    arch: tuple[int, int]
    head_dim: int
    dtype: str
    norm: str
    rotary: bool
    format: str = "int8"
    pieces: bool = False

    def __str__(self) -> str:
        return (f"{sm(self.arch)} prologue D{self.head_dim} {self.dtype} {self.norm}{' rotary' * self.rotary} {self.format}"
                f"{' in two pieces' * self.pieces}")


class Hopper(NamedTuple):
    """One build of the Hopper kernel; lse: none, "lse", or "shifted" by what K smoothing took."""

    head_dim: int
    pv: str
    causal: bool = False
    lse: str = ""
    dtype: str = "float16"
    qk: str = "int8"
    arch: tuple[int, int] = (9, 0)
    listed: bool = False

    def __str__(self) -> str:
        return (f"hopper {self.qk}+{self.pv} D{self.head_dim} {self.dtype}{' causal' * self.causal}{f' {self.lse}'.rstrip()}"
                f"{' listed' * self.listed}")


class Built(NamedTuple):
    """What the assembler reports of one kernel, the tensor-core instructions of its PTX, and the PTX's SHA-256."""

    name: str
    registers: int
    stack: int
    shared: int
    mma: tuple[str, ...]
    wide_loads: bool
    ptx: str


def lists(head_dim: int) -> Listed:
    """Lists of key tiles, and what those that are not listed came to."""
    return Listed(buffer("int32"), buffer("int32"), buffer("float32"), buffer("float32"), query_tile(head_dim), 2)


def sm(arch: tuple[int, int]) -> str:
    return f"sm_{arch[0]}{arch[1]}"


def strides(shape: tuple[int, int, int, int]) -> tuple[int, int, int]:
    """Of batch, head and token, as [B, N, H, D] tensors have them."""
    _, heads, tokens, head_dim = shape
    return (heads * tokens * head_dim, head_dim, heads * head_dim)


def operand(shape: tuple[int, int, int, int], dtype: str) -> Operand:
    """A tensor of [B, N, H, D] memory as launchers take it."""
    return Operand(buffer(dtype), shape, strides(shape), FORMAT_OF_DTYPE[dtype])


def _launch_attention(case: Attention) -> None:
    """2 x 12 heads, 4 of keys, over odd lengths, with the arguments of the public API."""
    exact, full = case.q in EXACT, case.full
    q, k, v = (operand((2, heads, case.tokens, case.head_dim), case.dtype) for heads in (12, 4, 4))
    out, given = q, lambda wanted: buffer("float32") if wanted else None
    if exact:
        q, k, v = q._replace(format=case.q), k._replace(format=case.k), v._replace(format=case.pv)
    else:
        q = codes_of(q, case.q, buffer("int8"), buffer("float32"), None, full)
        k = codes_of(k, case.k, buffer("int8"), buffer("float32"), scale_block("k", case.granularity), full)
        v = v_codes_of(v, buffer("int8"), buffer("float32"), full) if case.pv == "fp8" else v
    portable.launch_attn_fwd(
        q, k, v, out, bias=given(case.smooth_q), sm_scale=0.1, arch=case.arch, is_causal=full, lse=given(full),
        lse_shift=given(full), pv_dtype="bfloat16" if case.dtype == "float32" and not exact else None,
        packed=packed() if full else None, listed=lists(case.head_dim) if case.listed else None)


def _launch_quantisers(case: Quantisers) -> None:
    x, float32 = operand((2, 4, 17776, case.head_dim), case.dtype), buffer("float32")
    codes = lambda format, block, packed=False: codes_of(x, format, buffer("uint8"), float32, block, packed)
    together = packed()
    for sequences in (None, together):
        launch_stats(float32, q=x, q_mean=float32, k=x, k_mean=float32, v=x, v_scale=float32, packed=sequences)
    launch_quant_qk(x, codes("int8", 128, True), together.k, mean=float32)
    for format in QK_FORMATS:
        if format != "fp8" or case.arch >= (8, 9):
            for block in {"int8": (128, None), "fp8": (128,)}.get(format, (None,)):
                launch_quant_qk(x, codes(format, block), mean=float32, bias=float32, q_mean=float32, group=3)
    if case.arch >= (8, 9):
        for sequences in (None, together.k):
            launch_quant_v(x, v_codes_of(x, buffer("uint8"), float32, sequences is not None), sequences)


def _launch_exchange(case: Exchange) -> None:
    x, float32, int32 = operand((2, 15, 8960, case.head_dim), case.dtype), buffer("float32"), buffer("int32")
    launch_combine_stats(float32, float32, float32, n=2 * 30 * case.head_dim, shares=2, means=1, statistics=2)
    row = 64 * case.head_dim
    for count in (row, row + 4):  # copied by 16 bytes, and by 4
        rows = table_of([Copy(0, 70 * row, 0, row, 0, 70 * row, 0, row, 70, row), Copy(0, 0, 0, 0, 0, 0, 0, 0, 1, count, True)])
        launch_copy_parts(int32, int32, int32, buffer("int64"), rows, batch=2, heads=15)
    launch_dequant_rows(codes_of(x, "int8", buffer("int8"), float32, None)._replace(scale_strides=(15 * 8960, 8960)), x)
    for tokens_first in (True, False):
        for result in ("float32", case.dtype):
            launch_merge(float32, float32, x.buffer, float32, buffer(result), shape=x.shape, tokens_first=tokens_first)


def _launch_hopper(case: Hopper) -> None:
    x, float32 = operand((2, 6, 1000, case.head_dim), case.dtype), buffer("float32")
    codes = (x, x)
    if case.qk not in EXACT:
        codes = codes_of(x, case.qk, buffer("int8"), float32, None), codes_of(x, case.qk, buffer("int8"), float32, BLOCK_K)
    hopper.launch_attn_fwd(
        *codes, v_codes_of(x, buffer("int8"), float32) if case.pv == "fp8" else x, x, sm_scale=0.1, is_causal=case.causal,
        lse=float32 if case.lse else None, lse_shift=float32 if case.lse == "shifted" else None,
        listed=lists(case.head_dim) if case.listed else None)


def _launch_pooling(case: Pooling) -> None:
    x, float32, int32 = operand((2, 4, case.tokens, case.head_dim), case.dtype), buffer("float32"), buffer("int32")
    shapes = dict(q_shape=x.shape, kv_shape=x.shape)
    launch_key_tiles(x, x, means=float32, keys=x.buffer, k_var=float32, values=x.buffer, v_spread=float32, k_mean=float32,
                     v_absmax=float32, v_scale=float32)
    launch_query_tiles(x, means=float32, squares=float32)
    launch_scores(q_means=float32, q_squares=float32, keys=x.buffer, k_var=float32, v_spread=float32, scores=float32, **shapes,
                  sm_scale=0.1)
    launch_lists(scores=float32, k_scale=float32, tiles=int32, scale=float32, count=int32, **shapes, keep=[0.3] * 4, always=226)
    launch_pooled_part(x, x, keys=x.buffer, values=x.buffer, bias=float32, part_lse=float32, kv_shape=x.shape,
                       sm_scale=0.1)


def _launch_prologue(case: Prologue) -> None:
    """INT4 with all that smoothing asks: means of Q and K, and both corrections."""
    x, float32 = operand((2, 30, 17776, case.head_dim), case.dtype), buffer("float32")
    norm = Norm(case.norm, 1e-6, x.buffer, x.buffer if case.norm == "layer" else None, case.norm == "rms")
    video = operand((2, 30, 17550, case.head_dim), case.dtype)
    steps = Steps(norm, norm, Rotary(float32, float32, 226, 17550) if case.rotary else None,
                  Rest(video, video, video) if case.pieces else None)
    whole = case.format == "int4"
    codes = [codes_of(x, case.format, buffer("uint8"), float32, block)
             for block in (None, scale_block("k", "token" if whole else "block"))]
    given = lambda: float32 if whole else None
    launch_prologue_stats(x, x, x, steps, float32, q_mean=given(), k_mean=float32, v_scale=float32)
    launch_prologue_quant(x, x, *codes, steps, q_mean=given(), k_mean=float32, lse_shift=given(), score_bias=given())
    if case.pieces:
        launch_prologue_values(x, v_codes_of(x, buffer("uint8"), float32), steps)
    else:
        launch_prologue_apart(x, x, x, x, steps)


LAUNCH = {Attention: _launch_attention, Quantisers: _launch_quantisers, Exchange: _launch_exchange, Hopper: _launch_hopper,
          Pooling: _launch_pooling, Prologue: _launch_prologue}
"""How a case is launched."""


def code_of(ptx: str) -> str:
    """PTX without what only says where it comes from: debug sections, lines, their labels, and comments."""
    code = re.split(r"^\s*\.(?:file|section)\b", ptx, maxsplit=1, flags=re.MULTILINE)[0]
    lines = (line.partition("//")[0].strip() for line in code.splitlines())
    return "\n".join(line for line in lines if line and not re.match(r"\.loc\b|\$L__(?:tmp|func_)", line))


def compiled(case: Attention | Quantisers | Exchange | Hopper) -> list[Any]:
    """The kernels that a case launches, in their order."""
    with compiling(case.arch) as kernels:
        LAUNCH[type(case)](case)
    return kernels


def assembled(ptx: str) -> tuple[str, str]:
    """What ptxas says of PTX for sm_90a, and the SASS; kept in Triton's cache, beside what Triton compiled."""
    tool = get_ptxas(90)  # Triton 3.9 has one for each age
    cache = get_cache_manager(hashlib.sha256(f"{triton.__version__} {tool.version} {ptx}".encode()).hexdigest())
    kept = [cache.get_file(name) for name in ("ptxas.log", "sass")]
    if all(kept):
        log, sass = (Path(path).read_text() for path in kept)
        return log, sass
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "k.ptx"), Path(folder, "k.cubin")
        source.write_text(ptx)
        run = lambda tool, *words: subprocess.run([TOOLS / tool, *words], capture_output=True, text=True, check=True)
        log = run(tool.path, "-v", "--gpu-name=sm_90a", source, "-o", cubin).stderr
        sass = run("nvdisasm", "-c", cubin).stdout
    for name, text in (("ptxas.log", log), ("sass", sass)):
        cache.put(text, name, binary=False)
    return log, sass


def ptxas(kernel: Any) -> dict[str, Any]:
    """Of an sm_90a kernel: spilled and shared bytes, warnings about serialised wgmma, SASS opcodes of the tensor cores."""
    log, sass = assembled(kernel.asm["ptx"])
    return dict(spilled=int(re.search(r"(\d+) bytes spill stores", log)[1]), shared=kernel.metadata.shared,
                warnings=sorted(set(re.findall(r"C75\d\d", log))),
                tensor_ops=sorted(set(re.findall(r"\b[HIQ]GMMA\.\S+", sass))))


def build(case: Attention | Quantisers | Exchange | Hopper) -> list[Built]:
    """What is recorded of a case's kernels; runs in any process, so that several can share the work."""
    found = []
    for kernel in compiled(case):
        ptx = kernel.asm["ptx"]
        mma = sorted(set(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\.[\w.:]+", ptx)))
        found.append(Built(kernel.metadata.name, **resources(kernel), mma=tuple(mma), wide_loads="v4.b32" in ptx,
                           ptx=hashlib.sha256(code_of(ptx).encode()).hexdigest()))
    return found
