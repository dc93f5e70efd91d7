"""CUDA graphs without a GPU, by a double: what is recorded and when anew, what is counted, what is refused."""
import contextlib
import copy
import functools
import inspect
import types

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")
diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
from diffusers.models import attention_dispatch  # noqa: E402

import dispatch_models  # noqa: E402
import lowbit_video as lv  # noqa: E402
from graph_double import WORKED, doubled  # noqa: E402
from lowbit_video.cuda_graphs import torch_capture  # noqa: E402
from lowbit_video.cuda_graphs.forward import Setting  # noqa: E402
from lowbit_video.cuda_graphs.torch_capture import Graphed  # noqa: E402
from lowbit_video.distributed.watch import WatchedWire  # noqa: E402
from ranks import run_threads  # noqa: E402

pytestmark = pytest.mark.parity

UnsupportedError = lv.UnsupportedError
RECIPE = lv.Recipe([{"rung": "int8+fp8"}, {"steps": "0-0.5", "rung": "int8+fp16"}])


def make(layers=2):
    torch.manual_seed(0)
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=10,
        num_layers=layers, sample_width=8, sample_height=8, sample_frames=5, max_text_seq_length=9).eval()


def inputs(seed=1, batch=2, timestep=7):
    generator = torch.Generator().manual_seed(seed)
    return dict(hidden_states=torch.randn(batch, 2, 4, 8, 8, generator=generator),
                encoder_hidden_states=torch.randn(batch, 9, 10, generator=generator),
                timestep=torch.full((batch,), timestep))


def predict(model, given=None):
    with torch.no_grad():
        return model(**(given or inputs()), return_dict=False)[0]


def counts(model):
    return [{variant: calls for variant, calls, _ in module.runs} for module in lv.coverage(model).modules]


@pytest.fixture
def recorded(monkeypatch):
    """The pool of each graph's double that was recorded."""
    return doubled(monkeypatch)


@pytest.fixture(autouse=True)
def unregistered():
    """A recipe of a model that asks diffusers' dispatcher registers itself there."""
    yield
    lv.unregister_diffusers()


# --- What is given and what comes out


def test_a_graph_of_each_kind_of_call_reads_what_it_is_given(recorded):
    forward = lambda x, times=None, twice=False: {"a": (x * times * (2 if twice else 1), None), "b": [x[:1]]}
    graphed = Graphed(forward)
    first = graphed(torch.ones(2, 3), times=torch.tensor(3.0).expand(3))
    kept = torch.full((2, 3), 5.0)
    second = graphed(kept, times=torch.full((3,), 2.0))
    third = graphed(kept + 1, times=torch.full((3,), 2.0))
    assert (first["a"][0] == 3).all() and (second["a"][0] == 10).all() and (second["b"][0] == 5).all() and (kept == 5).all()
    assert (third["a"][0] == 12).all() and third["a"][1] is None
    assert (graphed(kept, times=torch.ones(3), twice=True)["a"][0] == 10).all()
    assert (graphed(kept[:1], times=torch.ones(3))["a"][0] == 5).all()
    assert (graphed(kept, times=torch.ones(3, dtype=torch.float64))["a"][0] == 5).all()
    assert (graphed.of("other", kept, times=torch.ones(3))["a"][0] == 5).all()
    assert (graphed(kept, times=torch.ones(3))["a"][0] == 5).all()
    assert len(recorded) == 5, "one for each kind"


def test_a_graph_that_gives_something_else_is_no_graph():
    stale = lambda work, pool: (out := tuple(one.clone() for one in work()), lambda: out[0].add_(1))
    with pytest.raises(AssertionError, match="the CUDA graph gives other values than the plain forward: .*close"):
        Graphed(lambda x: (x * 2,), capture=stale)(torch.ones(3))
    nothing = lambda work, pool: (work(), lambda: None)
    assert Graphed(lambda x: x * 2, capture=nothing)(torch.tensor([float("nan")])).isnan().all()


def test_what_the_host_reads_of_an_argument_is_read_again_while_it_is_recorded(recorded):
    from lowbit_video.hook.read_once import read_once

    read = []
    graphed = Graphed(lambda mask: mask * read_once(mask, "sum", lambda: read.append(1) or float(mask.sum())))
    graphed(torch.ones(2))
    assert len(read) == 1 + 3 + 1 + 1, "the capture must reach what waits for the GPU, and fail there"


def test_inference_mode_and_none_may_take_turns(recorded):
    graphed = Graphed(lambda x: x * 2)
    for mode in (True, False, True):
        with torch.inference_mode(mode):
            assert (graphed(torch.ones(2)) == 2).all()
    assert len(recorded) == 1


def test_what_no_graph_can_hold_is_refused(recorded):
    with pytest.raises(UnsupportedError, match="gradients of what the forward is given"):
        Graphed(lambda x: x)(torch.ones(2, requires_grad=True))
    with pytest.raises(UnsupportedError, match="gives a str, and a CUDA graph gives tensors alone"):
        Graphed(lambda x: (x, "text"))(torch.ones(2))
    assert not recorded


def test_numbers_that_change_from_call_to_call_do_not_pile_up_graphs(recorded):
    graphed = Graphed(lambda x, number: x * number)
    for number in range(torch_capture.MOST_KINDS):
        graphed(torch.ones(2), number)
    with pytest.warns(UserWarning, match="more than 16 kinds of call .* is to be a tensor"):
        graphed(torch.ones(2), 16)
    assert len(graphed.kinds) == 16 and (graphed(torch.ones(2), 16) == 16).all() and len(recorded) == 17


# --- A model


def test_a_models_forward_is_a_graph_until_it_is_taken_back(recorded):
    model, twin = make(), make()
    lv.apply(model, "int8+fp8")
    lv.apply(twin, "int8+fp8")
    handle = lv.cuda_graph(model)
    for seed in (1, 2, 3):
        assert torch.equal(predict(model, inputs(seed)), predict(twin, inputs(seed)))
    assert len(recorded) == 1 and "hidden_states" in inspect.signature(model.forward).parameters
    assert torch.equal(predict(model, inputs(2, batch=1)), predict(twin, inputs(2, batch=1))) and len(recorded) == 2
    assert recorded[0] is recorded[1], "kinds share their memory"
    with pytest.raises(ValueError, match="is a CUDA graph already"):
        lv.cuda_graph(model)
    copied = copy.deepcopy(model)
    assert "CudaGraph" not in type(copied.forward).__name__ and copied.forward.__self__ is copied
    handle.undo()
    handle.undo()
    assert "forward" not in vars(model) and torch.equal(predict(model), predict(twin)) and len(recorded) == 2
    with lv.cuda_graph(model):
        predict(model)
    assert "forward" not in vars(model) and len(recorded) == 3


def test_a_forward_that_was_replaced_is_put_back_and_one_that_wraps_a_graph_is_left(recorded):
    model = make()
    model.forward = own = model.forward
    with lv.cuda_graph(model):
        pass
    assert vars(model)["forward"] is own
    handle = lv.cuda_graph(model)
    graph = model.forward
    model.forward = lambda *args, **given: graph(*args, **given)
    predict(model)
    handle.undo()
    predict(model)
    assert len(recorded) == 1 and model.forward is not own


def twice(forward, *given, **named):
    return 2 * forward(*given, **named)


CHANGES = {
    "a processor set": lambda model: model.set_attn_processor(lv.LowBitAttnProcessor("int8+fp16")),
    "apply": lambda model: lv.apply(model, "int8+fp16"),
    "remove": lv.remove,
    "an attend set": lambda model: setattr(model.transformer_blocks[0].attn1.processor, "attend",
                                           lv.LowBitAttnProcessor("int8+fp16").attend),
    "what is around": lambda model: setattr(model.transformer_blocks[0].attn1.attention_slot, "around",
                                            lambda attend: functools.partial(twice, attend)),
    "a backend": lambda model: setattr(model.transformer_blocks[0].attn1.processor, "_attention_backend", "another"),
    "training": lambda model: model.train(),
    "an adapter's scale": lambda model: setattr(model.proj_out, "scaling", {"default": 2.0}),
    "order": lambda model: lv.order_tokens(model, "hilbert"),
    "a hook": lambda model: model.transformer_blocks[1].register_forward_hook(lambda module, given, out: (out[0], out[1] * 2)),
    "a hook before": lambda model: model.proj_out.register_forward_pre_hook(lambda module, given: (given[0] * 2,)),
    "another weight": lambda model: setattr(model.proj_out, "bias", torch.nn.Parameter(torch.ones_like(model.proj_out.bias))),
    "weights moved": lambda model: setattr(model.proj_out.weight, "data", model.proj_out.weight.data * 2),
    "another module without weights": lambda model: setattr(model.transformer_blocks[0].norm1, "silu", torch.nn.ReLU().eval()),
    "another module": lambda model: setattr(model, "proj_out", copy.deepcopy(model.proj_out)),
    "a forward of a part": lambda model: setattr(model.proj_out, "forward", functools.partial(twice, model.proj_out.forward)),
    "compiled": lambda model: setattr(model.proj_out, "_compiled_call_impl", model.proj_out._call_impl)}


@pytest.mark.parametrize("change", list(CHANGES))
def test_another_setting_records_anew_and_forgets_what_was(change, recorded):
    model, twin = make(), make()
    for one in (model, twin):
        lv.apply(one, "int8+fp8")
    with lv.cuda_graph(model):
        for one in (model, twin):
            predict(one)
            predict(one)
        CHANGES[change](model)
        CHANGES[change](twin)
        for seed in (1, 2):
            assert torch.equal(predict(model, inputs(seed)), predict(twin, inputs(seed)))
        assert len(recorded) == 2 and len(model.forward._graphed.kinds) == 1 and recorded[0] is not recorded[1]
        assert counts(model) == counts(twin), "what a stale graph was replayed for is not counted"


def test_the_setting_is_looked_at_while_a_graph_runs(recorded, monkeypatch):
    model, order = make(), []
    with lv.cuda_graph(model) as handle:
        predict(model)
        (held, out, replay, counted), kind = *handle._graphed.kinds.values(), *handle._graphed.kinds
        handle._graphed.kinds[kind] = held, out, lambda: (order.append("launched"), replay()), counted
        of = Setting.of.__func__
        monkeypatch.setattr(Setting, "of", classmethod(lambda cls, *given, **more: order.append("looked") or of(
            cls, *given, **more)))
        predict(model)
        assert order == ["launched", "looked"]


def test_memory_that_a_stale_graph_reads_once_more_stays_until_then(recorded):
    model = make()
    with lv.cuda_graph(model) as handle:
        predict(model)
        there = {storage.data_ptr() for storage in handle._setting.held}
        assert {parameter.data_ptr() for parameter in model.parameters()} <= there
        model.proj_out.weight.data = model.proj_out.weight.data.clone()
        assert model.proj_out.weight.data_ptr() not in there
        predict(model)
        assert model.proj_out.weight.data_ptr() in {storage.data_ptr() for storage in handle._setting.held}


def test_an_argument_elsewhere_is_refused_and_the_graphs_stay(recorded):
    model = make()
    with lv.cuda_graph(model):
        predict(model)
        with pytest.raises(UnsupportedError, match="argument hidden_states of the forward is on meta and the model on cpu"):
            predict(model, {**inputs(), "hidden_states": inputs()["hidden_states"].to("meta")})
        predict(model)
        assert len(recorded) == 1


def test_weights_written_in_place_are_those_that_a_graph_reads(recorded):
    model = make()
    with lv.cuda_graph(model), torch.no_grad():
        first = predict(model)
        model.proj_out.weight.mul_(2)
        assert not torch.allclose(predict(model), first) and len(recorded) == 1


def test_steps_of_a_recipe_that_differ_have_graphs_of_their_own(recorded):
    model, twin = make(), make()
    for one in (model, twin):
        lv.apply(one, RECIPE)
    with lv.cuda_graph(model):
        for timestep in (999, 400, 800, 100):
            assert torch.equal(predict(model, inputs(timestep=timestep)), predict(twin, inputs(timestep=timestep)))
        for step in (0, 2, 1, 3):
            with lv.denoising_step(model, step, 4), lv.denoising_step(twin, step, 4):
                assert torch.equal(predict(model), predict(twin))
    assert len(recorded) == 2 and counts(model) == counts(twin)
    assert sorted(counts(model)[0].values()) == [4, 4]


def test_a_model_that_asks_a_dispatcher_is_counted_and_takes_recipes(recorded):
    models = [dispatch_models.make("wan")[0] for _ in range(2)]
    given = dispatch_models.make("wan")[1]
    model, twin = models

    def both(timestep):
        own = {**given, "timestep": torch.full_like(given["timestep"], timestep)}
        assert torch.equal(predict(model, own), predict(twin, own))

    with lv.cuda_graph(model):
        for number, recipe in enumerate((RECIPE, *(lv.Recipe([{"rung": rung}]) for rung in ("int4+fp16", "int8+fp8"))), 1):
            for one in models:
                lv.apply(one, recipe)
            recorded.clear()
            for timestep in (999, 100, 800, 300):
                both(timestep)
            assert len(recorded) == (2 if recipe is RECIPE else 1) and counts(model) == counts(twin)
            assert sum(counts(model)[0].values()) == 4 * number
        for one in models:
            assert all([lv.remove(one) for _ in range(number)])
        recorded.clear()
        both(500)
        with attention_dispatch.attention_backend("_native_math"):
            both(500)
            both(400)
        assert len(recorded) == 2


def test_a_replay_counts_what_its_forward_did_and_recording_no_more_than_one(recorded):
    model = make()
    lv.apply(model, "int8+fp8 pooled 0.5 always 9")
    predict(model)
    with lv.cuda_graph(model):
        once = [(list(module.runs), module.tiles) for module in lv.coverage(model).modules]
        assert all(calls == 1 for runs, _ in once for _, calls, _ in runs) and once[0][1]
        for _ in range(4):
            predict(model)
        for module, (runs, tiles) in zip(lv.coverage(model).modules, once):
            assert module.runs == tuple((variant, 5, reason) for variant, _, reason in runs)
            assert module.tiles == tuple((variant, 5 * kept, 5 * pooled) for variant, kept, pooled in tiles)
        model.transformer_blocks[0].attn1.processor.records.clear()
        predict(model)
        assert [module.calls for module in lv.coverage(model).modules] == [1, 1]


def test_a_recording_that_fails_counts_one_forward(recorded, monkeypatch):
    model = make()
    lv.apply(model, "int8+fp8")

    def failing(work, pool):
        work()
        raise UnsupportedError("no")

    monkeypatch.setattr(torch_capture, "captured", failing)
    with lv.cuda_graph(model), pytest.raises(UnsupportedError, match="no"):
        predict(model)
    assert [module.calls for module in lv.coverage(model).modules] == [1, 1]


@pytest.mark.parametrize("first", ["parallelize", "cuda_graph"])
@pytest.mark.parametrize("degrees", [dict(ulysses=2, cfg=1), dict(ring=2, cfg=1), dict(cfg=2)], ids=str)
def test_several_ranks_share_what_is_a_graph_in_either_order(first, degrees, recorded):
    models = [make() for _ in range(4)]  # here: threads share one generator
    for model in models:
        lv.apply(model, "int8+fp8")

    def told(model, handle):
        return counts(model), handle.mesh.traffic.as_dict(), handle.mesh.wire.state.count

    def work(wire):
        model, plain = models[wire.rank], models[2 + wire.rank]
        with lv.parallelize(plain, wire=WatchedWire(wire), **degrees) as handle:
            handle.mesh.wire.state.count = 0
            wanted = [predict(plain, inputs(seed)) for seed in (1, 2, 3, 4)]
            should = told(plain, handle)
        with contextlib.ExitStack() as around:
            if first == "cuda_graph":
                around.enter_context(lv.cuda_graph(model))
                alone = predict(model)
                model.transformer_blocks[0].attn1.processor.records.clear()
            handle = around.enter_context(lv.parallelize(model, wire=WatchedWire(wire), **degrees))
            handle.mesh.wire.state.count, made = 0, []
            if first == "parallelize":
                made += [predict(model, inputs(1))]
                around.enter_context(lv.cuda_graph(model))
            begun, handle.mesh.wire.state.count = handle.mesh.wire.state.count, 0
            made += [predict(model, inputs(1 + len(made)))]
            handle.mesh.wire.state.count //= 1 if degrees.get("cfg") == 2 else WORKED  # these exchanges were all begun
            handle.mesh.wire.state.count += begun
            made += [predict(model, inputs(seed)) for seed in range(1 + len(made), 5)]
            is_told = told(model, handle)
            graph = model.forward
        after = predict(model) if first == "cuda_graph" else None
        assert first == "parallelize" or torch.equal(after, alone)
        return made, wanted, is_told, should, len(graph._graphed.kinds) if graph._graphed else 0

    for made, wanted, is_told, should, _ in run_threads(2, work):
        assert all(torch.equal(one, other) for one, other in zip(made, wanted, strict=True))
        assert is_told == should and should[1]["sent_total"] > 0
    assert len(recorded) == (2 if first == "parallelize" else 4), "once a rank and setting"


def test_compiled_blocks_are_held(recorded):
    model, twin = make(), make()
    for one in (model, twin):
        lv.apply(one, "int8+fp8")
    torch._dynamo.reset()
    ran = []

    def backend(module, example):
        return lambda *given: ran.append(1) or module.forward(*given)

    with lv.cuda_graph(model):
        for block in model.transformer_blocks:
            block.compile(backend=backend)
        for seed in (1, 2):
            assert torch.equal(predict(model, inputs(seed)), predict(twin, inputs(seed)))
        assert len(recorded) == 1 and len(ran) == 2 * (WORKED + 2)
    torch._dynamo.reset()


# --- What is refused


def test_models_that_no_graph_can_be_of_are_refused():
    with pytest.raises(UnsupportedError, match=r"are on cpu; .* one NVIDIA GPU and stays there: move it \(pipe.to\('cuda'\)\)"):
        lv.cuda_graph(make())
    with pytest.raises(TypeError, match="neither a pipeline"):
        lv.cuda_graph(3)
    paddles = types.SimpleNamespace(named_sublayers=iter, forward=print)
    with pytest.raises(UnsupportedError, match=r"no PyTorch model, and CUDA graphs .* pipe.compile\(\)"):
        lv.cuda_graph(paddles)
    model = make()
    model.compile(backend="eager")
    with pytest.raises(UnsupportedError, match="the whole forward of this CogVideoXTransformer3DModel is compiled"):
        lv.cuda_graph(model)


def test_a_model_on_several_devices_is_refused(recorded):
    model = make()
    model.proj_out = torch.nn.Linear(2, 2, device="meta")
    with pytest.raises(UnsupportedError, match="are on cpu, meta; "):
        lv.cuda_graph(model)


def test_calls_that_no_graph_can_be_of_are_refused(recorded):
    model, given = make(), inputs()
    with lv.cuda_graph(model):
        with pytest.raises(UnsupportedError, match="gradients of the model's weights"):
            model(**given)
        with torch.no_grad(), pytest.raises(UnsupportedError, match="argument timestep of the forward is on meta and"):
            model(**{**given, "timestep": given["timestep"].to("meta")})
        with torch.no_grad(), pytest.raises(UnsupportedError, match="argument 0 of the forward is on meta and"):
            model(given["hidden_states"].to("meta"), given["encoder_hidden_states"], timestep=given["timestep"])
        assert not recorded
        model.requires_grad_(False)
        model(**given)
        assert len(recorded) == 1
