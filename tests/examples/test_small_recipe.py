"""Recipes that are shipped: the small model's fits it, and each can be read and is listed where readers look."""
from pathlib import Path

import pytest

from lowbit_video import Recipe
from lowbit_video.precision import PRESETS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "small_cogvideox"


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


def test_the_readme_says_what_the_recipe_does():
    about = Recipe.load(FOLDER / "recipe.toml").about
    row = next(line for line in (FOLDER / "README.md").read_text().splitlines() if line.startswith("| the recipe |"))
    (found,) = about["found_error_db"]
    cells = [float(cell) for cell in row.split("|")[2:-1]]
    assert cells == pytest.approx([about["predicted_cost"], about["predicted_error_db"], found], abs=0.051)
    assert about["predicted_spread_db"][0] <= about["predicted_error_db"] <= about["predicted_spread_db"][1]


def test_each_recipe_that_is_shipped_is_listed_and_says_where_it_comes_from():
    page, readme = (ROOT / "docs" / "recipes.md").read_text(), (ROOT / "README.md").read_text()
    shipped = sorted(path.relative_to(ROOT) for path in (ROOT / "examples").rglob("*.toml"))
    assert Path("examples/small_cogvideox/recipe.toml") in shipped
    for path in shipped:
        about = Recipe.load(ROOT / path).about
        assert f"(../{path})" in page, f"docs/recipes.md does not link {path}"
        assert {"model", "prompts", "order", "budget", "predicted_error_db", "found_error_db", "cost_table",
                "rungs", "versions", "commit"} <= set(about), f"{path} lacks what calibrate writes"
        assert (ROOT / about["model"]).is_dir()
    presets = {path.stem for path in (ROOT / "lowbit_video" / "hook" / "recipe").glob("*.toml")}
    assert presets == set(PRESETS) and all(f"`{name}`" in page and f'"{name}"' in readme for name in presets)
