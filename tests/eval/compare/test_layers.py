"""The layer table: it points at the planted layer and heads, its shares add up, it survives saving, it can choose."""
import inspect
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("paddle", reason="PaddlePaddle is not installed")
sys.path.insert(0, str(Path(__file__).parents[1]))

from planted import Noise, SwapHeads, ZeroTail, only_in_layer_1  # noqa: E402
from toy_pipeline import ToyPipeline  # noqa: E402

from lowbit_video import Recipe  # noqa: E402
from lowbit_video.app.cli import main  # noqa: E402
from lowbit_video.eval import cli  # noqa: E402
from lowbit_video.eval.compare import layers  # noqa: E402
from lowbit_video.eval.compare.candidates import Candidate  # noqa: E402
from lowbit_video.eval.compare.layer_table import LayerTable, as_text  # noqa: E402
from lowbit_video.eval.compare.layers import Gated, StepClock, fit_shares, measure_layers, step_groups  # noqa: E402
from lowbit_video.eval.compare.progress import Progress  # noqa: E402
from lowbit_video.eval.compare.settings import Settings  # noqa: E402
from lowbit_video.hook import order  # noqa: E402
from lowbit_video.hook.processors import LowBitAttnProcessor  # noqa: E402

PLANTED = "transformer_blocks.1.attn1"
STEPS = 4


@pytest.fixture(scope="module")
def pipe():
    return ToyPipeline()


@pytest.fixture(scope="module")
def table(pipe):
    candidates = ["int8+fp16", "int2+fp16", Candidate("swap", only_in_layer_1), Candidate("tail", ZeroTail)]
    return measure_layers(pipe, "a red ball", candidates, settings=Settings("toy", steps=STEPS), say=lambda line: None)


def test_the_table_points_at_the_planted_layer_and_heads(table):
    shares = table.by_layer("swap")
    assert shares[PLANTED] == pytest.approx(1.0) and set(shares) == {f"transformer_blocks.{i}.attn1" for i in range(3)}
    layer, _, head, _ = table.worst("swap", 1)[0]
    assert layer == PLANTED and head in (0, 1)
    sqnr = table.of("swap", "sqnr")
    assert (sqnr[1] < 10).all() and (sqnr[[0, 2]] == 200).all()  # exact elsewhere, to the bit
    assert (table.layer_error[2] > 1e-3).tolist() == [False, True, False]


@pytest.mark.parametrize("defect", [Noise, SwapHeads, ZeroTail])
@pytest.mark.parametrize("measured_shares", [False, True], ids=["local", "measured"])
def test_the_table_points_at_the_layer_of_each_defect(pipe, defect, measured_shares):
    planted = Candidate(defect.__name__, lambda: only_in_layer_1(defect))
    table = measure_layers(pipe, "a red ball", [planted], settings=Settings("toy", steps=2), measured_shares=measured_shares,
                           say=lambda line: None)
    assert max(table.by_layer(planted.label), key=table.by_layer(planted.label).get) == PLANTED
    assert table.by_layer(planted.label)[PLANTED] == pytest.approx(1.0)
    assert {place[0] for place in table.worst(planted.label, 4)} == {PLANTED}


def test_errors_rank_as_they_should(table):
    assert (table.of("int8+fp16", "sqnr") > 30).all()
    assert (table.of("int2+fp16", "sqnr") < table.of("int8+fp16", "sqnr") - 10).all()
    assert (table.of("tail", "max_error") > table.of("int8+fp16", "max_error")).all()
    assert table.floor_error < 1e-5 < table.latent_error[0] < table.latent_error[1]
    for name in ("cosine", "relative_l1", "rmse"):
        assert table.of("int2+fp16", name).shape == (3, STEPS, 2)


def test_shares_sum_to_one_and_to_what_was_measured(table):
    for c, candidate in enumerate(table.candidates):
        share = table.of(candidate)
        assert share.sum() == pytest.approx(1.0, abs=1e-5) and (share >= 0).all()
        measured = np.square(table.layer_error[c])
        assert np.allclose(share.sum(axis=(1, 2)), measured / measured.sum(), atol=0.02)


def test_the_pipeline_is_left_as_it_was(pipe, table):
    assert {type(m.attn1.processor).__name__ for m in pipe.transformer.transformer_blocks} == {"ExactAttnProcessor"}


def test_saved_and_read_again(table, tmp_path):
    table.save(tmp_path / "layers.npz")
    again = LayerTable.load(tmp_path / "layers.npz")
    assert (again.candidates, again.layers, again.about) == (table.candidates, table.layers, table.about)
    assert np.allclose(again.share, table.share) and np.allclose(again.of("tail", "rmse"), table.of("tail", "rmse"))
    assert again.by_layer("swap") == pytest.approx(table.by_layer("swap"))
    np.savez(tmp_path / "other.npz", x=1)
    with pytest.raises(ValueError, match="not a layer table"):
        LayerTable.load(tmp_path / "other.npz")
    with pytest.raises(KeyError, match="there are: int8"):
        table.of("int3+fp16")
    with pytest.raises(KeyError, match="there are: share"):
        table.of("tail", "psnr")


def test_a_bit_width_per_layer_can_be_chosen(table):
    loose = table.choose(1e9, order=["int2+fp16", "int8+fp16"])
    assert set(loose.values()) == {"int2+fp16"} and set(loose) == set(table.layers)
    tight = table.choose(35.0, "sqnr", order=["int2+fp16", "int8+fp16"])
    assert set(tight.values()) <= {"int8+fp16"}
    assert table.choose(0.0, order=["int2+fp16"]) == {}


@pytest.mark.parametrize("figure, within, beyond", [("relative_l1", 1.001, 0.999), ("sqnr", 0.999, 1.001)])
def test_a_limit_just_above_the_least_error_chooses_and_just_below_does_not(figure, within, beyond):
    """Two candidates, the cheaper one worse; three layers, the middle one best; means over two steps and two heads."""
    means = np.array([[0.5, 0.3, 0.4], [0.2, 0.1, 0.3]]) if figure == "relative_l1" else np.array([[9., 12, 10], [33, 35, 34]])
    errors = means[:, :, None, None] * np.array([[0.5, 1.0], [1.0, 1.5]])
    table = LayerTable(["cheap", "dear"], ["a", "b", "c"], {figure: errors}, errors, *[np.zeros(2)] * 3, 0.0, {})
    assert table.choose(means[1, 1] * within, figure) == {"b": "dear"}
    assert table.choose(means[1, 1] * beyond, figure) == {}
    assert table.choose(means[0, 2] * within, figure) == {"a": "dear", "b": "cheap", "c": "cheap"}
    assert table.choose(means[0, 0] * within, figure, order=["dear", "cheap"]) == dict.fromkeys("abc", "dear")


def test_a_gate_opens_in_its_steps_only():
    clock = StepClock(Progress([], print))
    gate = Gated(lambda *given, **named: ("inside", given, named), clock, range(1, 3))
    assert {"image_rotary_emb", "temb"} <= set(inspect.signature(gate.__call__).parameters)  # all that diffusers then passes
    gate.outside = lambda *given, **named: ("outside", given, named)
    for clock.step, where in enumerate(("outside", "inside", "inside", "outside")):
        assert gate(1, 2, mask=3) == (where, (1, 2), {"mask": 3})


@pytest.mark.parametrize("step", [0, 1])
def test_an_error_of_one_group_of_steps_is_measured_there(pipe, monkeypatch, step):
    """With as many groups as steps: what acts in one step alone reaches the latents as that group's error."""
    clock = StepClock(Progress([], print))
    monkeypatch.setattr(layers, "StepClock", lambda progress: clock)
    planted = Candidate("planted", lambda: Gated(LowBitAttnProcessor("int2+fp16"), clock, range(step, step + 1)))
    table = measure_layers(pipe, "a red ball", [planted], settings=Settings("toy", steps=2), say=lambda line: None)
    assert table.step_error.shape == (1, 2)
    assert table.step_error[0, 1 - step] == 0 < table.step_error[0, step] == pytest.approx(table.latent_error[0])
    assert table.of("planted")[:, 1 - step].sum() == 0 and table.of("planted")[:, step].sum() == pytest.approx(1.0)


def test_the_text_names_the_culprit(table):
    text = as_text(table)
    assert "swap: the largest share" in text and PLANTED in text and "final latent error" in text


def test_fit_shares_by_hand():
    share = fit_shares(np.ones((2, 2, 1)), np.array([3.0, 4.0]), np.array([1.0, 1.0]), [range(0, 1), range(1, 2)])
    assert np.allclose(share[:, :, 0], [[9 / 50, 9 / 50], [16 / 50, 16 / 50]])
    share = fit_shares(np.ones((2, 3, 1)), np.array([3.0, 4.0]), np.array([1.0, 2.0]), [range(0, 2), range(2, 3)])
    assert np.allclose(share[:, :, 0], np.outer([9 / 25, 16 / 25], [0.5 / 5, 0.5 / 5, 4 / 5]))
    assert not fit_shares(np.zeros((2, 2, 1)), np.zeros(2), np.zeros(2), step_groups(2)).any()


def test_a_recipe_errs_as_the_rung_of_each_layer_head_and_step(pipe, table):
    rules = [{"rung": "int8+fp16"}, {"layers": PLANTED, "heads": "1", "steps": "0.5-1", "rung": "int2+fp16"}]
    mine = Candidate("mine", lambda: Recipe(rules))
    found = measure_layers(pipe, "a red ball", [mine], settings=Settings("toy", steps=STEPS), say=lambda line: None)
    coarse = np.zeros((3, STEPS, 2), bool)
    coarse[1, 2:, 1] = True
    wanted = np.where(coarse, table.of("int2+fp16", "sqnr"), table.of("int8+fp16", "sqnr"))
    np.testing.assert_allclose(found.of("mine", "sqnr"), wanted, atol=1e-3)
    assert found.worst("mine", 1)[0][:3] in [(PLANTED, 2, 1), (PLANTED, 3, 1)] and found.about["order"] == "raster"
    assert found.layer_error[0].argmax() == 1 and found.step_error[0][2:].min() > 3 * found.step_error[0][:2].max()
    with pytest.raises(ValueError, match="names no attention module"):
        measure_layers(pipe, "a red ball", [Candidate("none", lambda: Recipe([*rules, {"layers": "no", "rung": "exact"}]))])


def test_a_recipe_of_another_order_is_warned_of_and_the_command_takes_the_order(pipe, monkeypatch, tmp_path):
    Recipe([{"rung": "int8+fp16"}], {"order": "hilbert"}).save(tmp_path / "mine.toml")
    asked = ["eval", "layers", "--prompt", "a", "--precisions", str(tmp_path / "mine.toml"), "--local-shares", "--out",
             str(tmp_path / "layers.npz")]
    orders = []
    monkeypatch.setattr(cli, "load", lambda args: (pipe, Settings("toy", steps=1)))
    monkeypatch.setattr(order, "order_tokens", lambda pipe, named: orders.append(named))  # which a toy has none of
    with pytest.warns(UserWarning, match="mine.toml was calibrated with the tokens in the order 'hilbert'"):
        assert main(asked) == 0
    monkeypatch.setattr(pipe.transformer, "token_order", "hilbert", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert main([*asked, "--order", "hilbert"]) == 0
    assert orders == ["hilbert"] and LayerTable.load(tmp_path / "layers.npz").about["order"] == "hilbert"


def test_local_shares_need_one_run_only(pipe):
    said = []
    table = measure_layers(pipe, "x", ["int4+fp16"], settings=Settings("toy", steps=2), measured_shares=False, say=said.append)
    assert len(said) == 2 and table.share.sum() == pytest.approx(1.0) and np.isnan(table.latent_error).all()
    with pytest.raises(ValueError, match="no candidates"):
        measure_layers(pipe, "x", [])
