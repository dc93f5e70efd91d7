"""Masks of padding are served by lengths; every other mask exactly, with the reason, or refused."""
import gc

import numpy as np
import pytest

import lowbit_video as lv
from lowbit_video.hook import masks, read_once
from lowbit_video.hook.masks import packed, prefix_lengths
from lowbit_video.hook.processors import LowBitAttnProcessor

from helpers import naive_attention, qkv, sqnr_db

KEYS = 50


def hidden(*lengths, value=-10000.0):
    """An additive mask [B, KEYS] that shows each sample its first keys."""
    return np.where(np.arange(KEYS) < np.array(lengths)[:, None], 0.0, value).astype(np.float32)


def holed():
    mask = hidden(40, 30)
    mask[1, 3] = -10000
    return mask


def shifted():
    return hidden(40, 30)[:, ::-1].copy()


# name: (mask, lengths or None)
MASKS = {
    "keys": (hidden(40, 30), (40, 30)),
    "the smallest number": (hidden(40, 1, value=np.finfo(np.float32).min), (40, 1)),
    "minus infinity": (hidden(KEYS, 49, value=-np.inf), (KEYS, 49)),
    "nothing is hidden": (hidden(KEYS, KEYS), (KEYS, KEYS)),
    "one dimension between": (hidden(40, 30)[:, None], (40, 30)),
    "two dimensions between": (hidden(40, 30)[:, None, None], (40, 30)),
    "one for both samples": (hidden(7), (7, 7)),
    "a hole": (holed(), None),
    "the last keys": (shifted(), None),
    "a sample without keys": (hidden(40, 0), None),
    "a bias": (hidden(40, 30, value=-3.0), None),
    "hardly hidden": (hidden(40, 30, value=-9000.0), None),
    "a favour": (-hidden(40, 30), None),
    "of too many keys": (np.zeros((2, KEYS + 1), np.float32), None),
    "of too many samples": (np.zeros((3, KEYS), np.float32), None),
    "for each query": (np.zeros((2, 1, 20, KEYS), np.float32), None),
    "for each head": (np.zeros((2, 2, 1, KEYS), np.float32), None),
    "without samples": (np.zeros(KEYS, np.float32), None),
}


@pytest.mark.parametrize("name", MASKS)
def test_prefixes_are_told_from_other_masks(framework, name):
    mask, lengths = MASKS[name]
    assert prefix_lengths(framework.tensor(mask), 2, KEYS) == lengths


@pytest.mark.parametrize("name", ["keys", "a hole", "the last keys", "one for both samples"])
def test_true_attends(framework, name):
    mask, lengths = MASKS[name]
    assert prefix_lengths(framework.tensor(mask == 0, "bool"), 2, KEYS) == lengths


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_mask_of_16_bits_hides_as_well(framework, dtype):
    assert prefix_lengths(framework.tensor(hidden(40, 30), dtype), 2, KEYS) == (40, 30)


def test_a_mask_is_read_once_and_again_when_it_is_written_to(framework, monkeypatch):
    reads = []
    read = masks._read
    monkeypatch.setattr(masks, "_read", lambda mask: reads.append(1) or read(mask))
    mask = framework.tensor(hidden(40, 30))
    assert prefix_lengths(mask, 2, KEYS) == prefix_lengths(mask, 2, KEYS) == (40, 30) and len(reads) == 1
    mask[1, 20:] = -10000.0
    assert prefix_lengths(mask, 2, KEYS) == (40, 20) and len(reads) == 2
    key = id(mask)
    assert key in read_once._known
    del mask
    gc.collect()
    assert key not in read_once._known


@pytest.mark.torch
def test_a_mask_that_does_not_tell_when_it_is_written_to_is_read_each_time():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    with torch.inference_mode():
        mask = torch.from_numpy(hidden(40, 30))
        mask = mask + 0.0
        assert prefix_lengths(mask, 2, KEYS) == (40, 30)
        mask[1, 20:] = -10000.0
        assert prefix_lengths(mask, 2, KEYS) == (40, 20)


def test_packed_holds_all_queries_and_the_first_keys(framework):
    q, k, v = qkv(batch=2, q_len=20, kv_len=KEYS, dim=32)
    q3, k3, v3, packing = packed(*map(framework.tensor, (q, k, v)), (40, 30))
    np.testing.assert_array_equal(framework.numpy(q3), q.reshape(40, 2, 32))
    np.testing.assert_array_equal(framework.numpy(k3), np.concatenate([k[0, :40], k[1, :30]]))
    np.testing.assert_array_equal(framework.numpy(v3), np.concatenate([v[0, :40], v[1, :30]]))
    assert framework.numpy(packing.cu_q).tolist() == [0, 20, 40] and framework.numpy(packing.cu_k).tolist() == [0, 40, 70]
    assert (packing.max_q, packing.max_k) == (20, 40)


@pytest.mark.parametrize("lengths", [(40, 30), (40, 40), (KEYS, KEYS), (1, KEYS)], ids=str)
def test_a_processor_serves_prefixes_at_low_bit(framework, lengths):
    """Each sample is what it would be alone, with only the keys that it sees."""
    q, k, v = qkv(batch=2, q_len=20, kv_len=KEYS, dim=32)
    k[0, lengths[0]:] += 100  # a hidden key that counted would change all
    low = LowBitAttnProcessor("int8+fp16")
    out = framework.numpy(low.attend_masked(*map(framework.tensor, (q, k, v, hidden(*lengths)))))
    for sample, length in enumerate(lengths):
        one = [x[sample:sample + 1] for x in (q, k[:, :length], v[:, :length])]
        alone = lv.attention(*map(framework.tensor, one), "int8+fp16")
        np.testing.assert_allclose(out[sample], framework.numpy(alone)[0], atol=2e-6)
        assert sqnr_db(out[sample], naive_attention(*one)[0][0]) > 30


def test_other_masks_are_refused_or_served_exactly(framework):
    q, k, v = qkv(batch=2, q_len=20, kv_len=KEYS, dim=32)
    given = [framework.tensor(x) for x in (q, k, v, holed())]
    with pytest.raises(lv.UnsupportedError, match=r"shape \[2, 50\] was given to .*int8\+fp16.*hides other keys than each "
                                                  r"sample's last; try a processor with fallback='exact'"):
        LowBitAttnProcessor("int8+fp16").attend_masked(*given)
    exact = lv.ExactAttnProcessor().attend_masked(*given)
    got = LowBitAttnProcessor("int8+fp16", fallback="exact").attend_masked(*given)
    np.testing.assert_array_equal(framework.numpy(got), framework.numpy(exact))


def test_where_no_kernel_serves_a_prefix_either_it_is_exact(framework):
    q, k, v = qkv(batch=2, q_len=20, kv_len=KEYS, dim=16)
    given = [framework.tensor(x) for x in (q, k, v, hidden(40, 30))]
    exact = lv.ExactAttnProcessor().attend_masked(*given)
    got = LowBitAttnProcessor("int8+fp16", fallback="exact").attend_masked(*given)
    np.testing.assert_array_equal(framework.numpy(got), framework.numpy(exact))
    with pytest.raises(lv.UnsupportedError, match="head_dim 16"):
        LowBitAttnProcessor("int8+fp16").attend_masked(*given)


@pytest.mark.torch
def test_under_torch_compile_no_mask_is_read():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    given = [torch.from_numpy(x) for x in (*qkv(batch=2, q_len=20, kv_len=KEYS, dim=32), hidden(40, 30))]
    low = LowBitAttnProcessor("int8+fp16", fallback="exact")
    got = torch.compile(low.attend_masked, backend="eager", fullgraph=True)(*given)
    assert torch.equal(got, lv.ExactAttnProcessor().attend_masked(*given))
    with pytest.raises(lv.UnsupportedError, match="torch.compile traces this call, and a mask is read to be served"):
        torch.compile(LowBitAttnProcessor("int8+fp16").attend_masked, backend="eager")(*given)
