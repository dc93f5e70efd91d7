"""The stage `diffusion` step by step at toy size: what is asked of the model, how fast it learns, what is kept of it."""
import json
import math
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="the training code is written in PyTorch")
pytest.importorskip("diffusers", reason="the model is made of diffusers' classes")
pytest.importorskip("transformers", reason="the text encoder is transformers' T5EncoderModel")
pytest.importorskip("accelerate", reason="the training loop is accelerate's")
pytestmark = pytest.mark.torch
CLIPS = 6  # at hand, of the 96 that there is room for


class Trained:
    """The stage on clips that the test knows, by a clock that goes on by a second a step; what each step saw."""

    def __init__(self, code, monkeypatch, folder):
        self.code, self.patch, self.folder, self.now = code, monkeypatch, folder, 1e9
        self.sizes = code.models.TINY
        number = torch.arange(1.0, CLIPS + 1)
        self.latents = 10 * number[:, None, None, None, None].expand(CLIPS, *self.sizes.latent_shape).half()
        frames, _, height, width = self.sizes.latent_shape
        cells = torch.arange(frames * height * width).reshape(1, frames, 1, height, width)
        self.masks = cells % (CLIPS + 1) == number.long()[:, None, None, None, None]
        self.ids = torch.zeros(CLIPS, code.latents.WORDINGS, self.sizes.text_tokens, dtype=torch.long)
        self.ids[..., 0] = 3 + torch.arange(CLIPS * code.latents.WORDINGS).reshape(CLIPS, -1)
        self.ids[..., 1] = 1
        clock = SimpleNamespace(time=lambda: self.now)
        for module in (code.diffusion, code.run):
            monkeypatch.setattr(module, "time", clock)
        monkeypatch.setattr(code.loss_watch.LossWatch, "lost", lambda watch, mean: False)  # latents of 60 are no latents

    def __call__(self, *arguments, state="state"):
        """The state that is kept of a run with these arguments."""
        from accelerate import Accelerator

        code = self.code
        args = code.train.arguments(["--tiny", "--refresh-every", "0", "--check-seconds", "1e9", *arguments,
                                     "--state", str(self.folder / state), "--out", str(self.folder / "out")])
        self.run = run = code.run.Run(args, Accelerator(), SimpleNamespace(pool=None))
        run.vae, run.vocabulary = code.models.build_vae(self.sizes), 3 + self.ids[..., 0].numel()
        run.tokenizer = run.state / "model" / "tokenizer"
        run.encoded = {1: code.latents.Encoded(self.latents, self.masks, self.ids)}
        self.steps, self.losses, models = [], [], []
        build, forward = code.diffusion.build_optimisers, code.graphs.Predict.forward

        def built(model, *how):
            models.append(model)
            self.optimisers = build(model, *how)
            return self.optimisers

        def predict(plain, noisy, text, times):
            self.now += 1
            found = forward(plain, noisy, text, times)
            self.steps.append(SimpleNamespace(
                noisy=noisy, text=text.detach(), times=times, found=found.detach(), at=self.now,
                rates=[[group["lr"] for group in optimiser.param_groups] for optimiser in self.optimisers],
                weights=models[0].transformer.proj_out.weight.detach().clone()))
            return found

        with self.patch.context() as patch:
            patch.setattr(code.diffusion, "build_optimisers", built)
            patch.setattr(code.graphs.Predict, "forward", predict)
            backward = run.accelerator.backward
            patch.setattr(run.accelerator, "backward", lambda loss: self.losses.append(loss.item()) or backward(loss))
            code.diffusion.train_diffusion(run)
        return torch.load(run.state / "diffusion.pt", weights_only=True)


@pytest.fixture
def trained(training, monkeypatch, tmp_path):
    return Trained(training, monkeypatch, tmp_path)


@pytest.fixture
def begun(training, tmp_path):
    """A folder to go on from, of random weights and 100 steps before."""
    models, sizes = training.models, training.models.TINY
    torch.manual_seed(5)
    parts = models.build_vae(sizes), models.build_text_encoder(sizes, 27), models.build_transformer(sizes)
    models.save(tmp_path / "begun", *parts, sizes, models.generation_defaults(sizes))
    (tmp_path / "begun" / "training.json").write_text(json.dumps({"seconds": 500.0, "steps": 100}))
    return tmp_path / "begun"


def test_the_rate_warms_up_in_each_phase_and_falls_until_the_reserve(trained, begun):
    """40 s to go: 72 of the run less 20 for the evaluation and 12 of its own, though 60 are asked for."""
    state = trained("--minutes", "1.2", "--diffusion-minutes", "1", "--evaluate-seconds", "20", "--lr", "1e-3", "--warmup", "8",
                    "--curriculum", "1:1,5:1", "--init", str(begun), "--init-parts", "vae,transformer,text_encoder",
                    "--text-rate", "0.1")
    assert len(trained.steps) == 40 and [step.noisy.shape[1] for step in trained.steps] == 20 * [1] + 20 * [5]
    for i, step in enumerate(trained.steps):
        rate = 1e-3 * min(1, (i % 20 + 1) / 8) * max(0.005, 0.5 * (1 + math.cos(math.pi * max(0, (i / 40 - 0.15) / 0.85))))
        assert step.rates == [pytest.approx([rate, rate, 0.1 * rate, 0.1 * rate]), pytest.approx([rate])], f"step {i}"
    record = json.loads((trained.run.state / "model" / "training.json").read_text())
    assert (record["seconds"], record["steps"], record["batch"]) == (540.0, 140, 8)
    assert (state["seconds"], state["step"], state["earlier"]) == (40.0, 140, 500.0)


def test_a_training_in_several_runs_is_one(trained):
    """30 s of the 50 fit into the first run; the second does the rest."""
    given = ["--minutes", "1", "--diffusion-minutes", "0.8333333333", "--evaluate-seconds", "18", "--curriculum", "5:1",
             "--lr", "1e-3", "--warmup", "4", "--unfinished"]
    first = trained(*given)
    assert (len(trained.steps), first["step"]) == (31, 31)  # the step that begins before the reserve is taken
    second = trained(*given)
    assert len(trained.steps) == 19 and (second["seconds"], second["step"]) == (50.0, 50)
    for i, step in enumerate(trained.steps, 31):
        rate = 1e-3 * min(1, (i - 30) / 4) * max(0.005, 0.5 * (1 + math.cos(math.pi * max(0, (i / 50 - 0.15) / 0.85))))
        assert step.rates == [pytest.approx([rate, rate]), pytest.approx([rate])]
    adam = second["optimisers"][0]["state"]
    assert {int(one["step"]) for one in adam.values()} == {50}
    name = "transformer.proj_out.weight"
    torch.testing.assert_close(trained.steps[0].weights, first["model"][name])
