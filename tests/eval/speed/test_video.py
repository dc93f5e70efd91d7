"""A whole video by stage, dry, of a small model; sizes, weights and options of the full one."""
import argparse
import json
import math
import time

import numpy as np
import paddle
import pytest

import lowbit_video
from lowbit_video import Recipe
from lowbit_video.app.cli import main
from lowbit_video.eval.speed import random_weights
from lowbit_video.eval.speed.cogvideox import CONFIGS
from lowbit_video.eval.speed.video import pipeline, run
from lowbit_video.hook.processors import ExactAttnProcessor
from lowbit_video.pipelines.cogvideox.transformer import CogVideoXTransformer3DModel
from lowbit_video.pipelines.cogvideox.vae import AutoencoderKLCogVideoX
from lowbit_video.pipelines.shared.t5 import T5EncoderModel
from lowbit_video.runtime import paddle_runtime

DELAY_S = 0.05
SMALL = ["--tiny", "--frames", "9", "--height", "32", "--width", "48"]


def arguments(**other):
    return argparse.Namespace(**dict(model="2b", precisions=["exact"], recipe=[], steps=1, frames=9, height=32, width=48,
                                     low_memory=False, tiles=False, tiny=True) | other)


def measure(say=lambda text: None, save=lambda result: None, **other):
    return run.measure(arguments(**other), "cpu", say, save)


def test_the_command_makes_a_video_of_each_precision_and_writes_stages(tmp_path, capsys):
    assert main(["bench", "video", *SMALL, "--steps", "3", "--precisions", "exact", "int8+fp8", "int8+fp8 pooled 0.5 always 24",
                 "--out", str(tmp_path), "--name", "v"]) == 0
    written = json.loads((tmp_path / "v.json").read_text())
    assert written["about"]["tiny"] and written["about"]["gpu"] == "no GPU" and written["model"] == "cogvideox-2b"
    assert [written[name] for name in ("frames", "height", "width", "steps", "dtype", "low_memory", "tiles")] == [
        9, 32, 48, 3, "float32", False, False]
    exact, low, pooled = written["videos"]
    for one, kind in ((exact, "exact (reference-exact)"), (low, "int8+fp8 (reference-lowbit, fused prologue of two pieces)"),
                      (pooled, "int8+fp8 pooled 0.5 (reference-lowbit; prologue apart: pooling needs the means of tiles of "
                               "normed keys first)")):
        assert one["ran"] == {kind: 6}  # 2 modules, 3 steps: the short video before does not count
        assert list(one["seconds"]) == ["text_encode", "denoise", "decode"] and all(x > 0 for x in one["seconds"].values())
        assert one["total_s"] == pytest.approx(sum(one["seconds"].values())) and one["memory_gib"] is None
        assert one["step_s"] == pytest.approx(one["seconds"]["denoise"] / 3)
        assert one["weights_s"] == {"text_encoder": 0, "transformer": 0, "vae": 0}
    assert exact["sqnr_db"] is None and 10 < low["sqnr_db"] < 100
    page = (tmp_path / "v.md").read_text()
    assert page in capsys.readouterr().out and "9 frames of 32x48, 3 denoising steps" in page


def test_recipes_are_made_behind_the_precisions_and_one_that_does_not_fit_is_told(tmp_path):
    for name, rules in (("steps", [{"rung": "exact"}, {"steps": "0.6-1", "rung": "int8+fp16"}]),
                        ("none", [{"rung": "exact"}, {"layers": "no.such", "rung": "exact"}])):
        Recipe(rules).save(tmp_path / f"{name}.toml")
    steps, none = (str(tmp_path / f"{name}.toml") for name in ("steps", "none"))
    result = measure(precisions=["exact"], recipe=[none, steps, "safe"], steps=3)
    assert [one["precision"] for one in result["videos"]] == ["exact", none, steps, "safe"]
    exact, failed, first, safe = result["videos"]
    assert "names no attention module" in failed["failed"] and f"Failed: {none}: " in run.markdown(result)
    exact_kind = "exact (reference-exact)"
    assert exact["ran"] == {exact_kind: 6} and sum(first["ran"].values()) == sum(safe["ran"].values()) == 6
    assert {kind.partition(" (")[0]: count for kind, count in first["ran"].items()} == {
        "steps 0-0.6: exact": 4, "steps 0.6-1: int8+fp16": 2}
    assert 10 < first["sqnr_db"] < 100


def test_with_low_memory_weights_are_made_each_time_and_their_time_is_told_apart(monkeypatch):
    plain, _ = pipeline.random_pipeline("5b", "float32", "cpu", tiny=True)
    pipe, weights = pipeline.random_pipeline("5b", "float32", "cpu", low_memory=True, tiny=True)
    assert {name: len(one.seconds) for name, one in weights.items()} == {"text_encoder": 0, "transformer": 0, "vae": 1}
    size = dict(num_frames=9, height=32, width=48)
    own = random_weights.randomise
    monkeypatch.setattr(random_weights, "randomise", lambda *given: time.sleep(DELAY_S) or own(*given))
    one, video = run._video(pipe, weights, 1, size)
    assert {name: len(one.seconds) for name, one in weights.items()} == {"text_encoder": 2, "transformer": 2, "vae": 1}
    assert one["weights_s"] == {name: sum(own.seconds[1:]) for name, own in weights.items()}  # not the short video's before
    assert one["weights_s"]["vae"] == 0 and one["weights_s"]["transformer"] > 10 * DELAY_S
    assert 0 < one["seconds"]["text_encode"] < one["weights_s"]["text_encoder"]
    assert 0 < one["seconds"]["denoise"] < one["weights_s"]["transformer"]
    assert not pipe.transformer.proj_out.weight._is_initialized()
    assert np.array_equal(video, plain(run.PROMPT, seed=0, num_inference_steps=1, progress=False, **size).frames[0])


def test_tiles_and_what_fails_are_as_asked_and_the_model_is_as_before(monkeypatch):
    made, saved, own = [], [], run._video

    def video(pipe, weights, steps, size):
        made.append((pipe, pipe.vae.use_tiling, steps, size))
        if len(made) == 1:
            raise MemoryError("too little")
        return own(pipe, weights, steps, size)

    monkeypatch.setattr(run, "_video", video)
    result = measure(precisions=["int8+fp8", "exact", "int8+fp16"], tiles=True, save=lambda result: saved.append(
        len(result["videos"])))
    assert saved == [1, 2, 3] and [tiled for _, tiled, *_ in made] == [True] * 3
    assert made[0][2:] == (1, dict(num_frames=9, height=32, width=48))
    failed, first, other = result["videos"]
    assert failed == dict(precision="int8+fp8", failed="MemoryError: too little")
    assert first["sqnr_db"] is None and other["sqnr_db"] > 10
    pipe = made[0][0]
    assert not lowbit_video.remove(pipe)
    assert all(isinstance(one, ExactAttnProcessor) for one in pipe.attn_processors.values())
    page = run.markdown(result)
    assert "Failed: int8+fp8: MemoryError: too little" in page and "random weights, decoded by tiles:" in page


def test_parts_have_the_published_sizes():
    """Billions of parameters. Sources: the weight files of google/t5-v1_1-xxl (its encoder), THUDM/CogVideoX-2b and -5b."""
    transformer = CogVideoXTransformer3DModel
    for model, config, billions in ((T5EncoderModel, pipeline.T5_XXL, 4.762), (transformer, CONFIGS["2b"], 1.694),
                                    (transformer, CONFIGS["5b"], 5.570), (AutoencoderKLCogVideoX, {}, 0.2156)):
        count = sum(math.prod(parameter.shape) for parameter in model.from_config(config).parameters())
        assert count / 1e9 == pytest.approx(billions, rel=1e-3), model
    assert CONFIGS["2b"].get("text_embed_dim", 4096) == pipeline.T5_XXL["d_model"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_are_made_in_the_type_asked_for_but_those_that_stay_float32(dtype):
    model = T5EncoderModel.from_config(dict(d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, vocab_size=500,
                                            feed_forward_proj="gated-gelu"))
    weights = random_weights.RandomWeights(dtype, pipeline.spread)
    weights.read(model)
    for name, parameter in model.named_parameters():
        assert str(parameter.dtype) == "paddle." + ("float32" if name.endswith(".wo.weight") and dtype == "float16" else dtype)
        values = parameter.astype("float32").numpy()
        if values.ndim == 1:
            assert (values == 1).all()
        else:
            wanted = 1.0 if "shared" in name or "relative" in name else values.shape[0] ** -0.5
            assert values.std() == pytest.approx(wanted, rel=0.2), name
    assert len(weights.seconds) == 1 and weights.seconds[0] > 0


def test_biases_are_zero_and_the_last_convolution_is_small():
    pipe, _ = pipeline.random_pipeline("1.5-5b", "float32", "cpu", tiny=True)
    state = pipe.vae.state_dict()
    assert not paddle.any(state["decoder.conv_out.conv.bias"])
    inputs = math.prod(state["decoder.conv_out.conv.weight"].shape[1:])
    assert float(state["decoder.conv_out.conv.weight"].std()) * inputs**0.5 == pytest.approx(0.4, rel=0.1)
    assert pipe.transformer.config.patch_size_t == 2 and pipe.vae.config.invert_scale_latents


def test_a_table_says_how_much_faster_each_stage_is():
    one = lambda precision, denoise, memory: dict(
        precision=precision, seconds=dict(text_encode=1.0, denoise=denoise, decode=9.0), total_s=10 + denoise,
        step_s=denoise / 50, memory_gib=memory, ran={f"{precision} (a kernel)": 1500},
        sqnr_db=None if precision == "exact" else 20.0)
    result = dict(about=dict(gpu="a card", versions={"paddle": "3"}, commit="c"), model="cogvideox-2b", dtype="float16",
                  steps=50, low_memory=True, tiles=False, frames=49, height=480, width=720,
                  videos=[one("exact", 40.0, dict(text_encode=12.0, denoise=8.0, decode=20.0)), one("int8+fp8", 20.0, None)])
    lines = run.markdown(result).splitlines()
    assert "| exact | 1.00 | 40.00 | 9.00 | 50.00 | 800 |  |  | 12.0 | 8.0 | 20.0 |  |" in lines
    assert "| int8+fp8 | 1.00 | 20.00 | 9.00 | 30.00 | 400 | 2.00x | 1.67x |  |  |  | 20.0 |" in lines
    assert "int8+fp8: int8+fp8 (a kernel) 1500 times." in lines
    assert any("float16, random weights, low memory: 49 frames of 480x720, 50 denoising steps" in line for line in lines)


@pytest.mark.parametrize("more, told", [(["--precisions", "int9"], "int9"), (["--recipe", "no.toml"], "no such file: no.toml"),
                                        (["--precisions", "safe"], "'safe' is a recipe, and one precision is wanted here"),
                                        (["--steps", "0"], "--steps is 0; give 1 or more")])
def test_what_cannot_be_is_refused(capsys, tmp_path, more, told):
    assert main(["bench", "video", *SMALL, "--out", str(tmp_path), *more])
    assert told in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_full_size_needs_a_gpu(capsys, tmp_path):
    if paddle_runtime.default_device() != "cpu":
        pytest.skip("Paddle has a GPU here")
    assert main(["bench", "video", "--out", str(tmp_path)])
    assert "--tiny is a dry run without one" in capsys.readouterr().err and not list(tmp_path.iterdir())
