"""Processors that fuse norms and positions with quantisation: the same result, told in the report, or why they do not."""
import numpy as np
import pytest

paddle = pytest.importorskip("paddle", reason="paddlepaddle is not installed")
from lowbit_video import ExactAttnProcessor, LowBitAttnProcessor, Pooled, apply, coverage  # noqa: E402
from lowbit_video.hook import prologue  # noqa: E402
from lowbit_video.hook.frames.prepared import prepared  # noqa: E402
from lowbit_video.kernels.prologue.steps import Steps  # noqa: E402
from lowbit_video.runtime import paddle_runtime  # noqa: E402

import toy_model  # noqa: E402
from helpers import sqnr_db  # noqa: E402


def outputs(model, **given):
    with paddle.no_grad():
        return [part.numpy() for part in model(**given)]


def ran(model):
    return coverage(model).variants()


def both(given, precision="int8+fp8", seed=0, **options):
    """(what a model gives by a fusing processor, by one that does not, what the report says of the first)."""
    found = []
    for fused in (True, False):
        model = toy_model.model(seed)
        for number, block in enumerate(model.blocks):
            block.norm_q.weight.set_value(1 + 0.2 * paddle.arange(32, dtype="float32").sin() * (number + 1))
            block.norm_k.bias.set_value(0.5 * paddle.arange(32, dtype="float32").cos())
        apply(model, LowBitAttnProcessor(precision, fused_prologue=fused, **options))
        found.append((outputs(model, **given), ran(model)))
    return found[0][0], found[1][0], found[0][1]


@pytest.mark.parametrize("rotary", [True, False], ids=["rotary", "none"])
@pytest.mark.parametrize("precision", ["int8+fp8", "int4+fp16"])
def test_the_model_computes_the_same(rotary, precision, monkeypatch):
    """And not by the modules of the norms, nor by the frame's positions."""
    given = toy_model.inputs()
    given["rotary"] = given["rotary"] if rotary else None
    fused, apart, told = both(given, precision)
    pieces = " of two pieces" * precision.endswith("fp8")
    assert told == {f"{precision} (reference-lowbit, fused prologue{pieces})": 2}
    for one, other in zip(fused, apart):
        assert sqnr_db(one, other) > 50
    model = toy_model.model()
    apply(model, LowBitAttnProcessor(precision, fused_prologue=True))
    monkeypatch.setattr(paddle.nn.LayerNorm, "forward", None)
    monkeypatch.setattr("lowbit_video.hook.frames.cogvideox._rotate_video", None)
    outputs(model, **given)


def test_on_unless_told_otherwise(monkeypatch):
    model, given = toy_model.model(), toy_model.inputs()
    assert prologue.FUSED_PROLOGUE is True
    apply(model, "int8+fp8")
    outputs(model, **given)
    assert ran(model) == {"int8+fp8 (reference-lowbit, fused prologue of two pieces)": 2}
    monkeypatch.setattr(prologue, "FUSED_PROLOGUE", False)
    outputs(model, **given)
    assert ran(model) == {"int8+fp8 (reference-lowbit)": 2, "int8+fp8 (reference-lowbit, fused prologue of two pieces)": 2}
    monkeypatch.undo()
    apply(model, LowBitAttnProcessor("int8+fp8", fused_prologue=False))
    outputs(model, **given)
    assert ran(model) == {"int8+fp8 (reference-lowbit)": 2}
    apply(model, ExactAttnProcessor())
    outputs(model, **given)
    assert ran(model) == {"exact": 2}


def test_what_is_asked_for_is_told_and_checked():
    assert str(LowBitAttnProcessor(fused_prologue=True)).endswith("fused_prologue=True)")
    assert "fused" not in str(LowBitAttnProcessor())
    with pytest.raises(TypeError, match="fused_prologue"):
        LowBitAttnProcessor(fused_prologue="yes")


@pytest.mark.parametrize("rotary", [True, False], ids=["rotary", "none"])
def test_text_and_video_in_two_pieces(rotary, monkeypatch):
    """The same bits, and no concatenation before attention."""
    given = toy_model.inputs()
    given["rotary"] = given["rotary"] if rotary else None
    monkeypatch.setattr(prologue, "TWO_PIECES", False)
    whole, _, told = both(given)
    assert told == {"int8+fp8 (reference-lowbit, fused prologue)": 2}
    monkeypatch.undo()
    joined, concat = [], paddle.concat
    monkeypatch.setattr(paddle, "concat", lambda tensors, axis: joined.append(tensors[0].ndim) or concat(tensors, axis))
    pieces, _, told = both(given)
    assert told == {"int8+fp8 (reference-lowbit, fused prologue of two pieces)": 2}
    for one, other in zip(whole, pieces):
        assert sqnr_db(one, other) > 100  # products of other shapes sum in another order
    model = toy_model.model()
    apply(model, LowBitAttnProcessor("int8+fp8", fused_prologue=True))
    joined.clear()
    outputs(model, **given)
    assert 3 not in joined, "hidden states were concatenated"


def test_two_pieces_are_taken_by_what_reads_them_alone(monkeypatch):
    assert prologue.TWO_PIECES is True
    given = toy_model.inputs()
    for precision, options, wanted in (
            ("int8+fp16", dict(fused_prologue=True), "int8+fp16 (reference-lowbit, fused prologue)"),
            ("int8+fp8", dict(fused_prologue=False), "int8+fp8 (reference-lowbit)"),
            ("int8+fp8", dict(fused_prologue=True, pooled=Pooled(0.9)), "pooling needs"),
            ("exact", dict(fused_prologue=True), "exact")):
        model = toy_model.model()
        apply(model, LowBitAttnProcessor(precision, **options))
        outputs(model, **given)
        assert wanted in list(ran(model))[0] and "pieces" not in list(ran(model))[0]
    model = toy_model.model()
    apply(model, LowBitAttnProcessor("int8+fp8", fused_prologue=True))
    outputs(model, **given)
    attn = model.blocks[0]
    assert attn.processor.takes_pieces(attn, None, given["video"]) and not attn.processor.takes_pieces(attn, 1, given["video"])
    assert not LowBitAttnProcessor("int8+fp8", fused_prologue=False).takes_pieces(attn, None, given["video"])
    for module in (attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k):
        hook = module.register_forward_pre_hook(lambda *call: None)  # as what brings and takes its weights
        assert not attn.processor.takes_pieces(attn, None, given["video"])
        hook.remove()
        assert attn.processor.takes_pieces(attn, None, given["video"])
    monkeypatch.setattr("lowbit_video.hook.base.traced_by_paddle", lambda q: True)
    assert not attn.processor.takes_pieces(attn, None, given["video"])


def test_a_text_of_no_tokens_is_no_piece():
    given = toy_model.inputs(text_tokens=0)
    pieces, whole, told = both(given)
    assert told == {"int8+fp8 (reference-lowbit; prologue apart: one of two pieces has no tokens)": 2}
    assert sqnr_db(pieces[0], whole[0]) > 100 and pieces[1].shape[1] == 0


def test_two_pieces_are_joined_where_steps_turn_out_to_be_apart(monkeypatch):
    given = toy_model.inputs()

    def of_another_eps(model):  # seen when the call is served
        for block in model.blocks:
            block.norm_k._epsilon = 1e-3

    def hooked(model):  # seen before
        for block in model.blocks:
            block.norm_q.register_forward_post_hook(lambda layer, given, out: out)

    for change, why in ((of_another_eps, "q's and k's norms are not of one kind"), (hooked, "the LayerNorm has hooks")):
        found = []
        for fused in (True, False):
            model = toy_model.model()
            change(model)
            apply(model, LowBitAttnProcessor("int8+fp8", fused_prologue=fused))
            found.append(outputs(model, **given))
            if fused:
                assert list(ran(model)) == [f"int8+fp8 (reference-lowbit; prologue apart: {why})"]
        for one, other in zip(*found):
            assert sqnr_db(one, other) > 100


def apart(change=lambda model: None, given=None, **options):
    model = toy_model.model()
    change(model)
    options = dict(precision="int8+fp8") | options
    apply(model, LowBitAttnProcessor(options.pop("precision"), fused_prologue=True, **options))
    outputs(model, **(given or toy_model.inputs()))
    return list(ran(model))


def test_apply_takes_it_for_what_it_makes():
    model, given = toy_model.model(), toy_model.inputs()
    apply(model, "int8+fp8", {"*.1": LowBitAttnProcessor("int8+fp8")}, fused_prologue=False)
    outputs(model, **given)
    assert [list(module.runs) for module in coverage(model).modules] == [
        [("int8+fp8 (reference-lowbit)", 1, "")], [("int8+fp8 (reference-lowbit, fused prologue of two pieces)", 1, "")]]
    with pytest.raises(TypeError, match="fused_prologue"):
        apply(model, "int8+fp8", fused_prologue="yes")


def test_why_not_is_told():
    """And nothing counts as having fallen back."""
    def hooked(model):
        for block in model.blocks:
            block.norm_q.register_forward_post_hook(lambda layer, given, out: out)

    def of_another_eps(model):
        for block in model.blocks:
            block.norm_k._epsilon = 1e-3

    def of_another_class(model):
        for block in model.blocks:
            block.norm_k = paddle.nn.Identity()

    assert apart(hooked) == ["int8+fp8 (reference-lowbit; prologue apart: the LayerNorm has hooks)"]
    assert apart(of_another_eps) == ["int8+fp8 (reference-lowbit; prologue apart: q's and k's norms are not of one kind)"]
    assert "the norm paddle.nn.layer.common.Identity is not among torch.nn" in apart(of_another_class)[0]
    assert "rotation needs" in apart(precision="int8+fp8 rotate", given=toy_model.inputs(width=128, rotary_dim=64),
                                     change=of_wide_heads)[0]
    assert "pooling needs" in apart(pooled=Pooled(0.9))[0] and "pooling needs" in apart(hooked, pooled=Pooled(0.9))[0]
    given = toy_model.inputs()
    given["rotary"] = tuple(table.astype("float64") for table in given["rotary"])
    assert "cos has dtype float64; float32" in apart(given=given)[0]


def of_wide_heads(model):
    model.blocks = toy_model.model(head_dim=64).blocks


def test_masks_shared_tokens_and_graphs_come_after_norms():
    given = toy_model.inputs()
    mask = paddle.zeros([2, 47])
    mask[:, 40:] = -1e9
    assert apart(given=dict(given, mask=mask)) == ["int8+fp8 (reference-lowbit; prologue apart: a mask was given)"]
    model = toy_model.model()
    apply(model, LowBitAttnProcessor("int8+fp8", fused_prologue=True))
    for block in model.blocks:
        block.attention_slot.around = lambda attend: attend
    outputs(model, **given)
    assert list(ran(model)) == ["int8+fp8 (reference-lowbit; prologue apart: the tokens are shared by several ranks)"]


def test_exact_attention_takes_over_with_norms_and_positions(monkeypatch):
    """Where no kernel serves the call."""
    given, exact = toy_model.inputs(), toy_model.model()
    model = toy_model.model()
    apply(model, LowBitAttnProcessor("int8+fp8", fallback="exact", backend="hopper", fused_prologue=True))
    for one, other in zip(outputs(model, **given), outputs(exact, **given)):
        np.testing.assert_array_equal(one, other)
    assert list(ran(model)) == ["exact"] and coverage(model).fallbacks


def test_a_thread_forgets_its_reason():
    with pytest.raises(KeyError), prologue.apart("one"):
        assert prologue.apart_text() == "; prologue apart: one"
        with prologue.apart(""):
            assert not prologue.apart_text()
        assert prologue.apart_text()
        raise KeyError
    assert not prologue.apart_text()


class Rounding:
    """Stands for diffusers' RMSNorm."""

    __module__, __qualname__ = "diffusers.models.normalization", "RMSNorm"

    def __init__(self, weight=None, eps=1e-5):
        self.weight, self.bias, self.eps, self.dim = weight, None, eps, (32,)


Rounding.__qualname__ = "RMSNorm"


def test_norms_by_their_class():
    like = paddle.zeros([1, 5, 2, 32])
    steps = lambda norm, like=like: prologue.steps_of(paddle_runtime, (norm, norm), like, None, 0)
    found = steps(Rounding(paddle.ones([32]))).q_norm
    assert found.kind == "rms" and found.eps == 1e-5 and found.rounds_first and found.bias is None
    assert "weight is float64, so what it gives is no float32" in steps(Rounding(paddle.ones([32], "float64")))
    assert "has no eps" in steps(Rounding(eps=None))
    assert "over [32] values, and a head has 16" in steps(Rounding(), like[..., :16])
    layer = steps(paddle.nn.LayerNorm(32, 1e-4)).k_norm
    assert layer.kind == "layer" and layer.eps == 1e-4 and not layer.rounds_first and layer.bias is not None
    assert steps(None) == Steps()


@pytest.mark.torch
@pytest.mark.parametrize("dtype, pieces", [("float32", True), ("bfloat16", False)])
def test_diffusers_model(dtype, pieces, monkeypatch):
    """Beside the same with norms and positions by its own modules, at its own dtype."""
    monkeypatch.setattr(prologue, "TWO_PIECES", pieces)
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    import diffusers

    from diffusers_models import _cogvideox

    torch.manual_seed(0)
    model, given = _cogvideox(diffusers.CogVideoXTransformer3DModel)
    model, dtype = model.to(getattr(torch, dtype)).eval(), getattr(torch, dtype)
    given = {name: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for name, x in given.items()}
    found = []
    for fused in (True, False):
        apply(model, LowBitAttnProcessor("int8+fp8", fused_prologue=fused))
        with torch.no_grad():
            found.append(model(**given, return_dict=False)[0].float().numpy())
        if fused:
            assert ran(model) == {f"int8+fp8 (reference-lowbit, fused prologue{' of two pieces' * pieces})": 2}
    assert np.abs(found[0] - found[1]).sum() <= (1e-3 if dtype == torch.float32 else 1e-2) * np.abs(found[1]).sum()


def test_what_attends_without_norms_and_positions_gets_them_computed():
    """A subclass whose attend does not take `before`, as one of users' own."""
    class Own(LowBitAttnProcessor):
        def attend(self, q, k, v, is_causal=False, scale=None, return_lse=False):
            return super().attend(q, k, v, is_causal, scale, return_lse)

    model, twin, given = toy_model.model(), toy_model.model(), toy_model.inputs()
    apply(model, Own("int8+fp8"))
    apply(twin, "int8+fp8", fused_prologue=False)
    for one, other in zip(outputs(model, **given), outputs(twin, **given)):
        np.testing.assert_array_equal(one, other)
    assert ran(model) == {"int8+fp8 (reference-lowbit; prologue apart: this attend takes no norms and positions)": 2}


def test_steps_that_stay_apart_go_to_one_kernel(monkeypatch):
    """Of every processor that was to fuse them, whatever kept it; not of one that was told to leave them to the model."""
    given, calls = toy_model.inputs(), []

    def kernel(q, k, steps, runtime):
        calls.append(steps)
        return q * 2, k * 3

    monkeypatch.setattr(prologue, "behind_steps", kernel)
    for options, around, mask, taken in (
            ({}, False, False, 0), ({}, True, False, 2), (dict(fallback="exact"), False, True, 2),
            (dict(pooled=Pooled(0.9)), False, False, 2), (dict(precision="exact"), False, False, 2),
            (dict(precision="exact"), True, False, 2), (dict(fused_prologue=False), True, False, 0)):
        model = toy_model.model()
        apply(model, LowBitAttnProcessor(**dict(precision="int8+fp8") | options))
        outputs(model, **given)
        calls.clear()
        for block in model.blocks:
            block.attention_slot.around = (lambda attend: attend) if around else None
        tokens = given["video"].shape[1] + given["text"].shape[1]
        outputs(model, **given, **(dict(mask=paddle.zeros([1, 1, 1, tokens])) if mask else {}))
        assert len(calls) == taken, (options, around, mask)
        assert all(isinstance(steps, Steps) and steps.rest is None and steps.rotary is not None for steps in calls)


def test_what_one_kernel_does_not_serve_is_left_to_the_model(monkeypatch):
    """And what it gives is what is attended."""
    given = toy_model.inputs()
    found = []
    for kernel in (lambda *call: None, lambda q, k, steps, runtime: prepared(runtime, steps, q, k),
                   lambda q, k, steps, runtime: (q, k)):
        monkeypatch.setattr(prologue, "behind_steps", kernel)
        model = toy_model.model()
        apply(model, LowBitAttnProcessor("exact"))
        found.append(outputs(model, **given))
    for number in range(2):
        assert sqnr_db(found[1][number], found[0][number]) > 100 > 40 > sqnr_db(found[2][number], found[0][number])
