"""Heads in pieces: all of them, each rank with some of every piece, and as many pieces as hide an exchange."""
import pytest

from lowbit_video.distributed import pieces as module
from lowbit_video.distributed.pieces import BESIDE, PIECE_WAVES, QUERY_ROWS, WHOLE_BELOW, WIRE_WAVES, Piece, head_pieces
from lowbit_video.distributed.shares import even_shares


@pytest.mark.parametrize("processors", [None, 1, 108, 132])
@pytest.mark.parametrize("rows", [1, 8, 47, 93, 186, 500])
def test_pieces_make_up_all_heads_and_every_rank_has_some_of_each(rows, processors):
    for heads in (1, 2, 5, 7, 12, 24, 30, 48):
        for size in (size for size in (1, 2, 3, 4, 8, 16) if size <= heads):
            pieces, begin = head_pieces(heads, size, rows, processors, "torch"), 0
            assert len(pieces) in (1, 2)
            for piece in pieces:
                assert piece.first == begin and sum(piece.shares) == piece.count and len(piece.shares) == size
                assert min(piece.shares) >= 1 and max(piece.shares) - min(piece.shares) <= 1
                begin += piece.count
            assert begin == heads


def test_a_cpu_hides_nothing():
    for heads, size in ((30, 2), (7, 3), (48, 1)):
        (piece,) = head_pieces(heads, size, 186, None, "torch")
        assert piece == (0, heads, tuple(even_shares(heads, size)))


def cost(pieces, size, rows, processors):
    """Waves until all is computed: no piece before its codes have come, and they come one after the other."""
    waves = lambda piece: size * -(-(piece.count // size) * rows // processors)
    wire = lambda piece: piece.count // size * WIRE_WAVES
    first, *rest = pieces
    total = wire(first) + waves(first)
    for piece in rest:
        total += max(0, BESIDE * wire(piece) - waves(first)) + waves(piece)
    return total + PIECE_WAVES * len(pieces)


@pytest.mark.parametrize("heads, size, rows", [(30, 2, 94), (30, 4, 47), (48, 2, 278), (12, 2, 93), (48, 8, 30)])
def test_the_first_piece_is_as_small_as_hides_the_second(heads, size, rows):
    chosen = head_pieces(heads, size, rows, 132, "torch")
    each = heads // size
    splits = [[each], *([first, each - first] for first in range(1, each))]
    costs = {}
    for split in splits:
        counts = [count * size for count in split]
        counts[-1] += heads - each * size
        pieces = [Piece(0, count, tuple(even_shares(count, size))) for count in counts]
        costs[tuple(counts)] = cost(pieces, size, rows, 132)
    assert costs[tuple(piece.count for piece in chosen)] <= min(costs.values()) + 1e-9


def test_the_pieces_of_the_2b_model_on_two_gpus():
    """17776 tokens, 8960 of them on one rank, batch 2, head dim 64: 94 tiles a head."""
    assert 2 * -(-8960 // QUERY_ROWS[64]) == 94
    assert head_pieces(30, 2, 94, 132, "torch") == (Piece(0, 8, (4, 4)), Piece(8, 22, (11, 11)))
    assert head_pieces(30, 2, 94, None, "torch") == (Piece(0, 30, (15, 15)),)
    assert len(head_pieces(7, 3, 4, 132, "torch")) == 1, "a piece costs more than it hides where there is little to compute"


def test_keys_of_a_ring_of_two_of_the_2b_model():
    """17776 tokens, 8960 of them on one rank, one sample: a first piece of two waves, in which the rest arrives."""
    assert module.gathered_waves(1, 2) == pytest.approx(WIRE_WAVES / 3)  # K and V of one sample for Q, K and V of two
    assert module.gathered_waves(2, 4) == pytest.approx(WIRE_WAVES)  # three times a quarter of the tokens
    tiles = module.rows_in_tiles
    assert tiles(1, 8960, 64) == 47 and tiles(2, 8961, 64) == 94 and tiles(1, 193, 128) == tiles(1, 193, 96) == 2
    assert head_pieces(30, 1, 47, 132, "torch", module.gathered_waves(1, 2)) == (Piece(0, 5, (5,)), Piece(5, 25, (25,)))
    assert head_pieces(30, 1, 47, 132, "torch", 0.0) == (Piece(0, 30, (30,)),)


def test_where_the_host_takes_long_little_work_goes_in_one_piece():
    """What counts is all heads' tiles on this rank's rows, whoever computes which: 48 rows of tiles of the 2b model's 30 heads
    on four GPUs, and of the 5b model's 48."""
    waves = WHOLE_BELOW["paddle"]
    assert 30 * 48 / 132 < waves < 48 * 48 / 132
    for size in (1, 2, 4):
        for heads, count in ((30, 1), (48, 2)):
            assert len(head_pieces(heads, size, 48, 132, "paddle", WIRE_WAVES)) == count
            assert len(head_pieces(heads, size, 48, 132, "torch", WIRE_WAVES)) == 2
    assert len(head_pieces(15, 1, 132, 132, "paddle")) == 2, "just as many"
