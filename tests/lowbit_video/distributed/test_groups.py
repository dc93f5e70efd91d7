"""Groups of ranks: shares, degrees, and what arrives where."""
import numpy as np
import paddle
import pytest

from lowbit_video.distributed.group import Group, Traffic
from lowbit_video.distributed.mesh import Degrees, Mesh, degrees_for
from lowbit_video.distributed.shares import balanced, begins, even_shares, joint_shares, token_shares
from lowbit_video.runtime import paddle_runtime as runtime
from ranks import run_threads


@pytest.mark.parametrize("tokens, size, wanted", [
    (17776, 1, [17776]), (17776, 2, [8960, 8816]), (17776, 4, [4480, 4480, 4480, 4336]), (45106, 2, [22656, 22450]),
    (256, 2, [128, 128]), (257, 2, [256, 1]), (129, 2, [128, 1]), (128, 2, [64, 64]), (113, 2, [57, 56]), (5, 4, [2, 1, 1, 1])])
def test_tokens_are_shared_in_whole_blocks_where_there_are_enough(tokens, size, wanted):
    assert token_shares(tokens, size) == wanted


def test_heads_that_do_not_divide_are_shared_all_the_same():
    assert even_shares(30, 4) == [8, 8, 7, 7] and even_shares(30, 8) == [4, 4, 4, 4, 4, 4, 3, 3]
    assert begins([8, 8, 7]) == [0, 8, 16]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 64])
def test_text_and_video_make_up_each_share(size):
    text, video = joint_shares(226, 17550, size)
    assert sum(text) == 226 and sum(video) == 17550 and [t + v for t, v in zip(text, video)] == token_shares(17776, size)


@pytest.mark.parametrize("text, video, size, wanted", [
    (9, 120, 2, ([5, 4], [60, 60])), (16, 241, 2, ([8, 8], [121, 120])), (16, 250, 2, ([8, 8], [248, 2]))])
def test_whole_blocks_that_leave_a_rank_without_video_give_way_to_even_shares(text, video, size, wanted):
    assert joint_shares(text, video, size) == wanted


@pytest.mark.parametrize("text, video", [(3, 500), (500, 3), (3, 3)])
def test_a_rank_without_text_or_without_video_is_refused(text, video):
    with pytest.raises(ValueError, match=f"{text} text and {video} video tokens cannot be shared by 4 ranks"):
        joint_shares(text, video, 4)


def test_works_that_cannot_be_split_are_balanced_the_largest_first():
    assert balanced([1, 2, 3, 7, 3], 2) == [0, 1, 1, 0, 1] and balanced([2, 2, 2], 3) == [0, 1, 2]
    assert balanced([1, 1, 1, 3], 2) == [1, 1, 1, 0] and balanced([], 2) == []


@pytest.mark.parametrize("size, options, wanted", [
    (1, {}, (1, 1, 1)), (2, {}, (2, 1, 1)), (2, dict(guided=False), (1, 2, 1)), (3, {}, (1, 3, 1)), (4, {}, (2, 2, 1)),
    (8, dict(cfg=1), (1, 8, 1)), (8, dict(ring=2), (2, 2, 2)), (8, dict(ulysses=2), (2, 2, 2)),
    (30, dict(cfg=1), (1, 30, 1)), (64, dict(host_ranks=8), (2, 8, 4)), (64, {}, (2, 16, 2)), (62, {}, (2, 1, 31))])
def test_degrees_are_chosen_guidance_first_then_heads_then_the_ring(size, options, wanted, monkeypatch):
    monkeypatch.delenv("PADDLE_LOCAL_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    degrees = degrees_for(size, 30, **options)
    assert (degrees.cfg, degrees.ulysses, degrees.ring) == wanted and degrees.ranks == size and degrees.vae == size


def test_fewer_ranks_may_decode_than_there_are():
    assert [degrees_for(4, 30, vae=vae).vae for vae in (None, 1, 3, 4)] == [4, 1, 3, 4]


@pytest.mark.parametrize("size, options, words", [
    (4, dict(ulysses=3), "do not make 4 ranks"), (4, dict(cfg=1, ulysses=2, ring=1), "do not make 4 ranks"),
    (64, dict(cfg=2, ulysses=32, ring=1), "32 shares 30 heads"), (2, dict(vae=3), "the vae degree is 3"),
    (3, dict(cfg=3), "guidance has two halves"), (2, dict(ulysses=-1), "must be|do not make")])
def test_degrees_that_cannot_be_meant_are_refused(size, options, words):
    with pytest.raises(ValueError, match=words):
        degrees_for(size, 30, **options)


def test_a_mesh_puts_every_rank_in_its_groups():
    meshes = run_threads(8, lambda wire: Mesh(wire, Degrees(cfg=2, ulysses=2, ring=2, vae=3)))
    assert [mesh.sequence.ranks for mesh in meshes] == [(0, 1, 2, 3)] * 4 + [(4, 5, 6, 7)] * 4
    assert [mesh.ulysses.ranks for mesh in meshes] == [(0, 1)] * 2 + [(2, 3)] * 2 + [(4, 5)] * 2 + [(6, 7)] * 2
    assert [mesh.ring.ranks for mesh in meshes] == [(0, 2), (1, 3), (0, 2), (1, 3), (4, 6), (5, 7), (4, 6), (5, 7)]
    assert [mesh.cfg.ranks for mesh in meshes] == [(0, 4), (1, 5), (2, 6), (3, 7)] * 2
    assert [mesh.ring.rank for mesh in meshes] == [0, 0, 1, 1] * 2 and meshes[5].cfg.rank == 1
    meshes = run_threads(6, lambda wire: Mesh(wire, Degrees(ulysses=2, ring=3)))
    assert [mesh.ulysses.ranks for mesh in meshes] == [(0, 1)] * 2 + [(2, 3)] * 2 + [(4, 5)] * 2
    assert [mesh.ring.ranks for mesh in meshes] == [(0, 2, 4), (1, 3, 5)] * 3 and meshes[4].cfg.ranks == (4,)
    with pytest.raises(ValueError, match="makes 4 ranks, and 2 were launched"):
        run_threads(2, lambda wire: Mesh(wire, Degrees(ulysses=4)))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "float8_e4m3fn"])
def test_a_gather_gives_everyone_everyones_values_in_order(dtype):
    def work(wire):
        group = Group(wire, [0, 2] if wire.rank % 2 == 0 else [1, 3])
        mine = (paddle.arange(6) + 2 * wire.rank).reshape([2, 3]).astype(dtype)
        return [t.astype("float32").numpy() for t in group.all_gather(mine, runtime, "test")], group

    for rank, (parts, group) in enumerate(run_threads(4, work)):
        for part, other in zip(parts, group.ranks):
            np.testing.assert_array_equal(part, np.arange(6).reshape(2, 3) + 2 * other)
        assert group.traffic.sent == {"test": 6 * mine_bytes(dtype)} and group.rank == rank // 2


def mine_bytes(dtype):
    return {"float32": 4, "float16": 2, "bfloat16": 2}.get(dtype, 1)


def test_rows_of_different_number_are_gathered():
    def work(wire):
        group = Group(wire, range(wire.size))
        mine = paddle.full([wire.rank + 1, 2], wire.rank, dtype="bfloat16")
        return [t.astype("float32").numpy() for t in group.all_gather_rows(mine, [1, 2, 3], runtime, "test")]

    for parts in run_threads(3, work):
        for rank, part in enumerate(parts):
            np.testing.assert_array_equal(part, np.full((rank + 1, 2), rank))


def test_a_tensor_goes_to_a_place_of_the_group_and_its_bytes_are_counted():
    """Places are the group's own: the first is rank 3."""
    def work(wire):
        if wire.rank not in (3, 1):
            return None
        group, into = Group(wire, (3, 1)), paddle.zeros([2, 3], dtype="float32")
        other = 1 - group.rank
        sending = group.send(paddle.full([2, 3], wire.rank, dtype="float32"), other, runtime, "test")
        group.receive(into, other).wait()
        sending.wait()
        return into.tolist(), group.traffic.sent

    assert run_threads(4, work) == [None, ([[3.0] * 3] * 2, {"test": 24}), None, ([[1.0] * 3] * 2, {"test": 24})]


def test_nothing_is_left_of_counts_that_are_cleared():
    traffic = Traffic()
    traffic.count("codes", 3, 8)
    traffic.note("as it is")
    traffic.clear()
    assert traffic.as_dict() == Traffic().as_dict()


def test_what_is_sent_is_counted():
    def work(wire):
        group, sizes = Group(wire, [0, 1], Traffic()), [[0, 4], [2, 0]]
        sent = paddle.arange(sum(sizes[wire.rank])).astype("uint8")
        received = paddle.zeros([sizes[1 - wire.rank][wire.rank]], dtype="uint8")
        group.exchange(sent, sizes[wire.rank], received, [row[wire.rank] for row in sizes], "codes", in_16_bit=8).wait()
        group.traffic.note("as it is")
        return received.tolist(), group.traffic.as_dict()

    (first, counted), (second, counted_there) = run_threads(2, work)
    assert (first, second) == ([0, 1], [0, 1, 2, 3])
    assert counted == {"sent": {"codes": 4}, "in_16_bit": {"codes": 8}, "sent_total": 4, "in_16_bit_total": 8,
                       "notes": ["as it is"]}
    assert counted_there["sent_total"] == 2


def test_a_group_without_this_rank_is_refused():
    with pytest.raises(ValueError, match=r"rank 1 is not among the ranks \[0\]"):
        run_threads(2, lambda wire: Group(wire, [0]))
