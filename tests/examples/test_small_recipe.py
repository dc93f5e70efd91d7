"""The recipe that is shipped with the small model fits it."""
from pathlib import Path

import pytest

from lowbit_video import Recipe

FOLDER = Path(__file__).parents[2] / "examples" / "small_cogvideox"


def test_the_shipped_recipe_fits_the_small_model():
    pytest.importorskip("paddle", reason="paddlepaddle is not installed")
    from lowbit_video.pipelines import CogVideoXPipeline

    pipe = CogVideoXPipeline.from_pretrained(FOLDER / "model", device="cpu", vae=None, text_encoder=None, tokenizer=None)
    recipe = Recipe.load(FOLDER / "recipe.toml")
    table = recipe.resolve(pipe)
    assert len(table.layers) == 8 and table.has_steps and set(table.shares()) == {"int8+fp8", "int8+fp16"}
    assert recipe.about["predicted_cost"] <= 1.03 < recipe.about["predicted_cost"] + 0.01
    shares = table.shares()
    assert recipe.about["predicted_cost"] == pytest.approx(shares["int8+fp8"] + 1.0523 * shares["int8+fp16"], abs=1e-3)
