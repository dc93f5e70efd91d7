"""The pipeline's call: random valid arguments against a denoising loop of its own, odd ones against what may be taken."""

from __future__ import annotations

import functools
import importlib.util

import numpy as np
import paddle
import pytest
from hypothesis import assume, event, example, given
from hypothesis import strategies as st

from lowbit_video.pipelines import CogVideoXPipeline
from lowbit_video.pipelines.cogvideox.pipeline import dynamic_guidance

from golden_cases import GOLDENS
from odd_values import NOTHING, is_flag, is_number, is_texts, is_whole, odd_values
from own_errors import result_of, result_or_refusal

KINDS = ("pipeline_2b", "pipeline_5b", "pipeline_15")
SIZE = dict(height=16, width=16, num_frames=1)
TEXTS = ("a cat", "", "a red ball rolls over the blue table and leaves")
OUTPUTS = ("np", "frames", "pd", "latent")


@functools.cache
def pipe_of(kind):
    return CogVideoXPipeline.from_pretrained(GOLDENS / kind, device="cpu")


def base(pipe, **more):
    size = SIZE if pipe.transformer.config.patch_size_t is None else {**SIZE, "num_frames": 1}
    return {"prompt": "a cat", "num_inference_steps": 2, "seed": 3, "progress": False, "output_type": "latent", **size, **more}


def slowly(pipe, prompt, negative, steps, guidance, dynamic, seed, shape, noise=None):
    """Latents of one video, one prediction at a time: NumPy between the transformer and the scheduler."""
    rng = np.random.default_rng(seed)
    latents = rng.standard_normal(shape).astype(np.float32) if noise is None else noise
    pipe.scheduler.set_timesteps(steps)
    embeds = {text: pipe.encode_prompt(text) for text in (prompt, negative)}
    rotary = pipe.transformer.rotary_tables(shape[0], shape[2], shape[3])
    clean = before = None
    with paddle.no_grad():
        for t in map(int, pipe.scheduler.timesteps):
            sample, time = paddle.to_tensor(latents), paddle.to_tensor([t])
            ask = (prompt, negative)
            predicted = [pipe.transformer(sample[None], embeds[one], time, image_rotary_emb=rotary) for one in ask]
            out, without = (one.numpy()[0] for one in predicted)
            scale = dynamic_guidance(guidance, t, steps) if dynamic else guidance
            if guidance > 1:
                out = without + scale * (out - without)
            out = paddle.to_tensor(out)
            if pipe.scheduler.uses_noise:
                fresh = paddle.to_tensor(rng.standard_normal(shape).astype(np.float32))
                moved, clean = pipe.scheduler.step(out, clean, t, before, sample, noise=fresh)
            else:
                moved, _ = pipe.scheduler.step(out, t, sample)
            latents, before = moved.numpy(), t
    return latents


@given(data=st.data())
@pytest.mark.parametrize("kind", KINDS)
def test_every_video_of_a_call_is_that_of_its_own_prompt_and_seed(kind, data):
    draw = lambda strategy: data.draw(strategy)
    pipe = pipe_of(kind)
    prompts = draw(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=2))
    negatives = draw(
        st.none() | st.sampled_from(TEXTS) | st.lists(st.sampled_from(TEXTS), min_size=len(prompts), max_size=len(prompts))
    )
    each, steps = draw(st.integers(1, 2)), draw(st.integers(1, 4))
    guidance, dynamic = draw(st.sampled_from((0.0, 1.0, 1.5, 6.0, -2.0)) | st.floats(-3, 12)), draw(st.booleans())
    count = len(prompts) * each
    seed = draw(st.integers(0, 2**40) | st.lists(st.integers(0, 2**40), min_size=count, max_size=count))
    output = draw(st.sampled_from(OUTPUTS))
    size = dict(
        height=16 * draw(st.integers(1, 2)), width=16 * draw(st.integers(1, 3)), num_frames=draw(st.sampled_from((1, 9)))
    )
    out = result_of(
        lambda: pipe(
            prompts,
            negatives,
            **size,
            num_inference_steps=steps,
            guidance_scale=guidance,
            use_dynamic_cfg=dynamic,
            num_videos_per_prompt=each,
            seed=seed,
            output_type=output,
            progress=False,
        )
    )
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else seed
    assert out.seeds == seeds
    shape, padded = pipe._latent_shape(count, size["num_frames"], size["height"], size["width"])
    negatives = [negatives or ""] * len(prompts) if not isinstance(negatives, list) else negatives
    one = data.draw(st.integers(0, count - 1))
    wanted = result_of(
        lambda: slowly(pipe, prompts[one // each], negatives[one // each], steps, guidance, dynamic, seeds[one], shape[1:])
    )
    size_of = max(1.0, float(abs(wanted).max()))
    if output == "latent":
        assert out.frames.shape == shape
        np.testing.assert_allclose(out.frames[one].numpy(), wanted, rtol=0, atol=2e-4 * size_of)
        return
    video = result_of(lambda: pipe.decode_latents(paddle.to_tensor(wanted[None, padded:])))[0].numpy().transpose(1, 2, 3, 0)
    video = np.clip(video * 0.5 + 0.5, 0, 1)
    got = out.frames[one]
    got = got.numpy().transpose(0, 2, 3, 1) if output == "pd" else np.stack(got) / 255 if output == "frames" else got
    assert got.shape == (size["num_frames"], size["height"], size["width"], 3)
    np.testing.assert_allclose(got, video, rtol=0, atol=1 / 255 + 2e-3)


MAY_BE = {
    "prompt": is_texts,
    "negative_prompt": lambda value: value is None or isinstance(value, str) or is_texts(value) and len(value) == 1,
    "height": lambda value: value is None or is_whole(value, 16, 64) and value % 16 == 0,
    "width": lambda value: value is None or is_whole(value, 16, 64) and value % 16 == 0,
    "num_frames": lambda value: value is None or is_whole(value, 1, 9) and int(value) in (1, 8, 9),
    "num_inference_steps": lambda value: is_whole(value, 1, 1000),
    "guidance_scale": lambda value: is_number(value) and np.all(abs(np.asarray(value, np.float64)) < 3.4e38),
    "use_dynamic_cfg": is_flag,
    "num_videos_per_prompt": lambda value: is_whole(value, 1, 100),
    "eta": lambda value: is_number(value) and np.all(value == 0),
    "seed": lambda value: (
        value is None
        or is_whole(value, 0)
        or not isinstance(value, (str, bytes, bytearray, dict, set, range))
        and (hasattr(value, "__len__") and np.shape(value) == (1,) and is_whole(value[0], 0))
    ),
    "generator": lambda value: value is None,
    "latents": lambda value: value is None,
    "prompt_embeds": lambda value: value is None,
    "negative_prompt_embeds": lambda value: value is None,
    "output_type": lambda value: isinstance(value, str) and value in OUTPUTS,
    "max_sequence_length": lambda value: value is None or is_whole(value, 1, 1000),
    "callback_on_step_end": lambda value: value is None or value is len or value is object,
    "callback_on_step_end_tensor_inputs": lambda value: isinstance(value, (list, tuple)) and len(value) == 0,
    "progress": is_flag,
}
"""Whether a value that may be odd is one to take, for each argument of a call of one prompt."""


@pytest.mark.parametrize("name", MAY_BE)
@given(value=odd_values)
def test_an_odd_value_is_refused_by_name_or_was_none(name, value):
    pipe = pipe_of("pipeline_2b")
    choices = base(pipe, num_inference_steps=1, guidance_scale=2.0)
    if name == "generator":
        choices["seed"] = None
    if name == "callback_on_step_end_tensor_inputs":
        choices["callback_on_step_end"] = lambda *_: None
    assume(value is not object and value is not len or name != "callback_on_step_end")
    choices[name] = value
    out, error = result_or_refusal(lambda: pipe(**choices))
    event(f"{name} {'refused' if error else 'taken'}")
    assert (error is None) == MAY_BE[name](value), error
    if error is not None:
        assert name in str(error) or name.removesuffix("_scale") in str(error), error
        return
    assert np.isfinite(out.frames if isinstance(out.frames, np.ndarray) else np.asarray(out.frames)).all()


SHAPES = {"latents": (1, 1, 4, 2, 2), "prompt_embeds": (1, 16, 12), "negative_prompt_embeds": (1, 16, 12)}
FAULTS = (
    "nothing",
    "nothing",
    "nan",
    "inf",
    "int64",
    "bool",
    "complex64",
    "list",
    "rank",
    "length",
    "empty",
    "half",
    "double",
    *(("torch",) if importlib.util.find_spec("torch") else ()),
)


GOOD = ("nothing", "half", "double")


def spoilt(x, fault, kind):
    """An array with a fault, as Paddle or NumPy; and whether it may still be taken."""
    x = x.copy()
    if fault in ("nan", "inf"):
        x.reshape(-1)[-1] = float(fault)
    dtype = {"half": "float16", "double": "float64"}.get(fault, fault if fault in ("int64", "bool", "complex64") else "float32")
    x = {"rank": x[0], "length": x.repeat(2, -1), "empty": x[:0]}.get(fault, x).astype(dtype)
    if fault == "list":
        return x.tolist(), False
    if fault == "torch":
        import torch

        return torch.from_numpy(x), False
    return paddle.to_tensor(x) if kind == "paddle" else x, fault in GOOD


def _not_finite(x):
    """Whether it is a tensor or an array with NaN or infinity, as latents may be: they are told apart when pixels are made."""
    x = x.numpy() if isinstance(x, paddle.Tensor) else x
    return isinstance(x, np.ndarray) and x.dtype.kind == "f" and not np.isfinite(x).all()


@given(data=st.data())
def test_given_tensors_do_what_texts_and_seeds_do_or_are_refused_by_name(data):
    pipe = pipe_of("pipeline_2b")
    noise = np.random.default_rng(5).standard_normal(SHAPES["latents"][1:]).astype(np.float32)[None]
    arrays = {
        "latents": noise,
        "prompt_embeds": pipe.encode_prompt("a cat").numpy(),
        "negative_prompt_embeds": pipe.encode_prompt("dog").numpy(),
    }
    names = data.draw(st.lists(st.sampled_from(tuple(SHAPES)), min_size=1, unique=True))
    given = {
        name: spoilt(arrays[name], data.draw(st.sampled_from(FAULTS)), data.draw(st.sampled_from(("paddle", "numpy"))))
        for name in names
    }
    texts = dict(prompt="a cat", negative_prompt="dog", seed=5)
    instead = {"latents": "seed", "prompt_embeds": "prompt", "negative_prompt_embeds": "negative_prompt"}
    choices = base(pipe, **{name: value for name, value in texts.items()}) | {instead[name]: None for name in names}
    choices |= {name: value for name, (value, _) in given.items()}
    out, error = result_or_refusal(lambda: pipe(**choices))
    broken = "latents" in given and given["latents"][0] is not None and _not_finite(given["latents"][0])
    good = all(fits or name == "latents" and broken for name, (_, fits) in given.items())
    assert (error is None) == good, error
    if error is not None:
        assert any(name in str(error) for name in names), error
        return
    if broken:
        assert not np.isfinite(out.frames.numpy()).all()
        return
    wanted = result_of(lambda: pipe(**base(pipe, **texts))).frames.numpy()
    np.testing.assert_allclose(out.frames.numpy(), wanted, atol=0.05)


def returned_tensors(name):
    """What a callback may return under a name: ones with a fault, and which one."""
    return st.builds(
        lambda fault, kind: ({name: spoilt(np.ones(SHAPES[name], np.float32), fault, kind)[0]}, fault),
        st.sampled_from(FAULTS),
        st.sampled_from(("paddle", "numpy")),
    )


def may_be_returned(returned, fault, scale):
    """Whether a callback of a call with guidance may return it where it sets `scale`, or leaves it (NOTHING)."""
    if fault is None:
        return returned is None or isinstance(returned, dict) and not returned
    name, unguided = next(iter(returned)), scale is not NOTHING and np.asarray(scale).item() <= 1
    if name == "latents":  # as of a call: they are told apart when pixels are made
        return fault in (*GOOD, "nan", "inf")
    return fault in GOOD and (name == "negative_prompt_embeds" or unguided)  # with guidance the positive half is not enough


@given(
    made=st.one_of(
        st.tuples(odd_values, st.none()),
        st.tuples(st.dictionaries(st.sampled_from((*SHAPES, "noise")), odd_values, max_size=2), st.none()),
        *map(returned_tensors, SHAPES),
    ),
    scale=st.just(NOTHING) | odd_values,
)
@example(made=({"latents": np.full(SHAPES["latents"], np.nan, np.float32)}, "nan"), scale=NOTHING)
@example(made=({"prompt_embeds": np.full(SHAPES["prompt_embeds"], np.nan, np.float32)}, "nan"), scale=1.0)
@example(made=({"prompt_embeds": np.ones(SHAPES["prompt_embeds"], np.float32)}, "nothing"), scale=np.array([[0.5]]))
def test_what_a_callback_returns_is_used_or_refused(made, scale):
    pipe = pipe_of("pipeline_2b")
    returned, fault = made
    steps = []

    def callback(pipe, step, timestep, tensors):
        steps.append(step)
        if scale is not NOTHING:
            pipe.guidance_scale = scale
        return returned

    try:
        out, error = result_or_refusal(lambda: pipe(**base(pipe), callback_on_step_end=callback))
    finally:
        pipe.guidance_scale = 1.0
    fits = (scale is NOTHING or MAY_BE["guidance_scale"](scale)) and may_be_returned(returned, fault, scale)
    assert (error is None) == fits, error
    if error is not None:
        assert steps == [0] and ("callback" in str(error) or "guidance_scale" in str(error)), error
        return
    assert steps == [0, 1]
    if returned and "latents" in returned:
        wanted = returned["latents"]
        wanted = wanted.numpy() if isinstance(wanted, paddle.Tensor) else wanted
        np.testing.assert_array_equal(out.frames.numpy(), wanted.astype(np.float32))
    else:
        assert np.isfinite(out.frames.numpy()).all()
