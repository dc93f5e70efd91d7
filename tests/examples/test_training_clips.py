"""The clips that the small model is trained on: which are planned, how they are encoded, and which are at hand at a step."""
import contextlib
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


def run_of(training, *more, rank=0, ranks=1, workers=None, config="long"):
    """What these functions ask of a run, at toy size."""
    args = training.train.arguments(["--config", config, "--tiny", *more])
    run = SimpleNamespace(
        args=args, rank=rank, ranks=ranks, tokenizer=Path("tokenizer"), device=torch.device("cpu"), ahead={}, writers=[],
        sizes=training.models.CONFIGURATIONS[config][True], judges=SimpleNamespace(pool=workers), said=[])
    run.log = SimpleNamespace(say=run.said.append)
    run.vae_autocast = lambda: torch.autocast("cpu", enabled=False)
    return run


def test_the_processes_and_sizes_share_the_clips_and_no_seed_serves_twice(training, monkeypatch):
    monkeypatch.setattr(training.latents, "CHUNK", 10)
    planned = training.latents.planned
    runs = [run_of(training, "--clips", "90", "--curriculum", "5/2:0.5,5:0.5", rank=rank, ranks=4) for rank in range(4)]
    tasks = {(run.rank, shrink): planned(run, shrink) for run in runs for shrink in training.latents.shrinks_of(run)}
    for rank in range(4):  # 23 of 90 small clips each, and half as many whole ones
        assert [count for _, count, *_ in tasks[rank, 2]] == [10, 10, 3]
        assert [count for _, count, *_ in tasks[rank, 1]] == [10, 1]
    seeds = [seed for own in tasks.values() for _, _, seed, *_ in own]
    assert len(set(seeds)) == len(seeds) == 4 * 5
    fresh = run_of(training, "--clips", "90", "--fresh-clips")
    monkeypatch.setattr(training.latents.time, "time", lambda: 1234567.0)
    assert planned(fresh, 1)[0][2] - planned(run_of(training, "--clips", "90"), 1)[0][2] == 34567
    monkeypatch.setattr(training.latents, "Tokens", lambda folder: lambda captions: np.zeros((len(captions), 4), np.int64))
    pool, _ = training.latents.plan_ahead(*tasks[1, 2][0])
    assert len(pool) == 10 and not any(world.held_out(meaning) for meaning in pool.meanings)


def test_more_of_what_is_hard_reaches_the_clips_that_are_trained_on(training, monkeypatch):
    """Those that are encoded first, and the fresh ones."""
    latents = training.latents
    run, spins = run_of(training, "--more-spin", "1", "--more-small", "0.5"), world.More(1.0, 0.5)
    monkeypatch.setattr(latents, "Tokens", lambda folder: lambda captions: np.zeros((len(captions), 4), np.int64))
    asked, real = [], latents.plan_ahead
    monkeypatch.setattr(latents, "plan_ahead", lambda *task: asked.append(task) or real(*task))
    assert [task[-1] for task in latents.planned(run, 1)] == [spins]
    cache = latents.Cache.__new__(latents.Cache)
    cache.run, cache.seed, cache.coming = run, 5, None
    cache._next_plan()
    assert [task[-1] for task in asked] == [spins]
    assert all(thing.motion == "spin" for meaning in cache.plan[0].meanings for thing in meaning.things)
    assert [task[-1] for task in latents.planned(run_of(training), 1)] == [None]


@pytest.mark.parametrize("of", ["shapes", "scenes"])
def test_each_clip_has_its_own_captions(training, monkeypatch, of):
    read = lambda captions: np.array([[hash(world.parse(caption, world.WORLDS[of])) % 30_011] for caption in captions])
    monkeypatch.setattr(training.latents, "Tokens", lambda folder: read)
    pool, ids = training.latents.plan_ahead(Path("tokenizer"), 30, 5, of)
    assert ids.shape == (30, training.latents.WORDINGS, 1) and ids.dtype == np.int16
    wanted = np.array([hash(meaning) % 30_011 for meaning in pool.meanings])
    np.testing.assert_array_equal(ids[..., 0], wanted[:, None].repeat(training.latents.WORDINGS, 1))
    captions = pool.captions(training.latents.WORDINGS)
    assert len(set(captions)) > len(set(captions[::training.latents.WORDINGS])), "the wordings of a clip are all one"


class Answer:
    """A worker's, who begins when asked for it."""

    def __init__(self, task, given):
        self.task, self.given = task, given

    def get(self):
        return self.task(*self.given)


class Paints:
    """A pool whose clip `i` is of the grey `i`; it keeps what it was asked for."""

    def __init__(self, count):
        self.count, self.asked = count, []

    def __len__(self):
        return self.count

    def paint(self, index, first, frames, height):
        self.asked.append((first, frames, height))
        grey = torch.as_tensor(np.asarray(index), dtype=torch.float32)[:, None, None, None, None]
        video = grey.expand(-1, 3, frames, height, height * 4 // 3)
        return video, (video[:, :1] % 2 == 1)


def as_latents(video):
    """An autoencoder's answer: `[B, 4, F, h, w]` of the greys."""
    found = video[:, :1, ::4, ::8, ::8].expand(-1, 4, -1, -1, -1)
    return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: found))


@pytest.mark.parametrize("shrink", [1, 2])
def test_clips_are_encoded_a_few_at_a_time_in_their_order(training, monkeypatch, shrink):
    run, pool = run_of(training), Paints(9)
    run.vae = SimpleNamespace(encode=as_latents, config=SimpleNamespace(scaling_factor=0.5))
    height, width = 96 // shrink, 128 // shrink
    monkeypatch.setattr(training.latents, "ENCODED", 2 * 5 * height * width + 1)
    part = np.array([3, 8, 1, 0, 7])
    latents, masks = training.latents.encode(run, pool, part, 5, shrink)
    assert latents.dtype == torch.float16 and latents.shape == (5, 2, 4, height // 8, width // 8)
    assert pool.asked == 3 * [(0, 5, height)]  # two clips at once
    assert [float(clip.unique()) for clip in latents] == (0.5 * part).tolist()
    assert masks.shape == (5, 2, 1, height // 8, width // 8)
    assert [bool(clip.all()) for clip in masks] == [bool(clip.any()) for clip in masks] == (part % 2 == 1).tolist()


@pytest.mark.parametrize("workers", [False, True], ids=["itself", "workers"])
def test_fresh_clips_fill_the_room_then_replace_the_oldest(training, monkeypatch, workers):
    """By plans of 16 clips: 4 of 10 rows are there at the start; clip `i` of plan `p` is 100 p + i."""
    run = run_of(training, "--clips", "10", "--curriculum", "3:0.5,5:0.5",
                 workers=SimpleNamespace(apply_async=lambda *task: asked.append(task) or Answer(*task)) if workers else None)
    plans, encoded, asked = [], [], []

    def plan_ahead(tokenizer, clips, seed, of, more):
        plans.append((clips, seed, of))
        numbers = 100 * len(plans) + np.arange(clips)
        pool = type("Pool", (), {"__len__": lambda self: clips, "numbers": numbers})()
        ids = np.broadcast_to(numbers[:, None, None], (clips, training.latents.WORDINGS, 64)).astype(np.int16)
        return pool, ids

    def encode(run, pool, part, frames, shrink=1):
        encoded.append((frames, shrink))
        numbers = torch.from_numpy(pool.numbers[part])[:, None, None, None, None].expand(-1, (frames - 1) // 4 + 1, 4, 2, 2)
        return numbers.half(), numbers[:, :, :1] % 2 == 1

    monkeypatch.setattr(training.latents, "plan_ahead", plan_ahead)
    monkeypatch.setattr(training.latents, "encode", encode)
    start = torch.arange(1, 5)[:, None, None, None, None].expand(-1, 5, 4, 2, 2) + 0.1 * torch.arange(5)[:, None, None, None]
    ids = torch.arange(1, 5)[:, None, None].expand(-1, training.latents.WORDINGS, 64)
    mask = torch.arange(5)[None, :, None, None, None].expand(4, 5, 1, 2, 2) < 1
    run.encoded = {1: training.latents.Encoded(start.half(), mask, ids)}
    phase = training.curriculum.Phase(3, 0.5)
    cache = training.latents.Cache(run, phase, 7, lambda ids: ids)
    torch.testing.assert_close(cache.latents[:4].float(), start[:, :3].half().float())
    assert cache.masks[:4, 0].all() and not cache.masks[:4, 1:].any()

    def add(clips):
        cache.add(clips)
        rows = cache.latents[:cache.count, 0, 0, 0, 0].long()
        assert torch.equal(cache.captions[:cache.count, 1, 3].long(), rows), "a clip has another's caption"
        assert torch.equal(cache.masks[4:cache.count, 2, 0, 0, 0], rows[4:] % 2 == 1)
        return rows.tolist()

    assert add(3) == [1, 2, 3, 4, 100, 101, 102]
    assert add(5) == [1, 2, 3, 4, 100, 101, 102, 103, 104, 105]  # two more find no room
    assert add(4) == [108, 109, 110, 111, 100, 101, 102, 103, 104, 105]
    assert add(4) == [108, 109, 110, 111, 112, 113, 114, 115, 104, 105]
    assert add(4) == [202, 203, 110, 111, 112, 113, 114, 115, 200, 201]
    for _ in range(2):
        add(5)
    assert add(5) == [212, 213, 300, 301, 302, 303, 304, 209, 210, 211]  # the two that are left of a plan are too few
    assert cache.fresh == 3 + 3 + 4 + 4 + 4 + 5 + 5 + 5 and set(encoded) == {(9, 1)}
    seeds = [seed for _, seed, _ in plans]
    assert len(asked) == workers * (len(plans) + 1), "workers plan while the clips before are encoded"
    assert len(set(seeds)) == len(seeds) and {(count, of) for count, _, of in plans} == {(16, "scenes")}


def test_time_is_up_for_encoding_when_enough_clips_are_there(training, monkeypatch, tmp_path):
    """A part of eight clips takes a second, a plan ten: of the former 3 s are asked for, and 64 clips at least."""
    now = [0.0]
    monkeypatch.setattr(training.latents, "time", SimpleNamespace(time=lambda: now[0]))
    run = run_of(training, "--clips", "96", "--latent-seconds", "3", "--curriculum", "5:1")
    run.own = lambda name: tmp_path / name
    many = np.arange(96)[:, None, None].repeat(training.latents.WORDINGS, 1).repeat(64, 2)

    def encode(run, pool, part, frames, shrink):
        now[0] += 1
        numbers = torch.from_numpy(part)[:, None, None, None, None]
        return numbers.half(), numbers % 2 == 1

    def plan():
        now[0] += 10
        return Paints(96), many

    monkeypatch.setattr(training.latents, "encode", encode)
    run.ahead = {1: [Answer(plan, ())]}
    training.latents.make_latents(run)
    for writer in run.writers:
        writer.join()
    made = run.encoded[1]
    assert made.latents.flatten().tolist() == list(range(64)) == made.ids[:, 2, 5].tolist()
    run.args.latent_seconds, now[0] = 10.0, 0.0
    for path in training.latents.files_of(run, 1):
        path.unlink()
    training.latents.make_latents(run)
    assert len(run.encoded[1].latents) == 80  # the wait for the plan is not the autoencoder's time
    again = run_of(training, "--clips", "96", "--curriculum", "5:1")
    again.own = run.own
    for writer in run.writers:
        writer.join()
    training.latents.make_latents(again)
    assert all(torch.equal(one, other) for one, other in zip(again.encoded[1], run.encoded[1]))
    again.args.fresh_clips = True
    again.ahead = {1: [Answer(plan, ())]}
    training.latents.make_latents(again)
    assert len(again.encoded[1].latents) == 96
    for writer in again.writers:
        writer.join()


def test_workers_plan_the_clips_of_every_size_that_are_not_there(training, monkeypatch, tmp_path):
    given = ["--stages", "latents,diffusion", "--curriculum", "5/2:0.5,5:0.5"]
    monkeypatch.setattr(training.train, "build_vocabulary", lambda *of: None)
    monkeypatch.setattr(training.train, "Tokens", lambda folder: range(40))
    asked = lambda run: {shrink: [answer.given for answer in answers] for shrink, answers in run.ahead.items()}

    def prepared(*more):
        run = run_of(training, *given, *more, workers=SimpleNamespace(apply_async=Answer))
        run.state, run.own, run.first = tmp_path, lambda name: tmp_path / name, True
        run.accelerator = SimpleNamespace(main_process_first=contextlib.nullcontext)
        training.train.prepare(run)
        return run

    run = prepared()
    assert asked(run) == {shrink: training.latents.planned(run, shrink) for shrink in (2, 1)}
    for path in training.latents.files_of(run, 2):
        path.touch()
    assert list(asked(prepared())) == [1]
    assert list(asked(prepared("--fresh-clips"))) == [2, 1]
