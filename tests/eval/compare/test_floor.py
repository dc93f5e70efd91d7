"""The reordered twin is exact attention, whatever it is asked, in another order; and candidates reach the hook as they are."""
import numpy as np
import pytest

paddle = pytest.importorskip("paddle", reason="PaddlePaddle is not installed")
from lowbit_video import ExactAttnProcessor, coverage  # noqa: E402
from lowbit_video.eval.compare import candidates, floor  # noqa: E402
from lowbit_video.eval.compare.floor import ReorderedExactProcessor  # noqa: E402

import toy_model  # noqa: E402
from helpers import naive_attention, qkv  # noqa: E402


@pytest.mark.parametrize("q_len", [1, 2, 7, 20])
@pytest.mark.parametrize("asked", [{}, dict(scale=0.3), dict(is_causal=True), dict(scale=0.3, is_causal=True),
                                   dict(return_lse=True), dict(scale=0.3, is_causal=True, return_lse=True)], ids=str)
def test_the_twin_attends_as_it_is_asked(q_len, asked):
    arrays = qkv(batch=2, q_len=q_len, kv_len=20)
    result = ReorderedExactProcessor().attend(*map(paddle.to_tensor, arrays), **asked)
    out, lse = naive_attention(*arrays, asked.get("scale"), asked.get("is_causal", False))
    np.testing.assert_allclose((result[0] if "return_lse" in asked else result).numpy(), out, atol=1e-5)
    if "return_lse" in asked:
        np.testing.assert_allclose(result[1].numpy(), lse, atol=1e-4)


def test_keys_come_from_last_to_first_and_queries_in_halves(monkeypatch):
    calls = []
    monkeypatch.setattr(floor, "exact_attend", lambda q, k, v, **more: calls.append((q, k, v)) or q)
    q, k, v = map(paddle.to_tensor, qkv(q_len=7, kv_len=5))
    ReorderedExactProcessor().attend(q, k, v)
    np.testing.assert_array_equal(np.concatenate([call[0].numpy() for call in calls], 1), q.numpy())
    assert [call[0].shape[1] for call in calls] == [4, 3]
    for call in calls:
        for got, given in zip(call[1:], (k, v)):
            np.testing.assert_array_equal(got.numpy(), given.numpy()[:, ::-1])


@pytest.mark.parametrize("masked", [False, True])
def test_a_module_computes_what_it_computed(masked):
    given, results = toy_model.inputs(batch=3), []
    mask = paddle.zeros([3, 47])
    mask[1, 40:] = -1e4
    for processor in (ExactAttnProcessor(), ReorderedExactProcessor()):
        model = toy_model.model()
        for block in model.blocks:
            block.set_processor(processor)
        with paddle.no_grad():
            results.append([part.numpy() for part in model(given["video"], given["text"], mask if masked else None,
                                                           given["rotary"])])
    for exact, reordered in zip(*results):
        np.testing.assert_allclose(reordered, exact, atol=1e-5)
    assert all(("reordered" in module.runs[0][0]) != masked for module in coverage(model).modules)


@pytest.mark.parametrize("made, given", [("int8+fp8", ("int8+fp8",)), ({"a.*": "fp16"}, (None, {"a.*": "fp16"}))], ids=str)
def test_a_candidate_is_applied_with_every_choice(made, given, monkeypatch):
    monkeypatch.setattr(candidates, "apply", lambda *given, **named: (given, named))
    candidate = candidates.Candidate("it", lambda: made)
    assert candidates.applied("pipe", candidate, backend="triton", fallback="exact") == (
        ("pipe", *given), dict(backend="triton", fallback="exact"))
    assert candidates.applied("pipe", candidate) == (("pipe", *given), dict(backend="auto", fallback=None))


@pytest.mark.parametrize("label, slug", [("int8/int4+fp8", "int8-int4+fp8"), ("my.module:Class", "my.module-Class"),
                                         ("a_b c", "a-b-c"), ("int8+fp16", "int8+fp16")])
def test_a_candidates_files_are_named_as_it_is(label, slug):
    assert candidates.Candidate(label, str).slug == slug
