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
def code(monkeypatch):
    """The modules of the example by name; they are found as its scripts find them, beside each other."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    import train  # imports its neighbours

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # toy sizes gain nothing from more
    yield SimpleNamespace(train=train, **{path.stem: sys.modules[path.stem] for path in FOLDER.glob("*.py")
                                          if path.stem in sys.modules and path.stem != "train"})
    torch.set_num_threads(threads)
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_curriculum_is_read_and_refused(code):
    assert code.curriculum.curriculum("1:0.3,3:0.3,9:0.4", 9) == [(1, pytest.approx(0.3)), (3, pytest.approx(0.6)), (9, 1.0)]
    assert code.curriculum.curriculum("9:2", 9) == [(9, 1.0)]
    for text in ("", "9", "1:x,9:1", "0:1,9:1", "10:1", "9:-1,9:2", "9:0.5,1:0.5"):
        with pytest.raises(ValueError, match="--curriculum"):
            code.curriculum.curriculum(text, 9)
    assert [code.curriculum.batch_of(128, frames, code.models.SIZES) for frames in (9, 3, 1)] == [128, 352, 512]


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


def test_the_latents_of_shapes_are_where_their_pixels_are(code):
    mask = torch.zeros(1, 1, 9, 16, 24, dtype=torch.bool)
    mask[0, 0, 0, 3, 9] = True  # the first frame has a latent of its own
    mask[0, 0, 8, 15, 23] = True  # every other one stands for four frames
    found = code.latents.latent_mask(mask)
    assert found.shape == (1, 3, 1, 2, 3) and found.dtype == torch.bool
    assert found.nonzero().tolist() == [[0, 0, 0, 0, 1], [0, 2, 0, 1, 2]]


def test_muon_takes_the_inner_matrices_only(code):
    args = code.train.arguments(["--text-rate", "0.1"])
    tiny = code.models.TINY
    model = code.models.TextToVelocity(code.models.build_text_encoder(tiny, 40), code.models.build_transformer(tiny))
    adam, muon = code.diffusion.build_optimisers(model, args, fused=False)
    names = {id(p): n for n, p in model.named_parameters()}
    taken = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert len(taken) == code.models.TINY.layers * 6 and all(".attn1.to_" in n or ".ff.net." in n for n in taken)
    rest = [names[id(p)] for group in adam.param_groups for p in group["params"]]
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
    inputs = torch.ones(2, 3), torch.ones(2), torch.ones(2)
    assert code.graphs.graphed(run, plain, inputs) is (made if kept else plain)
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


def test_swapped_likeness_tells_a_bag_of_words(code, tmp_path):
    code.tokens.build_vocabulary(tmp_path)
    tokens = code.tokens.Tokens(tmp_path)
    torch.manual_seed(0)
    encoder = code.models.build_text_encoder(code.models.TINY, len(tokens))
    assert code.words.swapped_likeness(encoder, tokens) < code.words.COLLAPSED
    torch.nn.init.zeros_(encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight)
    assert code.words.swapped_likeness(encoder, tokens) > 0.999


def test_stages_run_from_nothing_and_go_on_from_the_folder(code, tmp_path, capfd):
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
    # the encoder beside the transformer is the words stage's own
    taught = torch.load(tmp_path / "a" / "words.pt", weights_only=True)["model"]
    from safetensors.torch import load_file

    kept = load_file(model / "text_encoder" / "model.safetensors")
    name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    torch.testing.assert_close(kept[name], taught[name].half(), rtol=0, atol=0)

    more = ["--tiny", "--max-steps", "3", "--init", str(model), "--text-rate", "0.1", "--curriculum", "5:1", "--stages",
            "latents,words,diffusion", "--state", str(tmp_path / "b"), "--out", str(tmp_path / "out")]
    assert code.train.main(more) == 0
    assert json.loads((tmp_path / "b" / "model" / "training.json").read_text())["steps"] == 9
    again = load_file(tmp_path / "b" / "model" / "vae" / "diffusion_pytorch_model.safetensors")
    before = load_file(model / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(again[name], before[name]) for name in before)


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


def test_two_processes_train_one_model(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(FOLDER / "train.py"),
               "--tiny", "--vae-minutes", "0.02", "--max-steps", "21", "--refresh-every", "4",
               "--guidance", "2", "4", "--state", str(tmp_path / "state"), "--out", str(tmp_path / "out")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("finished with 0") == 1  # one of them speaks
    record = json.loads((tmp_path / "state" / "model" / "training.json").read_text())
    assert record["batch"] == 2 * 8 and record["steps"] in (21, 30)  # they agree on the time every ten steps
    evaluation = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert evaluation["captions"] == 6 and set(evaluation["guidance_sweep"]) == {"2.0", "4.0"}
    own, other = (np.load(tmp_path / "state" / name) for name in ("ids.npy", "1-ids.npy"))
    assert not np.array_equal(own, other)  # each has clips of its own
