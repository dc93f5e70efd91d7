"""Who takes what of a whole: tokens in whole blocks of K's scales, heads and everything else as evenly as it goes."""
from __future__ import annotations

from lowbit_video.kernels.formats import BLOCK_K


def even_shares(count: int, size: int) -> list[int]:
    """How many of `count` each of `size` ranks takes, the first ones one more where it does not divide (30 on 4: 8 8 7 7)."""
    return [count // size + (rank < count % size) for rank in range(size)]


def token_shares(tokens: int, size: int, block: int = BLOCK_K) -> list[int]:
    """Tokens of each rank: whole blocks, so that codes with a scale a block can be joined again; the last rank takes the rest.

    Where there are fewer blocks than ranks the shares are even, and only 16-bit values can be joined (17776 on 2: 8960, 8816).
    """
    blocks = -(-tokens // block)
    if blocks < size:
        return even_shares(tokens, size)
    shares = [count * block for count in even_shares(blocks, size)]
    shares[-1] -= blocks * block - tokens
    return shares


def begins(shares: list[int]) -> list[int]:
    """Where each share begins."""
    return [sum(shares[:rank]) for rank in range(len(shares))]


def joint_shares(text_tokens: int, video_tokens: int, size: int) -> tuple[list[int], list[int]]:
    """(text tokens, video tokens) of each rank: text evenly, video so that both together make `token_shares`.

    Where whole blocks would leave a rank without video both are even. Raises ValueError where there are too few of one.
    """
    text = even_shares(text_tokens, size)
    video = [both - own for both, own in zip(token_shares(text_tokens + video_tokens, size), text)]
    if min(video) < 1:
        video = even_shares(video_tokens, size)
    if min(text) < 1 or min(video) < 1:
        raise ValueError(f"{text_tokens} text and {video_tokens} video tokens cannot be shared by {size} ranks so that each "
                         f"has some of both (text {text}, video {video}); use fewer ranks for the sequence "
                         "(--cfg-degree 2 takes half of them)")
    return text, video


def balanced(sizes: list[int], ranks: int) -> list[int]:
    """The rank of each of several works that cannot be split: the largest first, each to the rank that has least to do."""
    loads, owners = [0] * ranks, [0] * len(sizes)
    for work in sorted(range(len(sizes)), key=lambda work: -sizes[work]):
        owners[work] = loads.index(min(loads))
        loads[owners[work]] += sizes[work]
    return owners
