"""The whole pipeline against videos of diffusers, its options, and what it says to bad input."""
import json
import math
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import paddle
import pytest

import lowbit_video
from lowbit_video.errors import NonFiniteError
from lowbit_video.hook.processors import LowBitAttnProcessor
from lowbit_video.pipelines import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXPipeline, make_random_pipeline
from lowbit_video.pipelines.cogvideox import pipeline as module
from lowbit_video.pipelines.shared.config import Config, ConfigError

from golden_cases import GOLDENS, cases

KINDS = list(cases.PIPELINES)
OTHER = {CogVideoXDDIMScheduler: CogVideoXDPMScheduler, CogVideoXDPMScheduler: CogVideoXDDIMScheduler}
LEVELS = 2  # of 255, the bound on the difference of a pixel
QUICK = dict(num_inference_steps=2, progress=False, height=32, width=48, num_frames=9)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def loaded():
    return {kind: CogVideoXPipeline.from_pretrained(GOLDENS / kind, device="cpu") for kind in KINDS}


@pytest.fixture
def pipe(loaded):
    return loaded["pipeline_2b"]


def in_threads(*works):
    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result(timeout=120) for future in [pool.submit(work) for work in works]]


@pytest.mark.parametrize("shared", ["pipeline", "scheduler"])
def test_threads_that_share_state_each_make_their_own_video(pipe, shared):
    calls = [dict(num_inference_steps=2, guidance_scale=6.0), dict(num_inference_steps=5, guidance_scale=1.0),
             dict(num_inference_steps=4, guidance_scale=3.0, use_dynamic_cfg=True)]
    work = lambda one, more: lambda: one("a cat", seed=3, **{**QUICK, **more}).frames
    wanted = [work(pipe, more)() for more in calls]
    pipes = [pipe] * 3 if shared == "pipeline" else [
        CogVideoXPipeline(**{name: getattr(pipe, name) for name in pipe.components}, device="cpu") for _ in calls]
    for got, one in zip(in_threads(*map(work, pipes, calls)), wanted):
        np.testing.assert_array_equal(got, one)


def test_a_stop_of_one_call_does_not_reach_the_next_thread(pipe):
    steps = {"first": [], "second": []}

    def call(name, stop):
        def callback(pipeline, step, timestep, tensors):
            steps[name].append(step)
            pipeline.interrupt = stop
        return lambda: pipe("a cat", seed=1, callback_on_step_end=callback, **{**QUICK, "num_inference_steps": 3})

    in_threads(call("first", True), call("second", False))
    assert steps == {"first": [0], "second": [0, 1, 2]}


def test_a_call_from_its_own_callback_is_refused_and_decoding_there_is_not(pipe):
    shape = []
    with pytest.raises(ValueError, match="CogVideoXPipeline and .*Scheduler is in the middle of a call.*one call at a time"):
        pipe("a cat", callback_on_step_end=lambda *_: pipe("a dog", **QUICK), **QUICK)
    preview = lambda pipeline, step, timestep, tensors: shape.append(pipeline.decode_latents(tensors["latents"]).shape)
    assert pipe("a cat", callback_on_step_end=preview, **QUICK).frames.shape == (1, 9, 32, 48, 3)
    assert shape == [[1, 3, 9, 32, 48]] * 2


def test_progress_of_decoding_belongs_to_the_call(pipe):
    told = {4: [], 3: []}
    latents = {frames: paddle.zeros([1, 4, frames, 4, 6]) for frames in told}
    in_threads(*[lambda frames=frames: pipe.vae.decode(latents[frames], on_decoded=told[frames].append) for frames in told])
    assert {frames: sum(parts) for frames, parts in told.items()} == {4: 4, 3: 3} and pipe.vae.on_decoded is None


@pytest.mark.parametrize("output_type", ["np", "frames", "pd"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_make_no_pixels(pipe, output_type, value):
    latents = start_latents(pipe, 1).numpy()
    latents[0, 1, 2, 0, 0] = value
    with pytest.raises(ValueError, match=r"the video has \d+ NaN or infinite values of 41472; see whether the latents"):
        pipe("a cat", latents=latents, output_type=output_type, **QUICK)
    assert pipe("a cat", latents=latents, output_type="latent", **QUICK).frames.shape == [1, 3, 4, 4, 6]


def start_latents(pipe, videos, frames=9):
    shape, _ = pipe._latent_shape(videos, frames, 32, 48)
    return paddle.to_tensor(cases.start_noise(shape))


def run(pipe, arguments, **more):
    videos = 1 if isinstance(arguments["prompt"], str) else len(arguments["prompt"])
    return pipe(
        latents=start_latents(pipe, videos), generator=cases.step_noise(), progress=False, **cases.PIPELINE_SIZE,
        **arguments, **more,
    )


@pytest.mark.parametrize("case", [*cases.PIPELINE_CASES, "other_scheduler"])
def test_golden(loaded, kind, case):
    pipe = loaded[kind]
    own = pipe.scheduler
    if case == "other_scheduler":
        pipe.scheduler = OTHER[type(own)].from_config(own.config)
    try:
        output = run(pipe, cases.PIPELINE_CASES["guided" if case == "other_scheduler" else case])
    finally:
        pipe.scheduler = own
    got = output.frames[:, :, :: cases.VIDEO_STRIDE, :: cases.VIDEO_STRIDE] * 255
    want = np.load(GOLDENS / kind / "io.npz")[case].astype(np.float32)
    assert got.shape == want.shape
    assert want.std() > 10
    assert abs(got - want).max() <= LEVELS
    assert set(output.timings) == {"text_encode", "denoise", "decode"}
    assert all(seconds > 0 for seconds in output.timings.values()) and output.memory == {}  # a CPU does not tell


def test_guidance_matters(loaded, kind):
    videos = np.load(GOLDENS / kind / "io.npz")
    assert abs(videos["guided"].astype(int) - videos["unguided"]).max() > 3 * LEVELS
    assert abs(videos["guided"].astype(int) - videos["other_scheduler"]).max() > 3 * LEVELS


def test_seeds(loaded, kind):
    pipe = loaded[kind]
    make = lambda **arguments: pipe("snow", output_type="latent", **QUICK, **arguments)
    one = make(seed=5)
    again = make(seed=5)
    assert one.seeds == [5]
    assert (one.frames == again.frames).all()
    assert (make(seed=6).frames != one.frames).any()
    anew = make()
    assert (make(seed=anew.seeds).frames == anew.frames).all()
    assert make().seeds != anew.seeds
    generator = make(generator=np.random.default_rng(5))
    assert generator.seeds is None
    assert (generator.frames == one.frames).all()


def test_videos_of_a_batch_can_be_made_alone(loaded, kind):
    pipe = loaded[kind]
    together = pipe(["snow", "a red ball"], num_videos_per_prompt=2, seed=3, output_type="latent", **QUICK)
    assert together.frames.shape[0] == 4 and together.seeds == [3, 4, 5, 6]
    for i, prompt in enumerate(["snow", "snow", "a red ball", "a red ball"]):
        alone = pipe(prompt, seed=3 + i, output_type="latent", **QUICK).frames
        np.testing.assert_allclose(together.frames[i].numpy(), alone[0].numpy(), atol=1e-4)
    assert abs(together.frames[0] - together.frames[1]).max() > 0.1
    listed = pipe(["snow"], num_videos_per_prompt=2, seed=[9, 4], output_type="latent", **QUICK).frames
    np.testing.assert_allclose(listed[1].numpy(), together.frames[1].numpy(), atol=1e-4)


def test_negative_prompt_and_embeddings(pipe):
    make = lambda *prompts, **arguments: pipe(*prompts, seed=1, output_type="latent", **QUICK, **arguments).frames
    plain, negative = make("snow"), make("snow", "dark rain")
    assert abs(plain - negative).max() > 1e-3
    assert (make("snow", "") == plain).all()
    given = make(prompt_embeds=pipe.encode_prompt("snow"), negative_prompt_embeds=pipe.encode_prompt("dark rain"))
    np.testing.assert_allclose(given.numpy(), negative.numpy(), atol=1e-5)
    both = make(["snow", "snow"], ["", "dark rain"])
    np.testing.assert_allclose(both[:1].numpy(), plain.numpy(), atol=1e-4)
    with pytest.warns(UserWarning, match="negative prompt has no effect: guidance_scale is 1 or less"):
        unguided = make("snow", "dark rain", guidance_scale=1.0)
    assert (unguided == make("snow", guidance_scale=1.0)).all()
    # a negative text gets as many tokens as given embeddings have
    short = make(prompt_embeds=pipe.encode_prompt("snow", 8), negative_prompt="dark rain")
    np.testing.assert_allclose(short.numpy(), make("snow", "dark rain", max_sequence_length=8).numpy(), atol=1e-5)


def test_what_has_no_effect_is_said(pipe):
    with pytest.warns(UserWarning, match="use_dynamic_cfg has no effect"):
        pipe("snow", seed=1, guidance_scale=1.0, use_dynamic_cfg=True, output_type="latent", **QUICK)
    with pytest.warns(UserWarning, match="seed has no effect: latents are given"):
        made = pipe("snow", seed=1, latents=start_latents(pipe, 1), output_type="latent", **QUICK)
    assert made.seeds is None


def test_output_types(pipe):
    make = lambda kind: pipe(["snow", "snow"], seed=1, output_type=kind, **QUICK).frames
    array, frames, tensor, latents = make("np"), make("frames"), make("pd"), make("latent")
    assert array.shape == (2, 9, 32, 48, 3) and array.dtype == np.float32
    assert 0 <= array.min() and array.max() <= 1
    assert len(frames) == 2 and len(frames[0]) == 9
    assert frames[1][8].dtype == np.uint8 and frames[1][8].shape == (32, 48, 3)
    np.testing.assert_array_equal(frames[1][8], (array[1, 8] * 255).round())
    assert tensor.shape == [2, 9, 3, 32, 48]
    np.testing.assert_array_equal(tensor.numpy().transpose(0, 1, 3, 4, 2), array)
    assert latents.shape == [2, 3, 4, 4, 6]


def test_callback(pipe):
    seen = []

    def keep(pipeline, step, timestep, tensors):
        seen.append((pipeline, step, timestep, sorted(tensors), tensors["latents"].numpy()))

    names = ("latents", "prompt_embeds", "negative_prompt_embeds")
    keeping = dict(callback_on_step_end=keep, callback_on_step_end_tensor_inputs=names)
    out = pipe("snow", seed=1, output_type="latent", **keeping, **QUICK)
    assert [(s[1], s[2]) for s in seen] == [(0, 999), (1, 499)]
    assert seen[0][0] is pipe and seen[0][3] == sorted(names)
    np.testing.assert_array_equal(seen[-1][4], out.frames.numpy())

    replaced = pipe(
        "snow", seed=1, output_type="latent", callback_on_step_end=lambda *a: {"latents": a[3]["latents"] * 0 + 7.0}, **QUICK
    )
    assert (replaced.frames == 7.0).all()

    def stop(pipeline, step, timestep, tensors):
        pipeline.interrupt = True

    stopped = pipe("snow", seed=1, output_type="latent", callback_on_step_end=stop, **QUICK)
    np.testing.assert_array_equal(stopped.frames.numpy(), seen[0][4])


EMBEDS = ("latents", "prompt_embeds", "negative_prompt_embeds")


def with_callback(pipe, callback, **more):
    return pipe("snow", "dark rain", seed=1, output_type="latent", callback_on_step_end=callback,
                callback_on_step_end_tensor_inputs=EMBEDS, **{**QUICK, **more}).frames.numpy()


def test_embeddings_that_a_callback_returns_count_from_the_next_step(pipe):
    snow, ball, rain, sun = map(pipe.encode_prompt, ("snow", "a red ball", "dark rain", "sun"))
    make = lambda **changed: with_callback(pipe, lambda *a: {**a[3], **changed})
    plain = make()
    both = make(prompt_embeds=paddle.concat([sun, ball]))
    assert abs(make(negative_prompt_embeds=sun) - plain).max() > 1e-4
    np.testing.assert_array_equal(make(negative_prompt_embeds=sun), make(prompt_embeds=paddle.concat([sun, snow])))
    np.testing.assert_array_equal(make(prompt_embeds=paddle.concat([rain, ball]), negative_prompt_embeds=sun), both)
    np.testing.assert_array_equal(make(prompt_embeds=paddle.concat([rain, ball]).numpy(), negative_prompt_embeds=sun), both)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("returns", ["nothing", "all", "half"])
def test_a_callback_switches_guidance_off(pipe, monkeypatch, dynamic, returns):
    batches, forward = [], type(pipe.transformer).forward

    def counting(self, latents, *rest, **more):
        batches.append(latents.shape[0])
        return forward(self, latents, *rest, **more)

    def switch(pipeline, step, timestep, tensors):
        if step == 1:
            pipeline.guidance_scale = 0.0
            half = {**tensors, "prompt_embeds": paddle.chunk(tensors["prompt_embeds"], 2)[-1]}
            return {"nothing": None, "all": tensors, "half": half}[returns]

    monkeypatch.setattr(type(pipe.transformer), "forward", counting)
    made = with_callback(pipe, switch, num_inference_steps=4, use_dynamic_cfg=dynamic)
    assert batches == [2, 2, 1, 1]
    # what the unguided steps begin with is what the guided ones left
    left = with_callback(pipe, lambda p, step, *a: setattr(p, "interrupt", step == 1), num_inference_steps=4,
                         use_dynamic_cfg=dynamic)
    rotary = pipe.transformer.rotary_tables(*(left.shape[i] for i in (1, 3, 4)))
    latents = paddle.to_tensor(left)
    pipe.scheduler.set_timesteps(4)
    with paddle.no_grad():
        for timestep in map(int, pipe.scheduler.timesteps[2:]):
            predicted = forward(pipe.transformer, latents, pipe.encode_prompt("snow"), paddle.to_tensor([timestep]),
                                image_rotary_emb=rotary)
            latents = pipe.scheduler.step(predicted, timestep, latents)[0]
    np.testing.assert_allclose(made, latents.numpy(), atol=1e-5)


@pytest.mark.parametrize("returned, more, error, words", [
    ({"noise": 1}, {}, ValueError, "returned noise; what it can replace: latents, prompt_embeds"),
    ({"guidance_scale": 1.0}, {}, ValueError, "guidance is set as pipe.guidance_scale"),
    ([1], {}, TypeError, "returned a list; return a dict"),
    ({"latents": np.zeros([1, 2])}, {}, ValueError, r"returned latents \[1, 2\]; these videos need \[1, 3, 4, 4, 6\]"),
    ({"latents": [1.0]}, {}, TypeError, "latents returned by callback_on_step_end is a builtins.list"),
    ({"prompt_embeds": np.zeros([1, 16, 12])}, {}, ValueError, r"takes \[2, 16, 12\], the negative ones first"),
    ({"negative_prompt_embeds": np.zeros([2, 16, 12])}, {}, ValueError, r"_embeds \[2, 16, 12\]; .* \[1, 16, 12\]"),
    ({"negative_prompt_embeds": np.zeros([1, 16, 12])}, {"guidance_scale": 1.0}, ValueError, "guidance was left out"),
    ({"prompt_embeds": np.full([2, 16, 12], np.nan)}, {}, NonFiniteError, "^prompt_embeds returned by .* has 384 NaN or inf"),
    ({"negative_prompt_embeds": np.full([1, 16, 12], np.inf)}, {}, NonFiniteError, "^negative_prompt_embeds returned by"),
])
@pytest.mark.filterwarnings("ignore:the negative prompt has no effect")
def test_what_a_callback_cannot_return(pipe, returned, more, error, words):
    with pytest.raises(error, match=words):
        with_callback(pipe, lambda *a: returned, **more)


@pytest.mark.parametrize("scale, start, words", [
    (float("nan"), 6.0, "guidance_scale is nan"), (5.0, 1.0, "left out from the start"), (1e39, 6.0, "float32 holds"),
    (np.array([1.0, 2.0]), 6.0, "guidance_scale is array"), ("1", 6.0, "guidance_scale is '1'")])
@pytest.mark.filterwarnings("ignore:the negative prompt has no effect")
def test_a_guidance_that_a_callback_cannot_set(pipe, scale, start, words):
    with pytest.raises((ValueError, TypeError), match=words):
        with_callback(pipe, lambda p, *a: setattr(p, "guidance_scale", scale), guidance_scale=start)


def test_a_guidance_that_a_callback_sets_may_be_an_array_of_one(pipe):
    made = [with_callback(pipe, lambda p, *a, one=one: setattr(p, "guidance_scale", one)) for one in (np.array([2]), 2.0)]
    np.testing.assert_array_equal(*made)


@pytest.mark.parametrize("latents, words", [
    (np.zeros([1, 3, 5, 4, 6]), r"\[videos, frames, 4, height, width\]"), (np.zeros([3, 4, 4, 6]), "have shape"),
    (np.zeros([1, 0, 4, 4, 6]), "have shape"), ([1.0], "builtins.list"), (np.zeros([1, 3, 4, 4, 6], int), "dtype int64")])
def test_what_are_no_latents_is_not_decoded(pipe, latents, words):
    with pytest.raises((ValueError, TypeError), match=words):
        pipe.decode_latents(latents)


@pytest.mark.parametrize("prompt", [3, None, [], ["a", None]])
def test_what_is_no_text_is_not_encoded(pipe, prompt):
    with pytest.raises((ValueError, TypeError), match="^prompt must be a string or a non-empty list"):
        pipe.encode_prompt(prompt)


def test_progress_bars(pipe, capfd):
    pipe("snow", seed=1, **{**QUICK, "progress": True})
    shown = capfd.readouterr().err
    assert "denoise: 100%" in shown and "decode: 100%" in shown
    pipe("snow", seed=1, **QUICK)
    shown = capfd.readouterr().err
    assert "denoise" not in shown and "decode" not in shown


def test_dynamic_guidance_is_the_published_one():
    assert module.dynamic_guidance(6.0, 0, 50) == pytest.approx(7.0)  # (1 - cos(pi)) / 2 is 1
    assert module.dynamic_guidance(6.0, 50, 50) == pytest.approx(1.0)
    assert module.dynamic_guidance(6.0, 10, 50) == pytest.approx(1 + 6 * math.sin(math.pi * 0.8**5 / 2) ** 2)


def test_long_prompt_is_cut_with_a_warning(pipe):
    with pytest.warns(UserWarning, match="cut off: .*guitar"):
        embeds = pipe.encode_prompt("snow " * 20 + "guitar")
    assert embeds.shape[1] == pipe.transformer.config.max_text_seq_length
    assert pipe.encode_prompt("snow", max_sequence_length=4).shape[1] == 4


def test_padding_frames_of_15_are_dropped(loaded):
    pipe = loaded["pipeline_15"]
    assert pipe("snow", seed=1, output_type="latent", **QUICK).frames.shape[1] == 4  # 3, filled up to patches of 2
    assert pipe("snow", seed=1, **QUICK).frames.shape[1] == 9


@pytest.mark.parametrize("frames, own", [(8, 9), (16, 17), (48, 49)])
def test_frames_that_are_not_the_models_own_are_warned_of(loaded, kind, frames, own):
    with pytest.warns(UserWarning, match=f"num_frames is {frames}, whose first frames come out frozen; .* 8 n . 1: try {own}"):
        assert loaded[kind]._resolve_size(32, 48, frames) == (32, 48, frames)


@pytest.mark.filterwarnings("error")
def test_the_models_own_frames_are_not_warned_of(loaded, kind):
    for frames in (1, 9, 17, 49, 81, 161):
        assert loaded[kind]._resolve_size(32, 48, frames) == (32, 48, frames)


def test_the_default_size_of_15_is_the_published_one(loaded, monkeypatch):
    pipe = loaded["pipeline_15"]
    config = Config({**pipe.transformer.config, "sample_height": 300, "sample_width": 300, "sample_frames": 81})
    monkeypatch.setattr(pipe.transformer, "config", config)
    assert pipe._resolve_size(None, None, None) == (768, 1360, 81)
    assert pipe._resolve_size(96, None, 9) == (96, 1360, 9)
    monkeypatch.setattr(pipe.transformer, "config", Config({**config, "patch_size_t": None}))
    assert pipe._resolve_size(None, None, None) == (2400, 2400, 81)


def without(pipe, *names):
    parts = {name: getattr(pipe, name) for name in pipe.components}
    return CogVideoXPipeline(**{**parts, **dict.fromkeys(names)}, device="cpu")


@pytest.mark.parametrize("guidance_scale", [1.0, 6.0])
@pytest.mark.parametrize("array", [False, True])
def test_embeddings_need_no_text_encoder(pipe, guidance_scale, array):
    make = lambda pipe, **given: pipe(seed=1, guidance_scale=guidance_scale, output_type="latent", **QUICK, **given).frames
    bare = without(pipe, "text_encoder", "tokenizer")
    embeds = {"prompt_embeds": pipe.encode_prompt("snow")}
    if guidance_scale > 1:
        embeds["negative_prompt_embeds"] = pipe.encode_prompt("rain")
    if array:
        embeds = {name: value.numpy() for name, value in embeds.items()}
    wanted = make(pipe, prompt="snow", negative_prompt="rain" if guidance_scale > 1 else None)
    np.testing.assert_allclose(make(bare, **embeds).numpy(), wanted.numpy(), atol=1e-5)


@pytest.mark.parametrize("lacking, arguments, words", [
    (("text_encoder",), {"prompt": "snow"}, "the prompt needs the pipeline's text_encoder.*prompt_embeds in its place"),
    (("tokenizer",), {"prompt": "snow"}, "the prompt needs the pipeline's tokenizer"),
    (("text_encoder",), {"negative_prompt": "rain"}, "the negative prompt needs .*negative_prompt_embeds, or guidance_scale=1"),
    (("text_encoder",), {}, "the empty negative prompt of guidance_scale 6 needs .*, or guidance_scale=1"),
    (("vae",), {"guidance_scale": 1.0}, "output_type 'np' needs the pipeline's vae.* Give output_type='latent'"),
    (("transformer",), {}, "a call needs the pipeline's transformer, which is None.*pipe.transformer = "),
    (("scheduler",), {}, "a call needs the pipeline's scheduler"),
])
def test_a_part_that_was_left_out_and_is_needed_is_named_before_the_work(pipe, monkeypatch, lacking, arguments, words):
    if "prompt" not in arguments:
        arguments = {"prompt_embeds": pipe.encode_prompt("snow"), **arguments}
    monkeypatch.setattr(module, "denoise", None)
    with pytest.raises(ValueError, match=words):
        without(pipe, *lacking)(**{**QUICK, **arguments})


def test_latents_need_no_vae_and_embeddings_no_transformer(pipe):
    make = lambda pipe: pipe("snow", seed=1, output_type="latent", **QUICK).frames
    assert (make(without(pipe, "vae")) == make(pipe)).all()
    with pytest.raises(ValueError, match="decode_latents needs the pipeline's vae"):
        without(pipe, "vae").decode_latents(make(pipe))
    words = without(pipe, "transformer", "vae", "scheduler")
    assert (words.encode_prompt("snow", 16) == pipe.encode_prompt("snow", 16)).all()
    with pytest.raises(ValueError, match="encode_prompt needs .* Give max_sequence_length"):
        words.encode_prompt("snow")
    with pytest.raises(ValueError, match="encode_prompt needs the pipeline's tokenizer"):
        without(pipe, "tokenizer").encode_prompt("snow")
    for use in (lambda: words.attn_processors, lambda: words.set_attn_processor(None), words.compile):
        with pytest.raises(ValueError, match="needs the pipeline's transformer"):
            use()


def test_a_folder_without_a_part_is_written_and_read(pipe, tmp_path):
    without(pipe, "text_encoder", "vae").save_pretrained(tmp_path / "some")
    index = json.loads((tmp_path / "some" / "model_index.json").read_text())
    assert index["text_encoder"] == index["vae"] == [None, None] and index["tokenizer"] == ["transformers", "T5Tokenizer"]
    there = {path.name for path in (tmp_path / "some").iterdir()}
    assert there == {"model_index.json", "scheduler", "tokenizer", "transformer"}
    again = CogVideoXPipeline.from_pretrained(tmp_path / "some", device="cpu", tokenizer=None)
    assert again.text_encoder is None and again.vae is None and again.tokenizer is None
    assert again.transformer.config == pipe.transformer.config


def test_a_save_that_fails_leaves_what_was_there(pipe, tmp_path):
    broken = without(pipe)
    broken.vae = object()  # the last part that is written
    with pytest.raises(AttributeError):
        broken.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    folder = tmp_path / "old"
    pipe.save_pretrained(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(AttributeError):
        broken.save_pretrained(folder, dtype="float16")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_processors_reach_the_transformer(pipe):
    before = pipe.attn_processors
    calls = []

    class Counting:
        def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
            calls.append(attn)
            return before[next(iter(before))](attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)

    plain = pipe("snow", seed=1, output_type="latent", **QUICK).frames
    pipe.set_attn_processor(Counting())
    try:
        counted = pipe("snow", seed=1, output_type="latent", **QUICK).frames
    finally:
        pipe.set_attn_processor(before)
    assert len(calls) == 2 * len(before)
    assert (counted == plain).all()
    assert pipe.attn_processors == before


@pytest.mark.parametrize("what", module.COMPONENTS)
def test_save_and_load(loaded, kind, what, tmp_path):
    if what != "vae":  # one full round trip for each kind, and each part replaced once
        part = object()
        assert getattr(CogVideoXPipeline.from_pretrained(GOLDENS / kind, device="cpu", **{what: part}), what) is part
        return
    pipe = loaded[kind]
    pipe.save_pretrained(tmp_path / "copy")
    again = CogVideoXPipeline.from_pretrained(tmp_path / "copy", device="cpu")
    assert type(again.scheduler) is type(pipe.scheduler)
    assert again.transformer.config == pipe.transformer.config
    make = lambda p: p("snow", seed=1, output_type="latent", **QUICK).frames
    assert (make(again) == make(pipe)).all()
    index = json.loads((tmp_path / "copy" / "model_index.json").read_text())
    published = json.loads((GOLDENS / kind / "model_index.json").read_text())
    assert set(index) == set(published)
    assert {k: v for k, v in index.items() if k not in ("tokenizer", "_diffusers_version")} == {
        k: v for k, v in published.items() if k not in ("tokenizer", "_diffusers_version")
    }


@pytest.mark.parametrize("random_kind", ["2b", "5b", "1.5"])
def test_random_model(random_kind, tmp_path):
    first = make_random_pipeline(tmp_path / "a", seed=1, kind=random_kind)
    second = make_random_pipeline(tmp_path / "b", seed=1, kind=random_kind)
    for part in ("transformer", "vae"):
        name = f"{part}/diffusion_pytorch_model.safetensors"
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert first != second
    pipe = CogVideoXPipeline.from_pretrained(first, device="cpu")
    assert pipe.transformer.config.attention_head_dim == 64
    video = pipe("a red ball", seed=0, height=32, width=48, num_frames=9, num_inference_steps=2, progress=False).frames
    assert np.isfinite(video).all() and video.std() > 0.05
    with pytest.raises(ValueError, match="'3b'; supported: 2b, 5b, 1.5"):
        make_random_pipeline(tmp_path, kind="3b")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(height=40), ["height is 40", "multiple of 16", "32, 48"]),
        (dict(width=8), ["width is 8", "nearest: 16"]),
        (dict(num_frames=13), ["num_frames is 13", "nearest: 9, 16", "8 n + 1: try 17"]),
        (dict(num_frames=5), ["num_frames is 5", "8 n + 1: try 9"]),
        (dict(num_frames=44), ["8 n + 1: try 41"]),
        (dict(num_frames=0), ["num_frames is 0", "nearest: 1"]),
        (dict(output_type="pil"), ["'pil'", "np, frames, pd, latent"]),
        (dict(eta=0.5), ["eta is 0.5"]),
        (dict(prompt=None), ["prompt or prompt_embeds"]),
        (dict(prompt=3), ["prompt must be a string", "3"]),
        (dict(prompt=[]), ["non-empty"]),
        (dict(prompt=["a", 2]), ["list of strings"]),
        (dict(prompt_embeds=paddle.zeros([1, 16, 12])), ["not both"]),
        (dict(negative_prompt=["a", "b"]), ["2 negative prompts for 1"]),
        (dict(negative_prompt="a", negative_prompt_embeds=paddle.zeros([1, 16, 12])), ["negative_prompt", "not both"]),
        (dict(negative_prompt_embeds=paddle.zeros([1, 15, 12])), ["[1, 16, 12]", "[1, 15, 12]"]),
        (dict(num_videos_per_prompt=0), ["num_videos_per_prompt is 0"]),
        (dict(num_inference_steps=0), ["num_inference_steps is 0"]),
        (dict(callback_on_step_end_tensor_inputs=["noise"]), ["noise", "latents"]),
        (dict(seed=1, generator=np.random.default_rng(1)), ["seed or generator"]),
        (dict(seed=[1, 2]), ["2 seeds for 1 videos"]),
        (dict(generator=[1]), ["standard_normal"]),
        (dict(latents=np.zeros([1, 3, 4, 4, 4])), ["[1, 3, 4, 4, 4]", "[1, 3, 4, 4, 6]"]),
        (dict(guidance_scale=float("nan")), ["guidance_scale is nan", "finite"]),
        (dict(guidance_scale=float("-inf")), ["guidance_scale is -inf"]),
        (dict(guidance_scale="6"), ["guidance_scale is '6'"]),
        (dict(seed=1.5), ["seed is 1.5", "whole number"]),
        (dict(seed="3"), ["seed is '3'"]),
        (dict(seed=-1), ["seed is -1", "at least 0"]),
        (dict(seed=[True]), ["seed is True"]),
        (dict(max_sequence_length=0), ["max_sequence_length is 0", "at least 1"]),
        (dict(max_sequence_length=7, prompt=None, prompt_embeds=np.zeros([1, 8, 12])), ["is 7", "has 8 tokens"]),
        (dict(num_inference_steps=2.5), ["num_inference_steps is 2.5"]),
        (dict(num_videos_per_prompt=1.5), ["num_videos_per_prompt is 1.5"]),
        (dict(height=32.0), ["height is 32.0"]),
        (dict(num_frames=9.5), ["num_frames is 9.5"]),
        (dict(latents=[[1.0]]), ["latents is a builtins.list", "Paddle tensor or a NumPy array"]),
        (dict(prompt=None, prompt_embeds=[np.zeros([8, 12])]), ["prompt_embeds is a builtins.list", "np.stack"]),
        (dict(negative_prompt_embeds=[np.zeros([8, 12])]), ["negative_prompt_embeds is a builtins.list"]),
        (dict(prompt=None, prompt_embeds=np.zeros([8, 12])), ["prompt_embeds has shape [8, 12]"]),
        (dict(prompt=None, prompt_embeds=np.zeros([1, 16, 13])), ["[1, 16, 13]", "[prompts, tokens, 12]"]),
        (dict(negative_prompt_embeds=np.zeros([0, 16, 12])), ["negative_prompt_embeds has shape [0, 16, 12]"]),
        (dict(negative_prompt_embeds=np.full([1, 16, 12], np.nan)), ["negative_prompt_embeds has 192 NaN or infinite"]),
        (dict(latents=np.zeros([1, 3, 4, 4, 6], complex)), ["latents has dtype complex128", "float32"]),
        (dict(latents=paddle.zeros([1, 3, 4, 4, 6], "int64")), ["latents has dtype int64"]),
        (dict(guidance_scale=1e39), ["guidance_scale is 1e+39", "float32"]),
        (dict(use_dynamic_cfg="no"), ["use_dynamic_cfg is 'no'", "True or False"]),
        (dict(progress=2), ["progress is 2"]),
        (dict(eta=float("nan")), ["eta is nan"]),
        (dict(eta=np.zeros(2)), ["eta is array"]),
        (dict(output_type=np.array(["np", "pd"])), ["output_type is array"]),
        (dict(callback_on_step_end=3), ["callback_on_step_end is 3", "None"]),
        (dict(callback_on_step_end_tensor_inputs="latents"), ["tensor_inputs is 'latents'", "a list of"]),
        (dict(callback_on_step_end_tensor_inputs=[[]]), ["tensor_inputs has []"]),
        (dict(num_frames=2**31), ["num_frames is 2147483648", "at most 2147483647"]),
        (dict(num_frames=2**30 + 1), ["num_frames 1073741825 make", "pixels"]),
        (dict(height=2**20, width=2**20), ["height 1048576", "pixels"]),
        (dict(num_videos_per_prompt=2**31), ["2147483648 videos", "make fewer in a call"]),
        (dict(max_sequence_length=2**31), ["max_sequence_length is 2147483648"]),
        (dict(generator=type("Odd", (), {"standard_normal": lambda self, shape: np.zeros(3)})()), ["gave shape [3]"]),
    ],
)
def test_bad_input(pipe, arguments, words):
    with pytest.raises((ValueError, TypeError)) as error:
        pipe(**{"prompt": "snow", **QUICK, **arguments})
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("name", ["latents", "prompt_embeds", "negative_prompt_embeds"])
def test_tensors_of_torch_are_refused_with_what_to_write(pipe, name):
    arguments = {"prompt": "snow", **QUICK, name: type("Tensor", (), {"__module__": "torch", "shape": (1, 3, 4)})()}
    if name == "prompt_embeds":
        del arguments["prompt"]
    with pytest.raises(TypeError, match=rf"{name} is a torch.Tensor; .*try {name}.detach\(\).float\(\).cpu\(\).numpy\(\)"):
        pipe(**arguments)


def test_numbers_of_numpy_are_numbers(pipe):
    made = pipe(["snow"], num_videos_per_prompt=np.int64(2), seed=np.array([9, 4]), output_type="latent",
                guidance_scale=np.float32(6), **{**QUICK, "num_inference_steps": np.int32(1)})
    assert made.seeds == [9, 4] and made.frames.shape[0] == 2


def test_a_scheduler_of_another_library_is_refused(pipe, monkeypatch):
    monkeypatch.setattr(pipe, "scheduler", type("DDIMScheduler", (), {"config": {}})())
    with pytest.raises(TypeError, match=r"scheduler is a .*DDIMScheduler; supported: .*from_config\(scheduler.config\)"):
        pipe("snow", **QUICK)


@pytest.mark.parametrize("name, advice", [
    ("torch_dtype", "torch_dtype is dtype here"), ("revision", r"snapshot_download\(id, revision=...\)"),
    ("cache_dir", r"snapshot_download\(id, cache_dir=...\)"), ("device_map", "device_map is device here")])
def test_arguments_of_diffusers_are_told_what_they_are_here(name, advice):
    with pytest.raises(TypeError, match=f"unknown arguments: {name}; known: dtype, .*low_memory and the parts .*{advice}"):
        CogVideoXPipeline.from_pretrained(GOLDENS / "pipeline_2b", **{name: "x"})


@pytest.mark.parametrize("give", [
    lambda pipe: pipe.set_attn_processor(LowBitAttnProcessor), lambda pipe: lowbit_video.apply(pipe, LowBitAttnProcessor),
    lambda pipe: pipe.set_attn_processor({**pipe.attn_processors, next(iter(pipe.attn_processors)): LowBitAttnProcessor}),
    lambda pipe: lowbit_video.apply(pipe, None, {"*": LowBitAttnProcessor})])
def test_a_processors_class_is_refused(pipe, give):
    before = pipe.attn_processors
    with pytest.raises(TypeError, match=r"must be an instance, got the class LowBitAttnProcessor; try LowBitAttnProcessor\(\)"):
        give(pipe)
    assert pipe.attn_processors == before


def test_bad_folders(tmp_path, monkeypatch):
    load = lambda path, **more: CogVideoXPipeline.from_pretrained(path, device="cpu", **more)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="model_index.json"):
        load(tmp_path)
    with pytest.raises(TypeError, match="unet"):
        load(tmp_path, unet=None)
    folder = tmp_path / "model"
    shutil.copytree(GOLDENS / "pipeline_2b", folder)
    shutil.rmtree(folder / "vae")
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(FileNotFoundError, match="lacks parts of the pipeline: tokenizer, vae"):
        load(folder)
    index = json.loads((folder / "model_index.json").read_text())
    for change, message in (
        ({"_class_name": "CogVideoXImageToVideoPipeline"}, "CogVideoXImageToVideoPipeline, expected a CogVideoXPipeline"),
        ({"image_encoder": ["transformers", "CLIP"]}, "does not know: image_encoder"),
    ):
        (folder / "model_index.json").write_text(json.dumps({**index, **change}))
        with pytest.raises(ConfigError, match=message):
            load(folder)
    index["scheduler"] = ["diffusers", "PNDMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    shutil.copytree(GOLDENS / "pipeline_2b" / "vae", folder / "vae")
    shutil.copytree(GOLDENS / "pipeline_2b" / "tokenizer", folder / "tokenizer")
    with pytest.raises(ConfigError, match="scheduler is a PNDMScheduler; supported: CogVideoXDDIMScheduler"):
        load(folder)

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="pip install huggingface_hub"):
        load("someone/cogvideox")


@pytest.mark.parametrize("part, key, value, message", [
    ("transformer", "num_layers", 10**9, "config.json asks for num_layers = 1000000000, and the weights hold 2"),
    ("transformer", "num_layers", "30", "config.json: num_layers is '30'; give a number of layers"),
    ("transformer", "num_attention_heads", 10**9, "that cannot be built .*; correct its sizes"),
    ("text_encoder", "num_layers", 10**9, "config.json asks for num_layers = 1000000000, and the weights hold 2"),
    ("text_encoder", "vocab_size", 10**12, "that cannot be built .*; correct its sizes"),
    ("vae", "layers_per_block", 10**9, "config.json asks for layers_per_block = 1000000000, and the weights hold 1"),
])
@pytest.mark.timeout(60)
def test_a_configuration_that_asks_for_what_the_weights_do_not_hold(tmp_path, part, key, value, message):
    shutil.copytree(GOLDENS / "pipeline_2b", tmp_path / "model")
    path = tmp_path / "model" / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ValueError, match=f"(?s){message}"):
        CogVideoXPipeline.from_pretrained(tmp_path / "model", device="cpu")


def test_half_precision_request_on_the_cpu_is_served_in_float32():
    with pytest.warns(UserWarning, match="float32 on a CPU"):
        pipe = CogVideoXPipeline.from_pretrained(GOLDENS / "pipeline_2b", dtype="float16", device="cpu")
    assert np.isfinite(pipe("snow", seed=1, **QUICK).frames).all()


def test_importing_the_package_needs_no_paddle():
    code = (
        "import sys, lowbit_video.pipelines as p; assert 'CogVideoXPipeline' in p.__all__; "
        "assert 'paddle' not in sys.modules; p.CogVideoXPipeline; assert 'paddle' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    import lowbit_video.pipelines as package

    with pytest.raises(AttributeError, match="Nothing"):
        package.Nothing  # noqa: B018
