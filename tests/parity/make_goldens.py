"""Writes tests/goldens: small random models by diffusers and transformers, with inputs and outputs.

    python tests/parity/make_goldens.py [name ...]

needs torch (CPU), diffusers, transformers and sentencepiece. Each function writes one folder: the component in its published
layout, and `io.npz`. Weights are rounded to float16 before the outputs are computed, and stored so: goldens stay small,
and reading them tests the conversion. Zero and one are not left where training starts from them.
"""
from __future__ import annotations

import inspect
import io
import json
import random
import sys
from pathlib import Path

import numpy as np

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
MAKERS = {}


def golden(make):
    """Registers a function `make(folder)` under its own name."""
    MAKERS[make.__name__] = make
    return make


def randomized(model, seed: int, spread: float = 0.1):
    """Moves every parameter away from its initial value, and rounds all to float16."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
            parameter.copy_(parameter.half().float())
        kept = model.state_dict()
        for name, buffer in model.named_buffers():
            if name in kept and buffer.is_floating_point():
                buffer.copy_(buffer.half().to(buffer.dtype))
    return model.eval()


def save_half(model, folder: Path) -> None:
    """Writes a model in float16 without touching the one at hand."""
    import copy

    copy.deepcopy(model).half().save_pretrained(folder)


# ------------------------------------------------------------------------------------------------------------ transformer

TRANSFORMER = dict(
    num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=12,
    num_layers=2, sample_width=12, sample_height=8, sample_frames=9, max_text_seq_length=5,
)
TRANSFORMER_KINDS = {
    "transformer_2b": {},
    "transformer_5b": dict(use_rotary_positional_embeddings=True),
    "transformer_5b_learned": dict(use_rotary_positional_embeddings=True, use_learned_positional_embeddings=True),
    "transformer_15": dict(
        use_rotary_positional_embeddings=True, patch_size_t=2, patch_bias=False, ofs_embed_dim=8, num_layers=1
    ),
}
# latents [frames, height, width] of each case; the first is the trained size
TRANSFORMER_SIZES = {
    "transformer_2b": [(3, 8, 12), (2, 10, 6)],
    "transformer_5b": [(3, 8, 12), (2, 10, 6)],
    "transformer_5b_learned": [(3, 8, 12), (2, 8, 12)],
    "transformer_15": [(4, 8, 12), (2, 6, 8)],
}


def rotary_tables(config, frames: int, height: int, width: int):
    """The (cos, sin) that diffusers' pipeline makes for latents of this size; None without rotary positions."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    if not config.use_rotary_positional_embeddings:
        return None
    patch = config.patch_size
    grid = (height // patch, width // patch)
    trained = (config.sample_height // patch, config.sample_width // patch)
    if config.patch_size_t is None:
        crop = get_resize_crop_region_for_grid(grid, trained[1], trained[0])
        return get_3d_rotary_pos_embed(config.attention_head_dim, crop, grid, frames)
    frames = (frames + config.patch_size_t - 1) // config.patch_size_t
    return get_3d_rotary_pos_embed(config.attention_head_dim, None, grid, frames, grid_type="slice", max_size=trained)


def run_transformer(model, size, seed: int) -> dict[str, np.ndarray]:
    """Runs a diffusers transformer on seeded inputs; returns inputs and output."""
    import torch

    config = model.config
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, size[0], config.in_channels, *size[1:], generator=generator)
    text = torch.randn(2, config.max_text_seq_length, config.text_embed_dim, generator=generator)
    timestep = torch.tensor([999, 17])
    ofs = torch.tensor([2.0]) if config.ofs_embed_dim else None
    rotary = rotary_tables(config, *size)
    with torch.no_grad():
        out = model(latents, text, timestep, ofs=ofs, image_rotary_emb=rotary).sample
    arrays = dict(latents=latents, text=text, timestep=timestep, out=out)
    if rotary is not None:
        arrays.update(cos=rotary[0], sin=rotary[1])
    return {name: tensor.numpy() for name, tensor in arrays.items()}


def _transformer(folder: Path) -> None:
    import torch
    from diffusers import CogVideoXTransformer3DModel

    name = folder.name
    torch.manual_seed(0)
    model = randomized(CogVideoXTransformer3DModel(**{**TRANSFORMER, **TRANSFORMER_KINDS[name]}), seed=1)
    save_half(model, folder)
    arrays = {}
    for i, size in enumerate(TRANSFORMER_SIZES[name]):
        arrays.update({f"{key}_{i}": array for key, array in run_transformer(model, size, seed=2 + i).items()})
    np.savez_compressed(folder / "io.npz", **arrays)


MAKERS.update(dict.fromkeys(TRANSFORMER_KINDS, _transformer))


# ----------------------------------------------------------------------------------------------------------- text encoder

T5 = dict(vocab_size=64, d_model=24, d_kv=10, d_ff=32, num_layers=2, num_heads=2)
T5_KINDS = {
    "t5_gated": dict(feed_forward_proj="gated-gelu"),
    "t5_relu": dict(feed_forward_proj="relu", relative_attention_num_buckets=8, relative_attention_max_distance=20),
}


def run_t5(model, seed: int, length: int = 40) -> dict[str, np.ndarray]:
    """Runs a transformers T5 encoder on seeded ids, without and with a mask; returns inputs and outputs."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.vocab_size, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = 0
    with torch.no_grad():
        out = model(ids).last_hidden_state
        masked = model(ids, attention_mask=mask).last_hidden_state
    return {name: tensor.numpy() for name, tensor in dict(ids=ids, mask=mask, out=out, masked=masked).items()}


def _t5(folder: Path) -> None:
    import torch
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    model = randomized(T5EncoderModel(T5Config(**T5, **T5_KINDS[folder.name])), seed=1)
    save_half(model, folder)
    np.savez_compressed(folder / "io.npz", **run_t5(model, seed=2))


MAKERS.update(dict.fromkeys(T5_KINDS, _t5))


# -------------------------------------------------------------------------------------------------------------- tokenizer

WORDS = (
    "a an the red blue green ball cube panda guitar bamboo forest river street city night morning light camera slowly plays "
    "moves left right up down and of in on with is are sits small large bright dark rain snow people walk café naïve über"
).split()


def sentencepiece_model(normalization: str = "nmt_nfkc", vocab_size: int = 160) -> bytes:
    """Trains a T5-like sentencepiece model; the same bytes every time."""
    import sentencepiece

    rng = random.Random(0)
    lines = [" ".join(rng.choices(WORDS, k=12)) + rng.choice([".", "!", ", 49", "?"]) for _ in range(400)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=vocab_size, model_type="unigram", pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, num_threads=1, hard_vocab_limit=False, character_coverage=1.0, minloglevel=2,
        normalization_rule_name=normalization,
    )
    return model.getvalue()


def tokenizer_texts(count: int = 60, seed: int = 0) -> list[str]:
    """Texts that tokenizers get wrong, and random ones."""
    texts = [
        "", " ", "   ", "a panda plays the guitar", "  a   panda  ", "a\tred\nball\r\n", "A PANDA", "Café, naïve; über!",
        "cafe\u0301 nai\u0308ve", "ﬁne ½ ① ㎏ Å", "全角　スペース", "日本語のテスト", "🐼 🎸🎸 guitar",
        "a\u00a0b\u2003c\u200bd\u2028e\u0085f",
        "\ufeffa panda", "▁a ▁ ▁▁b", "x" * 70, "123 4,567.89 -3e-4 #!%&/()=", "a</s>b", "</s>", "a <pad> b<unk>c",
        "<extra_id_0> sits <extra_id_99> <extra_id_100>", "\u0000a\u0007b\u007f", "a\u00adb",
        "مرحبا שלום नमस्ते", "\u202ea\u202c",
        " ".join(WORDS) * 6, "a panda " * 200,
    ]
    rng = random.Random(seed)
    alphabet = [" ", "  ", "\n", "\u3000", "é", "中", "🐼", ".", ",", "</s>", "<extra_id_7>", *WORDS[:20]]
    for _ in range(count):
        parts = [rng.choice([*alphabet, chr(rng.randint(33, 0x2000))]) for _ in range(rng.randint(1, 14))]
        texts.append("".join(parts))
    return texts


def _expected(tokenizer, texts: list[str]) -> dict:
    padded = tokenizer(texts, padding="max_length", max_length=16, truncation=True)
    return {
        "texts": texts,
        "ids": [tokenizer(text).input_ids for text in texts],
        "padded": padded.input_ids,
        "mask": padded.attention_mask,
    }


@golden
def tokenizer(folder: Path) -> None:
    """spiece.model with T5's own normalization, as published folders have it."""
    from transformers import T5Tokenizer

    (folder / "spiece.model").write_bytes(sentencepiece_model())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 100}) + "\n")
    expected = _expected(T5Tokenizer.from_pretrained(folder), tokenizer_texts())
    (folder / "expected.json").write_text(json.dumps(expected, separators=(",", ":")) + "\n")


@golden
def tokenizer_json(folder: Path) -> None:
    """tokenizer.json alone, as newer transformers write it; no normalization table, which would be 300 KB of text."""
    import tempfile

    from transformers import T5Tokenizer

    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / "spiece.model").write_bytes(sentencepiece_model("identity", vocab_size=80))
        made = T5Tokenizer.from_pretrained(temporary, extra_ids=4)
        made.save_pretrained(folder)
    texts = [text for text in tokenizer_texts(20) if text.isascii() and "\x00" not in text]
    (folder / "expected.json").write_text(json.dumps(_expected(made, texts), separators=(",", ":")) + "\n")


# -------------------------------------------------------------------------------------------------------------------- VAE

VAE = dict(
    block_out_channels=(4, 8, 8, 8), norm_num_groups=2, layers_per_block=1, latent_channels=4, sample_height=64,
    sample_width=96,
)
VAE_DECODED_FRAMES = (1, 2, 3, 4, 5)  # latent frames; more than 3 are worked on in pieces
VAE_ENCODED_FRAMES = (1, 7, 8, 9, 10, 17)
# pixels; a sixth of the height and a fifth of the width, the overlap, are whole latents
VAE_TILE = (48, 40)
# Every fifth row and column, which meets all positions in an 8 x 8 cell, is kept of a video.
VAE_STRIDE = 5


def vae_inputs() -> dict[str, np.ndarray]:
    """The inputs of all cases, by name; made again by the tests instead of stored."""
    source = np.random.RandomState(3)
    inputs = {f"decode_{n}": source.standard_normal((1, 4, n, 4, 6)) for n in VAE_DECODED_FRAMES}
    inputs["decode_tiled"] = source.standard_normal((1, 4, 3, 11, 8))
    inputs.update({f"encode_{n}": source.uniform(-1, 1, (1, 3, n, 32, 48)) for n in VAE_ENCODED_FRAMES})
    inputs["encode_tiled"] = source.uniform(-1, 1, (1, 3, 9, 88, 64))
    return {name: array.astype(np.float32) for name, array in inputs.items()}


@golden
def vae_small(folder: Path) -> None:
    """A VAE: decoded videos (strided) and the means and logvars of encoded ones."""
    import torch
    from diffusers import AutoencoderKLCogVideoX

    torch.manual_seed(0)
    model = randomized(AutoencoderKLCogVideoX(**VAE), seed=1)
    save_half(model, folder)
    outputs = {}
    for name, array in vae_inputs().items():
        if name.endswith("tiled"):
            model.enable_tiling(*VAE_TILE)
        with torch.no_grad():
            if name.startswith("decode"):
                out = model.decode(torch.from_numpy(array)).sample[..., ::VAE_STRIDE, ::VAE_STRIDE]
            else:
                posterior = model.encode(torch.from_numpy(array)).latent_dist
                out = torch.cat([posterior.mean, posterior.logvar], dim=1)
        model.disable_tiling()
        outputs[name] = out.numpy()
    np.savez_compressed(folder / "io.npz", **outputs)


# -------------------------------------------------------------------------------------------------------------- schedulers

SCHEDULERS = {"ddim": "CogVideoXDDIMScheduler", "dpm": "CogVideoXDPMScheduler"}
PUBLISHED_SCHEDULE = dict(
    clip_sample=False, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing",
)
# name -> (what differs from the published schedule, steps)
SCHEDULES = {
    "2b": (dict(snr_shift_scale=3.0), 50),
    "5b": (dict(snr_shift_scale=1.0), 50),
    "few": (dict(snr_shift_scale=1.0), 7),
    "linspace": (dict(timestep_spacing="linspace"), 10),
    "leading": (dict(timestep_spacing="leading", steps_offset=1), 10),
    "end_at_first_alpha": (dict(set_alpha_to_one=False), 8),
    "no_rescale": (dict(rescale_betas_zero_snr=False), 8),
    "epsilon": (dict(rescale_betas_zero_snr=False, prediction_type="epsilon"), 8),
    "sample": (dict(prediction_type="sample"), 8),
    "linear": (dict(beta_schedule="linear", beta_end=0.02), 8),
    "cosine": (dict(beta_schedule="squaredcos_cap_v2"), 8),
}
SCHEDULER_SHAPE = (2, 3, 4)


def scheduler_inputs(steps: int) -> dict[str, np.ndarray]:
    """Starting noise, what a model might say at each step, and the noise of each step."""
    source = np.random.RandomState(5)
    inputs = {
        "start": source.standard_normal(SCHEDULER_SHAPE),
        "predicted": source.standard_normal((steps, *SCHEDULER_SHAPE)),
        "noise": source.standard_normal((steps, *SCHEDULER_SHAPE)),
    }
    return {name: array.astype(np.float32) for name, array in inputs.items()}


class one_noise_a_step:
    """While active, diffusers' DPM scheduler takes its noise from a list: one array for each step, however often it draws."""

    def __init__(self, scheduler, arrays):
        self.scheduler, self.arrays, self.count = scheduler, arrays, -1

    def __enter__(self):
        import torch
        from diffusers.schedulers import scheduling_dpm_cogvideox

        def step(*args, **kwargs):
            self.count += 1
            return self.step(*args, **kwargs)

        self.module, self.draw, self.step = scheduling_dpm_cogvideox, scheduling_dpm_cogvideox.randn_tensor, self.scheduler.step
        step.__signature__ = inspect.signature(self.step)  # the pipeline looks at its parameters
        self.scheduler.step = step
        self.module.randn_tensor = lambda *args, **kwargs: torch.from_numpy(self.arrays[self.count])

    def __exit__(self, *error):
        self.module.randn_tensor = self.draw
        del self.scheduler.step


def run_scheduler(name: str, changes: dict, steps: int) -> dict[str, np.ndarray]:
    """A trajectory of diffusers' scheduler, its timesteps and its table."""
    import diffusers
    import torch

    scheduler = getattr(diffusers, SCHEDULERS[name])(**{**PUBLISHED_SCHEDULE, **changes})
    scheduler.set_timesteps(steps)
    inputs = scheduler_inputs(steps)
    sample, clean, path = torch.from_numpy(inputs["start"]), None, []
    with one_noise_a_step(scheduler, inputs["noise"]):
        for i, timestep in enumerate(scheduler.timesteps):
            predicted = torch.from_numpy(inputs["predicted"][i])
            if name == "ddim":
                sample = scheduler.step(predicted, timestep, sample, return_dict=False)[0]
            else:
                back = scheduler.timesteps[i - 1] if i else None
                sample, clean = scheduler.step(predicted, clean, timestep, back, sample, return_dict=False)
            path.append(sample.numpy())
    timesteps = torch.tensor([3, 750])
    start, noise = torch.from_numpy(inputs["start"]), torch.from_numpy(inputs["noise"][0])
    return {
        "path": np.stack(path),
        "timesteps": scheduler.timesteps.numpy(),
        "alphas_cumprod": scheduler.alphas_cumprod.double().numpy()[::37],
        "noisy": scheduler.add_noise(start, noise, timesteps).numpy(),
        "velocity": scheduler.get_velocity(start, noise, timesteps).numpy(),
    }


@golden
def scheduler_paths(folder: Path) -> None:
    """Trajectories of both schedulers under every schedule, and the published files."""
    import diffusers

    arrays = {}
    for name in SCHEDULERS:
        for schedule, (changes, steps) in SCHEDULES.items():
            arrays.update({f"{name}.{schedule}.{key}": a for key, a in run_scheduler(name, changes, steps).items()})
        made = getattr(diffusers, SCHEDULERS[name])(**PUBLISHED_SCHEDULE, snr_shift_scale=1.0)
        made.save_pretrained(folder / name)
    np.savez_compressed(folder / "io.npz", **arrays)


# --------------------------------------------------------------------------------------------------------------- pipelines

PIPELINES = {
    "pipeline_2b": ("ddim", 3.0, {}, 1.15258426),
    "pipeline_5b": ("dpm", 1.0, dict(use_rotary_positional_embeddings=True), 0.7),
    "pipeline_15": ("dpm", 1.0, dict(use_rotary_positional_embeddings=True, patch_size_t=2, patch_bias=False), 0.7),
}
PROMPTS = ["a red panda plays the guitar", "snow"]
NEGATIVE = "dark rain"
# name of a case -> arguments of the call
PIPELINE_CASES = {
    "guided": dict(prompt=PROMPTS[0], guidance_scale=6.0),
    "dynamic": dict(prompt=PROMPTS[0], guidance_scale=6.0, use_dynamic_cfg=True),
    "negative": dict(prompt=PROMPTS, negative_prompt=[NEGATIVE, NEGATIVE], guidance_scale=4.0),
    "unguided": dict(prompt=PROMPTS[0], guidance_scale=1.0),
}
PIPELINE_SIZE = dict(height=32, width=48, num_frames=9, num_inference_steps=4)
VIDEO_STRIDE = 3  # of the rows and columns that are kept
OTHER_SCHEDULER = {"ddim": "dpm", "dpm": "ddim"}


def start_noise(shape) -> np.ndarray:
    return np.random.RandomState(11).standard_normal(shape).astype(np.float32)


def step_noise():
    """The source of the noise of the steps: standard_normal(shape), one call a step."""
    return np.random.RandomState(12)


def run_pipeline(pipe, arguments: dict, output_type: str = "np") -> np.ndarray:
    """Videos [B, F, H, W, 3] of a diffusers pipeline from the noise above."""
    import torch

    size = {**PIPELINE_SIZE, **arguments}
    ratio, patch_t = pipe.vae_scale_factor_spatial, pipe.transformer.config.patch_size_t or 1
    frames = (size["num_frames"] - 1) // 4 + 1
    batch = 1 if isinstance(size["prompt"], str) else len(size["prompt"])
    shape = (batch, frames + -frames % patch_t, pipe.transformer.config.in_channels, size["height"] // ratio,
             size["width"] // ratio)
    source = step_noise()
    noises = [source.standard_normal(shape).astype(np.float32) for _ in range(size["num_inference_steps"])]
    pipe.set_progress_bar_config(disable=True)
    size["max_sequence_length"] = pipe.transformer.config.max_text_seq_length
    with one_noise_a_step(pipe.scheduler, noises):
        return pipe(latents=torch.from_numpy(start_noise(shape)), output_type=output_type, **size).frames


def with_other_scheduler(pipe):
    """Gives a diffusers pipeline the other scheduler, with the same schedule."""
    import diffusers

    kind = next(name for name, class_name in SCHEDULERS.items() if class_name == type(pipe.scheduler).__name__)
    pipe.scheduler = getattr(diffusers, SCHEDULERS[OTHER_SCHEDULER[kind]]).from_config(pipe.scheduler.config)
    return pipe


def _pipeline(folder: Path) -> None:
    import copy
    import tempfile

    import diffusers
    import torch
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    scheduler, shift, changes, scaling_factor = PIPELINES[folder.name]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / "spiece.model").write_bytes(sentencepiece_model("identity", vocab_size=80))
        tokens = T5Tokenizer.from_pretrained(temporary)
    text = T5EncoderModel(T5Config(**{**T5, "vocab_size": 192, "d_model": 12}, feed_forward_proj="gated-gelu"))
    vae = diffusers.AutoencoderKLCogVideoX(**{**VAE, "block_out_channels": (2, 4, 4, 4)}, scaling_factor=scaling_factor)
    transformer = diffusers.CogVideoXTransformer3DModel(**{**TRANSFORMER, "max_text_seq_length": 16, **changes})
    pipe = diffusers.CogVideoXPipeline(
        tokens,
        randomized(text, seed=1),
        randomized(vae, seed=2),
        randomized(transformer, seed=3),
        getattr(diffusers, SCHEDULERS[scheduler])(**PUBLISHED_SCHEDULE, snr_shift_scale=shift),
    )
    with torch.no_grad():  # most pixels between black and white
        weight = pipe.vae.decoder.conv_out.conv.weight
        weight.copy_((weight * 0.2).half().float())
    copy.deepcopy(pipe).to(torch.float16).save_pretrained(folder)
    videos = {name: run_pipeline(pipe, case) for name, case in PIPELINE_CASES.items()}
    videos["other_scheduler"] = run_pipeline(with_other_scheduler(pipe), PIPELINE_CASES["guided"])
    inside = np.mean([np.mean((v > 0) & (v < 1)) for v in videos.values()])
    print(f"{folder.name}: {inside:.0%} of the pixels between black and white")
    kept = {name: video[:, :, ::VIDEO_STRIDE, ::VIDEO_STRIDE] for name, video in videos.items()}
    np.savez_compressed(folder / "io.npz", **{name: (video * 255).round().astype(np.uint8) for name, video in kept.items()})


MAKERS.update(dict.fromkeys(PIPELINES, _pipeline))


def main(names: list[str]) -> None:
    unknown = [name for name in names if name not in MAKERS]
    if unknown:
        raise SystemExit(f"no golden named {', '.join(unknown)}; there are: {', '.join(MAKERS)}")
    for name in names or MAKERS:
        folder = GOLDENS / name
        folder.mkdir(parents=True, exist_ok=True)
        MAKERS[name](folder)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{name}: {size / 1000:.0f} KB")


if __name__ == "__main__":
    main(sys.argv[1:])
