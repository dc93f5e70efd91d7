"""The shipped small models against diffusers: one folder, the same noise, the same video.

    SMALL_MODEL_FULL=1 pytest -s -m parity tests/parity/test_small_model_live.py -k small

takes the small model's own clip length and schedule, as its card quotes it; by default the test is short: 9 frames, 4 steps,
the long model at a quarter of its height and width.
"""
import json
import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("paddle", reason="paddlepaddle is not installed")
from lowbit_video.eval.metrics.psnr import psnr  # noqa: E402
from lowbit_video.pipelines import CogVideoXPipeline  # noqa: E402

torch = pytest.importorskip("torch", reason="needs PyTorch")
diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("transformers", reason="needs transformers")
pytestmark = pytest.mark.parity

FOLDER = Path(__file__).parents[2] / "examples" / "small_cogvideox"
FULL = os.environ.get("SMALL_MODEL_FULL", "0") not in ("", "0")
CASES = {"small": (FOLDER / "model", "a small red circle moves left over a blue background", {}),
         "long": (FOLDER / "long" / "model",
                  "a large red circle enters from the left and a white star spins over a striped blue background",
                  {"height": 96, "width": 128})}
LEAST_PSNR_DB = 45.0


@pytest.mark.parametrize("name", CASES)
def test_paddle_makes_the_video_that_diffusers_makes(name):
    model, caption, smaller = CASES[name]
    stored = json.loads((model / "generation.json").read_text())
    call = {key: value for key, value in stored.items() if key not in ("fps", "world")}
    if not FULL:
        call.update(num_inference_steps=4, num_frames=9, **smaller)
    frames, height, width = (call[key] for key in ("num_frames", "height", "width"))
    shape = (1, (frames - 1) // 4 + 1, 16, height // 8, width // 8)
    noise = np.random.default_rng(0).standard_normal(shape).astype(np.float32)

    theirs = diffusers.CogVideoXPipeline.from_pretrained(model, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    wanted = theirs(caption, latents=torch.from_numpy(noise), output_type="np", **call).frames[0]
    del theirs
    ours = CogVideoXPipeline.from_pretrained(model, dtype="float32", device="cpu")
    got = ours(caption, latents=noise, progress=False, output_type="np", **call).frames[0]

    assert got.shape == wanted.shape == (frames, height, width, 3)
    assert np.asarray(wanted).std() > 0.05  # a flat video would agree with anything
    square = float(np.square(got.astype(np.float64) - wanted).mean())
    whole_db = -10 * np.log10(max(square, 1e-20))
    per_frame = np.asarray(psnr(got, np.asarray(wanted, np.float32)))
    made = f"{frames} frames, {call['num_inference_steps']} steps, float32"
    print(f"{made}: {whole_db:.1f} dB over the video, worst frame {per_frame.min():.1f} dB")
    assert whole_db >= LEAST_PSNR_DB and per_frame.min() >= LEAST_PSNR_DB
