"""The noise schedule of CogVideoX and its DDIM sampler.

A schedule is a table of alphas_cumprod (float64 where the betas are "scaled_linear", as published): the share of the clean
signal's power at each training step. CogVideoX shifts its signal-to-noise ratio towards noise and rescales it so that the
last step is pure noise; the model then predicts v = sqrt(a) * noise - sqrt(1 - a) * clean.

Tables and coefficients are NumPy scalars; only the sums over latents run on the device, in float32.

Source: DDIM (arXiv 2010.02502, formula 12), zero terminal SNR (arXiv 2305.08891, algorithm 1), and diffusers 0.42's
CogVideoXDDIMScheduler, whose files this reads and writes. The keys clip_sample, clip_sample_range and sample_max_value are
kept and, as there, change nothing.
"""
from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import paddle

from lowbit_video.arguments import whole

from ..shared.config import DIFFUSERS_VERSION, ConfigError, keep_config, known_keys, load_config, write_json

SCHEDULER_CONFIG_NAME = "scheduler_config.json"
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")
MAX_COSINE_BETA = 0.999
MAX_TRAIN_TIMESTEPS = 10**6


class SchedulerOutput(NamedTuple):
    """What a step returns: the latents of the next step and the clean latents that the model now believes in."""

    prev_sample: paddle.Tensor
    pred_original_sample: paddle.Tensor


class CogVideoXScheduler:
    """The schedule that both samplers share.

    Args:
        num_train_timesteps: steps of the schedule.
        beta_start, beta_end, beta_schedule: the noise added at each step; one of BETA_SCHEDULES.
        trained_betas: the betas themselves, in place of the three above.
        clip_sample, clip_sample_range, sample_max_value: kept for the file; nothing uses them.
        set_alpha_to_one: the last step ends at no noise; else at the schedule's first entry.
        steps_offset: added to timesteps of "leading" spacing.
        prediction_type: what the model predicts; one of PREDICTION_TYPES.
        timestep_spacing: one of TIMESTEP_SPACINGS; CogVideoX is published with "trailing".
        rescale_betas_zero_snr: the last step is pure noise.
        snr_shift_scale: the signal-to-noise ratio is divided by this (2b: 3, 5b: 1).
    Raises:
        ConfigError: a value that is none of the above.
    """

    order = 1
    init_noise_sigma = 1.0
    uses_noise = False  # whether `step` adds fresh noise
    exact_steps = False
    """Whether each step ends at the timestep where the next one begins, and the last at no noise, for every number of steps.

    False as in diffusers: each step goes num_train_timesteps // num_inference_steps down. Where that does not divide, a step
    ends before the next one begins, and after the last some noise may be left (of 7 or 13 steps); `set_timesteps` then warns.
    Set it on a scheduler, as in `pipe.scheduler.exact_steps = True`; no file holds it, since diffusers knows no such key.
    """

    @keep_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.0120,
        beta_schedule: str = "scaled_linear",
        trained_betas: Sequence[float] | None = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        snr_shift_scale: float = 3.0,
    ):
        for key, value, supported in (
            ("beta_schedule", beta_schedule, BETA_SCHEDULES),
            ("prediction_type", prediction_type, PREDICTION_TYPES),
            ("timestep_spacing", timestep_spacing, TIMESTEP_SPACINGS),
        ):
            if value not in supported:
                raise ConfigError(f"{type(self).__name__}: {key} is {value!r}; supported: {', '.join(supported)}")
        if not 1 <= num_train_timesteps <= MAX_TRAIN_TIMESTEPS:
            raise ConfigError(f"{type(self).__name__}: num_train_timesteps is {num_train_timesteps}; give 1 to "
                              f"{MAX_TRAIN_TIMESTEPS}")
        if trained_betas is not None:
            betas = np.asarray(trained_betas, np.float32)
            if betas.shape != (num_train_timesteps,):
                raise ConfigError(
                    f"{type(self).__name__}: trained_betas has shape {list(betas.shape)}, expected [{num_train_timesteps}]"
                )
        elif min(beta_start, beta_end) < 0:
            raise ConfigError(f"{type(self).__name__}: beta_start is {beta_start} and beta_end {beta_end}; give none below 0")
        elif beta_schedule == "linear":
            betas = np.linspace(beta_start, beta_end, num_train_timesteps, dtype=np.float32)
        elif beta_schedule == "scaled_linear":
            betas = np.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=np.float64) ** 2
        else:
            betas = _cosine_betas(num_train_timesteps)
        with np.errstate(all="ignore"):  # what comes of odd numbers is looked at
            power = np.cumprod(1.0 - betas, dtype=np.float64).astype(betas.dtype)
            power = power / (snr_shift_scale + (1 - snr_shift_scale) * power)
            if rescale_betas_zero_snr:
                power = _rescale_to_zero_snr(power)
        if not ((0 <= power) & (power <= 1)).all() or (np.diff(power) > 0).any():  # NaN too
            raise ConfigError(f"{type(self).__name__}: beta_start {beta_start}, beta_end {beta_end} (or trained_betas) and "
                              f"snr_shift_scale {snr_shift_scale} make no schedule of shares that fall from 1 to 0")
        self.alphas_cumprod = power
        self.final_alpha_cumprod = 1.0 if set_alpha_to_one else float(power[0])
        self.num_inference_steps: int | None = None
        self.timesteps = np.arange(num_train_timesteps - 1, -1, -1, dtype=np.int64)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **changes: Any) -> CogVideoXScheduler:
        """A scheduler with another one's config, some keys changed: `CogVideoXDPMScheduler.from_config(pipe.scheduler.config)`.

        Raises:
            ConfigError: a key that is not known (named).
        """
        values = {key: value for key, value in {**config, **changes}.items() if not key.startswith("_")}
        unknown = sorted(set(values) - set(known_keys(cls)))
        if unknown:
            raise ConfigError(f"{cls.__name__} does not know: {', '.join(unknown)}. Known: {', '.join(known_keys(cls))}")
        return cls(**values)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> CogVideoXScheduler:
        """Reads `scheduler_config.json` of a folder."""
        return cls(**load_config(folder, cls.__name__, known_keys(cls), file_name=SCHEDULER_CONFIG_NAME))

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes `scheduler_config.json`, which diffusers reads."""
        os.makedirs(folder, exist_ok=True)
        values = dict(self.config)
        if values["trained_betas"] is not None:
            values["trained_betas"] = [float(beta) for beta in values["trained_betas"]]
        header = {"_class_name": type(self).__name__, "_diffusers_version": DIFFUSERS_VERSION}
        write_json(os.path.join(os.fspath(folder), SCHEDULER_CONFIG_NAME), {**header, **values})

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Chooses the timesteps of a run, highest first: `timesteps`, int64.

        Raises:
            ValueError, TypeError: not a whole number between 1 and num_train_timesteps.
        """
        num_inference_steps = whole("num_inference_steps", num_inference_steps)
        total = self.config.num_train_timesteps
        if not 1 <= num_inference_steps <= total:
            raise ValueError(f"num_inference_steps is {num_inference_steps}; this schedule takes 1 to {total}")
        if self.config.timestep_spacing == "linspace":
            steps = np.linspace(0, total - 1, num_inference_steps).round()[::-1]
        elif self.config.timestep_spacing == "leading":
            steps = np.arange(num_inference_steps)[::-1] * (total // num_inference_steps) + self.config.steps_offset
        else:
            # arange with a fraction for a step may end one too late, at timestep -1: diffusers' 61 steps are 62
            steps = np.round(np.arange(total, 0, -total / num_inference_steps)[:num_inference_steps]) - 1
        if steps[0] >= total:
            raise ValueError(f"{num_inference_steps} steps of 'leading' spacing begin at timestep {int(steps[0])} with "
                             f"steps_offset {self.config.steps_offset}; the schedule ends at {total - 1}: take fewer steps, or "
                             "another spacing")
        self.num_inference_steps, self.timesteps = num_inference_steps, np.ascontiguousarray(steps, dtype=np.int64)
        last = self._following(self.timesteps[-1])
        if last >= 0:
            warnings.warn(
                f"{num_inference_steps} steps, taken as diffusers takes them, end at timestep {last} and leave noise (share "
                f"{math.sqrt(1 - self.alphas_cumprod[last]):.2g}); set scheduler.exact_steps = True, or choose a number of "
                f"steps that divides {total}",
                stacklevel=2,
            )

    def scale_model_input(self, sample: paddle.Tensor, timestep: int | None = None) -> paddle.Tensor:
        """The model's input: the sample as it is."""
        return sample

    def add_noise(self, original_samples: paddle.Tensor, noise: paddle.Tensor, timesteps: Sequence[int]) -> paddle.Tensor:
        """Latents [B, ...] at the noise level of a timestep for each (or one for all)."""
        signal, level = self._mix(timesteps, original_samples)
        return signal * original_samples + level * noise

    def get_velocity(self, sample: paddle.Tensor, noise: paddle.Tensor, timesteps: Sequence[int]) -> paddle.Tensor:
        """The v that the model should predict for clean latents [B, ...] and the noise added to them."""
        signal, level = self._mix(timesteps, sample)
        return signal * noise - level * sample

    def _mix(self, timesteps, like: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        """The factors of the clean signal and of the noise, each [B, 1, ...]."""
        power = self.alphas_cumprod[np.asarray(timesteps, np.int64).reshape(-1)]
        shape = [-1] + [1] * (len(like.shape) - 1)
        return tuple(
            paddle.to_tensor(np.sqrt(p).astype(np.float32), place=like.place).astype(like.dtype).reshape(shape)
            for p in (power, 1 - power)
        )

    def _powers(self, timestep: int) -> tuple[float, float, int]:
        """The clean signal's share now and after the step, and the timestep after the step (below 0 at the end)."""
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps(num_inference_steps) before step()")
        following = self._following(int(timestep))
        power_next = float(self.alphas_cumprod[following]) if following >= 0 else self.final_alpha_cumprod
        return float(self.alphas_cumprod[int(timestep)]), power_next, following

    def _following(self, timestep: int) -> int:
        """The timestep after the step; below 0 at the end."""
        if not self.exact_steps:
            return int(timestep) - self.config.num_train_timesteps // self.num_inference_steps
        later = self.timesteps[self.timesteps < timestep]
        return int(later[0]) if later.size else -1

    def _clean(self, model_output: paddle.Tensor, sample: paddle.Tensor, power: float) -> paddle.Tensor:
        """The clean latents that a prediction amounts to."""
        if self.config.prediction_type == "sample":
            return model_output
        if self.config.prediction_type == "epsilon":
            return (sample - math.sqrt(1 - power) * model_output) / math.sqrt(power)
        return math.sqrt(power) * sample - math.sqrt(1 - power) * model_output


class CogVideoXDDIMScheduler(CogVideoXScheduler):
    """Deterministic DDIM steps."""

    def step(self, model_output: paddle.Tensor, timestep: int, sample: paddle.Tensor) -> SchedulerOutput:
        """One step towards the clean latents.

        Args:
            model_output: the model's prediction for `sample`, any shape.
            timestep: of `sample`, from `timesteps`.
            sample: noisy latents.
        Returns:
            SchedulerOutput, float32 unless both inputs are of one other type.
        """
        model_output, sample, dtype = to_float32(model_output, sample)
        power, power_next, _ = self._powers(timestep)
        clean = self._clean(model_output, sample, power)
        kept = math.sqrt((1 - power_next) / (1 - power))
        moved = kept * sample + (math.sqrt(power_next) - math.sqrt(power) * kept) * clean
        return SchedulerOutput(moved.astype(dtype), clean.astype(dtype))


def to_float32(*tensors: paddle.Tensor) -> tuple:
    """The tensors in float32, and the type that they share (float32 where they differ)."""
    dtypes = {tensor.dtype for tensor in tensors}
    return *(tensor.astype("float32") for tensor in tensors), dtypes.pop() if len(dtypes) == 1 else paddle.float32


def _cosine_betas(steps: int) -> np.ndarray:
    """Betas whose cumulative product follows a squared cosine, float32."""
    power = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
    return np.array([min(1 - after / before, MAX_COSINE_BETA) for before, after in zip(power, power[1:])], np.float32)


def _rescale_to_zero_snr(power: np.ndarray) -> np.ndarray:
    """Shifts and stretches sqrt(power) so that it ends at 0 and begins where it did."""
    root = np.sqrt(power)
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
