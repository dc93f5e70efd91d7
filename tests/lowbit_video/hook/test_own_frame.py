"""diffusers' models that pass its attention dispatcher by: hooked, each is its untouched self but for the attention."""
import copy
import importlib
import threading

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

import torch.nn.functional as F  # noqa: E402

import lowbit_video as lv  # noqa: E402
from lowbit_video.hook import frames  # noqa: E402
from lowbit_video.hook.frames import own_masks  # noqa: E402
from lowbit_video.hook.frames.cogvideox import joint_attention  # noqa: E402
from lowbit_video.hook.report import attention_modules  # noqa: E402

import diffusers_models  # noqa: E402
from diffusers_models import hidden  # noqa: E402
from helpers import sqnr_db  # noqa: E402

pytestmark = pytest.mark.torch

RETOLD = ("cogvideox", "consisid")
"""Models whose frame is ours, so that exact attention is the same to rounding; the others' code is diffusers' own."""
FLOOR_DB = {"mochi": 53, "lumina2": 55, "allegro": 78, "latte": 78, "pixart": 78, "auraflow": 115}
"""Signal to quantisation noise of the output at int8+fp16, less 5 to 10 dB; 65 where nothing stands. INT4 has 22 dB less."""
ALWAYS_MASKED = ("omnigen",)
"""Models that never attend without a mask that no low-bit kernel takes."""


def outputs(model, given):
    with torch.no_grad():
        out = model(**copy.deepcopy(given), return_dict=False)[0]
    assert out.isfinite().all()
    return out


@pytest.mark.parametrize("name", diffusers_models.MODELS)
def test_a_model_is_hooked_reported_and_given_back(name):
    model, given = diffusers_models.make(name)
    targets = attention_modules(model)
    before = {one: module.processor for one, module in targets.items()}
    plain = outputs(model, given)
    assert torch.equal(outputs(model, given), plain)

    lv.apply(model, lv.ExactAttnProcessor())
    exact = outputs(model, given)
    assert torch.equal(exact, plain) if name not in RETOLD else (exact - plain).abs().max() <= 1e-5
    assert {module.attention_slot.frame is joint_attention for module in targets.values()} == {name in RETOLD}
    assert sum(module.calls for module in lv.coverage(model).modules) > 0
    lv.remove(model)

    lv.apply(model, "int8+fp16", fallback="exact" if name in ALWAYS_MASKED else None)
    low = outputs(model, given)
    report = lv.coverage(model)
    assert [module.name for module in report.modules] == list(targets) and len(targets) == diffusers_models.MODULES.get(name, 2)
    assert all(module.calls for module in report.modules)
    if name in ALWAYS_MASKED:
        assert torch.equal(low, plain) and len(report.fallbacks) == 2 and "no low-bit kernel takes a mask" in str(report)
    else:
        fused = ", fused prologue" * (name in RETOLD)
        assert set(report.variants()) == {f"int8+fp16 (reference-lowbit{fused})"} and not report.fallbacks
        assert FLOOR_DB.get(name, 65) < sqnr_db(low, plain) < 150
    assert lv.remove(model) and not lv.remove(model)
    assert {one: module.processor for one, module in targets.items()} == before
    assert not any(hasattr(module, "own_processor") for module in targets.values())
    assert torch.equal(outputs(model, given), plain)


@pytest.mark.parametrize("name, masks", [
    ("allegro", {"encoder_attention_mask": hidden(2, 6, tokens=6)}),
    ("allegro", {"attention_mask": hidden(1, 2, tokens=2)[..., None, None].expand(2, 2, 8, 8)}),
    ("pixart", {"encoder_attention_mask": hidden(4, 4, tokens=6)}),
    ("lumina2", {"encoder_attention_mask": hidden(2, 6, tokens=6)}),
], ids=["allegro text", "allegro video", "pixart", "lumina2"])
def test_masks_that_hide_the_last_keys_are_served_at_low_bit_by_lengths(name, masks):
    model, given = diffusers_models.make(name)
    given |= masks
    plain = outputs(model, given)
    unmasked = outputs(model, given | dict.fromkeys(masks)) if name != "lumina2" else None
    lv.apply(model, "int8+fp16")
    low = outputs(model, given)
    report = lv.coverage(model)
    assert set(report.variants()) == {"int8+fp16 (reference-lowbit)"} and all(module.calls for module in report.modules)
    assert sqnr_db(low, plain) > max(30, 6 + (0 if unmasked is None else sqnr_db(unmasked, plain)))


@pytest.mark.parametrize("name, masks, where", [
    ("pixart", {"encoder_attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1], [1] * 6])}, "transformer_blocks.0.attn2"),
    ("cogview4", {"attention_mask": hidden(2, 6, tokens=6)}, "transformer_blocks.0.attn1"),
])
def test_other_masks_are_refused_by_name_or_served_exactly_with_the_reason(name, masks, where):
    model, given = diffusers_models.make(name)
    given |= masks
    plain = outputs(model, given)
    lv.apply(model, "int8+fp16")
    with pytest.raises(lv.UnsupportedError, match=f"{where}': an attention mask of shape .*fallback='exact'"):
        outputs(model, given)
    lv.remove(model)
    lv.apply(model, None, {where: "int8+fp16"}, fallback="exact")
    assert torch.equal(outputs(model, given), plain)
    (module,) = lv.coverage(model).fallbacks
    assert module.name == where and "no low-bit kernel takes a mask" in module.runs[0][2]


def test_a_model_s_mask_is_read_once_for_all_its_blocks_and_again_when_it_was_written_to(monkeypatch):
    read = []
    monkeypatch.setattr(own_masks, "leading_keys", lambda mask, inner=own_masks.leading_keys: read.append(1) or inner(mask))
    model, given = diffusers_models.make("pixart")
    bias = (1 - hidden(4, 5, tokens=6)[:, None].float()) * -10000
    for _ in range(2):
        model(**given, encoder_attention_mask=bias)
    assert not read
    lv.apply(model, "int8+fp16")
    for _ in range(2):
        first = model(**given, encoder_attention_mask=bias)[0]
    assert len(read) == 1
    bias[:, :, 2:] = -10000
    assert not torch.equal(model(**given, encoder_attention_mask=bias)[0], first) and len(read) == 2
    with torch.inference_mode():
        model(**given, encoder_attention_mask=bias.clone())
    assert len(read) == 4


def test_what_was_read_of_a_model_s_mask_is_for_one_kind_of_mask_made_of_it():
    given = hidden(2, 3, tokens=4)
    mask = given.bool()[:, None, None]
    for kind, made, lengths in ((int, mask, (2, 3)), (str, ~mask, None), (int, mask.float() * -1e4, None),
                                (int, mask[..., :1], (1, 1))):  # another kind of processor, another dtype, another shape
        assert own_masks.Source(given, kind).lengths(made) == lengths


def test_a_mask_under_torch_compile_is_served_exactly_with_the_reason():
    model, _ = diffusers_models.make("pixart")
    attn = model.transformer_blocks[0].attn2
    given = torch.randn(2, 5, 64), torch.randn(2, 6, 64), (1 - hidden(4, 5, tokens=6)[:, None].float()) * -10000
    with torch.no_grad():
        plain = attn(*given)
        lv.apply(model, None, {"transformer_blocks.0.attn2": "int8+fp16"}, fallback="exact")
        assert torch.equal(torch.compile(attn, backend="eager", fullgraph=True)(*given), plain)
    (module,) = lv.coverage(model).fallbacks
    assert "no low-bit kernel takes a mask" in module.runs[0][2]


def test_a_mask_is_not_read_where_no_kernel_would_take_the_call(monkeypatch):
    monkeypatch.setattr(own_masks, "leading_keys", None)
    model, given = diffusers_models.make("pixart")
    given["encoder_attention_mask"] = hidden(4, 5, tokens=6)
    plain = outputs(model, given)
    for precision in (lv.ExactAttnProcessor(), lv.LowBitAttnProcessor("int8+fp16", fallback="exact", backend="hopper")):
        with lv.apply(model, precision):
            assert torch.equal(outputs(model, given), plain)


@pytest.mark.parametrize("mask, lengths", [
    (torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()[:, None, None], (2, 3)),
    (torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()[:, None, None].expand(2, 4, 5, 3), (2, 3)),
    (torch.tensor([[0.0, -10000, -1e9]])[:, None, None], (1,)),
    (torch.tensor([[0.0, -10000]]).bfloat16()[:, None, None], (1,)),
    (torch.tensor([[0, torch.finfo(torch.float16).min]]).half()[:, None, None], (1,)),
    (torch.tensor([[0.0, -100]])[:, None, None], None),
    (torch.tensor([[0.0, 1.0]])[:, None, None], None),
    (torch.tensor([[0, 1, 1]]).bool()[:, None, None], None),
    (torch.tensor([[1, 1], [0, 0]]).bool()[:, None, None], None),
    (torch.tensor([[1, 0], [1, 1]]).bool()[None, None], None),
    (torch.tensor([[1, 0], [1, 1]]).bool()[None, :, None], None),
], ids=["rows", "wide", "bias", "bfloat16", "float16", "small bias", "positive bias", "hole", "none", "by query", "by head"])
def test_leading_keys(mask, lengths):
    assert own_masks.leading_keys(mask) == lengths


def test_every_block_of_diffusers_that_is_declared_exists():
    declared = [name.rpartition(".") for name in frames._declared if isinstance(name, str) and name.startswith("diffusers.")]
    assert len(declared) == 16
    for module, _, block in declared:
        assert issubclass(getattr(importlib.import_module(module), block), torch.nn.Module)


class Odd:
    """Stands for another library's processor: calls what it is given in place of attention."""

    def __init__(self, middle):
        self.middle = middle

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return self.middle(torch.ones(1, 2, 4, 32), torch.ones(1, 2, 6, 32)) * hidden_states.mean()


def odd_model(middle=lambda q, k: F.scaled_dot_product_attention(q, k, k)):
    model, _ = diffusers_models.make("pixart")
    model.transformer_blocks[0].attn1.set_processor(Odd(middle))
    lv.apply(model, None, {"transformer_blocks.0.attn1": "int8+fp16"}, fallback="exact")
    return model, model.transformer_blocks[0].attn1


@pytest.mark.parametrize("middle, said", [
    (lambda q, k: (q @ k.mT).softmax(-1) @ k, "Odd computes its attention without torch's scaled_dot_product_attention"),
    (lambda q, k: F.scaled_dot_product_attention(q, k, k, dropout_p=0.1), "dropout_p=0.1"),
    (lambda q, k: F.scaled_dot_product_attention(q, k, k, is_causal=True), "is_causal=True with 4 queries, 6 keys and no"),
    (lambda q, k: F.scaled_dot_product_attention(q, q, q, torch.ones(4) == 1, is_causal=True), "4 queries, 4 keys and a mask"),
], ids=["no sdpa", "dropout", "causal", "causal and a mask"])
def test_what_a_processor_asks_for_and_nobody_serves_is_refused(middle, said):
    _, attn = odd_model(middle)
    with pytest.raises(lv.UnsupportedError, match=said):
        attn(torch.ones(1, 4, 64))
    out = F.scaled_dot_product_attention(*[torch.ones(1, 1, 2, 8)] * 3, dropout_p=0.1)  # nothing of torch is changed
    assert out.shape == (1, 1, 2, 8)


@pytest.mark.parametrize("asked", [{"scale": 0.5}, {"scale": 0.24},
                                   {"scale": 0.5, "attn_mask": torch.tensor([[True] * 4 + [False] * 2])},
                                   {"scale": 0.5, "attn_mask": hidden(2, 5, tokens=6).bool()[:, None, None]},
                                   {"scale": 0.5, "attn_mask": torch.tensor([[False, True] * 3])}],
                         ids=["scale", "a little more", "leading", "leading by sample", "holes"])
def test_a_scale_is_honoured_with_and_without_a_mask(asked):
    torch.manual_seed(1)
    q, k, v = torch.randn(2, 2, 4, 32), torch.randn(2, 2, 6, 32), torch.randn(2, 2, 6, 32)
    _, attn = odd_model(lambda *_: F.scaled_dot_product_attention(q, k, v, **asked))
    hidden_states = torch.ones(1, 4, 64)
    expected = F.scaled_dot_product_attention(q, k, v, **asked)
    assert sqnr_db(attn(hidden_states), expected) > 30
    assert sqnr_db(F.scaled_dot_product_attention(q, k, v, attn_mask=asked.get("attn_mask")), expected) < 30


def test_causal_attention_of_as_many_queries_as_keys_is_honoured():
    q, k, v = torch.randn(3, 1, 2, 40, 32, generator=torch.Generator().manual_seed(1))
    _, attn = odd_model(lambda *_: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert 30 < sqnr_db(attn(torch.ones(1, 4, 64)), wanted) < 100


def test_arguments_that_the_own_processor_does_not_take_are_named():
    _, attn = odd_model()
    attn(torch.ones(1, 4, 64))
    with pytest.raises(lv.UnsupportedError, match="called with temb, which Odd does not take; it takes hidden_states, enc"):
        attn(torch.ones(1, 4, 64), temb=torch.ones(1))
    model, given = diffusers_models.make("pixart")
    lv.apply(model, "int8+fp16", fallback="exact")
    for name in ("scale", "ip_adapter_masks"):  # diffusers would warn of the one, ignore the other without a word
        with pytest.raises(lv.UnsupportedError, match=f"called with {name}, which AttnProcessor2_0 does not take"):
            model(**given, cross_attention_kwargs={name: 0.5})
    model, given = diffusers_models.make("cogvideox")
    lv.apply(model, "int8+fp16")
    with pytest.raises(lv.UnsupportedError, match="called with temb, which joint_attention does not know"):
        model.transformer_blocks[0].attn1(given["hidden_states"], encoder_hidden_states=torch.ones(2, 6, 128), temb=1)


def test_a_processor_set_by_hand_says_that_apply_is_meant():
    model, given = diffusers_models.make("sd3")
    model.set_attn_processor(lv.LowBitAttnProcessor("int8+fp16", fallback="exact"))
    with pytest.raises(lv.UnsupportedError, match="set by hand, ours replaced it; take lowbit_video.apply"):
        outputs(model, given)
    with pytest.raises(lv.UnsupportedError, match="blocks.0.attn of SD3Transformer2DModel: .*take lowbit_video.apply"):
        lv.apply(model, "int8+fp16")


def test_a_processor_with_weights_is_refused_and_nothing_is_changed():
    model, _ = diffusers_models.make("sd3")
    adapter = torch.nn.Linear(1, 1)
    model.transformer_blocks[1].attn.set_processor(adapter)
    before = list(model.attn_processors.values())
    with pytest.raises(lv.UnsupportedError, match="transformer_blocks.1.attn .*Linear, has weights.*unload_ip_ad") as refused:
        lv.apply(model, "int8+fp16")
    assert list(model.attn_processors.values()) == before and "dispatcher" not in str(refused.value)
    lv.apply(model, "int8+fp16", {"transformer_blocks.1.attn": None})


def test_a_processor_of_whoever_takes_the_place_of_one_that_is_a_module():
    model, _ = diffusers_models.make("sd3")
    attn = model.transformer_blocks[1].attn
    attn.set_processor(torch.nn.Linear(1, 1))
    lv.apply(model, None, {"transformer_blocks.1.attn": Odd(None)})
    assert type(attn.processor) is Odd and "processor" not in dict(attn.named_children())


def test_applies_on_top_of_each_other_keep_the_own_processor():
    model, given = diffusers_models.make("mochi")
    plain, own = outputs(model, given), model.transformer_blocks[0].attn1.processor
    lv.apply(model, "int8+fp16")
    low = outputs(model, given)
    lv.apply(model, None, {"transformer_blocks.0.*": lv.ExactAttnProcessor()})
    assert not torch.equal(outputs(model, given), low)
    lv.remove(model)
    assert torch.equal(outputs(model, given), low)
    lv.remove(model)
    assert model.transformer_blocks[0].attn1.processor is own and torch.equal(outputs(model, given), plain)


def test_another_thread_s_attention_is_its_own():
    inside, done, seen = threading.Event(), threading.Event(), []

    def middle(q, k):
        inside.set()
        assert done.wait(60)
        return F.scaled_dot_product_attention(q, k, k)

    def elsewhere():
        assert inside.wait(60)
        seen.append(F.scaled_dot_product_attention(*[torch.ones(1, 1, 2, 8)] * 3, dropout_p=0.5))  # refused if it were served
        done.set()

    model, attn = odd_model(middle)
    thread = threading.Thread(target=elsewhere)
    thread.start()
    attn(torch.ones(1, 4, 64))
    thread.join()
    assert len(seen) == 1 and lv.coverage(model).modules[0].calls == 1


@pytest.mark.parametrize("name", ["sd3", "mochi"])  # Mochi's processor calls what torch.compile cannot trace under a mode
def test_a_hooked_model_compiles_to_one_graph_that_equals_eager(name):
    model, given = diffusers_models.make(name)
    lv.apply(model, "int8+fp16")
    eager = outputs(model, given)
    calls = sum(module.calls for module in lv.coverage(model).modules)
    compiled = outputs(torch.compile(model, backend="eager", fullgraph=True), given)
    assert torch.equal(compiled, eager)
    assert sum(module.calls for module in lv.coverage(model).modules) == 2 * calls
    lv.remove(model)
    assert not torch.equal(outputs(model, given), eager)
