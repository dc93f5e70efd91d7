"""The shipped small model's folder: complete, small enough to ship, and loaded by the Paddle pipeline as it is."""
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("paddle", reason="paddlepaddle is not installed")
from lowbit_video import apply, coverage, remove  # noqa: E402
from lowbit_video.app.verdict import judge_video  # noqa: E402
from lowbit_video.eval.world import judge  # noqa: E402
from lowbit_video.eval.world.folder import world_of  # noqa: E402
from lowbit_video.pipelines import CogVideoXPipeline  # noqa: E402
from lowbit_video.pipelines.shared.small_model import small_model  # noqa: E402

MODEL = Path(__file__).parents[2] / "examples" / "small_cogvideox" / "model"
LARGEST_FILE, LARGEST_FOLDER = 16e6, 60e6  # bytes
CALL = dict(num_inference_steps=2, num_frames=9, height=64, width=96, seed=0, progress=False)


def test_the_folder_is_small_and_is_the_default_model():
    sizes = [path.stat().st_size for path in MODEL.rglob("*") if path.is_file()]
    assert max(sizes) < LARGEST_FILE and sum(sizes) < LARGEST_FOLDER
    assert small_model() == MODEL and world_of(MODEL) == "shapes"
    stored = json.loads((MODEL / "generation.json").read_text())
    config = json.loads((MODEL / "transformer" / "config.json").read_text())
    assert stored["num_frames"] == config["sample_frames"] and stored["height"] == 8 * config["sample_height"]
    assert config["attention_head_dim"] == 64 and config["num_attention_heads"] >= 4 and config["num_layers"] >= 6


def test_two_steps_are_finite_follow_the_prompt_and_take_the_hook():
    pipe = CogVideoXPipeline.from_pretrained(MODEL, dtype="float32", device="cpu")
    red = pipe("a red circle moves left over a blue background", **CALL).frames[0]
    assert red.shape == (9, 64, 96, 3) and np.isfinite(red).all() and red.std() > 0.02
    green = pipe("a white star spins on a striped green background", **CALL).frames[0]
    assert np.abs(red - green).mean() > 0.02, "the prompt changes nothing"
    apply(pipe, "int8+fp16")
    low = pipe("a red circle moves left over a blue background", **CALL).frames[0]
    assert 0 < np.abs(low - red).mean() < 0.02
    assert len(coverage(pipe).as_dict()["modules"]) >= 8
    assert remove(pipe)


@pytest.mark.parametrize("precision, prompt, size", [
    ("int8+fp16", "a small red circle moves left over a blue background", dict(height=64, width=96)),
    ("int4+fp8", "a large white square moves right over a green background", dict(num_frames=17, height=96, width=144))],
    ids=["int8+fp16", "int4+fp8"])
def test_a_low_bit_video_shows_what_was_asked(precision, prompt, size):
    stored = json.loads((MODEL / "generation.json").read_text())
    pipe = CogVideoXPipeline.from_pretrained(MODEL, dtype="float32", device="cpu")
    apply(pipe, precision)
    frames = pipe(prompt, num_inference_steps=5, guidance_scale=stored["guidance_scale"],
                  max_sequence_length=stored["max_sequence_length"], seed=0, progress=False,
                  **{name: size.get(name, stored[name]) for name in ("num_frames", "height", "width")}).frames[0]
    frames = np.clip(np.round(np.asarray(frames) * 255), 0, 255).astype(np.uint8)
    found = judge.score(frames, prompt)
    assert found.all, f"asked for {prompt!r}, seen: {found.scene}"
    wrong = judge.score(frames, "a large blue ring moves up on a striped red background")
    assert not (wrong.colour or wrong.shape or wrong.motion or wrong.background)


@pytest.mark.parametrize("prompt, not_asked", [
    ("a panda plays the guitar", 4), ("a red circle", 2), ("a small red circle moves left over a blue background", 0)])
def test_the_verdict_judges_only_what_the_prompt_says(prompt, not_asked):
    said = []
    verdict = judge_video(np.full((9, 64, 96, 3), 0.5, np.float32), prompt, "shapes", said.append)
    assert [verdict[part] for part in ("colour", "shape", "motion", "background")].count(None) == not_asked
    assert said[0].count("not asked for") == not_asked and said[0].count(" NO") == 4 - not_asked
    assert bool(verdict["hint"]) == (not_asked > 0)
    assert "camera" not in verdict


def test_the_long_worlds_verdict_reads_its_words_and_judges_the_camera():
    said = []
    prompt = "a red circle enters from the left and a white star spins over a striped blue background, the camera tilts up"
    verdict = judge_video(np.full((9, 64, 96, 3), 0.5, np.float32), prompt, "scenes", said.append)
    assert verdict["hint"] is None and len(said) == 1
    assert said[0].startswith("\nscorer: colour NO, shape NO, motion NO, background NO, camera NO; it sees: ")
    assert [verdict[part] for part in ("colour", "shape", "motion", "background", "camera")] == [False] * 5
    assert judge_video(np.full((9, 64, 96, 3), 0.5, np.float32), "a panda", "scenes", said.append)["hint"].startswith(
        "this small model knows two or three shapes")
