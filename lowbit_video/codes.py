"""`prequantize()` and `attention_of_codes()`: the two halves of `attention()`, so that codes can travel or wait in between."""
from __future__ import annotations

from typing import Any

from lowbit_video.kernels.exchange.layout import layout_of

from .arguments import shown
from .engine import checks
from .engine import codes as engine
from .engine.codes import AttentionCodes, Codes
from .engine.options import options_of
from .errors import UnsupportedError
from .precision import Precision
from .runtime import detect


def prequantize(q: Any, k: Any, v: Any, precision: str | Precision = "int8+fp16", tensor_layout: str = "NHD",
                scale: float | None = None, return_lse: bool = False, check_finite: bool | None = None) -> AttentionCodes:
    """Codes of q, k and v, all that `attention_of_codes` needs; the originals may be freed.

    q: [B, Nq, H, D]; k, v: [B, Nkv, H, D] Paddle or torch tensors ("NHD"), or [B, H, N, D] ("HND"); as many heads in q as in k,
        D a multiple of 16. They are not changed.
    precision, scale, check_finite: as `attention`; not an exact precision. return_lse: whether an LSE will be asked for.
    Returns AttentionCodes; `nbytes` of them is what they hold: at int8+fp8 3 bytes for 6 of 16-bit tensors, and scales.
    Raises UnsupportedError for what cannot be kept as codes or asks for gradients, and as `attention` does.
    """
    runtime = detect.same_runtime(q=q, k=k, v=v)
    options = options_of(precision, tensor_layout, False, scale, return_lse, "auto", check_finite)
    if tensor_layout == "HND":
        q, k, v = (runtime.permute(x, (0, 2, 1, 3)) for x in (q, k, v))
        options = options_of(precision, "NHD", False, scale, return_lse, "auto", check_finite)
    checks.refuse_gradients(runtime, q, k, v)
    reason = engine.why_no_codes(q, k, v, options, runtime)
    if reason is not None:
        raise UnsupportedError(f"these tensors cannot be kept as codes: {reason}; use attention()")
    checks.check_finite(options, runtime, q=q, k=k, v=v)
    batch, q_len, heads, head_dim = runtime.shape(q)
    options, kind = options.scaled(head_dim), engine.kind_of(q, options, runtime)
    found = engine.statistics(q, k, v, options, runtime)
    layouts = [layout_of(kind, batch, heads, *lengths) for lengths in ((q_len, 0), (0, runtime.shape(k)[1]))]
    q_codes, kv_codes = (Codes(engine.encode((q, k, v), found, layout, options, runtime), layout) for layout in layouts)
    return AttentionCodes(q_codes, kv_codes, engine.v_scale_of(found, options), options, runtime.dtype_name(q))


def attention_of_codes(codes: AttentionCodes, tensor_layout: str = "NHD", is_causal: bool = False, return_lse: bool = False,
                       backend: str = "auto") -> Any:
    """Attention of codes, as `attention` would have computed it of the tensors that `prequantize` was given.

    tensor_layout: of the output, [B, N, H, D] ("NHD") or [B, H, N, D] ("HND"). The rest as `attention`.
    Returns out in the originals' dtype, or (out, lse float32 [B, H, N]); inference only, as codes carry no gradients.
    Raises ValueError for an LSE that the codes were not made for, UnsupportedError where no variant serves them.
    """
    if not isinstance(codes, AttentionCodes):
        raise TypeError(f"codes is {shown(codes)}; give what prequantize() returned")
    options_of(codes.options.precision, tensor_layout, is_causal, None, return_lse, backend, None)  # names what does not exist
    runtime = detect.runtime_of(codes.q.memory)
    out, lse, _ = engine.attend(codes, runtime, is_causal=is_causal, return_lse=return_lse, backend=backend, tokens_first=False)
    if tensor_layout == "HND":
        out = runtime.contiguous(runtime.permute(out, (0, 2, 1, 3)))
    return (out, lse) if return_lse else out
