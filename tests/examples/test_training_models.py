"""The small model's parts before and beside the transformer's training: schedule, autoencoder, words, the run itself."""
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lowbit_video.eval import world

torch = pytest.importorskip("torch", reason="the training code is written in PyTorch")
pytest.importorskip("diffusers", reason="the model is made of diffusers' classes")
pytest.importorskip("transformers", reason="the text encoder is transformers' T5EncoderModel")
pytest.importorskip("accelerate", reason="the training loop is accelerate's")
pytestmark = pytest.mark.torch


def test_the_shipped_models_are_scheduled_as_they_were_trained(training):
    """Else samples are made by other noise levels than those that the transformer knows."""
    for name, sizes in (("model", training.models.SIZES), ("long/model", training.models.LONG)):
        kept = json.loads((Path(training.models.__file__).parent / name / "scheduler" / "scheduler_config.json").read_text())
        made = dict(training.models.build_scheduler(sizes).config)
        assert {k: v for k, v in kept.items() if k[0] != "_"} == {k: v for k, v in made.items() if k[0] != "_"}


def test_a_saved_transformer_has_the_same_weights_in_both_half_types(training, tmp_path):
    """Its fp16 files hold values that bfloat16 has too; the other parts keep all of fp16's digits."""
    models = training.models
    models.build_vocabulary(tmp_path / "tokenizer")
    words = models.build_text_encoder(models.TINY, len(models.Tokens(tmp_path / "tokenizer")))
    parts = dict(vae=models.build_vae(models.TINY), text_encoder=words, transformer=models.build_transformer(models.TINY))
    before = {name: {key: value.clone() for key, value in part.state_dict().items()} for name, part in parts.items()}
    models.save(tmp_path, *parts.values(), models.TINY, models.generation_defaults(models.TINY))
    for name, part in parts.items():
        kept = type(part).from_pretrained(tmp_path, subfolder=name).state_dict()
        rounded = {key: value.bfloat16().half() for key, value in before[name].items()}
        wanted = rounded if name == "transformer" else {key: value.half() for key, value in before[name].items()}
        assert set(kept) == set(wanted)
        assert all(torch.equal(kept[key].half(), wanted[key]) for key in wanted), name
        assert any(not torch.equal(rounded[key], value.half()) for key, value in before[name].items()), "nothing to round"


def test_an_untrained_transformer_is_the_identity_in_its_blocks_and_says_nothing(training):
    tiny = training.models.TINY
    torch.manual_seed(0)
    models = training.models
    model = models.TextToVelocity(models.build_text_encoder(tiny, 40), models.build_transformer(tiny))
    models.initialise(model)
    seen = []
    for block in model.transformer.transformer_blocks:
        block.register_forward_hook(lambda block, given, named, out: seen.append((given, named, out)), with_kwargs=True)
    out = model(torch.ones(1, tiny.text_tokens, dtype=torch.long), torch.randn(1, *tiny.latent_shape), torch.tensor([500]))
    assert not out.any() and len(seen) == tiny.layers
    for given, named, out in seen:
        came = [*given, *named.values()]
        assert all(any(torch.equal(part, before) for before in came if isinstance(before, torch.Tensor)
                       and before.shape == part.shape) for part in out)


def test_the_autoencoders_error_weighs_three_times_on_shapes(training):
    """Latents are drawn by their log variance; an autoencoder that gives black has the video as its error."""
    video = torch.rand(2, 3, 5, 8, 8) * 2 - 1
    mask = torch.rand(2, 1, 5, 8, 8) < 0.3
    mean, logvar, given = torch.full((2, 4, 2, 1, 1), 0.5), torch.full((2, 4, 2, 1, 1), -2.0), []
    vae = SimpleNamespace(
        encode=lambda video: SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, logvar=logvar)),
        decode=lambda latents: given.append(latents) or SimpleNamespace(sample=torch.zeros_like(video)))
    torch.manual_seed(3)
    loss, square = training.autoencoder.vae_loss(vae, video, mask, 0.25)
    torch.manual_seed(3)
    torch.testing.assert_close(given[0], mean + np.exp(-1.0) * torch.randn_like(mean))
    weighed = torch.where(mask, 3.0, 1.0) * (0.3 * video.abs() + 6 * video.square())
    kl = 0.5 * (0.25 + np.exp(-2.0) - 1 + 2.0)
    assert loss.item() == pytest.approx(weighed.mean().item() + 0.25 * kl, rel=1e-5)
    assert square.item() == pytest.approx(video.square().mean().item())
    assert training.autoencoder.psnr_db(0.04) == pytest.approx(20.0)


def test_quarters_of_frames_lie_about_the_first_shape(training, monkeypatch):
    run, rng = SimpleNamespace(sizes=training.models.TINY), np.random.default_rng(0)
    pool = training.clips.ClipPool(40, 5, "cpu")
    near = []
    for _ in range(8):
        video, mask = training.autoencoder.vae_batch(run, pool, rng, 16, 9, whole=False)
        assert video.shape == (16, 3, 9, 16, 24) and mask.shape == (16, 1, 9, 16, 24)
        near.append(mask[:, 0, 4].flatten(1).any(1).float().mean())
    assert np.mean(near) > 0.9
    paint = pool.paint
    monkeypatch.setattr(pool, "paint", lambda *asked: (video := paint(*asked)[0], video[:, :1] > 0))
    video, mask = training.autoencoder.vae_batch(run, pool, rng, 16, 9, whole=False)
    assert torch.equal(mask, video[:, :1] > 0), "the mask is of another quarter"


@pytest.mark.parametrize("count", [9, 3], ids=["every kind", "not every kind"])
def test_held_out_clips_are_compared_as_frames_of_eight_bits(training, count):
    """An autoencoder that is 4 levels too bright in the first clip, 5 in the second ...: 20 log10(255 / 4) dB, ..."""
    said, judged, levels = [], [], itertools.count(4)
    run = SimpleNamespace(sizes=training.models.TINY, device=torch.device("cpu"), log=SimpleNamespace(say=said.append),
                          vae_autocast=lambda: torch.autocast("cpu", enabled=False),
                          judges=lambda videos, captions, of: judged.append((videos, captions)) or [])
    vae = SimpleNamespace(encode=lambda video: SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: video)),
                          decode=lambda video: SimpleNamespace(
                              sample=torch.stack([one + next(levels) / 127.5 for one in video])))
    found, shares = training.autoencoder.reconstruct(run, vae, count)
    (videos, captions), = judged
    wanted = 20 * np.log10(255 / np.arange(4, 4 + count))
    assert found == pytest.approx(wanted.mean(), abs=0.3) and shares == {}
    assert len(videos) == len(captions) == count and all(world.held_out(world.parse(caption)) for caption in captions)
    assert videos.shape[1:] == (17, 32, 48, 3)
    textures = [world.parse(caption).texture for caption in captions]
    assert (len(set(textures)) < len(world.SMALL.textures)) == (count == 3)
    told = {line.split()[3]: (int(line.split()[2]), float(line.split()[-2])) for line in said}
    assert {texture: count for texture, (count, _) in told.items()} == {t: textures.count(t) for t in textures}
    for texture, (_, decibels) in told.items():
        assert decibels == pytest.approx(np.mean([db for db, own in zip(wanted, textures) if own == texture]), abs=0.3)


def test_parts_that_are_not_there_are_not_read(training):
    """Two captions of a pair and one of a single thing, of whose second shape there is nothing to read."""
    words, absent = training.words, training.words.NO_LABEL
    labels = torch.tensor([[0, 1, 2], [1, 1, absent], [1, 0, 1]])
    guess = torch.tensor([[0, 0, 2], [1, 1, 0], [0, 0, 2]])  # of the mean; the picked tokens are always right
    logits = torch.nn.functional.one_hot(torch.stack([guess, labels.clamp_min(0)]), 3)
    done = []

    def heads(hidden, ids):
        done.append(len(ids))
        return logits[:, sum(done[:-1]):sum(done)]

    found = words.accuracy(lambda ids: [ids], heads, torch.ones(3, 4, dtype=torch.int16), labels.short(),
                           lambda: torch.autocast("cpu", enabled=False))
    np.testing.assert_allclose(found, [[2 / 3, 2 / 3, 1 / 2], [1, 1, 1]])
    first = torch.arange(800)[:, None] % 3  # more than are read at once
    many = words.accuracy(lambda ids: [ids], lambda hidden, ids: torch.stack(2 * [(ids[..., None] == torch.arange(3)).int()]),
                          first, torch.zeros(800, 1), lambda: torch.autocast("cpu", enabled=False))
    np.testing.assert_allclose(many, [[267 / 800], [267 / 800]])


def test_padding_says_nothing_to_the_heads(training):
    torch.manual_seed(0)
    heads = training.words.Heads(8, (2, 5))
    ids = torch.tensor([[4, 5, 1, 0, 0], [4, 1, 0, 0, 0]])
    hidden = torch.randn(2, 5, 8)
    found = heads(hidden, ids)
    assert found.shape == (2, 2, 2, 5) and (found[:, :, 0, 2:] < -9e3).all() and (found[:, :, 1].abs() < 9e3).all()
    torch.testing.assert_close(heads(torch.where(ids[..., None] == 0, 100.0, hidden), ids), found)
    torch.testing.assert_close(found[0, 0, 1], hidden[0, :3].mean(0) @ heads.weight[0, 1])


def test_linear_readings_find_what_the_mean_holds_and_not_what_it_does_not(training, tmp_path):
    """An encoder that counts each word: there is one texture in a caption, but no saying which of two colours is whose."""
    training.tokens.build_vocabulary(tmp_path)
    tokens = training.tokens.Tokens(tmp_path)
    counts = torch.nn.Embedding.from_pretrained(torch.eye(len(tokens)))
    encoder = torch.nn.Module()
    encoder.counts, encoder.forward = counts, lambda ids: [counts(ids)]
    found = training.words.linear_readings(encoder, tokens, captions=1500)
    assert found["pair"] == found["texture"] == 1 and found["colour 1"] < 0.5 and found["background"] < 0.6
    assert found["shape 2"] > 0.4 and found["size 2"] > 0.65 and found["motion 2"] > 0.45


@pytest.mark.parametrize("given, learns", [
    (["--init", "somewhere", "--init-parts", "vae,text_encoder,transformer"], False), (["--words-seconds", "0"], False),
    (["--init", "somewhere"], True), ([], True)], ids=str)
def test_words_are_learned_where_no_encoder_is_taken_over(training, monkeypatch, tmp_path, given, learns):
    args = training.train.arguments(["--tiny", "--text-rate", "0.1", *given])
    asked = []
    run = SimpleNamespace(args=args, state=tmp_path, log=SimpleNamespace(say=lambda text: None), word_sets=None,
                          tokenizer=None, sizes=training.models.TINY)
    monkeypatch.setattr(training.words, "word_sets", lambda *of: asked.append(of) or (_ for _ in ()).throw(KeyError))
    if learns:
        with pytest.raises(KeyError):
            training.words.train_words(run)
    else:
        training.words.train_words(run)
    assert bool(asked) == learns


def test_a_run_has_its_minutes_its_own_files_and_copies_of_its_state(training, monkeypatch, tmp_path):
    monkeypatch.setattr(training.run, "time", SimpleNamespace(time=lambda: 1000.0))
    args = training.train.arguments(["--tiny", "--minutes", "2.5", "--state", str(tmp_path), "--out", str(tmp_path / "out")])
    as_rank = lambda rank: SimpleNamespace(process_index=rank, num_processes=3, is_main_process=rank == 0, device="cpu")
    ranks = [training.run.Run(args, as_rank(rank), None) for rank in range(3)]
    assert [run.left() for run in ranks] == 3 * [150.0]
    assert [run.own("ids.npy").name for run in ranks] == ["ids.npy", "1-ids.npy", "2-ids.npy"]
    held = {"of": [torch.ones(2), {"a": torch.zeros(1), "step": 4}]}
    copy = training.run.on_cpu(held)
    held["of"][0] += 1  # the training goes on while a copy is written
    assert torch.equal(copy["of"][0], torch.ones(2)) and copy["of"][1]["step"] == 4
    for run in ranks:
        run.log.row("check", 3, 1.5, motion=0.25, all=0.125)
    assert (tmp_path / "log.csv").read_text().splitlines() == [
        "stage,step,minutes,name,value", "check,3,1.500,motion,0.25", "check,3,1.500,all,0.125"]
