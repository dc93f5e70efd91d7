"""A hooked diffusers transformer under torch.compile: one graph without a break, bit-equal to eager, calls counted."""
import copy
import types
import warnings

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")
diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
from torch._dynamo.utils import counters  # noqa: E402

import lowbit_video as lv  # noqa: E402
from lowbit_video.graph.tracing import traced_by_torch  # noqa: E402
from lowbit_video.hook import attend, prologue  # noqa: E402
from lowbit_video.hook.base import _run_module  # noqa: E402

pytestmark = pytest.mark.parity

FRAMES, HEAD_DIM = 2, 32


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch):
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(prologue, "TWO_PIECES", False)  # as graphs have text and video; two products round otherwise


def make(layers=2, **more):
    torch.manual_seed(0)
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=HEAD_DIM, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=10,
        num_layers=layers, sample_width=8, sample_height=8, sample_frames=5, max_text_seq_length=9, **more).eval()


def inputs(batch=1, side=8, rotary=False):
    generator = torch.Generator().manual_seed(1)
    given = dict(hidden_states=torch.randn(batch, FRAMES, 4, side, side, generator=generator),
                 encoder_hidden_states=torch.randn(batch, 9, 10, generator=generator), timestep=torch.arange(batch) + 7)
    if rotary:
        angle = torch.randn(FRAMES * side * side // 4, HEAD_DIM // 2, generator=generator).repeat_interleave(2, dim=1)
        given["image_rotary_emb"] = (angle.cos(), angle.sin())
    return given


def predict(model, given=None):
    with torch.no_grad():
        return model(**(given or inputs()), return_dict=False)[0]


def compiled_of(model, backend="eager", **more):
    return torch.compile(model, fullgraph=True, backend=backend, **more)


def calls(model):
    return [module.calls for module in lv.coverage(model).modules]


HOOKS = {
    "apply": lambda model: lv.apply(model, "int8+fp16"),
    "by hand": lambda model: model.set_attn_processor(lv.LowBitAttnProcessor("int4+fp8")),
    "exact": lambda model: model.set_attn_processor(lv.ExactAttnProcessor()),
    "by module": lambda model: lv.apply(model, "int8+fp8", {"transformer_blocks.1.*": "int2+fp16"}, fallback="exact"),
}


@pytest.mark.parametrize("hook, backend", [("apply", "eager"), ("by hand", "aot_eager"), ("by module", "eager")])
def test_one_graph_bit_equal_to_eager_and_counted(hook, backend):
    rotary = backend == "aot_eager"
    model = make(use_rotary_positional_embeddings=rotary)
    HOOKS[hook](model)
    twin = make(use_rotary_positional_embeddings=rotary)
    HOOKS[hook](twin)
    compiled = compiled_of(model, backend)
    given = inputs(rotary=rotary)
    for _ in range(2):
        assert torch.equal(predict(compiled, given), predict(twin, given))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert [module.runs for module in lv.coverage(model).modules] == [module.runs for module in lv.coverage(twin).modules]
    assert calls(model) == [2, 2]


FUSED, INSIDE = "int8+fp8 (reference-lowbit, fused prologue)", "int8+fp8 (reference-lowbit)"


def fusing(rotary=False, layers=2, **more):
    """A model whose norms weigh channels and blocks apart, and are to be fused with quantisation."""
    model = make(layers, use_rotary_positional_embeddings=rotary)
    with torch.no_grad():
        for number, block in enumerate(model.transformer_blocks, 1):
            block.attn1.norm_q.weight += 0.2 * number * torch.arange(HEAD_DIM).sin()
            block.attn1.norm_k.bias += 0.5 * torch.arange(HEAD_DIM).cos()
    model.set_attn_processor(lv.LowBitAttnProcessor(**{"precision": "int8+fp8", "fused_prologue": True} | more))
    return model


def test_exact_attention_in_a_graph_runs_eagerly_and_so_may_take_a_kernel(monkeypatch):
    seen, faster = [], attend._faster
    monkeypatch.setattr(attend, "_faster", lambda q, *rest: seen.append(traced_by_torch(q)) or faster(q, *rest))
    model = make()
    model.set_attn_processor(lv.ExactAttnProcessor())
    predict(compiled_of(model))
    assert seen == [False] * 2


@pytest.mark.parametrize("rotary", [False, True], ids=["none", "rotary"])
def test_norms_and_positions_are_the_operators_where_a_processor_fuses_them(rotary):
    model, twin, given, graphs = fusing(rotary), fusing(rotary), inputs(2, rotary=rotary), []

    def keep(graph, examples):
        graphs.append(graph.graph)
        return graph

    assert torch.equal(predict(compiled_of(model, keep), given), predict(twin, given))
    assert lv.coverage(model).variants() == lv.coverage(twin).variants() == {FUSED: 2}
    (graph,) = graphs
    called = [str(node.target) for node in graph.nodes]
    assert sum("module_attention_behind" in name for name in called) == 2 and not counters["graph_break"]
    per_head = [node.args[1] for node in graph.nodes if node.target is torch.nn.functional.layer_norm]
    assert per_head and (HEAD_DIM,) not in per_head


def test_a_graph_follows_what_is_asked_of_the_prologue(monkeypatch):
    model = fusing(layers=1)
    compiled, ran = compiled_of(model), lambda: (predict(compiled), lv.coverage(model).variants())[1]
    assert ran() == {FUSED: 1}
    model.transformer_blocks[0].attn1.processor.fused_prologue = False
    assert ran() == {FUSED: 1, INSIDE: 1}
    model.set_attn_processor(lv.LowBitAttnProcessor("int8+fp8"))
    assert ran() == {FUSED: 1}
    monkeypatch.setattr(prologue, "FUSED_PROLOGUE", False)
    assert ran() == {INSIDE: 1, FUSED: 1}
    model.set_attn_processor(lv.ExactAttnProcessor())
    assert ran() == {"exact": 1} and not counters["graph_break"]


def test_why_a_graph_has_norms_apart_is_told():
    """By the graph's compiler where it is known when the graph is made, else inside of the operator."""
    model = fusing(layers=1, pooled=lv.Pooled(0.9))
    assert torch.equal(predict(compiled_of(model)), predict(model))
    (told,) = lv.coverage(model).variants()
    assert "prologue apart: pooling needs" in told
    model, exact = (fusing(layers=1, fallback="exact", backend="hopper") for _ in range(2))
    exact.set_attn_processor(lv.ExactAttnProcessor())
    for given in (inputs(), inputs(rotary=True)):
        torch.testing.assert_close(predict(compiled_of(model), given), predict(exact, given))
    assert lv.coverage(model).variants() == {"exact": 2} and lv.coverage(model).fallbacks


def test_a_fusing_model_is_trained_exactly_or_not_at_all():
    model = fusing(layers=1, fallback="exact")
    torch.compile(model, backend="eager")(**inputs())[0].sum().backward()
    assert model.transformer_blocks[0].attn1.norm_q.weight.grad is not None
    with pytest.raises(lv.UnsupportedError, match="gradients are asked for"):
        compiled_of(fusing(layers=1))(**inputs())


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
def test_inductor_compiles_it_too(fused):
    model = fusing(layers=1, fused_prologue=fused)
    wanted = predict(model)
    model.transformer_blocks[0].attn1.compile(fullgraph=True, backend="inductor")
    got = predict(model)
    assert (got - wanted).abs().max() < 1e-3 * wanted.abs().max()  # its sums round differently, and codes with them
    assert calls(model) == [2] and lv.coverage(model).variants() == {FUSED if fused else INSIDE: 2}


def test_other_shapes_and_dynamic_ones():
    model = make(layers=1)
    HOOKS["apply"](model)
    compiled = compiled_of(model)
    for batch, side in ((1, 8), (2, 12)):
        given = inputs(batch, side)
        assert torch.equal(predict(compiled, given), predict(model, given))
    torch._dynamo.reset()
    counters.clear()
    compiled = compiled_of(model)
    for batch in (2, 3):
        given = inputs(batch)
        for name in ("hidden_states", "encoder_hidden_states", "timestep"):
            torch._dynamo.mark_dynamic(given[name], 0)
        assert torch.equal(predict(compiled, given), predict(model, given))
    assert counters["stats"]["unique_graphs"] == 1


def test_hooks_may_come_and_go_after_the_compilation():
    model = make(layers=1)
    plain, compiled = predict(model), compiled_of(model)
    assert torch.equal(predict(compiled), plain)
    for precision in ("int8+fp16", "int4+fp16"):
        lv.apply(model, precision)
        low = predict(compiled)
        assert torch.equal(low, predict(model)) and not torch.equal(low, plain) and calls(model) == [2]
    assert counters["stats"]["unique_graphs"] == 2  # one serves every processor
    while lv.remove(model):
        pass
    assert torch.equal(predict(compiled), plain)
    HOOKS["exact"](model)
    predict(compiled)
    assert calls(model) == [1]


def test_a_model_compiled_with_a_hook_is_itself_again_without_it():
    model = make(layers=1)
    plain = predict(model)
    HOOKS["apply"](model)
    compiled = compiled_of(model)
    assert not torch.equal(predict(compiled), plain)
    lv.remove(model)
    assert torch.equal(predict(compiled), plain) and not counters["graph_break"]
    assert type(model.transformer_blocks[0].attn1.processor).__name__ == "CogVideoXAttnProcessor2_0"


def test_blocks_compiled_one_by_one_share_a_graph_and_keep_their_own_counts():
    model = fusing(layers=10)  # more than torch compiles a function for
    for block in model.transformer_blocks:
        block.compile(fullgraph=True, backend="eager")
    got = predict(model)
    assert calls(model) == [1] * 10
    assert counters["stats"]["unique_graphs"] == 2  # as without a hook: the first block's tokens have strides
    for block in model.transformer_blocks:
        block._compiled_call_impl = None
    assert torch.equal(got, predict(model))


def test_a_graph_of_our_processor_does_not_run_anothers():
    with pytest.raises(TypeError, match="compiled with a lowbit_video processor and cannot run int; compile the model again"):
        _run_module(types.SimpleNamespace(processor=3))


def test_a_copy_counts_for_itself():
    model = make(layers=1)
    HOOKS["apply"](model)
    predict(compiled_of(model))
    twin = copy.deepcopy(model)
    predict(compiled_of(twin))
    assert calls(model) == [1] and calls(twin) == [1]


def test_masks_reach_the_exact_fallback_or_its_error():
    mask = torch.zeros(1, 9 + FRAMES * 16)
    mask[:, 5:12] = -1e4
    given = {**inputs(), "attention_kwargs": {"attention_mask": mask}}
    model = make(layers=1)
    lv.apply(model, "int8+fp8", fallback="exact")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = predict(compiled_of(model), given)
        assert torch.equal(got, predict(model, given)) and not torch.equal(got, predict(model))
        assert "takes a mask" in lv.coverage(model).modules[0].runs[0][2]
        HOOKS["apply"](model)
        with pytest.raises(lv.UnsupportedError, match="transformer_blocks.0.attn1': an attention mask of shape"):
            predict(compiled_of(model), given)


def test_an_error_inside_names_its_module():
    model = make(layers=1)
    HOOKS["apply"](model)
    given = inputs()
    given["hidden_states"][0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(lv.NonFiniteError, match="transformer_blocks.0.attn1"):
        predict(compiled_of(model), given)


def test_the_operator_passes_torchs_own_checks():
    model = make(layers=1)
    HOOKS["exact"](model)
    predict(model)
    attn = model.transformer_blocks[0].attn1
    q, k, v = (torch.randn(2, 20, 2, HEAD_DIM).transpose(0, 1).contiguous().transpose(0, 1) for _ in range(3))
    for mask in (None, torch.zeros(2, 20)):
        torch.library.opcheck(torch.ops.lowbit_video.module_attention, (q, k, v, mask, attn.attention_slot.key))
    text, *tensors = repr([("rms", 1e-6, True, False, False)] * 2), torch.rand(HEAD_DIM), torch.rand(HEAD_DIM)
    torch.library.opcheck(torch.ops.lowbit_video.module_attention_behind,
                          (q, k, v, tensors, 0, text, attn.attention_slot.key))


def test_training_a_compiled_model_is_refused_by_name():
    model = make(layers=1)
    HOOKS["apply"](model)
    compiled = compiled_of(model, "aot_eager")
    predict(compiled)
    with pytest.raises(lv.UnsupportedError, match="transformer_blocks.0.attn1': gradients are asked for, .* inference only"):
        compiled(**inputs())


def test_with_the_fallback_a_compiled_model_trains_exactly_and_tells():
    models = [make(layers=1) for _ in range(2)]
    models[1].set_attn_processor(lv.LowBitAttnProcessor(fallback="exact"))
    for model in (models[0], torch.compile(models[1], backend="eager")):
        model(**inputs())[0].square().sum().backward()
    wanted, got = ({name: p.grad for name, p in model.named_parameters() if p.grad is not None} for model in models)
    assert wanted.keys() == got.keys() and any("to_q" in name for name in got)
    most = max(float(grad.abs().max()) for grad in wanted.values())
    for name, grad in wanted.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-6 * most)
    (_, count, reason), = lv.coverage(models[1]).modules[0].runs
    assert count == 1 and reason == "gradients are asked for, and this attention is inference only"
