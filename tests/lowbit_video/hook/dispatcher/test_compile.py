"""torch.compile of models on our backends: one graph, equal to eager to the bit, its calls counted; masks too."""
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")
diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402

from dispatch_models import make, predict  # noqa: E402
from lowbit_video import UnsupportedError, coverage, register_diffusers  # noqa: E402

pytestmark = pytest.mark.parity
INT8 = "lowbit_int8_fp8"


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def ready(name):
    model, inputs = make(name)
    register_diffusers(model)
    model.set_attention_backend(INT8)
    return model, inputs, predict(model, inputs)


def test_a_whole_model_is_one_graph():
    model, inputs, eager = ready("wan")
    before = [m.runs for m in coverage(model).modules]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(predict(compiled, inputs), eager) and counters["stats"]["unique_graphs"] == 1
    after = [m.runs for m in coverage(model).modules]
    assert after == [tuple((what, 2 * calls, why) for what, calls, why in runs) for runs in before]
    model.set_attention_backend("native")
    native = predict(model, inputs)
    assert torch.equal(predict(compiled, inputs), native) and not torch.equal(native, eager)


def test_blocks_share_a_graph_and_are_counted_apart():
    model, inputs, eager = ready("wan")
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert torch.equal(predict(model, inputs), eager)
    assert counters["stats"]["unique_graphs"] == 1 and [m.calls for m in coverage(model).modules] == [2] * 4


def test_a_graph_follows_the_mask_that_it_is_given():
    model, inputs, eager = ready("hunyuan")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(predict(compiled, inputs), eager)
    inputs["encoder_attention_mask"] = (torch.arange(24) < torch.tensor([[3], [24]])).long()
    wanted = predict(model, inputs)
    assert torch.equal(predict(compiled, inputs), wanted) and not torch.equal(wanted, eager)
    assert counters["stats"]["unique_graphs"] == 1
    assert coverage(model).variants() == {"int8+fp8 (reference-lowbit, leading keys)": 8}


def test_a_graph_decides_by_the_masks_values():
    register_diffusers()
    q, k, v = torch.randn(3, 2, 70, 2, 64)
    attend = lambda mask, backend=INT8: dispatch_attention_fn(q, k, v, mask, backend=AttentionBackendName(backend))
    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    mask = torch.arange(70) < torch.tensor([[40], [70]])
    assert torch.equal(compiled(mask), attend(mask)) and not torch.equal(compiled(mask), attend(mask, "native"))
    mask[1, 3] = False
    assert torch.equal(compiled(mask), attend(mask, "native"))
    assert counters["stats"]["unique_graphs"] == 1


def test_every_choice_of_a_call_reaches_its_operator_and_a_mask_has_one_of_its_own():
    register_diffusers()
    q, k, v = torch.randn(3, 2, 70, 2, 64)
    names = []

    def keep(graph, _):
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def attend(mask, **choices):
        own = {"return_lse": choices.pop("return_lse", False)}
        return dispatch_attention_fn(q, k, v, mask, attention_kwargs=own, backend=AttentionBackendName(INT8), **choices)

    compiled = torch.compile(attend, fullgraph=True, backend=keep)
    for choices in ({"is_causal": True, "scale": 0.3, "return_lse": True}, {"scale": 0.3}):
        for got, wanted in zip(compiled(None, **choices), attend(None, **choices)):
            assert torch.equal(got, wanted)
    assert not any("key_lengths" in name for name in names)
    compiled(torch.arange(70) < torch.tensor([[40], [70]]))
    assert sum("lowbit_video.key_lengths" in name for name in names) == 1  # read by an operator, which a graph may share


def test_operators_tell_the_truth_of_their_shapes():
    from torch.library import opcheck

    from lowbit_video.hook.dispatcher.operator import dispatched_op, key_lengths_op

    q, k = torch.randn(2, 70, 2, 64), torch.randn(2, 90, 2, 64)
    mask = (torch.arange(90) < torch.tensor([[40], [90]]))[:, None, None]
    opcheck(key_lengths_op, (mask,))
    for more in ((None, None, None, False, 0.2, True, INT8), (mask, key_lengths_op(mask), None, False, None, False, INT8),
                 (mask[:, 0].float(), None, None, False, None, False, INT8)):  # torch gives [B, H, N, D] under such a mask
        opcheck(dispatched_op, (q, k, k + 1, *more))
    opcheck(dispatched_op, (q.half(), k.half(), k.half(), None, None, None, False, None, True, INT8))
    told = torch.tensor([10, 20])  # the lengths that a graph has read are the ones that count
    out, _ = dispatched_op(q, k, k + 1, mask, told, None, False, None, False, INT8)
    assert torch.equal(out[1:], dispatched_op(q[1:], k[1:, :20], k[1:, :20] + 1, None, None, None, False, None, False, INT8)[0])
    out, _ = dispatched_op(q.requires_grad_(), k, k, None, None, None, False, None, False, INT8)
    with pytest.raises(UnsupportedError, match="low-bit attention has no gradients: run under torch.no_grad"):
        out.sum().backward()
