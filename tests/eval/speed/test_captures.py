"""Captures are what the model's attention is called with, for a clip of its world at the noise of the step."""
import json
from pathlib import Path

import numpy as np
import pytest

from lowbit_video.eval import world
from lowbit_video.eval.speed.experiments import captures as capturing
from lowbit_video.pipelines.shared.generation import read_generation

FOLDER = Path(__file__).parents[3] / "examples" / "small_cogvideox" / "model"
STEP, LAYER = 3, 5


def test_bad_requests_are_named_before_any_work(tmp_path):
    (tmp_path / "generation.json").write_text(json.dumps({"steps": 8}))
    with pytest.raises(ValueError, match="names a world"):
        capturing.captures(tmp_path, tmp_path, [0], [0], 1)
    with pytest.raises(ValueError, match=r"steps \[25\]: the model takes 25"):
        capturing.captures(FOLDER, tmp_path, [0], [25], 1)


@pytest.mark.parity
def test_a_capture_is_what_the_attention_is_called_with(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
    seen, model = {}, diffusers.CogVideoXTransformer3DModel
    forward, latents_of = model.forward, capturing._latents_of

    def watched(self, hidden_states, text, timestep, **more):
        seen.update(hidden=hidden_states, timestep=int(timestep))
        attention = self.transformer_blocks[LAYER].attn1
        for name in ("norm_q", "norm_k", "to_v"):
            getattr(attention, name).register_forward_hook(lambda module, given, out, name=name: seen.update({name: out[0]}))
        return forward(self, hidden_states, text, timestep, **more)

    def kept(pipe, *given):
        pipe.vae.register_to_config(scaling_factor=0.5)  # the small model's is 1, which would not show
        latents, text = latents_of(pipe, *given)
        seen.update(pipe=pipe, clean=latents)
        return latents, text

    monkeypatch.setattr(model, "forward", watched)
    monkeypatch.setattr(capturing, "_latents_of", kept)
    monkeypatch.setattr(capturing, "read_generation", lambda folder: {**read_generation(folder), "frames": 9})
    file, = capturing.captures(FOLDER, tmp_path, [LAYER], [STEP], 1, seed=7)
    got = capturing.load(file)
    heads_first = lambda x: x.unflatten(-1, (-1, 64)).numpy().swapaxes(0, 1) if x.ndim == 2 else x.numpy().swapaxes(0, 1)
    for ours, name in ((got.q, "norm_q"), (got.k, "norm_k"), (got.v, "to_v")):
        np.testing.assert_array_equal(ours, heads_first(seen[name]))
    assert (got.text, got.grid, got.layer, got.step) == (32, (3, 8, 12), LAYER, STEP) and got.q.shape == (4, 320, 64)

    scheduler, clean = seen["pipe"].scheduler, seen["clean"]
    assert seen["timestep"] == 1000 - STEP * 40 - 1  # 25 steps of 1000, from the last one
    signal = scheduler.alphas_cumprod[seen["timestep"]]
    noise = (seen["hidden"] - signal.sqrt() * clean) / (1 - signal).sqrt()
    assert abs(float(noise.std()) - 1) < 0.02 and abs(float(noise.mean())) < 0.02 and 0.25 < float(clean.std()) < 1
    there = world.draw_meanings(1, 7, True)
    with torch.no_grad():
        first = seen["pipe"].vae.decode(clean[:, :1].permute(0, 2, 1, 3, 4) / seen["pipe"].vae.config.scaling_factor).sample
    wanted = world.render(world.plan(there, 7))[0, 0] / 127.5 - 1
    assert np.square(first[0, :, 0].permute(1, 2, 0).numpy() - wanted).mean() < 0.02

    monkeypatch.setattr(capturing, "_make", lambda *given: pytest.fail("captured again"))
    assert capturing.captures(FOLDER, tmp_path, [LAYER], [STEP], 1, seed=7) == [file]
    other = Path(str(FOLDER) + "/.")
    assert capturing.captures(other, tmp_path, [LAYER], [STEP], 1, seed=7) == [file]
