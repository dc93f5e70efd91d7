"""Rotation through the public calls: what it does on both frameworks, where it is named, and what it refuses by name."""
import numpy as np
import pytest

import lowbit_video as lv
from lowbit_video.distributed.ring import ring
from lowbit_video.distributed.ulysses import ulysses
from lowbit_video.engine.options import of_text, text_of
from lowbit_video.hook.recipe.rule import Rule

from helpers import naive_attention, qkv, sqnr_db


def drawn(**sizes):
    """With a channel of K ten times as large."""
    q, k, v = qkv(**{**dict(heads=4, kv_heads=2, q_len=150, kv_len=190), **sizes})
    k[..., 5] *= 10
    return q, k, v


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("spec", ["int8+fp16", "int4+fp8"])
def test_outliers_cost_less(framework, spec, dim):
    arrays = drawn(dim=dim)
    expected, expected_lse = naive_attention(*arrays)
    q, k, v = (framework.tensor(x, "float32") for x in arrays)
    plain = framework.numpy(lv.attention(q, k, v, spec))
    out, lse = lv.attention(q, k, v, f"{spec} rotate", return_lse=True)
    assert sqnr_db(framework.numpy(out), expected) > sqnr_db(plain, expected) + 7
    assert np.abs(framework.numpy(lse) - expected_lse).max() < 0.5
    by_argument = lv.attention(q, k, v, lv.Precision(spec, rotate=True))
    assert np.array_equal(framework.numpy(by_argument), framework.numpy(out))


def test_sequences_that_are_packed(framework):
    arrays = [x[0] for x in drawn()]
    cu = [framework.tensor(np.array(begins, np.int32), "int32") for begins in ((0, 40, 150), (0, 130, 190))]
    q, k, v = (framework.tensor(x, "float32") for x in arrays)
    out = framework.numpy(lv.attention_varlen(q, k, v, *cu, 110, 130, precision="int8+fp16 rotate"))
    for (q0, q1), (k0, k1) in (((0, 40), (0, 130)), ((40, 150), (130, 190))):
        wanted = lv.attention(*(framework.tensor(x[None], "float32") for x in (
            arrays[0][q0:q1], arrays[1][k0:k1], arrays[2][k0:k1])), "int8+fp16 rotate")
        assert np.array_equal(out[q0:q1], framework.numpy(wanted)[0])


@pytest.mark.parametrize("dim", [32, 96, 256])
def test_other_head_dims_are_refused(framework, dim):
    q = framework.tensor(qkv(q_len=10, dim=dim)[0], "float32")
    with pytest.raises(lv.UnsupportedError, match=f"rotation needs a head dim of 64 or 128, not {dim}"):
        lv.attention(q, q, q, "int8+fp16 rotate")


def test_a_graph_is_told_of_it():
    """Options travel as text; a precision does as itself or as its own text."""
    for given in ("int4+fp8 rotate", lv.Precision("int4+fp8", rotate=True)):
        options = of_text(text_of(given, "NHD", False, None))
        assert options.precision == lv.Precision("int4+fp8", rotate=True)
    assert not of_text(text_of("int4+fp8", "NHD", False, None)).precision.rotate


def test_codes_that_would_be_kept_are_refused(framework):
    q = framework.tensor(qkv(q_len=10)[0], "float32")
    with pytest.raises(lv.UnsupportedError, match="cannot be kept as codes: codes that are rotated need the largest of each"):
        lv.prequantize(q, q, q, "int8+fp8 rotate")


def test_recipes_have_it_as_a_rung():
    assert Rule("int4+fp8 rotate").as_dict() == {"rung": "int4+fp8 rotate"}
    with pytest.raises(ValueError, match="'exact' is exact: .* no rotation"):
        Rule("exact rotate")
    with pytest.raises(ValueError, match="there is no rung 'int3\\+fp8 rotate'"):
        Rule("int3+fp8 rotate")


@pytest.mark.parametrize("wrapper", [ring, ulysses], ids=["ring", "ulysses"])
@pytest.mark.parametrize("exchange", ["auto", "int4"])
def test_ranks_send_16_bits_and_say_why(wrapper, exchange):
    """Each quantises what it gets by itself."""
    paddle = pytest.importorskip("paddle", reason="paddlepaddle is not installed")
    from lowbit_video.distributed.group import Group, Traffic
    from ranks import run_threads

    arrays = drawn(heads=2, q_len=256, kv_len=256)
    exact = naive_attention(*arrays)[0]
    alone = lv.attention(*map(paddle.to_tensor, arrays), "int8+fp16 rotate").numpy()
    plain = lv.attention(*map(paddle.to_tensor, arrays), "int8+fp16").numpy()

    def work(wire):
        traffic = Traffic()
        mine = slice(wire.rank * 128, wire.rank * 128 + 128)
        attend = wrapper(lv.LowBitAttnProcessor("int8+fp16 rotate").attend, Group(wire, (0, 1), traffic), exchange)
        return attend(*(paddle.to_tensor(x[:, mine]) for x in arrays)).numpy(), traffic.as_dict()

    made = run_threads(2, work)
    out = np.concatenate([part for part, _ in made], 1)
    assert sqnr_db(out, exact) > sqnr_db(alone, exact) - 1 > sqnr_db(plain, exact) + 5
    assert all("rotated need the largest of each channel" in str(traffic) for _, traffic in made)


def test_the_report_names_it():
    paddle = pytest.importorskip("paddle", reason="paddlepaddle is not installed")
    import toy_model

    model, given = toy_model.model(head_dim=64), toy_model.inputs(width=128, rotary_dim=64)
    lv.apply(model, "int8+fp8 rotate")
    with paddle.no_grad():
        model(given["video"], given["text"], None, given["rotary"])
    assert list(lv.coverage(model).variants()) == [
        "int8+fp8 rotate (reference-lowbit; prologue apart: rotation needs each channel's largest value of normed rows first)"]
