"""A call of the dispatcher, argument by argument: served, or refused by name; masks by lengths, exactly, or not at all."""
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")
diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402

from lowbit_video import UnsupportedError, attention, register_diffusers  # noqa: E402
from lowbit_video.errors import NonFiniteError  # noqa: E402
from lowbit_video.hook import read_once  # noqa: E402
from lowbit_video.hook.dispatcher import attention as dispatched  # noqa: E402
from lowbit_video.hook.dispatcher import masks  # noqa: E402

from helpers import naive_attention, qkv, sqnr_db  # noqa: E402

pytestmark = pytest.mark.parity
INT8, STRICT = "lowbit_int8_fp16", "lowbit_int8_fp16_strict"


@pytest.fixture(autouse=True)
def registered(untouched):
    register_diffusers()


def tensors(**shape):
    return [torch.from_numpy(x) for x in qkv(**{"q_len": 70, "kv_len": 90, **shape})]


def call(q, k, v, backend=INT8, **choices):
    """By the dispatcher."""
    own = {name: choices.pop(name) for name in list(choices) if name in
           ("return_lse", "window_size", "softcap", "return_attn_probs", "deterministic")}
    with attention_backend(backend):
        return dispatch_attention_fn(q, k, v, attention_kwargs=own, **choices)


@pytest.mark.parametrize("precision", ["int8+fp8", "int8+fp16", "int4+fp8", "int8/int4+fp16"])
def test_a_backend_is_attention_at_its_precision(precision):
    q, k, v = tensors(batch=2)
    name = "lowbit_" + precision.replace("/", "_").replace("+", "_")
    for chosen in (name, name + "_strict"):
        assert torch.equal(call(q, k, v, chosen, scale=0.2), attention(q, k, v, precision, scale=0.2))


@pytest.mark.parametrize("causal", [False, True])
def test_the_lse_is_natural_and_by_tokens_before_heads(causal):
    q, k, v = tensors(kv_len=70)
    out, lse = call(q, k, v, return_lse=True, is_causal=causal, scale=0.1)
    wanted, wanted_lse = naive_attention(*(x.numpy() for x in (q, k, v)), scale=0.1, causal=causal)
    assert lse.shape == (1, 70, 2) and lse.dtype == torch.float32
    assert sqnr_db(out, wanted) > 30 and np.abs(lse.numpy() - wanted_lse.transpose(0, 2, 1)).max() < 0.02


def test_grouped_heads_are_served_where_they_are_announced():
    q, k, v = tensors(heads=4, kv_heads=2)
    assert torch.equal(call(q, k, v, enable_gqa=True), attention(q, k, v, "int8+fp16"))
    with pytest.raises(ValueError, match="query has 4 heads and key 2; pass enable_gqa=True"):
        call(q, k, v)


@pytest.mark.parametrize("argument, value", [("dropout_p", 0.1), ("window_size", (64, 64)), ("window_size", (0, 0)),
                                             ("softcap", 30.0), ("softcap", 1.0), ("return_attn_probs", True)])
def test_what_no_kernel_serves_is_refused_by_name(argument, value):
    with pytest.raises(UnsupportedError, match=f"{argument}=.* is not supported by low-bit attention; pass {argument}="):
        call(*tensors(), **{argument: value})


@pytest.mark.parametrize("argument, value", [("window_size", (-1, -1)), ("softcap", 0.0), ("return_attn_probs", False),
                                             ("deterministic", True)])
def test_neutral_values_are_no_refusal(argument, value):
    q, k, v = tensors()
    assert torch.equal(call(q, k, v, **{argument: value}), attention(q, k, v, "int8+fp16"))


def test_a_mask_and_causal_exclude_each_other():
    with pytest.raises(ValueError, match="is_causal=True and an attn_mask are given"):
        call(*tensors(), attn_mask=torch.ones(1, 90, dtype=torch.bool), is_causal=True)


def leading(*lengths, keys=90):
    return torch.arange(keys) < torch.tensor(lengths)[:, None]


def exact(q, k, v, mask, scale=None):
    """By diffusers' own backend."""
    with attention_backend("native"):
        return dispatch_attention_fn(q, k, v, attn_mask=mask, scale=scale)


@pytest.mark.parametrize("wide", [False, True], ids=["[B, Nk]", "[B, 1, 1, Nk]"])
@pytest.mark.parametrize("lengths", [(90, 90), (33, 33), (33, 71), (1, 90)])
def test_a_mask_of_leading_keys_is_served_at_low_bit(lengths, wide):
    """A backend that drops the mask attends to padding: https://github.com/huggingface/diffusers/issues/12605."""
    q, k, v = tensors(batch=2)
    mask = leading(*lengths)[:, None, None, :] if wide else leading(*lengths)
    out, lse = call(q, k, v, STRICT, attn_mask=mask, return_lse=True)
    for i, n in enumerate(lengths):
        wanted, wanted_lse = attention(q[i:i + 1], k[i:i + 1, :n], v[i:i + 1, :n], "int8+fp16", return_lse=True)
        # one sample, and several: scales and sums are a sample's own
        assert torch.equal(out[i:i + 1], wanted) and torch.equal(lse[i:i + 1].permute(0, 2, 1), wanted_lse)
    assert sqnr_db(out, exact(q, k, v, mask)) > 30
    assert lengths == (90, 90) or sqnr_db(out, attention(q, k, v, "int8+fp16")) < 20


def test_one_mask_may_serve_all_samples():
    q, k, v = tensors(batch=2)
    assert torch.equal(call(q, k, v, STRICT, attn_mask=leading(40)[:, None, None, :]),
                       attention(q, k[:, :40], v[:, :40], "int8+fp16"))


def holes():
    mask = leading(50, 90)
    mask[0, 20] = False
    return mask


OTHER_MASKS = {
    "a hole": (holes(), "the keys that the mask leaves do not lead in every sample"),
    "a hole in the last sample": (holes().flip(0), "the keys that the mask leaves do not lead in every sample"),
    "the last keys": (~leading(40, 30), "do not lead in every sample"),
    "floats": (torch.zeros(2, 1, 1, 90).masked_fill(~leading(40, 50)[:, None, None, :], -1e4), "the mask is torch.float32"),
    "pairs": (torch.ones(2, 1, 70, 90, dtype=torch.bool).tril(10), r"the mask has shape \[2, 1, 70, 90\]"),
    "heads": (leading(40, 50)[:, None, None, :].expand(2, 2, 1, 90), r"the mask has shape \[2, 2, 1, 90\]")}


@pytest.mark.parametrize("kind", OTHER_MASKS)
def test_another_mask_is_served_exactly_or_refused(kind):
    mask, reason = OTHER_MASKS[kind]
    q, k, v = tensors(batch=2)
    assert torch.equal(call(q, k, v, attn_mask=mask, scale=0.3), exact(q, k, v, mask, scale=0.3))
    with pytest.raises(UnsupportedError, match=f"{STRICT}: .*{reason}"):
        call(q, k, v, STRICT, attn_mask=mask)
    with pytest.raises(UnsupportedError, match="return_lse is not served with this mask"):
        call(q, k, v, attn_mask=mask, return_lse=True)


def test_a_sample_without_keys_is_what_torch_makes_of_it():
    q, k, v = tensors(batch=2)
    mask = leading(0, 50)[:, None, None, :]
    assert torch.equal(call(q, k, v, attn_mask=mask).nan_to_num(7), exact(q, k, v, mask).nan_to_num(7))


def test_causal_with_unequal_lengths_is_torchs():
    """torch aligns at the top left, low-bit attention at the bottom right."""
    q, k, v = tensors()
    with attention_backend("native"):
        wanted = dispatch_attention_fn(q, k, v, is_causal=True)
    assert torch.equal(call(q, k, v, is_causal=True), wanted)
    with pytest.raises(UnsupportedError, match="is_causal with 70 queries and 90 keys"):
        call(q, k, v, STRICT, is_causal=True)


@pytest.mark.parametrize("samples, keys", [(2, 90), (3, 91), (3, 89)])
def test_a_mask_of_other_samples_or_keys_is_never_taken_for_lengths(samples, keys):
    q, k, v = tensors(batch=3)
    mask = leading(*[40] * samples, keys=keys)[:, None, None, :]
    with pytest.raises(UnsupportedError, match=rf"the mask has shape \[{samples}, 1, 1, {keys}\]"):
        call(q, k, v, STRICT, attn_mask=mask)


def test_exact_attention_shares_heads_that_are_announced():
    q, k, v = tensors(heads=4, kv_heads=2, q_len=90, dim=20)
    with attention_backend("native"):
        wanted = dispatch_attention_fn(q, k, v, enable_gqa=True)
    assert torch.equal(call(q, k, v, enable_gqa=True), wanted)


def test_exact_attention_has_an_lse_where_its_causal_mask_is_torchs(monkeypatch):
    def refuse(*given):
        raise UnsupportedError("exact attention is faster")

    monkeypatch.setattr(dispatched, "run", refuse)
    q, k, v = tensors(kv_len=70)
    wanted, wanted_lse = naive_attention(*(x.numpy() for x in (q, k, v)), scale=0.3, causal=True)
    out, lse = call(q, k, v, return_lse=True, is_causal=True, scale=0.3)
    np.testing.assert_allclose(out.numpy(), wanted, atol=1e-5)
    np.testing.assert_allclose(lse.numpy(), wanted_lse.transpose(0, 2, 1), atol=1e-5)
    with pytest.raises(UnsupportedError, match=f"{INT8}: return_lse is not served with this mask"):
        call(*tensors(), return_lse=True, is_causal=True)


def test_a_mask_is_not_read_where_no_kernel_would_take_the_call(monkeypatch):
    monkeypatch.setattr(masks, "read_lengths", None)
    q, k, v = tensors(batch=2, dim=20)
    assert torch.equal(call(q, k, v, attn_mask=leading(40, 50)), exact(q, k, v, leading(40, 50)))


def test_what_no_kernel_takes_is_exact_or_refused():
    q, k, v = tensors(dim=20)
    assert torch.equal(call(q, k, v), exact(q, k, v, None))
    with pytest.raises(UnsupportedError, match="head_dim 20"):
        call(q, k, v, STRICT)
    q, k, v = (x.double() for x in tensors())
    assert torch.equal(call(q, k, v), exact(q, k, v, None))
    with pytest.raises(UnsupportedError, match="dtype float64"):
        call(q, k, v, STRICT)


def test_nothing_is_differentiated_in_silence():
    q, k, v = (x.requires_grad_() for x in tensors())
    call(q, k, v).sum().backward()
    wanted = [x.grad.clone() for x in (q, k, v)]
    for x in (q, k, v):
        x.grad = None
    exact(q, k, v, None).sum().backward()
    assert all(torch.equal(x.grad, one) for x, one in zip((q, k, v), wanted))
    with pytest.raises(UnsupportedError, match="gradients are recorded"):
        call(q, k, v, STRICT)
    with forward_ad.dual_level(), torch.no_grad():
        with pytest.raises(UnsupportedError, match="gradients are recorded"):
            call(q, k, forward_ad.make_dual(v, torch.ones_like(v)), STRICT)


def test_values_that_are_not_finite_are_named():
    q, k, v = tensors()
    k[0, 3, 0, 5] = float("nan")
    with pytest.raises(NonFiniteError, match=f"diffusers' backend {INT8}: k has 1 NaN"):
        call(q, k, v)


def test_a_mask_is_read_once_while_it_stays_the_same(monkeypatch):
    read, times = masks.read_lengths, []
    monkeypatch.setattr(masks, "read_lengths", lambda mask: times.append(0) or read(mask))
    q, k, v = tensors(batch=2)
    mask = leading(40, 50)
    for _ in range(3):
        out = call(q, k, v, attn_mask=mask)
    assert len(times) == 1
    mask[0, 39] = False
    assert not torch.equal(call(q, k, v, attn_mask=mask), out) and len(times) == 2
    call(q, k, v, attn_mask=leading(40, 50))
    assert len(times) == 3
    with torch.inference_mode():  # such a tensor does not tell that it was changed
        mask = leading(40, 50)
        call(q, k, v, attn_mask=mask)
        mask[0, 30:] = False
        assert torch.equal(call(q, k, v, attn_mask=mask)[:1], attention(q[:1], k[:1, :30], v[:1, :30], "int8+fp16"))


def test_a_mask_that_dies_is_forgotten():
    mask = leading(40, 50)
    call(*tensors(batch=2), attn_mask=mask)
    assert id(mask) in read_once._known
    number = id(mask)
    del mask
    assert number not in read_once._known
