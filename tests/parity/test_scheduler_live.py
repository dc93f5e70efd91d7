"""The schedulers against diffusers under many schedules, and files in both directions."""
import itertools

import numpy as np
import paddle
import pytest

from lowbit_video.pipelines import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("torch", reason="needs PyTorch")
pytestmark = pytest.mark.parity

CLASSES = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}
TOLERANCE = 1e-5
SPACINGS = ("trailing", "leading", "linspace")


@pytest.mark.parametrize("steps", [1, 2, 3, 13, 50, 1000])
@pytest.mark.parametrize("name", list(CLASSES))
def test_trajectories(goldens, name, steps):
    for shift, rescale, spacing, to_one in itertools.product((1.0, 3.0), (True, False), SPACINGS, (True, False)):
        if steps == 1000 and (spacing != "trailing" or not to_one):
            continue
        changes = dict(
            snr_shift_scale=shift, rescale_betas_zero_snr=rescale, timestep_spacing=spacing, set_alpha_to_one=to_one
        )
        want = goldens.run_scheduler(name, changes, steps)
        scheduler = CLASSES[name](**{**goldens.PUBLISHED_SCHEDULE, **changes})
        scheduler.set_timesteps(steps)
        np.testing.assert_array_equal(scheduler.timesteps, want["timesteps"])
        inputs = {key: paddle.to_tensor(array) for key, array in goldens.scheduler_inputs(steps).items()}
        sample, clean = inputs["start"], None
        for i, timestep in enumerate(scheduler.timesteps):
            if name == "dpm":
                back = scheduler.timesteps[i - 1] if i else None
                sample, clean = scheduler.step(inputs["predicted"][i], clean, timestep, back, sample, noise=inputs["noise"][i])
            else:
                sample, clean = scheduler.step(inputs["predicted"][i], timestep, sample)
            np.testing.assert_allclose(sample.numpy(), want["path"][i], rtol=0, atol=TOLERANCE, err_msg=f"{changes} step {i}")


@pytest.mark.parametrize("name", list(CLASSES))
def test_files_in_both_directions(goldens, name, tmp_path):
    theirs = getattr(diffusers, goldens.SCHEDULERS[name])
    made = theirs(**goldens.PUBLISHED_SCHEDULE, snr_shift_scale=2.0)
    made.save_pretrained(tmp_path / "theirs")
    ours = CLASSES[name].from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again = theirs.from_pretrained(tmp_path / "ours")
    assert {k: v for k, v in again.config.items() if k[0] != "_"} == {k: v for k, v in made.config.items() if k[0] != "_"}
    assert {**ours.config} == {k: v for k, v in made.config.items() if k[0] != "_"}
