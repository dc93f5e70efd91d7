"""attention() under torch.compile: one graph, the same numbers."""
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import lowbit_video as lv  # noqa: E402
from lowbit_video.precision import Precision  # noqa: E402

pytestmark = pytest.mark.torch


def inputs(layout="NHD"):
    generator = torch.Generator().manual_seed(0)
    shape = lambda tokens: (1, tokens, 2, 64) if layout == "NHD" else (1, 2, tokens, 64)
    return [torch.randn(shape(n), generator=generator).half() for n in (40, 50, 50)]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("precision", ["int8+fp8", Precision("int4+fp16", smooth_q=False), "exact"], ids=str)
def test_no_graph_break_and_the_same_result(backend, layout, precision):
    def block(q, k, v):
        out, lse = lv.attention(q * 1, k, v, precision, tensor_layout=layout, return_lse=True, is_causal=True)
        return out * 2, lse + 1

    torch._dynamo.reset()
    tensors = inputs(layout)
    for got, wanted in zip(torch.compile(block, fullgraph=True, backend=backend)(*tensors), block(*tensors)):
        assert got.shape == wanted.shape and got.dtype == wanted.dtype
        assert torch.equal(got, wanted)


def test_the_graph_holds_one_attention():
    graphs = []
    torch._dynamo.reset()

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compile(lambda q, k, v: lv.attention(q, k, v) + 1, fullgraph=True, backend=keep)(*inputs())
    names = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("lowbit_video.attention" in name for name in names) == 1, names


def test_an_error_inside_is_the_callers_own_error():
    torch._dynamo.reset()
    q, k, v = inputs()
    compiled = torch.compile(lambda q, k, v: lv.attention(q, k, v, "int8+fp16", backend="hopper"), backend="eager")
    with pytest.raises(Exception, match="needs an NVIDIA GPU"):
        compiled(q, k, v)
