"""The launch of the Hopper kernel: what its arguments are, in memory and by name."""
from __future__ import annotations

from ...buffers import Buffer
from ...formats import BLOCK_K, EXACT_FORMATS, LOG2_E
from ...launch import launch
from ...operands import Listed, Operand, Packed
from ...quant.shapes import ceil_div, v_tokens
from ..gluon_shim import TensorDescriptor, gl
from .build import Build, HopperConfig, config_of
from .kernel import attn_fwd_kernel
from .registers import ROWS


def _swizzled(inner: int, bits: int, rank: int = 2) -> gl.NVMMASharedLayout:
    """Layout of a shared tile whose rows hold `inner` elements, as TMA writes and wgmma reads it."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(128, inner * bits // 8), element_bitwidth=bits, rank=rank)


def _codes_descriptor(codes: Operand, rows: int, columns: int, block: tuple[int, int]) -> TensorDescriptor:
    return TensorDescriptor(codes.buffer, [rows, columns], [columns, 1], list(block), _swizzled(block[1], 8))


def _rows_descriptor(x: Operand, name: str, rows: int) -> TensorDescriptor:
    """The caller's own 16-bit tensor, by its strides, in tiles of so many rows; TMA fills those past the end with zeros."""
    head_dim = x.shape[3]
    if x.buffer.data_ptr() % 16 or any(stride % 8 for stride, length in zip(x.strides, x.shape) if length > 1):
        raise ValueError(f"16-bit {name} at {x.buffer.data_ptr():#x} with strides {x.strides} (batch, head, token): the Hopper "
                         f"kernel takes multiples of 16 bytes; pass a contiguous {name} or backend='triton'")
    # the stride of a dimension of one element is never used, and may be anything
    strides = [stride if length > 1 else head_dim for stride, length in zip(x.strides, x.shape)]
    return TensorDescriptor(x.buffer, list(x.shape), [*strides, 1], [1, 1, rows, head_dim], _swizzled(head_dim, 16, rank=4))


def launch_attn_fwd(q: Operand, k: Operand, v: Operand, out: Operand, *, sm_scale: float, is_causal: bool = False,
                    packed: Packed | None = None, bias: Buffer | None = None, lse: Buffer | None = None,
                    lse_shift: Buffer | None = None, pv_dtype: str | None = None, arch: tuple[int, int] = (9, 0),
                    config: HopperConfig | None = None, listed: Listed | None = None) -> None:
    """out = softmax(q k^T sm_scale) v on sm_90, from codes and scales as the quantisers left them, or exact.

    The arguments are those of the portable `launch_attn_fwd`. q, k: codes of `operands.codes_of`, both "int8" or both "fp8",
    head dim 64 or 128, K's scales per 128 rows; for exact attention the caller's views, "fp16" or "bf16" like v. v: the
    caller's float16 or bfloat16 view, or the codes of `operands.v_codes_of`. Views begin at, and step by, multiples of 16
    bytes. out: any float dtype. lse [B, Hq, Nq] float32, natural log, plus lse_shift if that is given.
    is_causal: key j is visible to query i if j <= i + Nkv - Nq; a row without a key gives 0 and -inf.
    listed: the key tiles that each tile of 64 rows a consumer takes, with their scales; not with is_causal, not exact. out then
    holds attention over the others, and is joined with it.
    sm_scale: not negative (the row maximum is taken before it is multiplied).
    Raises ValueError for what the kernel does not cover.
    """
    refuse(q, k, v, sm_scale=sm_scale, packed=packed, bias=bias, arch=arch)
    batch, q_heads, q_len, head_dim = q.shape
    _, kv_heads, kv_len, _ = k.shape
    config = config or config_of(head_dim, q.format, v.format)
    block_n = config.block_n
    if listed is not None:
        refuse_lists(listed, config, is_causal, q.format)
    if q.format in EXACT_FORMATS:
        q_desc, k_desc = _rows_descriptor(q, "Q", ROWS.value), _rows_descriptor(k, "K", block_n)
    else:
        q_desc = _codes_descriptor(q, batch * q_heads * q_len, head_dim, (ROWS.value, head_dim))
        k_desc = _codes_descriptor(k, batch * kv_heads * kv_len, head_dim, (block_n, head_dim))
    if v.format == "fp8":
        v_desc = _codes_descriptor(v, batch * kv_heads * head_dim, v_tokens(kv_len), (head_dim, block_n))
        v_layout, ones_layout = _swizzled(block_n, 8), _swizzled(block_n, 8)
    else:
        v_desc = _rows_descriptor(v, "V", block_n)
        v_layout, ones_layout = _swizzled(head_dim, 16), _swizzled(block_n, 16)
    n_work = ceil_div(q_len, ROWS.value * config.consumers) * batch * q_heads
    build = Build(**vars(config), head_dim=head_dim, causal=bool(is_causal), lse=lse is not None,
                  lse_shift=lse is not None and lse_shift is not None)
    lists, k_scale = (None,) * 4, k.scale
    if listed is not None:
        lists, k_scale = (listed.tiles, listed.count, listed.part_lse, listed.heavy), listed.scale
    launch(attn_fwd_kernel, (n_work,), q_desc, k_desc, v_desc, out.buffer, lse or q.scale, lse_shift or q.scale, q.scale,
           k_scale, v.scale or q.scale, float(sm_scale * LOG2_E), q_heads, kv_heads, q_len, kv_len, n_work, *out.strides,
           *lists, build=build, V_LAYOUT=v_layout, ONES_LAYOUT=ones_layout, num_warps=4)


def refuse(q: Operand, k: Operand, v: Operand, *, sm_scale: float, packed: Packed | None, bias: Buffer | None,
           arch: tuple[int, int]) -> None:
    """Raises ValueError for what the kernel does not cover."""
    exact = q.format in EXACT_FORMATS
    supported = {"q/k formats": ((q.format, k.format), tuple((name, name) for name in ("int8", "fp8", "fp16", "bf16"))),
                 "P.V format": ("fp16" if v.format == "bf16" and not exact else v.format,
                                (q.format,) if exact else ("fp16", "fp8")),
                 "granularity": ("block" if k.block == BLOCK_K or exact else "token", ("block",)),
                 "head dim": (q.shape[3], (64, 128)), "arch": (tuple(arch), ((9, 0),))}
    for name, (given, known) in supported.items():
        if given not in known:
            raise ValueError(f"{name} {given} is not supported by the Hopper kernel (it has {known}); use backend='triton'")
    if bias is not None:
        raise ValueError("a score bias (smooth_q) is not supported by the Hopper kernel; use backend='triton'")
    if packed is not None:
        raise ValueError("packed sequences are not supported by the Hopper kernel; use backend='triton'")
    if sm_scale < 0:
        raise ValueError(f"sm_scale {sm_scale} is negative; negate q and the scale")


def refuse_lists(listed: Listed, config: HopperConfig, is_causal: bool, q_format: str) -> None:
    """Raises ValueError for lists that the kernel cannot walk as it is built."""
    rows = ROWS.value * config.consumers
    if q_format in EXACT_FORMATS:
        raise ValueError(f"lists of key tiles are not supported with exact Q and K ({q_format}), whose keys have no scales")
    if is_causal:
        raise ValueError("lists of key tiles are not supported with is_causal")
    if listed.scale is None or (listed.query_tile, BLOCK_K) != (rows, config.block_n):
        without = "" if listed.scale else ", without scales"
        raise ValueError(f"lists of {listed.query_tile} query rows and {BLOCK_K} keys{without} are not supported by the Hopper "
                         f"kernel (built for {rows} and {config.block_n}, with scales); use backend='triton'")
