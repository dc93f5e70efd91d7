"""docs/diffusers.md says what works: each of its snippets is run for each of the models that it names."""
import pathlib
import re
import types

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")
diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
import lowbit_video  # noqa: E402
from dispatch_models import MODELS, make, predict  # noqa: E402
from graph_double import doubled  # noqa: E402
from lowbit_video import register_diffusers, unregister_diffusers  # noqa: E402

import diffusers_models  # noqa: E402

pytestmark = pytest.mark.parity
PAGE = (pathlib.Path(__file__).parents[4] / "docs" / "diffusers.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.S)


class Pipe:
    """A pipeline of one step."""

    def __init__(self, name):
        self.transformer, self.inputs = make(name)

    def __call__(self, prompt):
        return predict(self.transformer, self.inputs)


class Framed(Pipe):
    """One whose call gives frames."""

    def __call__(self, prompt):
        return types.SimpleNamespace(frames=super().__call__(prompt))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("snippet", [0, 1])
def test_a_snippet_does_what_the_page_says(name, snippet, capsys):
    pipe = Pipe(name)
    exact = pipe("")
    given = {"pipe": pipe, "prompt": "a prompt"}
    exec(SNIPPETS[snippet], given)
    assert not torch.equal(given["video"], exact) and torch.equal(pipe(""), exact)
    assert snippet == 1 or re.search(r"[1-4] of [2-4] attention modules ran at low bit in every call", capsys.readouterr().out)


def test_the_compiled_snippet_is_one_graph(capsys, monkeypatch):
    torch._dynamo.reset()
    pipe = Pipe("flux")
    model = pipe.transformer
    monkeypatch.setattr(model, "compile", lambda **how: torch.nn.Module.compile(model, backend="eager", **how))  # it is quicker
    given = {"pipe": pipe, "prompt": "a prompt"}
    exec(SNIPPETS[2], given)
    assert "2 of 2 attention modules ran at low bit in every call" in capsys.readouterr().out
    unregister_diffusers(pipe)
    torch._dynamo.reset()


def test_the_snippet_of_cuda_graphs_makes_the_same_video(monkeypatch):
    """By a double of what records and replays."""
    recorded = doubled(monkeypatch)
    pipe, twin = Framed.__new__(Framed), Pipe.__new__(Pipe)
    for one in (pipe, twin):
        one.transformer, one.inputs = diffusers_models.make("cogvideox")
    given = {"pipe": pipe, "prompt": "a prompt", "lowbit_video": lowbit_video}
    exec(SNIPPETS[3], given)
    lowbit_video.apply(twin.transformer, "int8+fp8")
    assert len(recorded) == 1 and torch.equal(given["video"], twin("")) and "forward" not in vars(pipe.transformer)


def test_every_snippet_is_run_and_every_name_exists():
    assert len(SNIPPETS) == 4
    assert set(re.findall(r"`(lowbit_int\w+)`", PAGE)) <= set(register_diffusers())
    assert {"lowbit_int8_fp8", "lowbit_int8_fp8_strict"} <= set(re.findall(r"`(lowbit_int\w+)`", PAGE))
