"""What docs/diffusers-frames.md says runs, and the models that it names are those that are declared."""
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("diffusers", reason="diffusers is not installed")

import lowbit_video as lv  # noqa: E402
from lowbit_video.hook import frames  # noqa: E402
from lowbit_video.hook.report import attention_modules  # noqa: E402

import diffusers_models  # noqa: E402

pytestmark = pytest.mark.torch
PAGE = (Path(__file__).parents[2] / "docs" / "diffusers-frames.md").read_text()


class Pipe:
    """A pipeline of one step."""

    def __init__(self, name):
        self.transformer, self._given = diffusers_models.make(name)

    def __call__(self, prompt):
        with torch.no_grad():
            return SimpleNamespace(frames=self.transformer(**self._given, return_dict=False)[0])


@pytest.mark.parametrize("name", ["mochi", "allegro"])
def test_the_page_s_snippets_run_and_leave_nothing_behind(name, capsys, monkeypatch):
    monkeypatch.setattr(frames, "_declared", dict(frames._declared))
    pipe = Pipe(name)
    before = {one: module.processor for one, module in attention_modules(pipe.transformer).items()}
    snippets = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    names = {"pipe": pipe, "prompt": "a panda", "TheBlock": type("TheBlock", (torch.nn.Module,), {})}
    for snippet in snippets:
        exec(snippet, names)
    assert len(snippets) == 3 and names["video"].shape == pipe("").frames[0].shape
    report = capsys.readouterr().out
    assert all(one in report for one in before) and f"{len(before)} of {len(before)} attention modules ran at low bit" in report
    assert {one: module.processor for one, module in attention_modules(pipe.transformer).items()} == before
    assert frames._declared[names["TheBlock"]] == "own" and not lv.remove(pipe)


def test_the_page_names_every_model_that_the_tests_hook():
    plain = re.sub("[^a-z0-9]", "", PAGE.partition("## What happens")[0].lower())
    assert [name for name in diffusers_models.MODELS if name not in plain] == []
