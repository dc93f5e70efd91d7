"""A call of `attention()` or `attention_varlen()` as one operator of Paddle's static graphs, its choices in the operator's key.

What `torch_ops.py` is for torch.compile. A processor's attention has an operator of its own (`slots.py`), which
runs whatever processor the module has then.
"""
from __future__ import annotations

import ast
from collections.abc import Callable

import paddle

from ..api import run
from ..precision import Precision
from ..runtime import cuda_driver
from ..varlen import run_varlen
from .slots import like_query, remember

Pair = tuple[paddle.Tensor, paddle.Tensor | None]
"""out, and lse where it is wanted."""


def _chosen(q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, key: str) -> Pair:
    spec, granularity, smooth_k, smooth_q, layout, is_causal, scale, return_lse, backend, check_finite = ast.literal_eval(key)
    return _remembering(lambda: run(
        q, k, v, Precision(spec, granularity=granularity, smooth_k=smooth_k, smooth_q=smooth_q), tensor_layout=layout,
        is_causal=is_causal, scale=scale, return_lse=return_lse, backend=backend, check_finite=check_finite))


def _chosen_varlen(q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, cu_seqlens_q: paddle.Tensor,
                   cu_seqlens_k: paddle.Tensor, key: str) -> Pair:
    (spec, granularity, smooth_k, smooth_q, max_seqlen_q, max_seqlen_k, is_causal, scale, return_lse, backend,
     check_finite) = ast.literal_eval(key)
    return _remembering(lambda: run_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        Precision(spec, granularity=granularity, smooth_k=smooth_k, smooth_q=smooth_q), is_causal=is_causal, scale=scale,
        return_lse=return_lse, backend=backend, check_finite=check_finite))


def _remembering(call: Callable[[], tuple]) -> Pair:
    try:
        out, lse, _ = call()
    except BaseException as error:
        remember(error)
        raise
    return out.contiguous(), None if lse is None else lse.contiguous()


def _like_query_and_lse(q, k, v, key):
    tokens, heads = (1, 2) if ast.literal_eval(key)[4] == "NHD" else (2, 1)
    lse = paddle.static.MetaTensor(shape=[q.shape[0], q.shape[heads], q.shape[tokens]], dtype=paddle.float32)
    return paddle.static.MetaTensor(shape=q.shape, dtype=q.dtype), lse


def _like_query_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, key):
    return like_query(q, k, v, key)


def _like_query_and_lse_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, key):
    return like_query(q, k, v, key), paddle.static.MetaTensor(shape=[q.shape[1], q.shape[0]], dtype=paddle.float32)


@paddle.static.register_op(name="lowbit_attention_call", infer_meta=like_query, input_names=["q", "k", "v"],
                           output_names=["out"])
def call_op(q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, key: str) -> paddle.Tensor:
    """`attention()` with the choices that `key` holds."""
    return _chosen(q, k, v, key)[0]


@paddle.static.register_op(name="lowbit_attention_call_lse", infer_meta=_like_query_and_lse, input_names=["q", "k", "v"],
                           output_names=["out", "lse"])
def call_lse_op(q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, key: str) -> tuple[paddle.Tensor, paddle.Tensor]:
    """The same with the log-sum-exp."""
    return _chosen(q, k, v, key)


VARLEN_INPUTS = ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"]


@paddle.static.register_op(name="lowbit_attention_call_varlen", infer_meta=_like_query_varlen, input_names=VARLEN_INPUTS,
                           output_names=["out"])
def call_varlen_op(q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, cu_seqlens_q: paddle.Tensor,
                   cu_seqlens_k: paddle.Tensor, key: str) -> paddle.Tensor:
    """`attention_varlen()` with the choices that `key` holds."""
    return _chosen_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, key)[0]


@paddle.static.register_op(name="lowbit_attention_call_varlen_lse", infer_meta=_like_query_and_lse_varlen,
                           input_names=VARLEN_INPUTS, output_names=["out", "lse"])
def call_varlen_lse_op(q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, cu_seqlens_q: paddle.Tensor,
                       cu_seqlens_k: paddle.Tensor, key: str) -> tuple[paddle.Tensor, paddle.Tensor]:
    """The same with the log-sum-exp."""
    return _chosen_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, key)


def _apart(precision):
    """What makes the precision anew, as text; plain Python, as all below, that both tracers follow."""
    spec, granularity, smooth_k, smooth_q = precision, None, None, None
    if hasattr(precision, "spec"):  # SOT cannot ask isinstance() of a dataclass
        spec = precision.spec
        if not precision.exact:
            granularity, smooth_k, smooth_q = precision.granularity, precision.smooth_k, precision.smooth_q
    return f"{spec!r}, {granularity!r}, {smooth_k!r}, {smooth_q!r}"


@paddle.jit.not_to_static
def arch_of_graph() -> tuple[int, int] | None:
    """Compute capability of Paddle's current device, where a graph being traced will run; None for a CPU."""
    kind, _, ordinal = paddle.device.get_device().partition(":")
    return None if kind == "cpu" else cuda_driver.capability(int(ordinal or 0))


def attention(q, k, v, precision, tensor_layout, is_causal, scale, return_lse, backend, check_finite):
    """What `lowbit_video.attention` does while to_static traces it."""
    key = (f"({_apart(precision)}, {tensor_layout!r}, {is_causal!r}, {scale!r}, {return_lse!r}, {backend!r}, "
           f"{check_finite!r})")
    if return_lse:
        return call_lse_op(q, k, v, key)
    return call_op(q, k, v, key)


def attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, precision, is_causal, scale, return_lse,
                     backend, check_finite):
    """What `lowbit_video.attention_varlen` does while to_static traces it."""
    key = (f"({_apart(precision)}, {max_seqlen_q!r}, {max_seqlen_k!r}, {is_causal!r}, {scale!r}, {return_lse!r}, {backend!r}, "
           f"{check_finite!r})")
    if return_lse:
        return call_varlen_lse_op(q, k, v, cu_seqlens_q, cu_seqlens_k, key)
    return call_varlen_op(q, k, v, cu_seqlens_q, cu_seqlens_k, key)
