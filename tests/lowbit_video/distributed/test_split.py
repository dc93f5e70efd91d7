"""What a rank takes of a model's inputs: its half of the guidance, its share of the tokens, and nothing of the rest."""
import copy
import warnings
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from lowbit_video.distributed.shares import joint_shares
from lowbit_video.distributed.split import TokenSplit

import toy_model


def split_of(cfg=(0, 1), sequence=(0, 1)):
    """A split of a model whose groups have (place, size)."""
    group = lambda rank, size: SimpleNamespace(rank=rank, size=size)
    return TokenSplit(toy_model.model(), SimpleNamespace(cfg=group(*cfg), sequence=group(*sequence)))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("batch", [2, 6])
def test_a_half_is_of_what_has_the_batchs_rows(batch, rank):
    rows = lambda *shape: paddle.arange(int(np.prod(shape))).reshape(shape)
    given = (rows(batch, 3), rows(batch), rows(1, 3), rows(batch + 2, 3), rows(8 * batch, 2), paddle.to_tensor(5), None, 7, "x")
    first, second, *rest = split_of(cfg=(rank, 2)).take_half(*given)
    half = slice(rank * batch // 2, rank * batch // 2 + batch // 2)
    np.testing.assert_array_equal(first, given[0].numpy()[half])
    np.testing.assert_array_equal(second, given[1].numpy()[half])
    assert all(got is one for got, one in zip(rest, given[2:])) and len(rest) == len(given) - 2


def test_without_halves_all_of_it_stays():
    given = paddle.ones([2, 3]), paddle.ones([2])
    assert split_of().take_half(*given) == given


@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_that_has_no_halves_stays_and_is_warned_of_once(batch):
    split, given = split_of(cfg=(1, 2)), paddle.ones([batch, 3])
    with pytest.warns(UserWarning, match=f"cfg 2 gains nothing here: a batch of {batch}"):
        assert split.take_half(given)[0] is given
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert split.take_half(given)[0] is given


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("rotary", [False, True])
def test_shares_of_all_ranks_make_up_the_tokens(size, rotary):
    text, video = paddle.randn([2, 7, 4]), paddle.randn([2, 400, 4])
    tables = (paddle.randn([400, 8]), paddle.randn([400, 8])) if rotary else None
    parts = []
    for rank in range(size):
        split = split_of(sequence=(rank, size))
        parts.append(split.take_tokens(text, video, tables))
        shares = joint_shares(7, 400, size)
        assert [part.shape[1] for part in parts[-1][:2]] == [share[rank] for share in shares]
        assert split.shares == [sum(both) for both in zip(*shares)]
    for whole, number, axis in ((text, 0, 1), (video, 1, 1)):
        np.testing.assert_array_equal(np.concatenate([part[number].numpy() for part in parts], axis), whole.numpy())
    if not rotary:
        assert all(part[2] is None for part in parts)
        return
    for number, whole in enumerate(tables):
        np.testing.assert_array_equal(np.concatenate([part[2][number].numpy() for part in parts]), whole.numpy())


def test_a_rank_alone_takes_all():
    given = paddle.ones([1, 3, 4]), paddle.ones([1, 5, 4]), None
    assert all(got is one for got, one in zip(split_of().take_tokens(*given), given))


def test_a_copy_of_a_split_is_none():
    assert copy.deepcopy(split_of()) is None
