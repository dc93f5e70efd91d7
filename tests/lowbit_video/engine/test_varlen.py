"""attention_varlen() on the CPU: every sequence by itself."""
import numpy as np
import pytest

from lowbit_video.api import attention_varlen
from lowbit_video.runtime.detect import runtime_of

from helpers import naive_attention, qkv

Q_LENGTHS, K_LENGTHS = [20, 0, 1, 33, 5], [31, 3, 1, 0, 40]


def packed(framework, dtype="float32"):
    arrays = [a[0] for a in qkv(heads=4, kv_heads=2, q_len=sum(Q_LENGTHS), kv_len=sum(K_LENGTHS))]
    cu = [np.cumsum([0, *lengths]) for lengths in (Q_LENGTHS, K_LENGTHS)]
    return arrays, cu, [framework.tensor(a, dtype) for a in arrays], [framework.tensor(c, "int32") for c in cu]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("spec", ["exact", "int8+fp16", "int4+fp8"])
def test_matches_each_sequence_alone(framework, spec, causal):
    arrays, cu, tensors, tensor_cu = packed(framework)
    out, lse = attention_varlen(*tensors, *tensor_cu, 33, 40, spec, is_causal=causal, return_lse=True)
    assert list(out.shape) == [59, 4, 64] and list(lse.shape) == [4, 59]
    out, lse = framework.numpy(out), framework.numpy(lse)
    bound = {"exact": 1e-5, "int8+fp16": 0.04, "int4+fp8": 0.35}[spec]
    for q0, q1, k0, k1 in zip(cu[0], cu[0][1:], cu[1], cu[1][1:]):
        if k0 == k1:
            assert not out[q0:q1].any() and np.isneginf(lse[:, q0:q1]).all()
        elif q1 > q0:
            wanted, wanted_lse = naive_attention(arrays[0][None, q0:q1], arrays[1][None, k0:k1], arrays[2][None, k0:k1],
                                                 causal=causal)
            assert np.abs(out[q0:q1] - wanted[0]).sum() < bound * np.abs(wanted).sum()
            seen = np.isfinite(wanted_lse[0])
            np.testing.assert_array_equal(np.isfinite(lse[:, q0:q1]), seen)
            assert np.abs(lse[:, q0:q1][seen] - wanted_lse[0][seen]).max() < 20 * bound


def test_refusals(framework, monkeypatch):
    _, _, (q, k, v), (cu_q, cu_k) = packed(framework)
    with pytest.raises(ValueError, match=r"\[tokens, heads, head_dim\]"):
        attention_varlen(q[None], k[None], v[None], cu_q, cu_k, 33, 40)
    with pytest.raises(ValueError, match="int32 of one length"):
        attention_varlen(q, k, v, framework.tensor([0, 59], "float32"), framework.tensor([0, 75], "int32"), 33, 40)
    with pytest.raises(ValueError, match="int32 of one length"):
        attention_varlen(q, k, v, cu_q, cu_k[:-1], 33, 40)
    with pytest.raises(ValueError, match="cu_seqlens_q must rise from 0 to the 59 tokens"):
        attention_varlen(q, k, v, framework.tensor([0, 20, 20, 21, 54, 58], "int32"), cu_k, 33, 40)
    with pytest.raises(ValueError, match="max_seqlen_q is 32, but a sequence has 33 tokens"):
        attention_varlen(q, k, v, cu_q, cu_k, 32, 40)
    with pytest.raises(ValueError, match="max_seqlen_k is 39, but a sequence has 40 tokens"):
        attention_varlen(q, k, v, cu_q, cu_k, 33, 39)
    monkeypatch.setattr(runtime_of(q), "place", lambda t: "cpu" if t is cu_k else "gpu:0")
    with pytest.raises(ValueError, match="one device; given: q on gpu:0, cu_seqlens_q on gpu:0, cu_seqlens_k on cpu"):
        attention_varlen(q, k, v, cu_q, cu_k, 33, 40)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="unknown backend"):
        attention_varlen(q, k, v, cu_q, cu_k, 33, 40, backend="cuda")
