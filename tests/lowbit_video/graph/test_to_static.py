"""Attention under paddle.jit.to_static: one operator in the graph, the same result, calls still counted."""
import builtins
import sys
import traceback
import types
import weakref

import numpy as np
import pytest

paddle = pytest.importorskip("paddle", reason="paddlepaddle is not installed")
import lowbit_video as lv  # noqa: E402
from lowbit_video import ExactAttnProcessor, LowBitAttnProcessor, apply, coverage, remove  # noqa: E402
from lowbit_video.errors import UnsupportedError  # noqa: E402
from lowbit_video.graph.failures import take_failure  # noqa: E402
from lowbit_video.graph.tracing import traced_by_paddle  # noqa: E402
from lowbit_video.hook import attend  # noqa: E402
from lowbit_video.precision import Precision  # noqa: E402

import toy_model  # noqa: E402
from helpers import qkv  # noqa: E402

MODES = pytest.mark.parametrize("full_graph", [True, False], ids=["ast", "sot"])
OF_PADDLE_OR_NUMPY: dict[types.CodeType, bool] = {}
INNARDS = {"pd_op.softmax", "pd_op.flash_attn", "pd_op.scaled_dot_product_attention", "pd_op.round"}


@pytest.fixture(autouse=True)
def as_many_graphs_as_there_are_tests(monkeypatch):
    """SOT keeps 20 graphs a function and then runs it eagerly; these tests compile `attention` again and again.

    What it does beside takes more than half of the time, the more so the more modules are loaded, and is left out: for a log
    that is off it writes out the stack before every instruction, `sys.modules` with it, it collects garbage after a trace, and
    it goes through all built-in names for every value, to find whether it is a type among them. AST's tracing goes through all
    functions of Paddle and NumPy for every call of a function, also of one that it knows. Every operator keeps the stack that
    it was made on, with the source's lines.
    """
    from paddle.jit.dy2static import convert_call_func
    from paddle.jit.sot.opcode_translator.executor import executor_cache
    from paddle.jit.sot.opcode_translator.executor.variable_stack import VariableStack
    from paddle.jit.sot.opcode_translator.executor.variables import callable as callables

    executor_cache.OpcodeExecutorCache().clear()
    monkeypatch.setattr(VariableStack, "__repr__", lambda stack: "")
    monkeypatch.setattr(traceback, "extract_stack", lambda *given, **named: [])
    monkeypatch.setattr(executor_cache, "gc", types.SimpleNamespace(collect=lambda: None))
    kinds = {weakref.ref, *(value for value in vars(builtins).values() if isinstance(value, type))}
    monkeypatch.setattr(callables, "is_builtin_fn", lambda value: (
        value in kinds if isinstance(value, type) else isinstance(value, types.BuiltinFunctionType)))
    real = convert_call_func.is_unsupported

    def of_paddle_or_numpy(function):
        if not hasattr(function, "__code__"):
            return real(function)
        if function.__code__ not in OF_PADDLE_OR_NUMPY:
            OF_PADDLE_OR_NUMPY[function.__code__] = real(function)
        return OF_PADDLE_OR_NUMPY[function.__code__]

    monkeypatch.setattr(convert_call_func, "is_unsupported", of_paddle_or_numpy)


def run(model, given):
    with paddle.no_grad():
        return [part.numpy() for part in model(given["video"], given["text"], None, given["rotary"])]


def operators(compiled):
    return [op.name() for op in compiled.forward.concrete_program.main_program.global_block().ops]


def pair(precision="int8+fp16", **sizes):
    """The same model twice, hooked: one to compile, one to run eagerly."""
    models = [toy_model.model(**sizes) for _ in range(2)]
    for model in models:
        apply(model, precision)
    return models


@MODES
@pytest.mark.parametrize("precision", ["int8+fp16", "int4+fp8", "exact"])
def test_compiled_equals_eager_and_is_counted(precision, full_graph):
    model, eager = pair(precision)
    compiled = paddle.jit.to_static(model, full_graph=full_graph)
    for _ in range(2):
        for a, b in zip(run(compiled, toy_model.inputs()), run(eager, toy_model.inputs())):
            assert np.abs(a - b).max() <= 1e-5
    assert [m.calls for m in coverage(model).modules] == [2, 2]


@MODES
@pytest.mark.parametrize("rotary", [False, True], ids=["none", "rotary"])
def test_norms_and_positions_are_the_operators_where_a_processor_fuses_them(rotary, full_graph):
    given = dict(toy_model.inputs(), **({} if rotary else {"rotary": None}))
    model, eager = fusing_pair()
    compiled = paddle.jit.to_static(model, full_graph=full_graph)
    for a, b in zip(run(compiled, given), run(eager, given)):
        assert np.abs(a - b).max() <= 1e-5
    assert coverage(model).variants() == coverage(eager).variants() == FUSED
    if full_graph:
        names = operators(compiled)
        assert sum("lowbit_attention_behind" in name for name in names) == 2 and "pd_op.layer_norm" not in names


FUSED = {"int8+fp16 (reference-lowbit, fused prologue)": 2}


def fusing_pair():
    """As `pair`; the norms weigh channels and blocks apart, and are to be fused with quantisation."""
    models = pair()
    for model in models:
        for number, block in enumerate(model.blocks, 1):
            block.norm_q.weight.set_value(1 + 0.2 * number * paddle.arange(32, dtype="float32").sin())
            block.norm_k.bias.set_value(0.5 * paddle.arange(32, dtype="float32").cos())
        apply(model, LowBitAttnProcessor("int8+fp16", fused_prologue=True))
    return models


def test_one_graph_fuses_at_every_length():
    model, eager = fusing_pair()
    spec = paddle.static.InputSpec([None, None, 64], "float32")
    compiled = paddle.jit.to_static(model, full_graph=True, input_spec=[spec, spec])
    for video_tokens, text_tokens in ((40, 7), (65, 3)):
        given = toy_model.inputs(video_tokens, text_tokens)
        with paddle.no_grad():
            got, expected = compiled(given["video"], given["text"]), eager(given["video"], given["text"])
        for a, b in zip(got, expected):
            assert a.shape == b.shape and float((a - b).abs().max()) <= 1e-5
    assert coverage(model).variants() == coverage(eager).variants() == {name: 2 * count for name, count in FUSED.items()}


@MODES
def test_exact_attention_in_a_graph_runs_eagerly_and_so_may_take_a_kernel(full_graph, monkeypatch):
    seen, faster = [], attend._faster
    monkeypatch.setattr(attend, "_faster", lambda q, *rest: seen.append(traced_by_paddle(q)) or faster(q, *rest))
    compiled = paddle.jit.to_static(toy_model.model(), full_graph=full_graph)
    for _ in range(2):
        run(compiled, toy_model.inputs())
    assert seen == [False] * 4


@MODES
def test_shapes_may_change(full_graph):
    model, eager = pair()
    compiled = paddle.jit.to_static(model, full_graph=full_graph)
    for sizes in (dict(video_tokens=40), dict(video_tokens=65), dict(video_tokens=129, text_tokens=3, batch=1),
                  dict(video_tokens=40)):
        given = toy_model.inputs(**sizes)
        for a, b in zip(run(compiled, given), run(eager, given)):
            assert a.shape == b.shape and np.abs(a - b).max() <= 1e-5


@pytest.mark.parametrize("sizes", [dict(heads=2, head_dim=32), dict(heads=1, head_dim=64), dict(heads=3, head_dim=40)],
                         ids=lambda sizes: "x".join(map(str, sizes.values())))
def test_the_graph_holds_one_operator_a_module_and_none_of_its_innards(sizes):
    model, _ = pair(**sizes)
    compiled = paddle.jit.to_static(model, full_graph=True)
    run(compiled, toy_model.inputs(width=sizes["heads"] * sizes["head_dim"], rotary_dim=sizes["head_dim"]))
    names = operators(compiled)
    assert sum("lowbit_attention" in name for name in names) == 2
    assert not INNARDS & set(names)


def test_one_graph_serves_every_length_if_its_inputs_are_declared_dynamic():
    model, eager = pair()
    spec = paddle.static.InputSpec([None, None, 64], "float32")
    compiled = paddle.jit.to_static(model, full_graph=True, input_spec=[spec, spec])
    for video_tokens, text_tokens, batch in ((40, 7, 2), (65, 3, 1), (1, 1, 1)):
        given = toy_model.inputs(video_tokens, text_tokens, batch)
        with paddle.no_grad():
            got, expected = compiled(given["video"], given["text"]), eager(given["video"], given["text"])
        for a, b in zip(got, expected):
            assert a.shape == b.shape and float((a - b).abs().max()) <= 1e-5
    assert len(compiled.forward.program_cache) == 1


@MODES
def test_a_compiled_model_runs_the_processors_it_has_now(full_graph):
    model, eager = toy_model.model(), toy_model.model()
    given = toy_model.inputs()
    compiled = paddle.jit.to_static(model, full_graph=full_graph)
    exact = run(compiled, given)
    assert np.abs(exact[0] - run(eager, given)[0]).max() <= 1e-5
    for twin in (model, eager):
        apply(twin, "int4+fp16", fused_prologue=False)  # as the graph has them, which was made of exact attention
    low = run(compiled, given)
    assert np.abs(low[0] - run(eager, given)[0]).max() <= 1e-5 and not np.array_equal(low[0], exact[0])
    remove(model)
    assert np.array_equal(run(compiled, given)[0], exact[0])


@MODES
def test_masks_reach_the_exact_fallback(full_graph):
    model, eager = toy_model.model(), toy_model.model()
    given, mask = toy_model.inputs(), paddle.zeros([2, 47])
    mask[:, 5:20] = -1e4
    for twin in (model, eager):
        apply(twin, "int8+fp16", fallback="exact")
    compiled = paddle.jit.to_static(model, full_graph=full_graph)
    with paddle.no_grad():
        a, b = compiled(given["video"], given["text"], mask)[0], eager(given["video"], given["text"], mask)[0]
    assert float((a - b).abs().max()) <= 1e-5
    assert "takes a mask" in coverage(model).modules[0].runs[0][2]


def test_an_output_that_is_not_contiguous_is_taken_as_it_is():
    class Strided(ExactAttnProcessor):
        def attend(self, q, k, v, is_causal=False, scale=None, return_lse=False):
            out = super().attend(q, k, v, is_causal, scale, return_lse)
            strided = out.transpose([0, 2, 1, 3]).contiguous().transpose([0, 2, 1, 3])
            assert not strided.is_contiguous()
            return strided

    model, eager = toy_model.model(), toy_model.model()
    apply(model, Strided())
    compiled = paddle.jit.to_static(model, full_graph=True)
    assert np.abs(run(compiled, toy_model.inputs())[0] - run(eager, toy_model.inputs())[0]).max() <= 1e-5


def test_an_error_inside_the_graph_can_be_read():
    model = toy_model.model(heads=4, head_dim=16)
    apply(model, LowBitAttnProcessor("int8+fp16"))
    take_failure()
    with pytest.raises(Exception):  # noqa: B017 - Paddle's executor makes a bare SystemError of it
        run(paddle.jit.to_static(model, full_graph=True), toy_model.inputs(rotary_dim=16))
    assert "head_dim 16" in str(take_failure())
    assert take_failure() is None


@MODES
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("precision", ["int8+fp16", Precision("int4+fp8", smooth_q=False), "exact"], ids=str)
def test_attention_itself_is_one_operator(precision, layout, full_graph):
    def block(q, k, v):
        out, lse = lv.attention(q * 1.0, k, v, precision, tensor_layout=layout, is_causal=True, return_lse=True)
        return lv.attention(out, k, v, precision, tensor_layout=layout, scale=0.5) + 1.0, lse * 2.0

    tensors = [paddle.to_tensor(a if layout == "NHD" else a.transpose(0, 2, 1, 3)) for a in qkv(q_len=20, kv_len=33)]
    compiled = paddle.jit.to_static(block, full_graph=full_graph)
    with paddle.no_grad():
        for got, wanted in zip(compiled(*tensors), block(*tensors)):
            assert got.shape == wanted.shape and got.dtype == wanted.dtype
            assert float((got - wanted).abs().max()) <= 1e-5
    if full_graph:
        names = [op.name() for op in compiled.concrete_program.main_program.global_block().ops]
        assert sum("lowbit_attention_call" in name for name in names) == 2 and not INNARDS & set(names)


@MODES
def test_a_compiled_call_of_attention_runs_through_the_operator(monkeypatch, full_graph):
    from lowbit_video.graph import paddle_ops

    def block(q, k, v):
        return lv.attention(q * 1.0, k, v) + 1.0

    tensors, calls, real = [paddle.to_tensor(a) for a in qkv(q_len=20)], [], paddle_ops.run
    monkeypatch.setenv("MIN_GRAPH_SIZE", "0")  # SOT runs smaller graphs eagerly
    monkeypatch.setattr(paddle_ops, "run", lambda *given, **more: calls.append(1) or real(*given, **more))
    compiled = paddle.jit.to_static(block, full_graph=full_graph)
    with paddle.no_grad():
        block(*tensors)
        assert not calls
        compiled(*tensors)
    assert calls == [1]


def test_no_trace_wraps_all_modules_that_are_loaded(monkeypatch):
    """SOT does where traced code asks `in sys.modules`, and each wrapped module is guarded at every call afterwards."""
    from paddle.jit.sot.opcode_translator.executor.mutable_data import MutableDictLikeData

    model, _ = pair()
    wrapped, real = [], MutableDictLikeData.get_all
    monkeypatch.setattr(MutableDictLikeData, "get_all", lambda data: wrapped.append(data.original_data) or real(data))
    run(paddle.jit.to_static(model, full_graph=False), toy_model.inputs())

    def call(q, k, v):
        return lv.attention(q * 1.0, k, v) + 1.0

    with paddle.no_grad():
        paddle.jit.to_static(call, full_graph=False)(*(paddle.to_tensor(a) for a in qkv(q_len=20)))
    assert wrapped and not any(one is sys.modules for one in wrapped)


def packed():
    """q [30, 2, 64], k and v [41, 2, 64] and the beginnings of three sequences, the second without keys."""
    tensors = [paddle.to_tensor(a[0]) for a in qkv(q_len=30, kv_len=41)]
    return [*tensors, *(paddle.to_tensor(cu, "int32") for cu in ([0, 12, 13, 30], [0, 20, 20, 41]))]


@MODES
@pytest.mark.parametrize("precision", ["int8+fp16", Precision("int4+fp8", smooth_q=False), "exact"], ids=str)
def test_attention_of_packed_sequences_is_one_operator(precision, full_graph, monkeypatch):
    from lowbit_video.graph import paddle_ops

    def block(q, k, v, cu_q, cu_k):
        out, lse = lv.attention_varlen(q * 1.0, k, v, cu_q, cu_k, 17, 21, precision, is_causal=True, return_lse=True)
        return lv.attention_varlen(out, k, v, cu_q, cu_k, 17, 21, precision, scale=0.5) + 1.0, lse * 2.0

    given, calls, real = packed(), [], paddle_ops.run
    monkeypatch.setenv("MIN_GRAPH_SIZE", "0")  # SOT runs smaller graphs eagerly
    monkeypatch.setattr(paddle_ops, "run", lambda *args, **more: calls.append(1) or real(*args, **more))
    compiled = paddle.jit.to_static(block, full_graph=full_graph)
    with paddle.no_grad():
        wanted = block(*given)
        assert not calls
        for got, want in zip(compiled(*given), wanted):
            assert got.shape == want.shape and got.dtype == want.dtype
            np.testing.assert_allclose(got.numpy(), want.numpy(), atol=1e-5)
    assert calls == [1, 1]
    if full_graph:
        names = [op.name() for op in compiled.concrete_program.main_program.global_block().ops]
        assert sum("lowbit_attention_call_varlen" in name for name in names) == 2 and not INNARDS & set(names)


@MODES
def test_packed_lengths_may_change_between_calls(full_graph, monkeypatch):
    from lowbit_video.graph import paddle_ops

    def block(q, k, v, cu_q, cu_k, max_q, max_k):
        return lv.attention_varlen(q * 1.0, k, v, cu_q, cu_k, max_q, max_k, "int8+fp16") + 1.0

    (q, k, v, cu_q, cu_k), calls, real = packed(), [], paddle_ops.run
    monkeypatch.setenv("MIN_GRAPH_SIZE", "0")  # SOT runs smaller graphs eagerly
    monkeypatch.setattr(paddle_ops, "run", lambda *args, **more: calls.append(args[4].max_q) or real(*args, **more))
    compiled = paddle.jit.to_static(block, full_graph=full_graph)
    with paddle.no_grad():
        for tokens in (30, 25, 20, 30):
            cu = paddle.clip(cu_q, max=tokens), cu_k
            given = q[:tokens], k, v, *cu, *(int(np.diff(c.numpy()).max()) for c in cu)
            np.testing.assert_allclose(compiled(*given).numpy(), block(*given).numpy(), atol=1e-5)
    assert calls == [17, 12, 12, 17]


@MODES
@pytest.mark.parametrize("name", ["sageattn", "sageattn_qk_int8_pv_fp16_triton", "sageattn_qk_int4_pv_fp16_triton",
                                  "sageattn_qk_int8_pv_fp16_cuda", "sageattn_qk_int8_pv_fp8_cuda", "sageattn_multi_precision"])
def test_compat_names_can_be_compiled(name, full_graph, monkeypatch):
    from lowbit_video import compat

    function = getattr(compat, name)

    def block(q, k, v):
        return function(q * 1.0, k, v, smooth_k=False) + 1.0

    monkeypatch.setenv("MIN_GRAPH_SIZE", "0")  # SOT runs smaller graphs eagerly
    tensors = [paddle.to_tensor(a.transpose(0, 2, 1, 3)) for a in qkv(q_len=20)]
    with paddle.no_grad():
        got, wanted = paddle.jit.to_static(block, full_graph=full_graph)(*tensors), block(*tensors)
    assert float((got - wanted).abs().max()) <= 1e-5


@MODES
def test_the_compat_name_of_packed_sequences_can_be_compiled(full_graph, monkeypatch):
    from lowbit_video import compat

    def block(q, k, v, cu_q, cu_k):
        return compat.sageattn_varlen(q * 1.0, k, v, cu_q, cu_k, 17, 21) + 1.0

    monkeypatch.setenv("MIN_GRAPH_SIZE", "0")
    with paddle.no_grad():
        got, wanted = paddle.jit.to_static(block, full_graph=full_graph)(*packed()), block(*packed())
    np.testing.assert_allclose(got.numpy(), wanted.numpy(), atol=1e-5)


@pytest.mark.parametrize("device,arch,spec", [("cpu", None, "int8+fp16"), ("gpu:0", (8, 0), "int8+fp16"),
                                              ("cudev:1", (9, 0), "int8+fp8")])
def test_a_graph_is_traced_for_the_current_device(monkeypatch, device, arch, spec):
    from lowbit_video import compat
    from lowbit_video.graph import paddle_ops

    asked = []
    monkeypatch.setattr(paddle.device, "get_device", lambda: device)
    monkeypatch.setattr(paddle_ops.cuda_driver, "capability", lambda ordinal: asked.append(ordinal) or arch)
    monkeypatch.setattr(compat, "traced_by_paddle", lambda q: True)
    assert compat._best_spec(None) == spec and compat._triton(None) == ("auto" if device == "cpu" else "triton")
    assert asked == ([] if device == "cpu" else [int(device[-1])] * 2)


def test_an_error_of_packed_sequences_inside_the_graph_can_be_read():
    take_failure()
    q, k, v, cu_q, cu_k = packed()

    def block(q, k, v, cu_q, cu_k):
        return lv.attention_varlen(q, k, v, cu_q, cu_k, 17, 21)

    with pytest.raises(Exception), paddle.no_grad():  # noqa: B017 - Paddle's executor makes a bare SystemError of it
        paddle.jit.to_static(block, full_graph=True)(q, k, v, cu_q, cu_k + 1)
    assert "cu_seqlens_k must rise from 0 to the 41 tokens" in str(take_failure())


def test_an_error_of_attention_inside_the_graph_can_be_read():
    take_failure()
    q = paddle.zeros([1, 8, 2, 16])

    def itself(q):
        return lv.attention(q, q, q)

    with pytest.raises(Exception), paddle.no_grad():  # noqa: B017 - Paddle's executor makes a bare SystemError of it
        paddle.jit.to_static(itself, full_graph=True)(q)
    assert "head_dim 16" in str(take_failure())


@MODES
def test_training_a_compiled_model_is_refused(full_graph):
    model, given = toy_model.model(), toy_model.inputs()
    apply(model, "int8+fp16")
    compiled = paddle.jit.to_static(model, full_graph=full_graph)
    with pytest.raises(UnsupportedError, match="gradients are asked for, and .* inference only"):
        compiled(given["video"], given["text"])


def test_training_is_refused_after_a_trace_for_inference(monkeypatch):
    """In AST mode the first trace's graph runs again, without gradients, as of every model in Paddle."""
    monkeypatch.setenv("MIN_GRAPH_SIZE", "0")  # SOT runs smaller graphs eagerly
    model, given = toy_model.model(), toy_model.inputs()
    apply(model, "int8+fp16")
    compiled = paddle.jit.to_static(model, full_graph=False)
    with paddle.no_grad():
        compiled(given["video"], given["text"])
    with pytest.raises(UnsupportedError, match="gradients are asked for, and .* inference only"):
        compiled(given["video"], given["text"])


@MODES
@pytest.mark.parametrize("varlen", [False, True], ids=["attention", "varlen"])
def test_calls_refuse_gradients_and_run_without_though_their_tensors_want_them(varlen, full_graph, monkeypatch):
    def call(q, k, v):
        return lv.attention(q * 1.0, k, v) + 1.0

    def call_packed(q, k, v, cu_q, cu_k):
        return lv.attention_varlen(q * 1.0, k, v, cu_q, cu_k, 17, 21) + 1.0

    block = call_packed if varlen else call
    monkeypatch.setenv("MIN_GRAPH_SIZE", "0")  # SOT runs smaller graphs eagerly
    given = packed() if varlen else [paddle.to_tensor(a) for a in qkv(q_len=20)]
    wanted = block(*given)
    compiled = paddle.jit.to_static(block, full_graph=full_graph)
    given[1].stop_gradient = False
    with pytest.raises(UnsupportedError, match="gradients are asked for, and .* inference only"):
        compiled(*given)
    with paddle.no_grad():
        np.testing.assert_allclose(compiled(*given).numpy(), wanted.numpy(), atol=1e-5)
