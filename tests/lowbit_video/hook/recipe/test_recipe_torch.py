"""Recipes in diffusers' models: the timestep says the step, also in a graph of torch.compile."""
import copy

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")
diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
from torch._dynamo.utils import counters  # noqa: E402

import lowbit_video as lv  # noqa: E402
from lowbit_video.hook.recipe import clock  # noqa: E402
from lowbit_video.hook.recipe.clock import COUNT_DOWN  # noqa: E402

pytestmark = pytest.mark.parity

RECIPE = lv.Recipe([{"rung": "int8+fp8"}, {"steps": "0-0.5", "rung": "int8+fp16"},
                    {"layers": "*.1.*", "heads": [0], "steps": "0.5-1", "rung": "int4+fp16"}])
FIRST = "steps 0-0.5: int8+fp16 (reference-lowbit, fused prologue)"
LAST = "steps 0.5-1: int8+fp8 (reference-lowbit, fused prologue)"


def make():
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=10,
        num_layers=2, sample_width=8, sample_height=8, sample_frames=5, max_text_seq_length=9).eval()


def predict(model, timestep, by_name=True):
    generator = torch.Generator().manual_seed(1)
    given = torch.randn(1, 2, 4, 8, 8, generator=generator), torch.randn(1, 9, 10, generator=generator)
    with torch.no_grad():
        if by_name:
            return model(*given, timestep=torch.tensor([timestep]), return_dict=False)[0]
        return model(*given, torch.tensor([timestep]), return_dict=False)[0]


def runs(model):
    return [{variant: calls for variant, calls, _ in module.runs} for module in lv.coverage(model).modules]


@pytest.mark.parametrize("backend, by_name", [("eager", False), ("aot_eager", True)])
def test_one_graph_serves_all_steps_as_eager_calls_do(backend, by_name):
    model = make()
    twin = copy.deepcopy(model)
    lv.apply(model, RECIPE)
    lv.apply(twin, RECIPE)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    predict(compiled, 999, by_name)
    predict(twin, 999, by_name)
    graphs = counters["stats"]["unique_graphs"]
    for timestep in (750, 501, 500, 250, 0):
        assert torch.equal(predict(compiled, timestep, by_name), predict(twin, timestep, by_name))
    assert runs(model) == runs(twin) and runs(model)[0] == {FIRST: 3, LAST: 3}
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]


@pytest.mark.parametrize("by_name", [False, True])
def test_what_a_graph_is_given_stays_whole_around_the_timestep(monkeypatch, by_name):
    model = make()
    lv.apply(model, RECIPE)
    monkeypatch.setattr(clock, "traced_by_torch", lambda timestep: True)
    named = {"timestep": torch.tensor([7])} if by_name else {}
    given = ("video", "text") if by_name else ("video", "text", torch.tensor([7]), "cond", "ofs")
    assert clock.clock_of(model)._begin(model, given, {"rotary": 1, **named}) == (given, {"rotary": 1, **named})
    assert clock.clock_of(model).share() == 1 - 7 / 1000


def test_the_step_that_is_told_counts_in_a_graph_too():
    model = make()
    lv.apply(model, RECIPE)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    graphs = []
    for step in range(4):
        with lv.denoising_step(model, step, 4):
            predict(compiled, 999)
        graphs.append(counters["stats"]["unique_graphs"])
    assert runs(model)[0] == {FIRST: 2, LAST: 2} and len(set(graphs)) == 1


@pytest.mark.parametrize("late", ["int8+fp8 pooled 0.5", "exact"])
def test_a_graph_computes_norms_itself_where_some_rung_does_not_fuse_them(late):
    """Its compiler fuses them with other things; inside of the operator they would be computed step by step."""
    model = make()
    twin = copy.deepcopy(model)
    recipe = lv.Recipe([{"rung": late}, {"steps": "0-0.5", "rung": "int8+fp16"}])
    lv.apply(model, recipe)
    lv.apply(twin, recipe)
    graphs = []
    compiled = torch.compile(model, fullgraph=True, backend=lambda made, examples: graphs.append(made.graph) or made)
    for timestep in (999, 0):
        torch.testing.assert_close(predict(compiled, timestep), predict(twin, timestep), atol=2e-3, rtol=0)
    called = [str(node.target) for graph in graphs for node in graph.nodes]
    assert any("module_attention" in name for name in called) and not any("behind" in name for name in called)
    told = FIRST.replace(", fused prologue", "; prologue apart: not all rungs of this layer fuse them, and a graph has one way")
    assert list(runs(twin)[0])[0] == FIRST and list(runs(model)[0])[0] == told


def test_a_copy_and_a_removed_recipe_answer_for_themselves():
    model = make()
    plain = predict(model, 0)
    hooks = [list(table) for name, table in vars(model).items() if name.startswith("_forward_")]
    lv.apply(model, RECIPE)
    twin = copy.deepcopy(model)
    predict(torch.compile(model, fullgraph=True, backend="eager"), 0)
    predict(torch.compile(twin, fullgraph=True, backend="eager"), 999)
    assert runs(model)[0] == {LAST: 1} and runs(twin)[0] == {FIRST: 1}
    assert lv.remove(model) and torch.equal(predict(model, 0), plain)
    assert hooks == [list(table) for name, table in vars(model).items() if name.startswith("_forward_")]
    predict(twin, 0)
    assert runs(twin)[0] == {FIRST: 1, LAST: 1}


def test_the_timestep_is_read_once_a_step(monkeypatch):
    from lowbit_video.runtime import torch_runtime

    model = make()
    lv.apply(model, RECIPE)
    read = []
    to_numpy = torch_runtime.to_numpy
    monkeypatch.setattr(torch_runtime, "to_numpy", lambda t: read.append(t) or to_numpy(t))
    predict(model, 3)
    assert len([t for t in read if t.dtype == torch.int64]) == 1


def test_a_pipeline_of_diffusers_says_its_schedule():
    model = make()
    pipe = type("Pipe", (), {})()
    pipe.transformer, pipe.scheduler = model, diffusers.CogVideoXDDIMScheduler(num_train_timesteps=10)
    lv.apply(pipe, RECIPE)
    predict(model, 9)
    predict(model, 5)
    assert runs(model)[0] == {FIRST: 1, LAST: 1}
    with pytest.raises(lv.UnsupportedError, match="timestep 11, and its schedule has 10"):
        predict(model, 11)


def test_models_that_are_read_are_there_and_take_a_timestep():
    import inspect

    for name in COUNT_DOWN:
        assert "timestep" in inspect.signature(getattr(diffusers, name).forward).parameters
