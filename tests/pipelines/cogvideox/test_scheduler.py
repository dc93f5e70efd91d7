"""The schedulers against trajectories of diffusers, their files, and what they say to bad input."""
import json
import warnings

import numpy as np
import paddle
import pytest

from lowbit_video.pipelines import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from lowbit_video.pipelines.shared.config import ConfigError

from golden_cases import GOLDENS, cases

CLASSES = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def wanted():
    return np.load(GOLDENS / "scheduler_paths" / "io.npz")


def make(name, schedule="2b"):
    changes, steps = cases.SCHEDULES[schedule]
    scheduler = CLASSES[name](**{**cases.PUBLISHED_SCHEDULE, **changes})
    scheduler.set_timesteps(steps)
    return scheduler, steps


def walk(scheduler, steps):
    inputs = {key: paddle.to_tensor(array) for key, array in cases.scheduler_inputs(steps).items()}
    sample, clean, path = inputs["start"], None, []
    for i, timestep in enumerate(scheduler.timesteps):
        if scheduler.uses_noise:
            back = scheduler.timesteps[i - 1] if i else None
            noise = inputs["noise"][i]
            sample, clean = scheduler.step(inputs["predicted"][i], clean, timestep, back, sample, noise=noise)
        else:
            sample, clean = scheduler.step(inputs["predicted"][i], timestep, sample)
        path.append(sample.numpy())
    return np.stack(path)


@pytest.mark.parametrize("schedule", list(cases.SCHEDULES))
@pytest.mark.parametrize("name", list(CLASSES))
def test_golden(name, schedule, wanted):
    scheduler, steps = make(name, schedule)
    want = lambda key: wanted[f"{name}.{schedule}.{key}"]
    np.testing.assert_array_equal(scheduler.timesteps, want("timesteps"))
    np.testing.assert_allclose(scheduler.alphas_cumprod[::37], want("alphas_cumprod"), rtol=0, atol=1e-6)
    path = walk(scheduler, steps)
    assert path.shape == (steps, *cases.SCHEDULER_SHAPE)
    np.testing.assert_allclose(path, want("path"), rtol=0, atol=TOLERANCE)
    inputs = {key: paddle.to_tensor(array) for key, array in cases.scheduler_inputs(steps).items()}
    for key, call in (("noisy", scheduler.add_noise), ("velocity", scheduler.get_velocity)):
        got = call(inputs["start"], inputs["noise"][0], [3, 750]).numpy()
        np.testing.assert_allclose(got, want(key), rtol=0, atol=TOLERANCE)


def test_ends_of_the_published_schedule():
    scheduler, _ = make("dpm", "5b")
    assert scheduler.alphas_cumprod[-1] == 0.0  # pure noise
    assert scheduler.timesteps[0] == 999
    assert scheduler.final_alpha_cumprod == 1.0
    x = paddle.ones([1, 2])
    last, clean = scheduler.step(x, x, scheduler.timesteps[-1], scheduler.timesteps[-2], x, noise=1e6 * x)
    assert (last == clean).all()  # no noise is left in the last step
    assert (scheduler.scale_model_input(x, 3) == x).all()


@pytest.mark.filterwarnings("ignore:.*as diffusers takes them")
@pytest.mark.parametrize("schedule", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler], ids=lambda s: s.__name__)
@pytest.mark.parametrize("spacing", ["trailing", "linspace", "leading"])
def test_every_number_of_steps_gives_as_many_timesteps_all_in_range(schedule, spacing):
    scheduler = schedule(timestep_spacing=spacing)
    for count in range(1, 1001):
        scheduler.set_timesteps(count)
        steps = scheduler.timesteps
        assert len(steps) == count and steps.min() >= 0 and steps.max() <= 999, count
        assert (np.diff(steps) < 0).all(), count
    if spacing == "trailing":
        scheduler.set_timesteps(61)
        assert steps[-1] == 0 and scheduler.timesteps[0] == 999 and scheduler.timesteps[-1] == 15


def left(scheduler, count):
    """What a predictor that knows the clean latents leaves of the noise, along `count` steps."""
    scheduler.set_timesteps(count)
    x, clean, before = paddle.ones([1, 1]), None, None  # the clean latents are 0
    for timestep in scheduler.timesteps:
        power = float(scheduler.alphas_cumprod[timestep])
        v = x * (power / (1 - power)) ** 0.5
        x, clean = (scheduler.step(v, clean, timestep, before, x, noise=paddle.ones([1, 1])) if scheduler.uses_noise
                    else scheduler.step(v, timestep, x))
        before = timestep
    return float(x.item())


@pytest.mark.parametrize("spacing", ["trailing", "linspace", "leading"])
@pytest.mark.parametrize("name", list(CLASSES))
def test_exact_steps_leave_no_noise_whatever_their_number(name, spacing):
    scheduler = CLASSES[name](**{**cases.PUBLISHED_SCHEDULE, "timestep_spacing": spacing})
    scheduler.exact_steps = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for count in (1, 2, 3, 7, 13, 50, 61, 333):
            assert abs(left(scheduler, count)) < 1e-6, count
        for count in range(1, 1001):
            scheduler.set_timesteps(count)
            steps = scheduler.timesteps
            assert len(steps) == count and (np.diff(steps) < 0).all() and steps[-1] >= 0, count  # what follows is the next one
            if count <= 100 or count % 111 <= 1:
                assert [scheduler._following(step) for step in steps] == [*steps[1:], -1], count


@pytest.mark.parametrize("name", list(CLASSES))
def test_steps_as_diffusers_takes_them_warn_where_they_leave_noise(name):
    scheduler = CLASSES[name](**{**cases.PUBLISHED_SCHEDULE, "timestep_spacing": "trailing"})
    for count in (7, 13):
        with pytest.warns(UserWarning, match=rf"{count} steps, .* end at timestep 0 and leave noise .*exact_steps = True"):
            assert abs(left(scheduler, count)) > 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert abs(left(scheduler, 50)) < 1e-6


def test_dpm_noise_comes_from_its_generator():
    scheduler, _ = make("dpm")
    x = paddle.ones([1, 4])
    step = lambda generator: scheduler.step(x, None, 999, None, x, generator=generator).prev_sample
    assert (step(1) == step(1)).all() and (step(1) != step(2)).any()


@pytest.mark.parametrize("name", list(CLASSES))
def test_half_precision_in_and_out(name):
    scheduler, _ = make(name)
    x = paddle.ones([1, 4])
    extra = dict(noise=x) if name == "dpm" else {}
    arguments = lambda v, x: (v, None, 999, None, x) if name == "dpm" else (v, 999, x)
    assert scheduler.step(*arguments(x, x), **extra).prev_sample.dtype == paddle.float32
    assert scheduler.step(*arguments(x, x.astype("float16")), **extra).prev_sample.dtype == paddle.float32
    half = scheduler.step(*arguments(x.astype("float16"), x.astype("float16")), **extra)
    assert half.prev_sample.dtype == half.pred_original_sample.dtype == paddle.float16


@pytest.mark.parametrize("name", list(CLASSES))
def test_save_and_load(name, tmp_path):
    published = CLASSES[name].from_pretrained(GOLDENS / "scheduler_paths" / name)
    assert published.config.snr_shift_scale == 1.0 and published.config.timestep_spacing == "trailing"
    published.save_pretrained(tmp_path)
    again = CLASSES[name].from_pretrained(tmp_path)
    assert again.config == published.config
    written = json.loads((tmp_path / "scheduler_config.json").read_text())
    read = json.loads((GOLDENS / "scheduler_paths" / name / "scheduler_config.json").read_text())
    assert written == read


def test_from_config_of_the_other():
    ddim, _ = make("ddim", "5b")
    dpm = CogVideoXDPMScheduler.from_config(ddim.config, timestep_spacing="linspace")
    assert dpm.config.snr_shift_scale == 1.0 and dpm.config.timestep_spacing == "linspace"
    with pytest.raises(ConfigError, match="wobble"):
        CogVideoXDPMScheduler.from_config(ddim.config, wobble=1)


def test_trained_betas():
    betas = np.linspace(0.01, 0.02, 10)
    scheduler = CogVideoXDDIMScheduler(num_train_timesteps=10, trained_betas=betas, snr_shift_scale=1.0)
    np.testing.assert_allclose(scheduler.alphas_cumprod, np.cumprod(1 - betas), rtol=1e-5)
    with pytest.raises(ConfigError, match=r"trained_betas has shape \[10\], expected \[1000\]"):
        CogVideoXDDIMScheduler(trained_betas=betas)


def test_bad_input(tmp_path):
    scheduler = CogVideoXDDIMScheduler()
    x = paddle.ones([1])
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(x, 1, x)
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=f"{steps}.*1 to 1000"):
            scheduler.set_timesteps(steps)
    for key in ("beta_schedule", "prediction_type", "timestep_spacing"):
        with pytest.raises(ConfigError, match=f"{key} is 'odd'; supported"):
            CogVideoXDDIMScheduler(**{key: "odd"})
    with pytest.raises(ValueError, match="both or neither"):
        make("dpm")[0].step(x, x, 999, None, x)
    scheduler.save_pretrained(tmp_path)
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_karras": True}))
    with pytest.raises(ConfigError, match="use_karras"):
        CogVideoXDDIMScheduler.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="CogVideoXDDIMScheduler, expected a CogVideoXDPMScheduler"):
        CogVideoXDPMScheduler.from_pretrained(tmp_path)
