"""A call of `attention()` as one operator of Paddle's static graphs, with its choices in the operator's key.

What `torch_op.py` is for torch.compile. A processor's attention has an operator of its own (`runtime/paddle_op.py`), which
runs whatever processor the module has then.
"""
from __future__ import annotations

import ast

import paddle

from lowbit_video.attention import run
from lowbit_video.precision import Precision
from lowbit_video.runtime.paddle_op import like_query, remember


def _chosen(q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, key: str) -> tuple[paddle.Tensor, paddle.Tensor | None]:
    spec, granularity, smooth_k, smooth_q, layout, is_causal, scale, return_lse, backend, check_finite = ast.literal_eval(key)
    try:
        out, lse, _ = run(q, k, v, Precision(spec, granularity=granularity, smooth_k=smooth_k, smooth_q=smooth_q),
                          tensor_layout=layout, is_causal=is_causal, scale=scale, return_lse=return_lse, backend=backend,
                          check_finite=check_finite)
    except BaseException as error:
        remember(error)
        raise
    return out.contiguous(), None if lse is None else lse.contiguous()


def _like_query_and_lse(q, k, v, key):
    tokens, heads = (1, 2) if ast.literal_eval(key)[4] == "NHD" else (2, 1)
    lse = paddle.static.MetaTensor(shape=[q.shape[0], q.shape[heads], q.shape[tokens]], dtype=paddle.float32)
    return paddle.static.MetaTensor(shape=q.shape, dtype=q.dtype), lse


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


def attention(q, k, v, precision, tensor_layout, is_causal, scale, return_lse, backend, check_finite):
    """What `lowbit_video.attention` does while to_static traces it; plain Python that both of its tracers follow."""
    spec, granularity, smooth_k, smooth_q = precision, None, None, None
    if hasattr(precision, "spec"):  # SOT cannot ask isinstance() of a dataclass
        spec = precision.spec
        if not precision.exact:
            granularity, smooth_k, smooth_q = precision.granularity, precision.smooth_k, precision.smooth_q
    key = (f"({spec!r}, {granularity!r}, {smooth_k!r}, {smooth_q!r}, {tensor_layout!r}, {is_causal!r}, {scale!r}, "
           f"{return_lse!r}, {backend!r}, {check_finite!r})")
    if return_lse:
        return call_lse_op(q, k, v, key)
    return call_op(q, k, v, key)
