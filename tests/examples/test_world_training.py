"""The small model's training at toy size on a CPU: every stage runs, short clips first, and goes on from a folder."""
import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the training code is written in PyTorch")
pytest.importorskip("diffusers", reason="the model is made of diffusers' classes")
pytest.importorskip("transformers", reason="the text encoder is transformers' T5EncoderModel")
pytest.importorskip("accelerate", reason="the training loop is accelerate's")
FOLDER = Path(__file__).parents[2] / "examples" / "small_cogvideox"
pytestmark = pytest.mark.torch


@pytest.fixture
def code(training):
    return training


def test_curriculum_is_read_and_refused(code):
    read, batch_of = code.curriculum.curriculum, code.curriculum.batch_of
    assert read("1:0.3,3:0.3,9:0.4", 9) == [(1, pytest.approx(0.3), 1, 0), (3, pytest.approx(0.6), 1, 0), (9, 1.0, 1, 0)]
    assert read("9:2", 9) == [(9, 1.0, 1, 0)]
    assert read("1/2:0.1:512,9/2:0.2,9:0.7:4", 9) == [
        (1, pytest.approx(0.1), 2, 512), (9, pytest.approx(0.3), 2, 0), (9, 1.0, 1, 4)]
    for text in ("", "9", "1:x,9:1", "0:1,9:1", "10:1", "9:-1,9:2", "9:0.5,1:0.5", "9/2:1", "1/3:0.5,9:0.5", "1/2/2:0.5,9:0.5",
                 "9:1:-4", "9:1:4:4"):
        with pytest.raises(ValueError, match="--curriculum"):
            read(text, 9)
    small, long = code.models.SIZES, code.models.LONG
    assert [batch_of(128, phase, small) for phase in read("3:1,1:1,9:1", 9)] == [352, 512, 128]
    assert [batch_of(8, phase, long) for phase in read("1/2:1:256,13/2:1,13:1", 13)] == [256, 24, 8]


def test_fewer_frames_keep_the_positions_of_the_first(code):
    torch.manual_seed(0)
    tiny = code.models.TINY
    transformer = code.models.build_transformer(tiny).eval()
    noisy, text = torch.randn(2, 2, *tiny.latent_shape[1:]), torch.randn(2, code.tokens.MAX_TOKENS, tiny.text_dim)
    whole = torch.randn(2, *code.models.TINY.latent_shape)
    times = torch.tensor([10, 900])
    with torch.no_grad():
        wanted = transformer(noisy, text, times, return_dict=False)[0]  # diffusers makes positions for 2 frames
        wanted_whole = transformer(whole, text, times, return_dict=False)[0]
        positions = code.curriculum.model_positions(transformer)
        code.curriculum.first_frames(transformer, 2, positions)
        made = transformer.patch_embed._get_positional_embeddings
        transformer.patch_embed._get_positional_embeddings = None  # nothing is computed anew
        torch.testing.assert_close(transformer(noisy, text, times, return_dict=False)[0], wanted)
        transformer.patch_embed._get_positional_embeddings = made
        code.curriculum.first_frames(transformer, code.models.TINY.latent_frames, positions)
        torch.testing.assert_close(transformer(whole, text, times, return_dict=False)[0], wanted_whole)


@pytest.mark.parametrize("shrink", [1, 2])
def test_smaller_clips_turn_as_diffusers_turns_them(code, shrink):
    from diffusers import CogVideoXPipeline

    sizes = code.models.TINY_LONG
    transformer = code.models.build_transformer(sizes)
    pipe = SimpleNamespace(vae_scale_factor_spatial=8, transformer=transformer)
    frames = 3
    wanted = CogVideoXPipeline._prepare_rotary_positional_embeddings(
        pipe, sizes.height // shrink, sizes.width // shrink, frames, torch.device("cpu"))
    made = code.curriculum.rotations(sizes, frames, shrink, "cpu")
    for ours, theirs in zip(made, wanted, strict=True):
        assert ours.shape == (sizes.tokens(frames, shrink) - sizes.text_tokens, sizes.head_dim)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert code.curriculum.model_positions(transformer) is None
    assert code.curriculum.rotations(code.models.TINY, 3, 1, "cpu") is None
    torch.manual_seed(0)
    model = code.models.TextToVelocity(code.models.build_text_encoder(sizes, 40), transformer.eval())
    noisy = torch.randn(1, frames, sizes.latent_channels, sizes.height // 8 // shrink, sizes.width // 8 // shrink)
    text, times = torch.randn(1, sizes.text_tokens, sizes.text_dim), torch.tensor([500])
    with torch.no_grad():
        found = code.graphs.Predict(model.transformer, made)(noisy, text, times)
        torch.testing.assert_close(found, transformer(noisy, text, times, image_rotary_emb=wanted, return_dict=False)[0])
        assert not torch.allclose(found, code.graphs.Predict(model.transformer)(noisy, text, times), atol=1e-3)


def test_the_long_model_is_as_long_and_as_small_as_it_has_to_be(code):
    sizes = code.models.LONG
    assert sizes.tokens(sizes.latent_frames) - sizes.text_tokens == 13 * 24 * 32 == 9984
    assert (sizes.layers, sizes.heads, sizes.head_dim) == (8, 6, 64)
    with torch.device("meta"):
        count = sum(p.numel() for p in code.models.build_transformer(sizes).parameters())
    shipped = FOLDER / "model"
    rest = sum(path.stat().st_size for part in ("vae", "text_encoder", "tokenizer") for path in (shipped / part).iterdir())
    assert 2 * count + rest < 60e6


def test_the_latents_of_shapes_are_where_their_pixels_are(code):
    mask = torch.zeros(1, 1, 9, 16, 24, dtype=torch.bool)
    mask[0, 0, 0, 3, 9] = True  # the first frame has a latent of its own
    mask[0, 0, 8, 15, 23] = True  # every other one stands for four frames
    found = code.latents.latent_mask(mask)
    assert found.shape == (1, 3, 1, 2, 3) and found.dtype == torch.bool
    assert found.nonzero().tolist() == [[0, 0, 0, 0, 1], [0, 2, 0, 1, 2]]


def test_times_are_drawn_alike_or_shifted_to_much_noise(code):
    draw = code.diffusion.draw_times
    torch.manual_seed(0)
    plain, shifted = (draw(40_000, 1000, shift, "cpu") for shift in (1.0, 3.0))
    for times, median, low in ((plain, 500, 250), (shifted, 750, 500)):  # t = 3 u / (1 + 2 u)
        assert times.dtype == torch.long and times.min() >= 0 and times.max() == 999
        assert abs(times.float().median() - median) < 12 and abs(times.float().quantile(0.25) - low) < 12
    assert code.train.arguments([]).time_shift == 1.0


def test_muon_takes_the_inner_matrices_only(code):
    args = code.train.arguments(["--text-rate", "0.1"])
    tiny = code.models.TINY
    model = code.models.TextToVelocity(code.models.build_text_encoder(tiny, 40), code.models.build_transformer(tiny))
    adam, muon = code.diffusion.build_optimisers(model, args, fused=False)
    names = {id(p): n for n, p in model.named_parameters()}
    taken = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert len(taken) == code.models.TINY.layers * 6 and all(".attn1.to_" in n or ".ff.net." in n for n in taken)
    rest = [names[id(p)] for group in adam.param_groups for p in group["params"]]
    groups = [*adam.param_groups, *muon.param_groups]
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    assert taken < decayed and {group["weight_decay"] for group in groups} == {0.0, 0.01}
    assert decayed == {name for name, p in model.named_parameters() if p.ndim > 1 and "shared" not in name
                       and "relative" not in name}
    assert sorted(rest + list(taken)) == sorted(names.values())


def test_stacked_muon_steps_as_torch_does(code):
    torch.manual_seed(0)
    shapes = [(8, 8), (8, 8), (24, 8), (8, 24), (16, 8)]
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in start] for start in 2 * [[torch.randn(s) for s in shapes]])
    still = torch.nn.Parameter(torch.ones(4, 4))
    stacked = code.optimisers.StackedMuon([*ours, still], lr=0.02, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    before = [p.detach().clone() for p in ours]
    for _ in range(4):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        stacked.step()
        reference.step()
    for a, b, old in zip(ours, theirs, before):
        assert (a - b).norm() < 0.03 * (b - old).norm()  # bf16 products
    assert torch.equal(still, torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"not a tensor of shape \(3,\)"):
        code.optimisers.StackedMuon([torch.nn.Parameter(torch.ones(3))], lr=0.1)


def test_gradients_are_averaged_in_one_message_and_put_back_in_place(code):
    parameters = [torch.nn.Parameter(torch.zeros(s)) for s in ((2, 3), (4,), (1,))]
    parameters[0].grad, parameters[1].grad = torch.arange(6.0).reshape(2, 3), torch.full((4,), 8.0)
    messages = []

    def reduce(sent, how):  # with another process whose gradients are zero
        messages.append(sent)
        return sent / 2 if how == "mean" else sent

    code.diffusion.average_gradients(SimpleNamespace(accelerator=SimpleNamespace(reduce=reduce)), parameters)
    assert len(messages) == 1 and parameters[2].grad is None
    assert torch.equal(parameters[0].grad, torch.arange(6.0).reshape(2, 3) / 2)
    assert torch.equal(parameters[1].grad, torch.full((4,), 4.0))


@pytest.mark.parametrize("factor, kept", [(1.0, True), (1.05, False), (float("nan"), False)])
def test_graphs_that_give_other_values_are_dropped(code, monkeypatch, factor, kept):
    said = []
    run = SimpleNamespace(args=SimpleNamespace(graphs=True, text_rate=0.0), device=SimpleNamespace(type="cuda"),
                          log=SimpleNamespace(say=said.append))
    plain = code.graphs.Predict(lambda noisy, text, times, return_dict: (noisy * 2,))
    made = lambda *given: factor * plain(*given)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda *given, **options: made)
    inputs = torch.ones(2, 9, 16, 16, 24), torch.ones(2), torch.ones(2)
    assert code.graphs.graphed(run, plain, inputs) is (made if kept else plain)
    long = torch.ones(2, 13, 1, 24, 32), torch.ones(2), torch.ones(2)
    assert code.graphs.graphed(run, plain, long) is plain  # its launches are the smaller part
    assert len(said) == 1 and "from the plain transformer" in said[0]


def test_a_loss_that_jumps_takes_the_good_weights_back(code, tmp_path, capfd, monkeypatch):
    begun = ["--tiny", "--vae-minutes", "0.01", "--words-seconds", "0.2", "--warmup", "2", "--stages",
             "vae,latents,words,diffusion", "--curriculum", "5:1", "--state", str(tmp_path / "a"), "--out", str(tmp_path / "o")]
    forward, calls = code.graphs.Predict.forward, []

    def jumps(self, *inputs):
        calls.append(1)
        return forward(self, *inputs) * (50 if len(calls) == 12 else 1)

    monkeypatch.setattr(code.graphs.Predict, "forward", jumps)
    assert code.train.main([*begun, "--max-steps", "20"]) == 0
    said = capfd.readouterr().out
    assert said.count("back to the last good weights, learning rate 0.0003") == 1


@pytest.mark.parametrize("means, lost", [
    ((1.0, 0.9, 1.25, 0.8), [False] * 4), ((1.0, 1.41, 1.0, 1.41), [False] * 4), ((1.0, 1.39, 1.41), [False] * 3),
    ((1.0, 1.41, 1.41, 1.41), [False, False, True, False]), ((1.0, 2.9, 3.1), [False, False, True]),
    ((1.0, 3.01), [False, True]), ((1.0, float("nan"), 1.41), [False, True, False]),
    ((2.0, 1.0, 1.41, 1.41), [False] * 3 + [True]),
])
def test_a_training_is_lost_after_a_jump_or_two_bad_means(code, means, lost):
    watch = code.loss_watch.LossWatch()
    assert [watch.lost(mean) for mean in means] == lost
    assert watch.best == min(mean for mean in means if mean == mean)


def test_swapped_likeness_tells_a_bag_of_words(code, tmp_path):
    code.tokens.build_vocabulary(tmp_path)
    tokens = code.tokens.Tokens(tmp_path)
    torch.manual_seed(0)
    encoder = code.models.build_text_encoder(code.models.TINY, len(tokens))
    assert code.words.swapped_likeness(encoder, tokens) < code.words.COLLAPSED
    torch.nn.init.zeros_(encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight)
    assert code.words.swapped_likeness(encoder, tokens) > 0.999


def test_stages_run_from_nothing_and_go_on_from_the_folder(code, tmp_path, capfd, monkeypatch):
    first = ["--tiny", "--vae-minutes", "0.02", "--max-steps", "6", "--refresh-every", "2", "--check-seconds", "0", "--stages",
             "vae,latents,words,diffusion", "--curriculum", "1:0.5,2:0.25,5:0.25"]
    assert code.train.main([*first, "--state", str(tmp_path / "a"), "--out", str(tmp_path / "out")]) == 0
    said = capfd.readouterr().out
    for frames in (1, 2, 5):
        assert f"{frames} latent frames from" in said
    assert "; 4 clips were encoded on the way before" in said and "alike to" in said
    assert "no more fresh clips" not in said and "check failed" not in said and "clips of 2 latent frames" in said
    model = tmp_path / "a" / "model"
    assert json.loads((model / "training.json").read_text())["steps"] == 6
    config = json.loads((model / "transformer" / "config.json").read_text())
    assert config["sample_frames"] == code.models.TINY.frames
    with open(tmp_path / "a" / "log.csv", newline="") as file:
        assert {"vae", "words", "diffusion"} <= {row["stage"] for row in csv.DictReader(file)}
    spread = np.load(tmp_path / "a" / "latents.npy").astype(np.float32).std((0, 1, 3, 4))
    assert 0.8 < spread.min() and spread.max() < 1.25, "latents are to be of unit spread"
    # the encoder beside the transformer is the words stage's own
    taught = torch.load(tmp_path / "a" / "words.pt", weights_only=True)["model"]
    from safetensors.torch import load_file

    kept = load_file(model / "text_encoder" / "model.safetensors")
    name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    torch.testing.assert_close(kept[name], taught[name].half(), rtol=0, atol=0)

    more = ["--tiny", "--max-steps", "3", "--init", str(model), "--text-rate", "0.1", "--curriculum", "5:1", "--stages",
            "latents,words,diffusion", "--state", str(tmp_path / "b"), "--out", str(tmp_path / "out"), "--time-shift", "2.5"]
    shifts = []
    monkeypatch.setattr(code.diffusion, "draw_times", lambda count, steps, shift, device:
                        shifts.append(shift) or torch.randint(steps, (count,), device=device))
    assert code.train.main(more) == 0
    assert set(shifts) == {2.5}
    assert json.loads((tmp_path / "b" / "model" / "training.json").read_text())["steps"] == 9
    again = load_file(tmp_path / "b" / "model" / "vae" / "diffusion_pytorch_model.safetensors")
    before = load_file(model / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(again[name], before[name]) for name in before)
    assert str(tmp_path) not in (tmp_path / "b" / "model" / "vae" / "config.json").read_text()


def test_the_long_configuration_runs_every_stage_and_goes_on(code, tmp_path, capfd):
    first = ["--config", "long", "--tiny", "--vae-minutes", "0.02", "--words-seconds", "1", "--max-steps", "3", "--clips", "16",
             "--refresh-every", "1", "--check-seconds", "0", "--state", str(tmp_path / "a"), "--out", str(tmp_path / "out")]
    assert code.train.main([*first, "--stages", "vae,latents,words,diffusion"]) == 0
    said = capfd.readouterr().out
    for phase in ("1 latent frames of 1/2 size from", "5 latent frames of 1/2 size from", "5 latent frames from"):
        assert phase in said
    assert "check failed" not in said and "no more fresh clips" not in said and "clips of 5 latent frames" in said
    state = tmp_path / "a"
    small, whole = np.load(state / "latents-2.npy"), np.load(state / "latents.npy")  # half as many
    sizes = code.models.TINY_LONG
    assert whole.shape == (8, *sizes.latent_shape) and small.shape == (16, 5, 4, 6, 8)
    assert np.load(state / "ids-2.npy").shape == (16, code.latents.WORDINGS, 64)
    config = json.loads((state / "model" / "transformer" / "config.json").read_text())
    assert config["use_rotary_positional_embeddings"] and config["max_text_seq_length"] == 64
    assert json.loads((state / "model" / "generation.json").read_text())["world"] == "scenes"
    assert code.train.main([*first, "--stages", "latents,diffusion,evaluate", "--guidance", "4", "--max-steps", "1"]) == 0
    said = capfd.readouterr().out
    assert said.count("encoded clips read in") == 2 and "vae is trained already" in said
    assert "diffusion goes on from step 3" in said
    assert json.loads((state / "model" / "training.json").read_text())["steps"] == 4
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["captions"] == 6


def test_a_toy_training_refuses_the_shipped_autoencoder(code, tmp_path, capfd):
    begun = ["--tiny", "--init", str(FOLDER / "model"), "--state", str(tmp_path / "a"), "--out", str(tmp_path / "out")]
    assert code.train.main(begun) == 1
    assert "16 latent channels, this training 4; --tiny goes on from" in capfd.readouterr().err


@pytest.mark.parametrize("wrong", [["--curriculum", "1:1"], ["--init-parts", "scheduler"], ["--words-seconds", "0"],
                                   ["--stages", "nothing"]])
def test_arguments_that_cannot_be_meant_are_refused(code, wrong, capsys):
    with pytest.raises(SystemExit):
        code.train.arguments(wrong)
    assert wrong[0].lstrip("-").split("-")[0] in capsys.readouterr().err


@pytest.mark.parametrize("given, curriculum, batch", [
    ([], "1:0.13,{most}:0.87", 128), (["--config", "long"], "1/4:0.06:512,{most}/4:0.3:192,{most}/2:0.3:64,{most}:0.34:8", 8)])
def test_the_help_tells_the_defaults_of_the_configuration(code, given, curriculum, batch, capsys):
    with pytest.raises(SystemExit) as end:
        code.train.arguments([*given, "--help"])
    told = capsys.readouterr().out
    options = {words.split()[0]: " ".join(words.split()) for words in told.split("\n  --")[1:]}
    assert end.value.code == 0
    assert options["curriculum"].replace(" ", "").endswith(f"(default:{curriculum})")
    assert options["batch"].endswith(f"(default: {batch})") and options["text-rate"].endswith("(default: 0.0)")
    assert [name for name, words in options.items() if "default" not in words] == [
        "init", "unfinished", "fresh-clips", "no-muon", "no-graphs", "vae-goes-on", "no-compile", "pack", "tiny"]
    args = code.train.arguments(given)
    most = code.models.CONFIGURATIONS[args.config][False].latent_frames
    assert (args.curriculum, args.batch) == (curriculum.replace("{most}", str(most)), batch)


@pytest.mark.parametrize("config", ["small", "long"])
def test_toy_sizes_take_half_a_minute_unless_told_otherwise(code, config):
    names = ("vae_minutes", "words_seconds", "diffusion_minutes", "evaluate_seconds")
    usual, toy, told = (code.train.arguments(["--config", config, *more]) for more in (
        [], ["--tiny"], ["--tiny", "--vae-minutes", "3", "--words-seconds", "14"]))
    assert [getattr(toy, name) for name in names] == [0.1, 2, 0.1, 5]
    assert [getattr(told, name) for name in names] == [3, 14, 0.1, 5]
    assert [getattr(usual, name) for name in names] == [3, 40 if config == "long" else 14, 11, 60]


@pytest.mark.parametrize("given, words", [
    (["--more-spin", "0.2"], "--more-spin and --more-small are of the long model's world; add --config long"),
    (["--config", "long", "--more-small", "2"], "--more-small 2.0: small is 2.0; give a probability, 0 to 1")], ids=str)
def test_more_of_what_is_hard_is_a_probability_of_the_long_world(code, given, words, capsys):
    with pytest.raises(SystemExit):
        code.train.arguments(given)
    assert words in capsys.readouterr().err


TOLD = """
import os
import sys
import torch
import diffusion
import run
import train

if os.environ["RANK"] == "1":
    run.Run.left = lambda self: 0.0

times, seeds, models = [], [], []
draw, cache, build = diffusion.draw_times, diffusion.Cache, diffusion.build_optimisers
diffusion.draw_times = lambda *how: times.append(draw(*how)) or times[-1]
diffusion.Cache = lambda run, phase, seed, read: seeds.append(seed) or cache(run, phase, seed, read)
diffusion.build_optimisers = lambda model, *how: models.append(model) or build(model, *how)
code = train.main(sys.argv[2:])
if code == 0:
    torch.save([dict(models[0].named_parameters()), times[0], seeds[0]], f"{sys.argv[1]}/{os.environ['RANK']}.pt")
raise SystemExit(code)
"""  # tells of each process: its weights at the end, the times of its first batch, its clips' seed; the first's clock counts


def test_two_processes_train_one_model(tmp_path):
    (tmp_path / "told.py").write_text(TOLD)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               str(tmp_path / "told.py"), str(tmp_path), "--tiny", "--vae-minutes", "0.02", "--max-steps", "21",
               "--refresh-every", "4", "--guidance", "2", "4", "--sampling-steps", "1", "3",
               "--state", str(tmp_path / "state"), "--out", str(tmp_path / "out")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(
        [str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("finished with 0") == 1  # one of them speaks
    record = json.loads((tmp_path / "state" / "model" / "training.json").read_text())
    assert record["batch"] == 2 * 8 and record["steps"] in (21, 30)  # they agree on the time every ten steps
    evaluation = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    tried = [(found["num_inference_steps"], found["guidance_scale"]) for found in evaluation["sweep"]]
    assert evaluation["captions"] == 6 and tried == [(1, 2.0), (1, 4.0), (3, 2.0), (3, 4.0)]
    assert (evaluation["generation"]["num_inference_steps"], evaluation["generation"]["guidance_scale"]) in tried
    own, other = (np.load(tmp_path / "state" / name) for name in ("ids.npy", "1-ids.npy"))
    assert not np.array_equal(own, other)  # each has clips of its own
    (weights, times, seed), (others, other_times, other_seed) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(weights[name], others[name]) for name in weights)  # from clips of both
    assert not torch.equal(times, other_times) and abs(seed - other_seed) > 10**7
