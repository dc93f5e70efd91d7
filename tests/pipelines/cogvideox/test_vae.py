"""The VAE against goldens written by diffusers, its memory savers, and what it says to bad input."""
import numpy as np
import paddle
import pytest

from lowbit_video.pipelines.cogvideox import vae as module
from lowbit_video.pipelines.cogvideox.vae import AutoencoderKLCogVideoX
from lowbit_video.pipelines.shared.config import ConfigError

from golden_cases import GOLDENS, cases

TOLERANCE = 5e-4
INPUTS = cases.vae_inputs()


@pytest.fixture(scope="module")
def model():
    return AutoencoderKLCogVideoX.from_pretrained(GOLDENS / "vae_small")


@pytest.fixture(scope="module")
def wanted():
    return np.load(GOLDENS / "vae_small" / "io.npz")


@pytest.fixture(params=["cpu way", "gpu way"])
def way(request, monkeypatch):
    """Both formulations of the convolutions, on the CPU."""
    if request.param == "gpu way":
        monkeypatch.setattr(module, "on_cpu", lambda x: False)
    return request.param


def run(model, name):
    x = paddle.to_tensor(INPUTS[name])
    if name.endswith("tiled"):
        model.enable_tiling(*cases.VAE_TILE)
    try:
        if name.startswith("decode"):
            return model.decode(x).numpy()
        posterior = model.encode(x)
        return paddle.concat([posterior.mean, posterior.logvar], axis=1).numpy()
    finally:
        model.disable_tiling()


@pytest.mark.parametrize("name", list(INPUTS))
def test_golden(model, wanted, name, way):
    got = run(model, name)
    if name.startswith("decode"):
        latent_frames = INPUTS[name].shape[2]
        assert got.shape[2] == model.num_decoded_frames(latent_frames)
        got = got[..., :: cases.VAE_STRIDE, :: cases.VAE_STRIDE]
    want = wanted[name]
    assert got.shape == want.shape
    assert want.std() > 0.05
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)


def test_slicing_gives_the_same(model):
    z = paddle.to_tensor(np.concatenate([INPUTS["decode_3"], -INPUTS["decode_3"]]))
    whole = model.decode(z).numpy()
    model.enable_slicing()
    try:
        sliced = model.decode(z).numpy()
    finally:
        model.disable_slicing()
    assert abs(whole[0] - whole[1]).max() > 0.1
    np.testing.assert_allclose(sliced, whole, atol=1e-5)


def test_tiling_keeps_the_size_whatever_the_tile(model):
    z = paddle.to_tensor(INPUTS["decode_tiled"])
    model.enable_tiling(32, 48)  # an overlap that is not whole latents
    try:
        video = model.decode(z)
        latents = model.encode(video).mode()
    finally:
        model.disable_tiling()
        model.enable_tiling(*cases.VAE_TILE)
        model.disable_tiling()
    assert video.shape[3:] == [8 * n for n in z.shape[3:]]
    assert latents.shape == z.shape


def test_default_tiles_are_those_of_diffusers():
    """Half the training size, which is not square; a sixth of the height and a fifth of the width overlap."""
    model = AutoencoderKLCogVideoX(**{**cases.VAE, "sample_height": 96, "sample_width": 160})
    model.enable_tiling()
    assert (model.tile_sample_min_height, model.tile_sample_min_width) == (48, 80)
    assert (model.tile_latent_min_height, model.tile_latent_min_width) == (6, 10)
    assert (model.tile_overlap_factor_height, model.tile_overlap_factor_width) == (1 / 6, 1 / 5)
    assert (model.num_latent_frames_batch_size, model.num_sample_frames_batch_size) == (2, 8)
    model.enable_tiling(tile_sample_min_width=64, tile_overlap_factor_height=0.5)
    assert (model.tile_sample_min_height, model.tile_sample_min_width) == (48, 64)
    assert (model.tile_latent_min_height, model.tile_latent_min_width) == (6, 8)
    assert (model.tile_overlap_factor_height, model.tile_overlap_factor_width) == (0.5, 1 / 5)


def test_every_norm_has_the_epsilon_of_diffusers():
    """1e-6 of the spatial and the last norms whatever the configuration says, which is for those of the residual blocks."""
    model = AutoencoderKLCogVideoX(**{**cases.VAE, "norm_eps": 3e-4})
    found = {name: norm._epsilon for name, norm in model.named_sublayers() if isinstance(norm, paddle.nn.GroupNorm)}
    residual = {name for name in found if name.rpartition(".")[2] in ("norm1", "norm2")}
    assert {found[name] for name in residual} == {3e-4} and {found[name] for name in found.keys() - residual} == {1e-6}
    assert AutoencoderKLCogVideoX(**cases.VAE).config.norm_eps == 1e-6


def test_other_frame_batch_gives_the_frames_it_says(model, monkeypatch):
    z = paddle.to_tensor(INPUTS["decode_5"])
    for size, frames in ((1, 5), (4, 17), (8, 17)):
        monkeypatch.setattr(model, "num_latent_frames_batch_size", size)
        assert model.decode(z).shape[2] == model.num_decoded_frames(5) == frames


def test_posterior():
    mean = paddle.zeros([2, 1, 1, 2, 2])
    posterior = module.DiagonalGaussian(mean + 3.0, mean)
    draws = posterior.sample(0), posterior.sample(0), posterior.sample(1)
    assert (draws[0] == draws[1]).all() and (draws[0] != draws[2]).any()
    assert (posterior.mode() == 3.0).all()
    np.testing.assert_allclose(posterior.kl().numpy(), [18.0, 18.0])  # 4 places x 9 / 2


def test_logvar_is_clipped(model, monkeypatch):
    x = paddle.to_tensor(INPUTS["encode_1"])
    bias = model.encoder.conv_out.conv.bias
    before = bias.numpy().copy()
    bias.set_value(before + np.repeat([0, 1000], 4).astype(np.float32))
    try:
        assert model.encode(x).logvar.max() == 20.0
    finally:
        bias.set_value(before)


def test_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = AutoencoderKLCogVideoX.from_pretrained(tmp_path)
    assert again.config == model.config
    z = paddle.to_tensor(INPUTS["decode_1"])
    assert (again.decode(z) == model.decode(z)).all()


def test_quant_convs_run():
    paddle.seed(0)
    model = AutoencoderKLCogVideoX(**{**cases.VAE, "latent_channels": 3}, use_quant_conv=True, use_post_quant_conv=True)
    x = paddle.to_tensor(INPUTS["encode_1"])
    mode = model.encode(x).mode()
    model.quant_conv.weight.set_value(model.quant_conv.weight * 2)
    assert abs(model.encode(x).mode() - mode).max() > 0
    assert model.decode(mode).shape == x.shape


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(down_block_types=["DownBlock2D"] * 4), ["down_block_types", "DownBlock2D", "CogVideoXDownBlock3D"]),
        (dict(up_block_types=["CogVideoXUpBlock3D"]), ["up_block_types", "4"]),
        (dict(act_fn="gelu"), ["act_fn", "gelu", "silu"]),
        (dict(norm_num_groups=3), ["norm_num_groups", "3"]),
        (dict(temporal_compression_ratio=3), ["temporal_compression_ratio", "3"]),
    ],
)
def test_bad_config(changes, words):
    with pytest.raises(ConfigError) as error:
        AutoencoderKLCogVideoX(**{**cases.VAE, **changes})
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("refused", [
    dict(tile_overlap_factor_height=1.0), dict(tile_overlap_factor_width=1.5), dict(tile_overlap_factor_height=-0.1),
    dict(tile_sample_min_height=4), dict(tile_sample_min_width=7),
    dict(tile_sample_min_height=64, tile_overlap_factor_width=1)], ids=str)
def test_a_refused_setting_changes_nothing(model, refused):
    names = ("use_tiling", "tile_sample_min_height", "tile_sample_min_width", "tile_latent_min_height",
             "tile_latent_min_width", "tile_overlap_factor_height", "tile_overlap_factor_width")
    before = [getattr(model, name) for name in names]
    with pytest.raises(ValueError, match="smaller than one latent|must be in"):
        model.enable_tiling(**refused)
    assert [getattr(model, name) for name in names] == before


def test_bad_shapes(model):
    with pytest.raises(ValueError, match=r"latents of shape \[1, 3, 1, 4, 4\].*4, frames"):
        model.decode(paddle.zeros([1, 3, 1, 4, 4]))
    with pytest.raises(ValueError, match="multiples of 8"):
        model.encode(paddle.zeros([1, 3, 1, 12, 16]))
    with pytest.raises(ValueError, match="smaller than one latent"):
        model.enable_tiling(4, 4)
    model.disable_tiling()
