"""Attention as one operator of Paddle's static graphs.

`paddle.jit.to_static` would trace through the Python that quantises and launches kernels, or break the graph at it. A
registered operator is opaque, and runs eagerly when it is reached. There are two kinds, each with and without one more tensor:
a call of `attention()` or `attention_varlen()`, with its options in the operator's key (what `torch_ops.py` is for
torch.compile), and the attention of a module (`slots.py`), which runs whatever processor the module has then.
"""
from __future__ import annotations

import ast
from collections.abc import Callable

import paddle

from ..engine.options import of_text, text_of
from ..engine.packing import Packing
from ..engine.run import run
from ..errors import UnsupportedError
from ..runtime import cuda_driver
from .failures import keep_failure
from .runners import runner_of
from .steps import with_tensors, without_tensors

VARLEN_INPUTS = ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"]
STEPS_TENSORS = 6
"""Of norms and positions at most; an operator takes no list, so where there are fewer q stands in the places left."""
BEHIND_INPUTS = ["q", "k", "v", *(f"step_{number}" for number in range(STEPS_TENSORS))]


def _kept(call: Callable[[], tuple]) -> list[paddle.Tensor | None]:
    """The call's results, made contiguous: the executor takes their memory and drops their strides."""
    try:
        return [None if t is None else t.contiguous() for t in call()]
    except BaseException as error:  # Ctrl-C as well: the executor swallows it
        keep_failure(error)
        raise


def _run(q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, key: str) -> list[paddle.Tensor | None]:
    return _kept(lambda: run(q, k, v, of_text(key))[:2])


def _run_varlen(q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, cu_seqlens_q: paddle.Tensor,
                cu_seqlens_k: paddle.Tensor, key: str) -> list[paddle.Tensor | None]:
    lengths, _, options = key.partition(";")
    return _kept(lambda: run(q, k, v, of_text(options), Packing(cu_seqlens_q, cu_seqlens_k, *ast.literal_eval(lengths)))[:2])


def _meta_like_q(q, *rest):
    return paddle.static.MetaTensor(shape=q.shape, dtype=q.dtype)


def _meta(q, k, v, key):
    return _meta_like_q(q)


def _meta_masked(q, k, v, mask, key):
    return _meta_like_q(q)


def _meta_behind(q, k, v, step_0, step_1, step_2, step_3, step_4, step_5, key):
    return _meta_like_q(q)


def _meta_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, key):
    return _meta_like_q(q)


def _meta_lse(q, k, v, key):
    tokens, heads = (1, 2) if of_text(key).tensor_layout == "NHD" else (2, 1)
    shape = [q.shape[0], q.shape[heads], q.shape[tokens]]
    return _meta_like_q(q), paddle.static.MetaTensor(shape=shape, dtype=paddle.float32)


def _meta_varlen_lse(q, k, v, cu_seqlens_q, cu_seqlens_k, key):
    return _meta_like_q(q), paddle.static.MetaTensor(shape=[q.shape[1], q.shape[0]], dtype=paddle.float32)


@paddle.static.register_op(name="lowbit_attention", infer_meta=_meta, input_names=["q", "k", "v"], output_names=["out"])
def module_op(q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, key: str) -> paddle.Tensor:
    """Attention of [B, N, H, D] tensors by the module whose slot has that key; the output is q's shape and dtype.

    key: the slot's; behind a semicolon, for the report, why norms and positions are in the graph where they were to be fused.
    """
    number, _, apart = key.partition(";")
    return _kept(lambda: [runner_of(int(number)).run(q, k, v, apart=apart)])[0]


@paddle.static.register_op(name="lowbit_attention_masked", infer_meta=_meta_masked, input_names=["q", "k", "v", "mask"],
                           output_names=["out"])
def masked_module_op(q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, mask: paddle.Tensor, key: str) -> paddle.Tensor:
    """The same under a mask."""
    number, _, apart = key.partition(";")
    return _kept(lambda: [runner_of(int(number)).run(q, k, v, mask, apart=apart)])[0]


@paddle.static.register_op(name="lowbit_attention_behind", infer_meta=_meta_behind, input_names=BEHIND_INPUTS,
                           output_names=["out"])
def behind_op(q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, step_0: paddle.Tensor, step_1: paddle.Tensor,
              step_2: paddle.Tensor, step_3: paddle.Tensor, step_4: paddle.Tensor, step_5: paddle.Tensor, key: str
              ) -> paddle.Tensor:
    """The same of q and k as their projections left them, and so without a mask: norms and positions are its own.

    key: the slot's, how many of the tensors are of the steps, where positions begin, and the text of `steps.without_tensors`.
    """
    number, count, begin, text = key.split(";")
    tensors = (step_0, step_1, step_2, step_3, step_4, step_5)[:int(count)]
    simulating = paddle.framework.core.set_eval_frame(None)  # SOT would simulate this too, and takes named tuples for tuples
    try:
        return _kept(lambda: [runner_of(int(number)).run(q, k, v, steps=with_tensors(text, tensors, int(begin)))])[0]
    finally:
        paddle.framework.core.set_eval_frame(simulating)


@paddle.static.register_op(name="lowbit_attention_call", infer_meta=_meta, input_names=["q", "k", "v"], output_names=["out"])
def call_op(q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, key: str) -> paddle.Tensor:
    """`attention()` with the options that `key` holds."""
    return _run(q, k, v, key)[0]


@paddle.static.register_op(name="lowbit_attention_call_lse", infer_meta=_meta_lse, input_names=["q", "k", "v"],
                           output_names=["out", "lse"])
def call_lse_op(q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, key: str) -> tuple[paddle.Tensor, paddle.Tensor]:
    """The same with the log-sum-exp."""
    return tuple(_run(q, k, v, key))


@paddle.static.register_op(name="lowbit_attention_call_varlen", infer_meta=_meta_varlen, input_names=VARLEN_INPUTS,
                           output_names=["out"])
def call_varlen_op(q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, cu_seqlens_q: paddle.Tensor,
                   cu_seqlens_k: paddle.Tensor, key: str) -> paddle.Tensor:
    """`attention_varlen()` with the longest sequences and the options that `key` holds."""
    return _run_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, key)[0]


@paddle.static.register_op(name="lowbit_attention_call_varlen_lse", infer_meta=_meta_varlen_lse, input_names=VARLEN_INPUTS,
                           output_names=["out", "lse"])
def call_varlen_lse_op(q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, cu_seqlens_q: paddle.Tensor,
                       cu_seqlens_k: paddle.Tensor, key: str) -> tuple[paddle.Tensor, paddle.Tensor]:
    """The same with the log-sum-exp."""
    return tuple(_run_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, key))


@paddle.jit.not_to_static
def arch_of_graph() -> tuple[int, int] | None:
    """Compute capability of Paddle's current device, where a graph being traced will run; None for a CPU."""
    kind, _, ordinal = paddle.device.get_device().partition(":")
    return None if kind == "cpu" else cuda_driver.capability(int(ordinal or 0))


def refuse_gradients(*tensors) -> None:
    """Raises UnsupportedError where a graph that is being traced would be differentiated: its operators have no gradients."""
    if paddle.is_grad_enabled() and any(not t.stop_gradient for t in tensors):
        raise UnsupportedError("gradients are asked for, and a compiled graph with this attention is inference only\n"
                               "run it under paddle.no_grad(), or train the model as it is, not compiled")


def key_of(number: int) -> str:
    """The key of a module's slot: a string, because SOT makes a tensor of an integer that it sees vary."""
    return str(number)


def _detached(t):
    """The tensor, to be given to an operator without gradients: SOT looks for them under no_grad too.

    Not in AST mode, where detaching puts an operator into the program that custom devices cannot lower.
    """
    return t if t.stop_gradient or not paddle.in_dynamic_mode() else t.detach()


def attention_of_module(attn, q, k, v, mask, key, apart=""):
    """The attention of the module whose slot has that key, while to_static traces it. apart: as `module_op`."""
    # and the weight: SOT takes q's stop_gradient from an earlier trace, which may have been under no_grad
    refuse_gradients(q, k, v, attn.to_q.weight)
    q, k, v = _detached(q), _detached(k), _detached(v)
    key = f"{key};{apart}"
    return module_op(q, k, v, key) if mask is None else masked_module_op(q, k, v, mask, key)


def attention_behind_steps(attn, q, k, v, before, key):
    """The same of q and k that lack norms and positions. before: those, as the hook has them."""
    text, tensors, begin = without_tensors(before.steps)
    if not isinstance(begin, int):
        return attention_of_module(attn, *before.prepare(q, k), v, None, key, "a graph of any number of text tokens")
    refuse_gradients(q, k, v, attn.to_q.weight)
    q, k, v = _detached(q), _detached(k), _detached(v)
    given = [_detached(t) for t in tensors] + [q] * (STEPS_TENSORS - len(tensors))
    return behind_op(q, k, v, *given, f"{key};{len(tensors)};{begin};{text}")


def attention(q, k, v, precision, tensor_layout, is_causal, scale, return_lse, *rest):
    """What `lowbit_video.attention` does while to_static traces it."""
    refuse_gradients(q, k, v)
    q, k, v = _detached(q), _detached(k), _detached(v)
    key = text_of(precision, tensor_layout, is_causal, scale, return_lse, *rest)
    if return_lse:
        return call_lse_op(q, k, v, key)
    return call_op(q, k, v, key)


def attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, precision, tensor_layout, is_causal,
                     scale, return_lse, *rest):
    """What `lowbit_video.attention_varlen` does while to_static traces it."""
    refuse_gradients(q, k, v)
    q, k, v = _detached(q), _detached(k), _detached(v)
    options = text_of(precision, tensor_layout, is_causal, scale, return_lse, *rest)
    key = f"{max_seqlen_q!r}, {max_seqlen_k!r};{options}"
    if return_lse:
        return call_varlen_lse_op(q, k, v, cu_seqlens_q, cu_seqlens_k, key)
    return call_varlen_op(q, k, v, cu_seqlens_q, cu_seqlens_k, key)
