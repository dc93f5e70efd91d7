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
        self.use("small")
        clock = SimpleNamespace(time=lambda: self.now)
        for module in (code.diffusion, code.run):
            monkeypatch.setattr(module, "time", clock)
        monkeypatch.setattr(code.loss_watch.LossWatch, "lost", lambda watch, mean: False)  # latents of 60 are no latents

    def use(self, config):
        """Clips of the configuration of that name."""
        self.config, (_, self.sizes) = config, self.code.models.CONFIGURATIONS[config]
        number = torch.arange(1.0, CLIPS + 1)
        self.latents = 10 * number[:, None, None, None, None].expand(-1, *self.sizes.latent_shape).half()
        frames, _, height, width = self.sizes.latent_shape
        cells = torch.arange(frames * height * width).reshape(1, frames, 1, height, width)
        self.masks = cells % (CLIPS + 1) == number.long()[:, None, None, None, None]
        self.ids = torch.zeros(CLIPS, self.code.latents.WORDINGS, self.sizes.text_tokens, dtype=torch.long)
        self.ids[..., 0] = 3 + torch.arange(CLIPS * self.code.latents.WORDINGS).reshape(CLIPS, -1)
        self.ids[..., 1] = 1

    def __call__(self, *arguments, tiny=True):
        """The state that is kept of a run with these arguments; `tiny`: as `--tiny` has it but for the sizes."""
        from accelerate import Accelerator

        code = self.code
        args = code.train.arguments([
            "--config", self.config, "--tiny", "--diffusion-minutes", "11", "--evaluate-seconds", "60", "--refresh-every", "0",
            "--check-seconds", "1e9", *arguments, "--state", str(self.folder / "state"), "--out", str(self.folder / "out")])
        self.run = run = code.run.Run(args, Accelerator(), SimpleNamespace(pool=None))
        args.tiny = tiny
        run.vae, run.vocabulary = code.models.build_vae(self.sizes), 3 + self.ids[..., 0].numel()
        run.tokenizer = run.state / "model" / "tokenizer"
        run.encoded = {shrink: code.latents.Encoded(self.latents[..., ::shrink, ::shrink], self.masks[..., ::shrink, ::shrink],
                                                    self.ids) for shrink in (1, 2)}
        self.steps, self.losses, self.norms, models = [], [], [], []
        build, forward = code.diffusion.build_optimisers, code.graphs.Predict.forward

        def built(model, *how):
            models.append(model)
            self.optimisers = build(model, *how)
            for optimiser in self.optimisers:
                optimiser.register_step_pre_hook(lambda one, given, named: self.norms.append(torch.stack(
                    [p.grad.norm() for group in one.param_groups for p in group["params"] if p.grad is not None]).norm()))
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


def test_a_step_asks_for_the_velocity_and_more_so_on_shapes(trained, training, monkeypatch, begun):
    draw = training.diffusion.draw_times
    monkeypatch.setattr(training.diffusion, "draw_times", lambda count, steps, shift, device: draw(count, 600, shift, device))
    trained("--max-steps", "40", "--curriculum", "5:1", "--shape-weight", "5", "--warmup", "1000", "--lr", "1e-9",
            "--init", str(begun), "--init-parts", "vae,text_encoder,transformer")
    assert len(trained.losses) == len(trained.steps) == 40
    norms = torch.stack(trained.norms).reshape(40, 2).norm(dim=1)  # of both optimisers' gradients
    assert (norms < 1.001).all() and norms.max() > 0.99
    alphas = training.models.build_scheduler(trained.sizes).alphas_cumprod
    encoder = training.models.build_text_encoder(trained.sizes, trained.run.vocabulary)
    encoder.load_state_dict({name.removeprefix("text_encoder."): value for name, value in torch.load(
        trained.run.state / "diffusion.pt", weights_only=True)["model"].items() if name.startswith("text_encoder.")})
    empty = torch.zeros(1, trained.sizes.text_tokens, dtype=torch.long)
    empty[0, 0] = 1
    with torch.no_grad():
        features = encoder(torch.cat([empty, trained.ids.flatten(0, 1)]))[0].bfloat16().float()
    said = []
    for step, loss in zip(trained.steps, trained.losses):
        signal, strength = (share.sqrt()[:, None, None, None, None] for share in (alphas[step.times], 1 - alphas[step.times]))
        clips = ((step.noisy / signal).mean((1, 2, 3, 4)) / 10).round().long() - 1
        assert clips.min() >= 0 and clips.max() < CLIPS, "a step takes a clip that is not there"
        clean = trained.latents[clips].float()
        noise = (step.noisy - signal * clean) / strength
        assert abs(noise.std() - 1) < 0.1
        weight = torch.where(trained.masks[clips], 1 + 4 * signal.square(), torch.tensor(1.0))
        wanted = (weight * (step.found - (signal * noise - strength * clean)).square()).mean().item()
        assert loss == pytest.approx(wanted, rel=1e-3)
        nearest = torch.cdist(step.text.flatten(1), features.flatten(1))
        assert nearest.min(1).values.max() < 1e-3
        said += list(zip(clips.tolist(), nearest.argmin(1).tolist()))
    assert {clip for clip, _ in said} == set(range(CLIPS))
    wordings = training.latents.WORDINGS
    assert all(text == 0 or (text - 1) // wordings == clip for clip, text in said), "a clip has another's caption"
    assert {text for _, text in said} == set(range(CLIPS * wordings + 1))
    assert 0.04 < sum(text == 0 for _, text in said) / len(said) < 0.18  # a tenth of the captions is dropped


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


def test_what_is_checked_and_saved_is_the_average_of_the_weights(trained, training, monkeypatch, begun):
    from safetensors.torch import load_file

    checked = {}
    monkeypatch.setattr(training.diffusion, "say_swapped", lambda run, encoder, step, minutes: checked.update(encoder=encoder))
    monkeypatch.setattr(training.diffusion, "check", lambda run, averaged, step, minutes, phase: checked.update(
        {step: averaged.transformer.proj_out.weight.clone(), "right": checked["encoder"] is averaged.text_encoder}))
    weights = load_file(begun / "transformer" / "diffusion_pytorch_model.safetensors")["proj_out.weight"].float()
    state = trained("--max-steps", "20", "--curriculum", "5:1", "--init", str(begun), "--warmup", "1", "--lr", "0.01",
                    "--average", "0.95", "--init-parts", "vae,transformer,text_encoder", "--check-seconds", "0",
                    "--save-seconds", "0")
    torch.testing.assert_close(trained.steps[0].weights, weights)
    after = [step.weights for step in trained.steps[1:]] + [state["model"]["transformer.proj_out.weight"]]
    for step, now in enumerate(after, 101):
        if step % 4 == 0:
            weights = torch.lerp(weights, now, 1 - min(0.95, (1 + step) / (10 + step)) ** 4)
        torch.testing.assert_close(checked[step], weights)
    assert checked["right"] and (now - weights).norm() > 0.1 * weights.norm()
    torch.testing.assert_close(state["averaged"]["transformer.proj_out.weight"], weights)
    kept = load_file(trained.run.state / "model" / "transformer" / "diffusion_pytorch_model.safetensors")["proj_out.weight"]
    torch.testing.assert_close(kept, weights.half(), rtol=0, atol=1e-3)
    words = load_file(begun / "text_encoder" / "model.safetensors")["shared.weight"].float()
    torch.testing.assert_close(state["averaged"]["text_encoder.shared.weight"], words)


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


def test_a_loss_that_is_lost_takes_back_weights_average_and_momenta(trained, training, monkeypatch, begun):
    from safetensors.torch import load_file

    asked = []
    monkeypatch.setattr(training.loss_watch.LossWatch, "lost",
                        lambda watch, mean: asked.append(len(trained.steps)) or len(trained.steps) == 9)
    state = trained("--max-steps", "10", "--curriculum", "5:1", "--init", str(begun), "--warmup", "4", "--lr", "1e-3",
                    "--init-parts", "vae,transformer")
    assert not torch.allclose(state["model"]["text_encoder.shared.weight"].half(), load_file(
        begun / "text_encoder" / "model.safetensors")["shared.weight"]), "it was not to be taken over"
    assert asked == [5, 6, 7, 8, 9], "a phase is watched once it is warm, and anew after a fall"
    name = "transformer.proj_out.weight"
    torch.testing.assert_close(trained.steps[9].weights, trained.steps[1].weights, rtol=0, atol=0)  # good after one step
    torch.testing.assert_close(state["averaged"][name], trained.steps[0].weights, rtol=0, atol=0)
    falls = 0.5 * (1 + math.cos(math.pi * (9 / 10 - 0.15) / 0.85))
    assert trained.steps[9].rates == [pytest.approx([0.6e-3 / 4 * falls] * 2), pytest.approx([0.6e-3 / 4 * falls])]
    assert {int(one["step"]) for one in state["optimisers"][0]["state"].values()} == {1}


def test_what_is_not_taken_over_is_left_as_it_was(trained, begun):
    from safetensors.torch import load_file

    state = trained("--max-steps", "1", "--curriculum", "5:1", "--init", str(begun), "--init-parts", "vae,text_encoder")
    words = load_file(begun / "text_encoder" / "model.safetensors")["shared.weight"].float()
    torch.testing.assert_close(state["model"]["text_encoder.shared.weight"], words)
    assert state["step"] == 1 and state["earlier"] == 0, "the steps before are the transformer's"
    assert not trained.steps[0].weights.any(), "the transformer begins anew"


def test_single_frames_and_small_clips_are_renewed_faster(trained, training, monkeypatch):
    """`--refresh-clips` says how many whole clips; four times as many single frames, twice as many of half the size."""
    added = []
    monkeypatch.setattr(training.latents.Cache, "add", lambda cache, clips: added.append((*cache.phase[::2], clips)))
    trained.use("long")
    trained("--max-steps", "12", "--curriculum", "1:1:2,5/2:1:3,5:1:1", "--refresh-every", "2", "--refresh-clips", "3",
            "--batch", "1", "--warmup", "100", tiny=False)
    assert added == 2 * [(1, 1, 12)] + 2 * [(5, 2, 6)] + 2 * [(5, 1, 3)]
    assert [len(step.noisy) for step in trained.steps] == 4 * [2] + 4 * [3] + 4 * [1]
