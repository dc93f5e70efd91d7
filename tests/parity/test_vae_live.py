"""The VAE against diffusers on fresh random models, both directions of saving and loading."""
import random

import numpy as np
import paddle
import pytest

from lowbit_video.pipelines import AutoencoderKLCogVideoX

torch = pytest.importorskip("torch", reason="needs PyTorch")
diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
pytestmark = pytest.mark.parity

TOLERANCE = 5e-4


def random_config(seed):
    rng = random.Random(seed)
    groups = rng.choice([1, 2, 4])
    blocks = rng.choice([3, 4])
    config = dict(
        block_out_channels=tuple(groups * rng.choice([2, 3, 4]) for _ in range(blocks)), norm_num_groups=groups,
        layers_per_block=rng.choice([1, 2]), latent_channels=rng.choice([2, 5]), norm_eps=rng.choice([1e-6, 1e-3]),
        temporal_compression_ratio=rng.choice([1, 2, 4]), sample_height=rng.choice([32, 64]), sample_width=rng.choice([40, 96]),
        scaling_factor=0.7, invert_scale_latents=rng.random() < 0.5,
    )
    return {**config, **block_types(blocks)}


def block_types(blocks):
    return {f"{way.lower()}_block_types": (f"CogVideoX{way}Block3D",) * blocks for way in ("Down", "Up")}


def plain(config):
    """A diffusers config without its notes, tuples as the lists that JSON makes of them."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in config.items() if k[0] != "_"}


def pair(goldens, seed, folder, **changes):
    torch.manual_seed(seed)
    theirs = goldens.randomized(diffusers.AutoencoderKLCogVideoX(**{**random_config(seed), **changes}), seed)
    theirs.save_pretrained(folder)
    return theirs, AutoencoderKLCogVideoX.from_pretrained(folder)


def close(ours, theirs):
    """Within the bound; where the random model's values are large, relative to them."""
    theirs = theirs.numpy()
    assert tuple(ours.shape) == theirs.shape
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=TOLERANCE * max(1.0, abs(theirs).max() / 8))


@pytest.mark.parametrize("seed", range(4))
def test_random_configs(goldens, seed, tmp_path):
    theirs, ours = pair(goldens, seed, tmp_path)
    rng = random.Random(seed + 100)
    ratio = ours.spatial_compression_ratio
    with torch.no_grad():
        for frames in (1, rng.choice([2, 3]), rng.choice([5, 6, 7])):
            z = torch.randn(rng.choice([1, 2]), theirs.config.latent_channels, frames, rng.choice([3, 4]), rng.choice([5, 6]))
            close(ours.decode(paddle.to_tensor(z.numpy())), theirs.decode(z).sample)
        for frames in (1, 9, rng.choice([8, 12, 16, 17])):
            x = torch.rand(1, 3, frames, 3 * ratio, 4 * ratio) * 2 - 1
            mine, posterior = ours.encode(paddle.to_tensor(x.numpy())), theirs.encode(x).latent_dist
            close(mine.mean, posterior.mean)
            close(mine.logvar, posterior.logvar)
            np.testing.assert_allclose(mine.mode().numpy(), mine.mean.numpy())


@pytest.mark.parametrize("latents", [(5, 6, 8), (3, 12, 4), (2, 7, 11)], ids=str)
def test_tiling_and_slicing(goldens, latents, tmp_path):
    changes = dict(block_out_channels=(4, 4, 8, 8), norm_num_groups=2, temporal_compression_ratio=4, layers_per_block=1)
    theirs, ours = pair(goldens, 9, tmp_path, **changes, **block_types(4))
    for model in (theirs, ours):
        model.enable_tiling(*goldens.VAE_TILE)
        model.enable_slicing()
    frames, height, width = latents
    z = torch.randn(2, theirs.config.latent_channels, *latents)
    x = torch.rand(2, 3, min(4 * frames, 9), 8 * height, 8 * width) * 2 - 1
    with torch.no_grad():
        close(ours.decode(paddle.to_tensor(z.numpy())), theirs.decode(z).sample)
        close(ours.encode(paddle.to_tensor(x.numpy())).mean, theirs.encode(x).latent_dist.mean)


def test_published_tile_sizes(tmp_path):
    """The tiles and overlaps of the published models (480 x 720, and 1.5's 768 x 1360) are the same as in diffusers."""
    for height, width in ((480, 720), (768, 1360)):
        tiny = dict(block_out_channels=(2, 2, 2, 2), norm_num_groups=1, layers_per_block=1)
        theirs = diffusers.AutoencoderKLCogVideoX(**tiny, sample_height=height, sample_width=width)
        ours = AutoencoderKLCogVideoX(**tiny, sample_height=height, sample_width=width)
        for key in ("tile_latent_min_height", "tile_latent_min_width", "tile_sample_min_height", "tile_sample_min_width"):
            assert getattr(ours, key) == getattr(theirs, key)
        for tile, sample, factor in (
            (theirs.tile_latent_min_height, theirs.tile_sample_min_height, theirs.tile_overlap_factor_height),
            (theirs.tile_latent_min_width, theirs.tile_sample_min_width, theirs.tile_overlap_factor_width),
        ):
            # where diffusers cuts its tiles is where the next ones begin, as it always is here
            assert sample - int(sample * factor) == 8 * int(tile * (1 - factor))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_diffusers_reads_ours(goldens, dtype, tmp_path):
    theirs, ours = pair(goldens, 3, tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours", dtype=dtype)
    again = diffusers.AutoencoderKLCogVideoX.from_pretrained(tmp_path / "ours", torch_dtype=torch.float32)
    for (name, a), b in zip(again.state_dict().items(), theirs.state_dict().values()):
        assert torch.equal(a, b.to(getattr(torch, dtype)).float()), name
    assert plain(again.config) == plain(theirs.config)
