"""The VAE on several ranks gives the bits of one rank, shares the work out, and says how far it is."""
import copy
import itertools
import pathlib
import threading

import numpy as np
import paddle
import pytest

from lowbit_video.distributed.group import Group
from lowbit_video.distributed.wavefront import Wavefront
from lowbit_video.pipelines.cogvideox import vae as module
from lowbit_video.pipelines.cogvideox.vae import AutoencoderKLCogVideoX
from ranks import run_processes, run_threads

from golden_cases import GOLDENS, cases

PATIENCE = 30  # seconds after which a rank that waits counts as stuck


@pytest.fixture(scope="module")
def model():
    return AutoencoderKLCogVideoX.from_pretrained(GOLDENS / "vae_small")


@pytest.fixture(params=["cpu way", "gpu way"])
def way(request, monkeypatch):
    """Both formulations of the convolutions, whose caches are not alike, on the CPU."""
    if request.param == "gpu way":
        monkeypatch.setattr(module, "on_cpu", lambda x: False)


def latents(frames, height=2, width=3, batch=1):
    paddle.seed(frames)
    return paddle.randn([batch, 4, frames, height, width])


def clip(frames, height=16, width=24, batch=1):
    paddle.seed(frames)
    return paddle.rand([batch, 3, frames, height, width]) * 2 - 1


def decode(vae, z):
    return vae.decode(z).numpy()


def encode(vae, x):
    posterior = vae.encode(x)
    return paddle.concat([posterior.mean, posterior.logvar], axis=1).numpy()


def on_ranks(model, work, x, size, degree=None):
    """[(result, group, what on_decoded was told) of each rank]; every send waits until it is taken."""
    def rank(wire):
        vae, told = copy.copy(model), []
        vae.group, vae.degree, vae.on_decoded = Group(wire, range(size)), degree, told.append
        return work(vae, x), vae.group, told

    return run_threads(size, rank, PATIENCE, rendezvous=True)


made = {}
"""What one rank made, which does not depend on how many others do."""


def same_on_ranks(model, work, x, size, degree=None):
    """Asserts that every rank gets the bits of one rank; their groups, and what each was told."""
    how = (id(model), work, *x.shape, module.on_cpu(x), model.use_slicing, model.use_tiling)
    if how not in made:  # x is drawn from its shape
        made[how] = work(model, x)
    wanted = made[how]
    assert model.group is None and wanted.std() > 0.01
    ranks = on_ranks(model, work, x, size, degree)
    for result, *_ in ranks:
        np.testing.assert_array_equal(result, wanted)
    return [group for _, group, _ in ranks], [told for *_, told in ranks]


@pytest.mark.parametrize("frames, size", [*itertools.product((1, 5, 8, 13), (2, 3, 4)), (13, 8)])
def test_decoded_bits_are_those_of_one_rank(model, frames, size, way):
    groups, told = same_on_ranks(model, decode, latents(frames), size)
    assert [sum(rank) for rank in told] == [frames] * size
    assert all(("decode" in group.traffic.sent) == (frames > 3) for group in groups)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("frames", [1, 16, 23, 49])
def test_encoded_bits_are_those_of_one_rank(model, frames, size, way):
    groups, told = same_on_ranks(model, encode, clip(frames), size)
    assert told == [[]] * size
    assert all(set(group.traffic.sent) == ({"encode"} if frames > 15 else set()) for group in groups)


def test_every_rank_works_on_its_own_pieces_only(model, monkeypatch):
    worked, forward = {}, module.Decoder3D.forward

    def noted(self, z, caches):
        worked.setdefault(threading.current_thread(), []).append(z[0, 0, 0, 0, 0].item())
        return forward(self, z, caches)

    z = latents(13)
    monkeypatch.setattr(module.Decoder3D, "forward", noted)
    on_ranks(model, decode, z, 4)
    firsts = [z[0, 0, start, 0, 0].item() for start in (0, 3, 5, 7, 9, 11)]
    assert sorted(worked.values()) == sorted([firsts[0::4], firsts[1::4], firsts[2:3], firsts[3:4]])


def test_bytes_of_caches_and_pieces_are_counted(model, way):
    z = latents(5)  # two pieces
    groups, _ = same_on_ranks(model, decode, z, 3)
    pixels = 3 * 16 * 24 * 4
    gathered = [9 * pixels * 2, 8 * pixels * 2, 0]
    handed_on = [group.traffic.sent["decode"] - own for group, own in zip(groups, gathered)]
    rank, states = handed_on[0], 0
    for layer in (layer for layer in model.decoder.sublayers() if isinstance(layer, module.CausalConv3D)):
        out_channels, in_channels = layer.conv.weight.shape[:2]
        states += 3 * out_channels if module.on_cpu(z) else 2 * in_channels  # of one place, by any resolution
    assert handed_on[1:] == [0, 0] and states * 4 * 6 < rank < states * 4 * 6 * 64


@pytest.mark.parametrize("is_cpu", [True, False])
def test_caches_come_ahead_where_receiving_does_not_hold_up_the_work(model, monkeypatch, is_cpu):
    made, init = [], Wavefront.__init__
    monkeypatch.setattr(module, "on_cpu", lambda x: is_cpu)
    monkeypatch.setattr(Wavefront, "__init__", lambda self, *given: made.append(given[5]) or init(self, *given))
    on_ranks(model, decode, latents(5), 2)
    assert made == [not is_cpu] * 2


def test_progress_counts_the_pieces_of_the_others(model):
    _, told = same_on_ranks(model, decode, latents(13, batch=2), 4)
    assert told == [[6, 16, 4], [10, 16], [14, 12], [18, 8]]


def test_batches_and_slices(model):
    z = latents(6, batch=3)
    same_on_ranks(model, decode, z, 2)
    model.enable_slicing()
    try:
        _, told = same_on_ranks(model, decode, z, 2)
    finally:
        model.disable_slicing()
    assert told == [[2, 4] * 3, [4, 2] * 3]


@pytest.mark.parametrize("size, shared", [(2, True), (4, True), (5, False)])
@pytest.mark.parametrize("work, x", [(decode, latents(5, 4, 5)), (encode, clip(17, 32, 40))], ids=["decode", "encode"])
def test_tiles_are_shared_where_there_is_one_for_each_rank(model, work, x, size, shared, way):
    model.enable_tiling(24, 32)  # 4 tiles: 3 and 2 rows by 4 and 2 columns
    try:
        groups, told = same_on_ranks(model, work, x, size)
        wanted = work(model, x)
    finally:
        model.disable_tiling()
    sent = sum(sum(group.traffic.sent.values()) for group in groups)
    results = wanted[:1].nbytes / (4 * 5) * (3 + 2) * (4 + 2) * (size - 1)  # of all tiles, to all others
    assert (sent == results) == shared and sent >= results
    assert all(sum(rank) == (20 if work is decode else 0) for rank in told)


@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("tiles", [False, True], ids=["whole", "tiles"])
def test_ranks_beyond_the_degree_get_the_result(model, degree, tiles):
    if tiles:
        model.enable_tiling(24, 32)
    try:
        groups, told = same_on_ranks(model, decode, latents(7, 4, 5), 4, degree)
    finally:
        model.disable_tiling()
    assert all(sum(rank) == (28 if tiles else 7) for rank in told)
    sent = [group.traffic.sent.get("decode", 0) for group in groups]
    assert [bytes > 0 for bytes in sent] == [degree > 1 and rank < degree for rank in range(4)]


def test_convolutions_around_the_latents_run_on_ranks_too():
    paddle.seed(0)
    model = AutoencoderKLCogVideoX(**{**cases.VAE, "latent_channels": 3}, use_quant_conv=True, use_post_quant_conv=True)
    same_on_ranks(model, decode, latents(6)[:, :3], 2)
    same_on_ranks(model, encode, clip(17), 2)


def test_a_rank_alone_in_its_group_works_as_without(model):
    (group,), (told,) = same_on_ranks(model, decode, latents(5, batch=2), 1)
    assert group.traffic.sent == {} and told == [6, 4]


def test_processes_give_the_bits_of_one(tmp_path):
    _, written = run_processes(pathlib.Path(__file__).with_name("vae_on_ranks.py"), 3, tmp_path)
    for rank in written:
        assert len(rank["same"]) == 2 and all(all(same) for same in rank["same"].values()), rank
        assert set(rank["sent"]) == {"decode", "encode"}
