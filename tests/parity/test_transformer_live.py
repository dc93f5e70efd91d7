"""The transformer against diffusers on fresh random models, both directions of saving and loading."""
import random
import warnings

import numpy as np
import paddle
import pytest

from lowbit_video.pipelines.cogvideox.transformer import CogVideoXTransformer3DModel

pytest.importorskip("torch", reason="needs PyTorch")
diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
pytestmark = pytest.mark.parity

TOLERANCE = 1e-4
SEEDS = range(3)
DTYPES = ("float32", "float16", "bfloat16")


def random_case(seed):
    """A configuration of some kind and a size of latents, (config, (frames, height, width))."""
    rng = random.Random(seed)
    config = dict(
        num_attention_heads=rng.choice([1, 3]), attention_head_dim=rng.choice([16, 32]), in_channels=rng.choice([3, 8]),
        out_channels=rng.choice([3, 8]), time_embed_dim=rng.choice([8, 20]), text_embed_dim=rng.choice([10, 24]), num_layers=2,
        sample_width=12, sample_height=10, sample_frames=9, max_text_seq_length=rng.choice([4, 9]),
        attention_bias=rng.random() < 0.5, norm_elementwise_affine=rng.random() < 0.7, flip_sin_to_cos=rng.random() < 0.7,
        freq_shift=rng.choice([0, 1]), spatial_interpolation_scale=rng.choice([1.0, 1.875]),
        temporal_interpolation_scale=rng.choice([1.0, 2.0]), activation_fn=rng.choice(["gelu", "gelu-approximate"]),
        timestep_activation_fn=rng.choice(["silu", "gelu", "relu", "mish"]), patch_bias=rng.random() < 0.5,
    )
    return config, (rng.choice([2, 4]), rng.choice([6, 10]), rng.choice([8, 12]))


KINDS = {
    "2b": {},
    "5b": dict(use_rotary_positional_embeddings=True),
    "5b learned": dict(use_rotary_positional_embeddings=True, use_learned_positional_embeddings=True),
    "1.5": dict(use_rotary_positional_embeddings=True, patch_size_t=2),
    "1.5 ofs": dict(use_rotary_positional_embeddings=True, patch_size_t=2, ofs_embed_dim=8),
}


def make(goldens, kind, seed):
    import torch

    config, size = random_case(seed)
    config |= KINDS[kind]
    if kind == "1.5 ofs":
        config["time_embed_dim"] = 8
    if "learned" in kind:
        size = (size[0], config["sample_height"], config["sample_width"])
    torch.manual_seed(seed)
    model = diffusers.CogVideoXTransformer3DModel(**config)
    return goldens.randomized(model, seed), goldens.run_transformer(model, size, seed)


def run(model, arrays):
    given = {name: paddle.to_tensor(arrays[name]) for name in arrays if name != "out"}
    rotary = (given["cos"], given["sin"]) if "cos" in given else None
    ofs = paddle.to_tensor([2.0]) if model.config.ofs_embed_dim else None
    with paddle.no_grad():
        return model(given["latents"], given["text"], given["timestep"], ofs=ofs, image_rotary_emb=rotary).numpy()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_from_diffusers_and_back(goldens, tmp_path, kind, seed):
    theirs, arrays = make(goldens, kind, seed)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "theirs")
    out = run(ours, arrays)
    assert out.shape == arrays["out"].shape
    assert np.abs(out - arrays["out"]).max() <= TOLERANCE

    ours.save_pretrained(tmp_path / "ours")
    back = diffusers.CogVideoXTransformer3DModel.from_pretrained(tmp_path / "ours")
    latents = arrays["latents"]
    size = (latents.shape[1], *latents.shape[3:])
    # the same weights; torch's own sums differ a little with where memory happens to lie
    np.testing.assert_allclose(goldens.run_transformer(back.eval(), size, seed)["out"], arrays["out"], atol=1e-5)
    assert dict(back.config).items() >= dict(ours.config).items()


@pytest.mark.parametrize("kind", KINDS)
def test_rotary_tables(goldens, kind):
    """Sizes below, at and beyond the trained one, tall and wide."""
    config, _ = random_case(0)
    config |= KINDS[kind] | dict(sample_height=16, sample_width=24)
    ours = CogVideoXTransformer3DModel(**config)
    for size in ((3, 16, 24), (2, 6, 24), (5, 14, 4), (1, 2, 2), *([] if "1.5" in kind else [(2, 40, 12), (2, 12, 60)])):
        want, got = goldens.rotary_tables(ours.config, *size), ours.rotary_tables(*size)
        if want is None:
            assert got is None
            continue
        for a, b in zip(want, got):
            np.testing.assert_allclose(b.numpy(), a.numpy(), atol=1e-5)


@pytest.mark.parametrize("shard", ["10GB", "20KB"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_types_and_shards_both_ways(goldens, tmp_path, dtype, shard):
    """The weights are the same bits, whichever side wrote them."""
    import torch

    theirs, arrays = make(goldens, "5b", 1)
    theirs = theirs.to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1 or shard == "10GB"
    ours = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "theirs")
    out = run(ours, arrays)
    assert np.abs(out - arrays["out"]).max() <= (TOLERANCE if dtype != "bfloat16" else 0.2)

    ours.save_pretrained(tmp_path / "ours", dtype=dtype, max_shard_size=shard)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1 or shard == "10GB"
    kind = getattr(torch, dtype)
    back = diffusers.CogVideoXTransformer3DModel.from_pretrained(tmp_path / "ours", torch_dtype=kind)
    want = theirs.state_dict()
    assert set(back.state_dict()) == set(want)
    for name, tensor in back.state_dict().items():
        assert tensor.dtype == kind and torch.equal(tensor, want[name]), name


def test_variant_as_diffusers_writes_it(goldens, tmp_path):
    theirs, arrays = make(goldens, "2b", 0)
    for shard in ("10GB", "20KB"):
        folder = tmp_path / shard
        theirs.half().save_pretrained(folder, variant="fp16", max_shard_size=shard)
        ours = CogVideoXTransformer3DModel.from_pretrained(folder, variant="fp16")
        assert np.abs(run(ours, arrays) - arrays["out"]).max() <= TOLERANCE


def test_half_asked_for_on_a_cpu(goldens, tmp_path):
    theirs, arrays = make(goldens, "2b", 0)
    theirs.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = CogVideoXTransformer3DModel.from_pretrained(tmp_path, dtype="bfloat16")
    half = dict(arrays, latents=arrays["latents"].astype(np.float16))
    assert np.abs(run(ours, half) - arrays["out"]).max() < 0.1


PUBLISHED = {
    "CogVideoX-2b": {},
    "CogVideoX-5b": dict(num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True),
    "CogVideoX-5b-I2V": dict(
        num_attention_heads=48, num_layers=42, in_channels=32, use_rotary_positional_embeddings=True,
        use_learned_positional_embeddings=True,
    ),
    "CogVideoX1.5-5B": dict(
        num_attention_heads=48, num_layers=42, patch_size_t=2, patch_bias=False, sample_frames=81, sample_height=300,
        sample_width=300, max_text_seq_length=224, use_rotary_positional_embeddings=True,
    ),
}
BILLIONS = {"CogVideoX-2b": 1.69, "CogVideoX-5b": 5.57, "CogVideoX-5b-I2V": 5.57, "CogVideoX1.5-5B": 5.57}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_without_their_memory(name):
    """The full-size models have diffusers' tensors, by name and shape; neither side holds any weight."""
    import torch

    config = PUBLISHED[name] | dict(sample_frames=9, sample_height=4, sample_width=4)  # small position tables
    with torch.device("meta"):
        theirs = diffusers.CogVideoXTransformer3DModel(**config)
    ours = CogVideoXTransformer3DModel.from_config(config)
    want = {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
    linear = {f"{key}.weight" for key, layer in ours.named_sublayers() if isinstance(layer, paddle.nn.Linear)}
    got = {key: tuple(tensor.shape)[:: -1 if key in linear else 1] for key, tensor in ours.state_dict().items()}
    assert got == want
    assert sum(parameter.numel() for parameter in theirs.parameters()) / 1e9 == pytest.approx(BILLIONS[name], abs=0.01)
