"""A configuration's values: each of the kind that its argument's hint names, within its bounds, before anything is built."""

import json
import shutil

import pytest

from lowbit_video.pipelines import CogVideoXDDIMScheduler, CogVideoXTransformer3DModel, load
from lowbit_video.pipelines.cogvideox.vae import AutoencoderKLCogVideoX
from lowbit_video.pipelines.shared.config import ConfigError, check_kind
from lowbit_video.pipelines.shared.t5 import T5EncoderModel

from golden_cases import GOLDENS

FIELDS = [
    *[
        ("transformer/config.json", key, value)
        for key, value in (
            ("num_attention_heads", "2"),
            ("num_attention_heads", True),
            ("in_channels", None),
            ("patch_size", 0),
            ("patch_size", 2**31 - 1),
            ("patch_size", 2.0),
            ("sample_frames", 0),
            ("sample_width", -1),
            ("max_text_seq_length", 2**31 - 1),
            ("dropout", 3),
            ("norm_eps", 0.5),
            ("norm_eps", float("nan")),
            ("activation_fn", 3),
            ("attention_bias", "no"),
            ("temporal_compression_ratio", 0),
            ("spatial_interpolation_scale", -1),
            ("_class_name", ["CogVideoXTransformer3DModel"]),
            ("_class_name", {}),
        )
    ],
    *[
        ("vae/config.json", key, value)
        for key, value in (
            ("block_out_channels", 4),
            ("block_out_channels", []),
            ("block_out_channels", [2, "4", 4, 4]),
            ("norm_num_groups", 0),
            ("scaling_factor", 0),
            ("scaling_factor", "1"),
            ("down_block_types", "CogVideoXDownBlock3D"),
            ("norm_eps", -1),
            ("latent_channels", []),
        )
    ],
    *[
        ("text_encoder/config.json", key, value)
        for key, value in (
            ("d_model", "12"),
            ("num_heads", 0),
            ("feed_forward_proj", None),
            ("vocab_size", 1.5),
            ("relative_attention_num_buckets", 0),
            ("architectures", 3),
            ("architectures", [[]]),
        )
    ],
    *[
        ("scheduler/scheduler_config.json", key, value)
        for key, value in (
            ("beta_end", "x"),
            ("beta_end", -1),
            ("beta_end", 3),
            ("beta_start", None),
            ("num_train_timesteps", 0),
            ("num_train_timesteps", 2**31 - 1),
            ("trained_betas", 3),
            ("trained_betas", ["a"]),
            ("snr_shift_scale", -1),
            ("snr_shift_scale", 0),
            ("beta_schedule", []),
            ("steps_offset", 0.5),
            ("set_alpha_to_one", "no"),
        )
    ],
    *[
        ("tokenizer/tokenizer_config.json", key, value)
        for key, value in (("extra_ids", "x"), ("extra_ids", None), ("extra_ids", 2**31), ("tokenizer_class", []))
    ],
    *[
        ("model_index.json", key, value)
        for key, value in (
            ("_class_name", ["CogVideoXPipeline"]),
            ("_class_name", {}),
            ("scheduler", [[]]),
            ("vae", {}),
            ("transformer", [1]),
        )
    ],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(GOLDENS / "pipeline_2b", folder)
    return folder


@pytest.mark.parametrize("part, key, value", FIELDS, ids=lambda x: str(x)[:30])
def test_a_field_of_another_kind_is_refused_by_name(folder, part, key, value):
    path = folder / part
    stored = path.read_text()
    path.write_text(json.dumps({**json.loads(stored), key: value}))
    words = {"_class_name": "describes a", "architectures": "describes a", "tokenizer_class": "describes a"}.get(key, key)
    try:
        with pytest.raises(ConfigError, match=words if part != "scheduler/scheduler_config.json" else f"{key}|schedule"):
            load(folder, device="cpu")
    finally:
        path.write_text(stored)


@pytest.mark.parametrize(
    "build, key, value",
    [
        (CogVideoXTransformer3DModel, "num_layers", "2"),
        (AutoencoderKLCogVideoX, "norm_eps", 1.0),
        (T5EncoderModel, "d_kv", None),
        (CogVideoXDDIMScheduler, "beta_start", True),
    ],
)
def test_models_built_by_hand_are_checked_alike(build, key, value):
    with pytest.raises(ConfigError, match=key):
        build(**{key: value})


def test_what_a_hint_allows():
    from collections.abc import Sequence

    for value, hint in (
        (3, int),
        (None, int | None),
        (3, float),
        (0.5, float | None),
        (True, bool),
        ("a", str),
        ([1, 2], Sequence[int]),
        ((0.5, 1), Sequence[float] | None),
        (None, Sequence[float] | None),
        (object(), list),
    ):
        check_kind("x", value, hint)
    for value, hint in (
        (None, int),
        (-1, int),
        (2**31, int),
        (1.0, int),
        (float("inf"), float),
        ("a", bool),
        (3, str),
        ("ab", Sequence[str]),
        ([1, None], Sequence[int]),
    ):
        with pytest.raises((ValueError, TypeError), match="x is "):
            check_kind("x", value, hint)


def test_steps_that_begin_beyond_the_schedule_are_refused_and_change_nothing():
    scheduler = CogVideoXDDIMScheduler(timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="1000 steps of 'leading' spacing begin at timestep 1000 .* ends at 999"):
        scheduler.set_timesteps(1000)
    assert scheduler.num_inference_steps == 10 and len(scheduler.timesteps) == 10
