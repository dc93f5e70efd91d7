"""Calibration through diffusers: the same noise and latents as in Paddle, the same errors, a recipe with pooled rungs."""
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")
pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("paddle", reason="PaddlePaddle is not installed")

from lowbit_video import Recipe, pipelines  # noqa: E402
from lowbit_video.app.cli import build_parser  # noqa: E402
from lowbit_video.eval.calibrate import run as running  # noqa: E402
from lowbit_video.eval.calibrate.measure import latents_of, look, measure  # noqa: E402
from lowbit_video.eval.calibrate.pooled import PooledPlan  # noqa: E402
from lowbit_video.eval.calibrate.run import Plan, calibrate  # noqa: E402
from lowbit_video.eval.calibrate.solve import Budget  # noqa: E402
from lowbit_video.eval.calibrate.torch_pipeline import TorchPipeline  # noqa: E402
from lowbit_video.eval.compare.layers import StepClock  # noqa: E402
from lowbit_video.eval.compare.progress import Progress  # noqa: E402
from lowbit_video.eval.compare.settings import Settings, for_model  # noqa: E402

pytestmark = pytest.mark.parity
MODEL = str(Path(__file__).parents[3] / "examples" / "small_cogvideox" / "model")
SETTINGS = Settings(MODEL, steps=2, guidance=4.0, frames=17, height=96, width=128)  # 32 text and 240 video tokens
PROMPT = "a large red circle moves left over a blue background"


@pytest.fixture(scope="module")
def pipe():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield TorchPipeline(MODEL, device="cpu")
    torch.set_num_threads(threads)


def silent(*labels):
    return Progress(labels, lambda line: None)


def test_latents_and_errors_are_paddles(pipe):
    both = [pipelines.load(MODEL, dtype="float32", device="cpu"), pipe]
    ours, theirs = (latents_of(one, PROMPT, SETTINGS, 3, StepClock(silent("one")), None, "one", "") for one in both)
    np.testing.assert_allclose(theirs, ours, atol=2e-3)
    assert look(pipe, PROMPT, SETTINGS, 0, silent("look")) == (272, 32, 64)
    how = dict(seed=3, samples=1, rows=64, backend="auto")
    rungs = ["int8+fp8 pooled 0.5 always 32", "int4+fp16"]
    ours, theirs = (measure(one, PROMPT, rungs, "int4+fp16", [range(0, 1), range(1, 2)], SETTINGS, **how,
                            progress=silent("record", "probe", "probe"), peaks=True) for one in both)
    np.testing.assert_allclose(theirs.errors, ours.errors, rtol=0.1)
    np.testing.assert_allclose(theirs.gains, ours.gains, rtol=0.25)  # of INT4's errors, whose ties fall either way
    np.testing.assert_allclose(theirs.peaks, ours.peaks, rtol=0.01)
    assert (theirs.tokens, theirs.head_dim) == (272, 64)


def test_a_recipe_is_made_through_diffusers(pipe, tmp_path):
    plan = Plan(rungs=("exact", "int8+fp8"), ranges=2, pooled=PooledPlan((0.5,), least=272))
    recipe = calibrate(pipe, [PROMPT], Budget(cost=1.05), tmp_path / "r.toml", held_out=["a green ring gets smaller"],
                       settings=SETTINGS, plan=plan, say=lambda line: None)
    about = Recipe.load(tmp_path / "r.toml").about
    assert set(recipe.resolve(pipe).shares()) <= {"exact", "int8+fp8", "int8+fp8 pooled 0.5 always 32"}
    assert [text.partition(":")[0] for text in about["rungs"]] == ["exact", "int8+fp8", "int8+fp8 pooled 0.5 always 32"]
    assert about["found_error_db"][0] > 20 and about["hardware"].endswith(", cpu")


def test_the_command_reaches_diffusers(monkeypatch, tmp_path):
    (tmp_path / "p.txt").write_text("a\n")
    made, called = [], []
    monkeypatch.setattr("lowbit_video.eval.calibrate.torch_pipeline.TorchPipeline", lambda *given: made.append(given) or "pipe")
    monkeypatch.setattr(running, "calibrate", lambda *given, **named: called.append((given, named)))
    args = build_parser("calibrate").parse_args([
        "calibrate", "--framework", "torch", "--model", MODEL, "--dtype", "bfloat16", "--device", "cuda:1", "--prompts",
        str(tmp_path / "p.txt"), "--limit", "1", "--held-out", "0", "--budget", "0.5x", "--steps", "3", "--out",
        str(tmp_path / "r.toml")])
    assert args.run(args) == 0
    assert made == [(MODEL, "bfloat16", "cuda:1")] and called[0][0][0] == "pipe"
    assert called[0][1]["settings"] == for_model(MODEL, steps=3) and called[0][1]["settings"].frames == 33
