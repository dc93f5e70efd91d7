"""The DPM sampler of CogVideoX: second-order steps with fresh noise (SDE-DPM-Solver++ 2M).

Source: DPM-Solver++ (arXiv 2211.01095, algorithm 2, its SDE variant) and diffusers 0.42's CogVideoXDPMScheduler. That one draws
noise twice in a second-order step and throws the first draw away; here each step takes one draw.
"""
from __future__ import annotations

import numpy as np
import paddle

from .scheduler import CogVideoXScheduler, SchedulerOutput, to_float32


class CogVideoXDPMScheduler(CogVideoXScheduler):
    """Multistep solver of the reverse stochastic process; the first and the last step are first order."""

    uses_noise = True

    def step(
        self,
        model_output: paddle.Tensor,
        old_pred_original_sample: paddle.Tensor | None,
        timestep: int,
        timestep_back: int | None,
        sample: paddle.Tensor,
        noise: paddle.Tensor | None = None,
        generator: np.random.Generator | int | None = None,
    ) -> SchedulerOutput:
        """One step towards the clean latents.

        Args:
            model_output: the model's prediction for `sample`, any shape.
            old_pred_original_sample: the clean latents that the step before returned; None at the first step.
            timestep: of `sample`, from `timesteps`.
            timestep_back: of the step before; None at the first step.
            sample: noisy latents.
            noise: standard normal, shaped as sample; None: drawn from `generator` (a NumPy generator or a seed).
        Returns:
            SchedulerOutput, float32 unless both inputs are of one other type.
        """
        if (old_pred_original_sample is None) != (timestep_back is None):
            raise ValueError("old_pred_original_sample and timestep_back belong together: give both or neither")
        if noise is None:
            drawn = np.random.default_rng(generator).standard_normal(list(sample.shape), dtype=np.float32)
            noise = paddle.to_tensor(drawn, place=sample.place)
        model_output, sample, dtype = to_float32(model_output, sample)
        power, power_next, following = self._powers(timestep)
        clean = self._clean(model_output, sample, power)
        # The ends of the schedule (power 0 or 1) are infinite in log-SNR; every limit below is finite and right.
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            step_size = _log_snr(power_next) - _log_snr(power)
            decay = np.exp(-step_size)
            kept = np.sqrt((1 - power_next) / (1 - power)) * decay
            gained = -np.expm1(-2 * step_size) * np.sqrt(power_next)
            fresh = np.sqrt(1 - power_next) * np.sqrt(1 - decay**2)
            target = clean
            if timestep_back is not None and following >= 0:
                step_back = _log_snr(power) - _log_snr(float(self.alphas_cumprod[int(timestep_back)]))
                half = float(0.5 * step_size / step_back)  # 1 / (2 r)
                target = (1 + half) * clean - half * old_pred_original_sample.astype("float32")
        moved = float(kept) * sample + float(gained) * target + float(fresh) * noise.astype("float32")
        return SchedulerOutput(moved.astype(dtype), clean.astype(dtype))


def _log_snr(power: float) -> np.float64:
    """Half the log of the signal-to-noise ratio, natural log."""
    return 0.5 * np.log(np.float64(power) / np.float64(1 - power))
