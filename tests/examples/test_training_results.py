"""What a training ends with: videos of held-out captions, the settings that are chosen by them, and a folder to carry."""
import io
import json
import tarfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from lowbit_video.eval import world
from lowbit_video.eval.world import judge

torch = pytest.importorskip("torch", reason="the training code is written in PyTorch")
pytest.importorskip("diffusers", reason="the model is made of diffusers' classes")
pytest.importorskip("transformers", reason="the text encoder is transformers' T5EncoderModel")
pytest.importorskip("accelerate", reason="the training loop is accelerate's")
pytestmark = pytest.mark.torch


def verdict_of(caption, **parts):
    """What the scorer would say: every part as asked but for those given."""
    meaning = world.parse(caption)
    return judge.Adherence(**{**dict(colour=True, shape=True, motion=True, background=True), **parts},
                           scene=judge.Scene(meaning.things, meaning.texture, meaning.background), meaning=meaning)


def test_the_quick_sampler_makes_what_diffusers_pipeline_makes(training, folder):
    sampling, models = training.sampling, training.models
    pipe = models.load_pipeline(folder, "cpu")
    pipe.vae.config.scaling_factor = 0.7
    pipe.vae_scaling_factor_image = 0.7
    captions = sampling.held_out_captions(3, 5)
    assert all(world.held_out(world.parse(caption)) for caption in captions)
    noise = sampling.noise_of(3, models.TINY.latent_shape, 1)
    plain = lambda: torch.autocast("cpu", enabled=False)
    generation = {**models.generation_defaults(models.TINY), "guidance_scale": 3.0, "num_inference_steps": 2}
    wanted = sampling.sample_with_pipeline(pipe, captions, noise, generation, batch=2)
    ids = torch.from_numpy(models.Tokens(folder / "tokenizer")(captions))
    found = sampling.sample_quickly(pipe.text_encoder, pipe.transformer, pipe.vae, models.build_scheduler(models.TINY), ids,
                                    noise, 3.0, 2, plain, plain)
    assert wanted.shape == found.shape == (3, 17, 32, 48, 3) and wanted.std() > 5
    assert np.abs(wanted.astype(int) - found).max() <= 1
    other = sampling.sample_with_pipeline(pipe, captions, noise, {**generation, "guidance_scale": 6.0}, batch=2)
    assert np.abs(wanted.astype(int) - other).max() > 1


def test_every_process_makes_its_share_and_the_first_has_all_in_order(training, monkeypatch):
    """Three processes, seven captions, two at once: a video is the number that its noise holds."""
    monkeypatch.setattr(training.evaluation, "BATCH", 2)
    sampled, gathered = [], []

    def sample(pipe, captions, noise, generation, batch):
        sampled.append([(caption, int(value)) for caption, value in zip(captions, noise)])
        return np.stack([np.full((2, 2), int(value)) for value in noise])

    def gather(found):
        assert all((video is None) == (i >= 4) for i, _, video in found), "what nobody looks at travels"
        gathered.extend(found)
        return list(gathered) if len(gathered) == 7 else []

    monkeypatch.setattr(training.evaluation, "sample_with_pipeline", sample)
    monkeypatch.setattr(training.evaluation, "gather_object", gather)
    captions = [f"caption {i}" for i in range(7)]
    for rank in (2, 1, 0):
        run = SimpleNamespace(rank=rank, ranks=3, sizes=training.models.TINY,
                              judges=lambda videos, captions, of: [(int(v[0, 0]), c) for v, c in zip(videos, captions)])
        verdicts, videos = training.evaluation.sample_and_judge(run, None, captions, torch.arange(7), {}, kept=4)
    assert verdicts == list(enumerate(captions))
    assert videos[:, 0, 0].tolist() == [0, 1, 2, 3]
    assert sorted(sum(sampled, [])) == [(f"caption {i}", i) for i in range(7)]
    assert [len(few) for few in sampled] == [2, 2, 2, 1]


@pytest.mark.parametrize("met, best", [
    ({(2, 3.0): "colour shape motion", (4, 2.0): "colour shape"}, (2, 3.0)),  # the most parts
    ({(4, 3.0): "colour shape", (2, 3.0): "motion"}, (4, 3.0)),
    ({(4, 2.0): "colour", (2, 3.0): "motion"}, (2, 3.0)),  # of equals the fewest steps, then the least guidance
    ({(2, 3.0): "colour", (2, 2.0): "motion"}, (2, 2.0)),
    ({(4, 2.0): "colour shape motion background", (2, 2.0): "colour shape motion"}, (4, 2.0))])
def test_steps_and_guidance_are_chosen_by_the_parts_that_are_met(training, monkeypatch, tmp_path, folder, met, best):
    evaluation, said, asked = training.evaluation, [], []
    args = training.train.arguments(["--guidance", "2", "3", "--sampling-steps", "4", "2", "--sweep-captions", "2",
                                     "--test-captions", "3"])
    run = SimpleNamespace(args=args, state=folder.parent, out=tmp_path, sizes=training.models.TINY, first=True, ranks=2,
                          device=torch.device("cpu"), log=SimpleNamespace(say=said.append))

    def sample_and_judge(run, pipe, captions, noise, generation, kept=0):
        chosen = generation["num_inference_steps"], generation["guidance_scale"]
        asked.append((chosen, captions, noise))
        parts = met.get(chosen, "").split()
        own = [verdict_of(caption, **{part: part in parts for part in judge.PARTS}) for caption in captions]
        return own, np.zeros((min(kept, len(captions)), 5, 8, 8, 3), np.uint8)

    monkeypatch.setattr(evaluation, "sample_and_judge", sample_and_judge)
    monkeypatch.setattr(evaluation, "reconstruct", lambda run, vae, count: (30.0, {}))
    evaluation.evaluate(run)
    assert [chosen for chosen, *_ in asked] == [(4, 2.0), (4, 3.0), (2, 2.0), (2, 3.0), best]
    *sweep, (_, captions, noise) = asked
    assert all(one == sweep[0][1] and torch.equal(start, sweep[0][2]) for _, one, start in sweep)
    assert len(captions) == len(noise) == 3 and len(sweep[0][1]) == len(sweep[0][2]) == 2
    assert not set(captions) & set(sweep[0][1]) and not torch.equal(noise[:2], sweep[0][2])
    record, stored = (json.loads(path.read_text()) for path in (tmp_path / "evaluation.json", folder / "generation.json"))
    for settings in (record["generation"], stored):
        assert (settings["num_inference_steps"], settings["guidance_scale"]) == best
    assert stored["num_frames"] == 17
    for found in record["sweep"]:
        parts = met.get((found["num_inference_steps"], found["guidance_scale"]), "").split()
        assert [found[part] for part in judge.PARTS] == [float(part in parts) for part in judge.PARTS]
    missed = [part for part in judge.PARTS if part not in met[best].split()]
    assert [(one["caption"], one["parts"]) for one in record["missed"]] == ([(c, missed) for c in captions] if missed else [])


def test_what_was_measured_is_written_before_the_pictures_are_drawn(training, monkeypatch, tmp_path, folder):
    """A run that is cut off while it draws has its figures and its guidance."""
    evaluation = training.evaluation
    args = training.train.arguments(["--guidance", "7", "--test-captions", "3"])
    run = SimpleNamespace(args=args, state=folder.parent, out=tmp_path, sizes=training.models.TINY, first=True, ranks=2,
                          device=torch.device("cpu"), log=SimpleNamespace(say=lambda text: None))

    def cut_off(*asked, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "sample_and_judge", lambda run, pipe, captions, *more, **named: (
        [verdict_of(caption) for caption in captions], np.zeros((3, 5, 8, 8, 3), np.uint8)))
    monkeypatch.setattr(evaluation, "reconstruct", lambda run, vae, count: (30.0, {}))
    for picture in ("contact_sheet", "save_gif"):
        monkeypatch.setattr(evaluation, picture, cut_off)
    with pytest.raises(KeyboardInterrupt):
        evaluation.evaluate(run)
    assert json.loads((tmp_path / "evaluation.json").read_text())["adherence"]["all"] == 1
    assert json.loads((folder / "generation.json").read_text())["guidance_scale"] == 7


def test_the_contact_sheet_says_all_that_was_asked_and_seen(training, monkeypatch, tmp_path):
    from PIL import Image, ImageDraw

    written = []
    write = lambda draw, at, text, **look: written.append((at, text, look))
    monkeypatch.setattr(ImageDraw.ImageDraw, "multiline_text", write)
    captions = ["a clip of a little pink circle travels diagonally down-left, a purple plus sign moves downwards while an "
                "orange box bounces left and right on a striped cyan background while the camera pulls back", "a red circle"]
    verdicts = [SimpleNamespace(parts=("colour", "shape", "motion"), colour=True, shape=right, motion=right,
                                scene="thing " * 40) for right in (False, True)]
    videos = np.zeros((2, 5, 32, 48, 3), np.uint8)
    videos[1, 2] = 200
    training.sampling.contact_sheet(videos, captions, verdicts, tmp_path / "sheet.png", columns=3)
    verdicts_in_words = (("missed: shape, motion", "red"), ("as asked", "black"))
    for (_, text, look), caption, (ends, colour) in zip(written, captions, verdicts_in_words, strict=True):
        assert " ".join(text.split()) == f"{caption} seen: {' '.join(['thing'] * 40)} {ends}" and look["fill"] == colour
        assert max(map(len, text.splitlines())) <= 88 and text.splitlines()[-1] == ends
    picture = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert picture.shape == (2 * (16 + 2), 3 * (24 + 2) + 560, 3)
    assert (picture[:16, :24] == 0).all() and (picture[18:34, 26:50] == 200).all() and (picture[18:34, 52:76] == 0).all()
    assert [at for at, *_ in written] == [(3 * 26 + 4, 2), (3 * 26 + 4, 20)]


def test_shares_and_colours_are_counted_as_they_are(training):
    shares, pairs = training.sampling.shares, training.sampling.colour_pairs
    caption = "a red circle moves left over a blue background"
    right = verdict_of(caption)
    thing = right.meaning.things[0]
    seen = lambda colour, ground: replace(
        right, scene=SimpleNamespace(things=[replace(thing, colour=colour)], background=ground))
    verdicts = [seen("red", "blue"), seen("blue", "red"), seen("red", "green"), seen("red", "blue"),
                replace(right, scene=SimpleNamespace(things=[], background="blue"))]
    assert pairs(verdicts) == {"right": 2, "exchanged": 1, "other": 2}
    assert shares([right, replace(right, shape=False), replace(right, shape=False, motion=False), right]) == {
        "colour": 1.0, "shape": 0.5, "motion": 0.75, "background": 1.0, "all": 0.5}
    assert shares([]) == {}


def test_a_packed_model_is_whole_and_nothing_of_an_earlier_one_stays(training, tmp_path, monkeypatch):
    outputs = training.outputs
    assert outputs.PART_BYTES < 16e6
    monkeypatch.setattr(outputs, "PART_BYTES", 3000)
    run = SimpleNamespace(state=tmp_path / "state", out=tmp_path / "out", log=SimpleNamespace(say=lambda text: None))
    (run.state / "model").mkdir(parents=True)
    run.out.mkdir()
    for size in (40_001, 10_001):
        content = np.random.default_rng(size).bytes(size)
        (run.state / "model" / "weights").write_bytes(content)
        outputs.pack_model(run)
        parts = sorted(run.out.glob("model.tar.*"))
        assert max(part.stat().st_size for part in parts) == 3000
        assert sum(part.stat().st_size for part in parts) == (run.state / "model.tar").stat().st_size
        with tarfile.open(fileobj=io.BytesIO(b"".join(part.read_bytes() for part in parts))) as archive:
            assert archive.extractfile("model/weights").read() == content
    (run.out / "evaluation.json").write_text("{}")
    outputs.pack(run)
    with tarfile.open(run.out / "results.tar") as archive:
        assert archive.getnames() == ["evaluation.json"]
    assert not (run.out / "evaluation.json").exists()
