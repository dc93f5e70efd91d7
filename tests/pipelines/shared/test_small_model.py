"""The model of a command that is told none: a checkout's, and elsewhere one line that says how to get one."""
from pathlib import Path

import pytest

from lowbit_video.app import cli
from lowbit_video.pipelines.shared import small_model
from lowbit_video.pipelines.shared.small_model import SMALL_MODEL, model_or_small

ROOT = Path(__file__).parents[3]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """As the package is where it was installed, called from a folder that is no checkout."""
    monkeypatch.setattr(small_model, "__file__", str(tmp_path / "site-packages/lowbit_video/pipelines/shared/small_model.py"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def test_a_checkouts_model_is_taken_and_named_as_from_where_one_is(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert model_or_small(None) == str(SMALL_MODEL) and (SMALL_MODEL / "model_index.json").is_file()
    monkeypatch.chdir(tmp_path)
    assert model_or_small(None) == str(ROOT / SMALL_MODEL)
    assert model_or_small("a/b") == "a/b" and model_or_small(tmp_path) == str(tmp_path)


def test_an_installed_package_takes_the_model_of_the_checkout_that_it_is_called_in(installed, tmp_path):
    folder = tmp_path / "work" / SMALL_MODEL
    folder.mkdir(parents=True)
    assert small_model.small_model() is None
    (folder / "model_index.json").write_text("{}")
    assert small_model.small_model() == folder and model_or_small(None) == str(SMALL_MODEL)


@pytest.mark.parametrize("command", [
    ["generate"], ["generate", "--compare"], ["eval", "compare", "--prompts", "p.txt"], ["eval", "layers", "--prompt", "x"]])
def test_without_a_model_every_command_says_in_one_line_how_to_get_one(installed, tmp_path, capsys, command):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    (tmp_path / "work" / "p.txt").write_text("a red ball\n")
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    for words in ("no --model is given", "source checkout", "THUDM/CogVideoX-2b", "[hub]", "generate --model random"):
        assert words in error
    assert error.count("\n") == 1
    assert {path.name for path in (tmp_path / "work").iterdir()} == {"p.txt"}  # nothing was begun


def test_the_readmes_first_lines_say_the_same_elsewhere(installed):
    pytest.importorskip("paddle", reason="PaddlePaddle is not installed")
    from lowbit_video.pipelines import CogVideoXPipeline

    with pytest.raises(FileNotFoundError, match="no such folder: examples/small_cogvideox/model; it is part of the source"):
        CogVideoXPipeline.from_pretrained(str(SMALL_MODEL))
