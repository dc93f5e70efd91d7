"""attention() under torch.compile: one graph, the same numbers."""
import types

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import lowbit_video as lv  # noqa: E402
from lowbit_video.engine.options import text_of  # noqa: E402
from lowbit_video.graph import runners, torch_ops  # noqa: E402
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
        out, lse = lv.attention(q * 1, k, v, precision, tensor_layout=layout, return_lse=True, is_causal=True, scale=0.2)
        return out * 2, lse + 1

    torch._dynamo.reset()
    tensors = inputs(layout)
    for got, wanted in zip(torch.compile(block, fullgraph=True, backend=backend)(*tensors), block(*tensors)):
        assert got.shape == wanted.shape and got.dtype == wanted.dtype
        assert torch.equal(got, wanted)


def called_in_graph(function, given):
    """Names of what the graph of the compiled function calls."""
    graphs = []
    torch._dynamo.reset()

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compile(function, fullgraph=True, backend=keep)(*given)
    return [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]


def test_the_graph_holds_one_attention():
    names = called_in_graph(lambda q, k, v: lv.attention(q, k, v) + 1, inputs())
    assert sum("lowbit_video.attention" in name for name in names) == 1, names


def packed():
    """q [30, 2, 64], k and v [41, 2, 64] and the beginnings of three sequences, the second without keys."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, 2, 64, generator=generator).half() for n in (30, 41, 41)]
    return *tensors, *(torch.tensor(cu, dtype=torch.int32) for cu in ([0, 12, 13, 30], [0, 20, 20, 41]))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("precision", ["int8+fp8", Precision("int4+fp16", smooth_q=False), "exact"], ids=str)
def test_packed_sequences_break_no_graph_and_give_the_same_result(backend, precision):
    def block(q, k, v, cu_q, cu_k):
        out, lse = lv.attention_varlen(q * 1, k, v, cu_q, cu_k, 17, 21, precision, is_causal=True, return_lse=True)
        return out * 2, lse + 1, lv.attention_varlen(q, k, v, cu_q, cu_k, 17, 21, precision, scale=0.5)

    torch._dynamo.reset()
    for got, wanted in zip(torch.compile(block, fullgraph=True, backend=backend)(*packed()), block(*packed())):
        assert got.shape == wanted.shape and got.dtype == wanted.dtype and torch.equal(got, wanted)


def test_packed_lengths_may_change_between_calls():
    torch._dynamo.reset()
    compiled = torch.compile(lambda *given: lv.attention_varlen(*given, "int8+fp16"), fullgraph=True, backend="aot_eager")
    q, k, v, cu_q, cu_k = packed()
    for tokens in (30, 25, 20):
        cu = cu_q.clamp(max=tokens), cu_k
        given = q[:tokens], k, v, *cu, *(int(c.diff().max()) for c in cu)
        assert torch.equal(compiled(*given), lv.attention_varlen(*given, "int8+fp16"))


def test_the_graph_holds_one_attention_of_packed_sequences():
    names = called_in_graph(lambda *given: lv.attention_varlen(*given, 17, 21) + 1, packed())
    assert sum("lowbit_video.attention_varlen" in name for name in names) == 1, names


@pytest.mark.parametrize("name, layout", [("attention", "NHD"), ("attention", "HND"), ("attention_varlen", "NHD")])
def test_the_operators_pass_torchs_own_checks(name, layout):
    if name == "attention":
        given = (*inputs(layout), None, text_of("int8+fp16", layout, False, None, True, "auto", None))
    else:
        given = (*packed(), 17, 21, None, text_of("int8+fp16", "NHD", False, None, True, "auto", None))
    torch.library.opcheck(getattr(torch.ops.lowbit_video, name), given)


@pytest.mark.parametrize("arch,spec", [((8, 0), "int8+fp16"), ((8, 9), "int8+fp8")])
def test_asking_for_the_arch_breaks_no_graph(monkeypatch, arch, spec):
    """The GPU is played: what it is asked for is not known to the tracer."""
    from lowbit_video import compat
    from lowbit_video.runtime import torch_runtime

    q, k, v = inputs("HND")
    wanted = lv.attention(q, k, v, spec, tensor_layout="HND")

    monkeypatch.setattr(torch_runtime, "capability", lambda index: (open("/dev/null").close(), arch)[1])
    played = types.SimpleNamespace(is_cpu=lambda t: False)
    monkeypatch.setattr(compat, "detect", types.SimpleNamespace(runtime_of=lambda t: played))
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: compat.lowbit_fa(q, k, v) * 1, fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, k, v), wanted)


def test_a_slots_key_is_a_tensor_of_the_cpu_that_any_mode_takes():
    with torch.inference_mode(), torch.device("meta"):
        key = torch_ops.key_of(3)
    assert key.device.type == "cpu" and not key.is_inference() and int(key) == 3


def test_a_timestep_that_is_told_is_kept_as_it_was():
    class Clock:
        tell = lambda self, timestep: told.append(timestep)

    told, clock, timestep = [], Clock(), torch.tensor([7])
    out = torch_ops.step_op(timestep, torch_ops.key_of(runners.register(clock)))
    timestep.zero_()  # a graph may use its memory again
    assert told[0].tolist() == out.tolist() == [7]


def test_a_compilation_does_the_work_of_all_modules_once(monkeypatch):
    done = []

    def function(x):
        torch_ops.once_a_compilation(done_once)
        torch_ops.once_a_compilation(done_once)
        return x + 1

    def done_once():
        done.append(1)

    monkeypatch.setattr(torch_ops, "_compilation", [])
    for times in (1, 2):
        torch._dynamo.reset()
        torch.compile(function, fullgraph=True, backend="eager")(torch.ones(2))
        assert len(done) == times


def test_an_error_inside_is_the_callers_own_error():
    torch._dynamo.reset()
    q, k, v = inputs()
    compiled = torch.compile(lambda q, k, v: lv.attention(q, k, v, "int8+fp16", backend="hopper"), backend="eager")
    with pytest.raises(Exception, match="needs an NVIDIA GPU"):
        compiled(q, k, v)


@pytest.mark.parametrize("varlen", [False, True], ids=["attention", "varlen"])
def test_gradients_are_refused_in_the_graph_and_only_where_they_would_be_lost(varlen):
    def block(q, *rest):
        return lv.attention_varlen(q * 1, *rest, 17, 21) if varlen else lv.attention(q * 1, *rest)

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    given = packed() if varlen else inputs()
    wanted = block(*given)
    given[1].requires_grad_()
    with pytest.raises(lv.UnsupportedError, match=r"gradients are asked for, .* inference only\n.*torch.no_grad\(\)"):
        compiled(*given)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(compiled(*given), wanted)
