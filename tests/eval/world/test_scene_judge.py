"""The scorer of the long world: right on true renders, sharp and soft, and not fooled by clips that differ in one part."""
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from lowbit_video.eval import world
from lowbit_video.eval.metrics import adherence
from lowbit_video.eval.metrics.psnr import psnr
from lowbit_video.eval.metrics.shared.context import Context
from lowbit_video.eval.world import LONG, ground_seeing, judge, measure_judge, scene_seeing

HEIGHT = 96
PARTS = (*judge.PARTS, "camera")


def as_uint8(frames):
    return np.clip(np.round(frames), 0, 255).astype(np.uint8)


def soft(frames, seed=0):
    """Worse than an autoencoder of 30 dB leaves a clip of this size: edges two pixels wide more, and some noise."""
    video = np.asarray(frames, np.float32)
    for axis in (1, 2):
        for _ in range(2):
            wide = np.concatenate([video.take([0], axis), video, video.take([-1], axis)], axis)
            size = video.shape[axis]
            video = sum(weight * wide.take(range(at, at + size), axis) for at, weight in enumerate((0.25, 0.5, 0.25)))
    return as_uint8(video + np.random.default_rng(seed).normal(0, 4, video.shape))


def sharp(frames, seed=0):
    return frames


BOTH = pytest.mark.parametrize("change", [sharp, soft], ids=["true", "soft"])


@cache
def true(caption, seed=0, height=HEIGHT):
    """`clip` of a caption, made once."""
    return clip(caption, seed, height)


@cache
def held_out(count, seed):
    """(caption, true render) of held-out captions."""
    meanings = world.draw_meanings(count, seed, True, world=LONG)
    plan, rng = world.plan(meanings, seed, height=HEIGHT, world=LONG), np.random.default_rng(seed)
    return [(world.caption_of(meaning, rng), as_uint8(world.render(plan.take([i]), HEIGHT, HEIGHT * 4 // 3)[0]))
            for i, meaning in enumerate(meanings)]


def clip(caption, seed=0, height=HEIGHT, frames=LONG.frames, **changed):
    """A true render of a caption, uint8; `changed` are arrays of its plan to be used in place of the drawn ones."""
    plan = world.plan([world.parse(caption, LONG)], seed, frames, height, LONG)
    return as_uint8(world.render(replace(plan, **changed), height, height * 4 // 3)[0])


@BOTH
def test_agrees_with_true_renders_of_held_out_captions(change):
    for caption, frames in held_out(8, 9):
        verdict = judge.score(change(frames), caption, LONG)
        assert verdict.all and verdict.parts == PARTS, (caption, str(verdict.scene))


BASE = "a red star moves right and a white ring moves down on a checkered blue background while the camera pans up"
WRONG = [
    ("colour", "a red star", "a yellow star"), ("shape", "a red star", "a red square"),
    ("shape", "white ring", "white circle"), ("motion", "moves right", "moves left"),
    ("motion", "moves down", "moves down and to the right"), ("motion", "moves right", "spins"),
    ("motion", "moves right", "enters from the left"), ("motion", "moves down", "bounces up and down"),
    ("background", "checkered", "striped"), ("background", "checkered", "cloudy"),
    ("background", "checkered blue", "plain blue"), ("background", "blue", "green"), ("camera", "pans up", "pans down"),
    ("camera", "pans up", "pans left"), ("camera", "pans up", "zooms in"), ("camera", "pans up", "stays still"),
    ("colour", " and a white", ", a black cross spins and a white"),
]


@pytest.mark.parametrize("part, old, new", WRONG, ids=[f"{part}: {new}" for part, _, new in WRONG])
def test_says_no_to_one_wrong_part(part, old, new, monkeypatch):
    assert BASE.count(old) == 1
    shown = BASE.replace(old, new)
    if "plain" in shown:
        shown = shown.replace("pans up", "stays still")
    frames = soft(true(shown, 3))
    wrong = judge.score(frames, BASE, LONG)
    monkeypatch.setattr(scene_seeing, "look", lambda frames: wrong.scene)
    right = judge.score(frames, shown, LONG)
    assert right.all, (shown, str(right.scene))
    missed = {name for name in PARTS if not getattr(wrong, name)}
    spread = {"colour": {"colour", "shape", "motion"}, "motion": {"motion"}}.get(part, {part, "camera"})
    # a thing of another colour has neither its shape nor its motion
    assert part in missed and missed <= spread, (missed, str(wrong.scene))


@pytest.mark.parametrize("texture", ["striped", "checkered", "cloudy"])
@pytest.mark.parametrize("camera", world.CAMERAS)
def test_every_camera_over_every_background_that_shows_it(camera, texture):
    meaning = world.Meaning((world.scene.Thing("red", "circle", "up-left"),), texture, "green", camera=camera)
    plan = world.plan([meaning], 5, height=HEIGHT, world=LONG)
    scene = scene_seeing.look(soft(world.render(plan, HEIGHT, 128)[0]))
    assert (scene.camera, scene.texture, scene.background) == (camera, texture, "green")
    assert [(t.colour, t.shape, t.motion) for t in scene.things] == [("red", "circle", "up-left")]


@pytest.mark.parametrize("colour", world.COLOURS)
@pytest.mark.parametrize("texture", ["plain", "shaded"])
def test_a_background_that_shows_no_camera(colour, texture):
    thing = "black" if colour in ("white", "yellow", "cyan", "pink", "orange") else "white"
    other = {"black": "blue", "white": "yellow"}[thing]
    if world.scene.contrast(thing, colour, LONG) < 100:
        thing = other
    meaning = world.Meaning((world.scene.Thing(thing, "cross", "still"),), texture, colour, camera="still")
    plan = world.plan([meaning], 2, 9, HEIGHT, LONG)
    scene = scene_seeing.look(soft(world.render(plan, HEIGHT, 128)[0]))
    assert (scene.camera, scene.texture, scene.background) == ("still", texture, colour)


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_enters_leaves_when_time_goes_back(side):
    frames = true(f"a red star enters from the {side} and a white box stays still on a blue background", 1)
    assert judge.score(frames, f"a red star enters from the {side} and a white box stays still on a blue background", LONG).all
    back = judge.score(frames[::-1], f"a red star leaves to the {side} and a white box rests on a blue background", LONG)
    assert back.all, str(back.scene)
    assert not judge.score(frames, f"a red star leaves to the {side} and a white box rests on a blue background", LONG).motion


@BOTH
@pytest.mark.parametrize("front", ["a white square", "a white ring"])
def test_what_is_covered_on_its_way_is_still_read(front, change):
    """A star goes right behind a thing that stands in the middle of its way."""
    caption = f"a red star moves right and {front} stands still on a striped blue background while the camera zooms out"
    middle, ways = HEIGHT * 2 / 3, np.linspace(-42, 42, LONG.frames)
    x, y = np.stack([middle + ways, np.full_like(ways, middle)]), np.full((2, LONG.frames), HEIGHT / 2)
    radius = np.stack([np.full_like(ways, r) for r in (14.0, 17.0)])
    frames = clip(caption, 4, x=x.astype("f4"), y=y.astype("f4"), radius=radius.astype("f4"))
    verdict = judge.score(change(frames), caption, LONG)
    assert verdict.all, str(verdict.scene)


def test_says_no_to_a_second_thing_of_the_same_colour_and_to_one_that_goes():
    caption = "a red star stands still and a white ring stands still on a cloudy blue background"
    frames = clip(caption, 8)
    twice = frames.copy()
    star = world.plan([world.parse(caption, LONG)], 8, LONG.frames, HEIGHT, LONG)
    far = (int(HEIGHT * 4 // 3 - star.x[0, 0]), int(HEIGHT - star.y[0, 0]))  # the opposite place
    twice[:, max(far[1] - 9, 0):far[1] + 9, max(far[0] - 9, 0):far[0] + 9] = world.COLOURS["red"]
    assert judge.score(frames, caption, LONG).all
    assert not judge.score(twice, caption, LONG).colour
    gone = frames.copy()
    gone[18:] = clip("a white ring stands still and a white ring stands still on a cloudy blue background", 8)[18:]
    assert not judge.score(gone, caption, LONG).colour


def test_says_no_to_noise_to_nothing_and_to_a_frozen_clip():
    shape = (LONG.frames, HEIGHT, HEIGHT * 4 // 3, 3)
    noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    for frames in (noise, np.full_like(noise, 128)):
        verdict = judge.score(frames, BASE, LONG)
        assert not any(getattr(verdict, part) for part in PARTS), str(verdict.scene)
    frozen = judge.score(np.repeat(true(BASE, 3)[24:25], LONG.frames, 0), BASE, LONG)
    assert frozen.colour and frozen.shape and frozen.background and not frozen.motion and not frozen.camera
    with pytest.raises(ValueError, match="frames are float64"):
        judge.score(noise / 255, BASE, LONG)


def test_a_clip_of_full_size_is_seen_as_its_small_one_and_soon_enough():
    import time

    small = clip(BASE, 3, 128)
    large = small.repeat(3, 1).repeat(3, 2)
    begun = time.process_time()
    scene = scene_seeing.look(large)
    assert time.process_time() - begun < 3
    assert [(t.colour, t.shape, t.motion) for t in scene.things] == [
        (t.colour, t.shape, t.motion) for t in scene_seeing.look(small).things]
    assert judge.score(large, BASE, LONG).all


@pytest.mark.parametrize("factor", [1, 2, 3, 7])
def test_a_clip_is_seen_as_the_means_of_its_blocks(factor):
    frames = np.random.default_rng(factor).integers(0, 256, (2, 22, 29, 3), np.uint8)
    height, width = 22 // factor, 29 // factor
    blocks = frames[:, : height * factor, : width * factor].reshape(2, height, factor, width, factor, 3)
    assert np.array_equal(scene_seeing._shrunk(frames, factor), blocks.mean((2, 4), dtype=np.float32).transpose(3, 0, 1, 2))


def test_the_metric_asks_for_the_world_of_its_captions():
    frames = true(BASE, 3)
    found = adherence.measure(frames, None, Context(BASE, world="scenes"))
    assert found == dict.fromkeys((*PARTS, "all"), 1.0)
    assert adherence.measure(frames, None, Context("a panda", world="scenes")) is None
    assert "camera" not in adherence.measure(frames, None, Context("a red star moves right on a plain blue background"))


@pytest.mark.parametrize("right, down, growth, camera", [
    (0, 0, 0, "still"), (9, 0, 0.08, "still"), (11, 0, 0, None), (0, 0, 0.1, None), (20, 0, 0, "pan-left"),
    (-20, 0, 0, "pan-right"), (0, 20, 0, "pan-up"), (0, -20, 0, "pan-down"), (18, 0, 0, None), (40, 20, 0, "pan-left"),
    (40, 26, 0, None), (20, 40, 0.13, "pan-up"), (20, 40, 0.15, None), (0, 0, 0.18, "zoom-in"), (0, 0, -0.18, "zoom-out"),
    (18, 0, 0.3, "zoom-in"), (20, 0, 0.3, None), (0, 0, 0.16, None)])
def test_cameras_on_either_side_of_every_limit(right, down, growth, camera):
    assert ground_seeing.name_camera(right, down, growth) == camera


NO = np.zeros(20, bool)
FIRST, LAST = np.arange(20) < 5, np.arange(20) > 14
FULL = np.ones(20)


@pytest.mark.parametrize("way, shown, left, right, name", [
    (20, np.where(FIRST, 0.3, 1), FIRST, NO, "enter-left"), (20, np.where(FIRST, 0.8, 1), FIRST, NO, None),
    (20, np.where(FIRST, 0.3, 1), NO, NO, None), (-20, np.where(FIRST, 0.3, 1), FIRST, NO, None),
    (-20, np.where(FIRST, 0.3, 1), NO, FIRST, "enter-right"), (17, np.where(FIRST, 0.3, 1), FIRST, NO, None),
    (-20, np.where(LAST, 0.3, 1), LAST, NO, "leave-left"), (20, np.where(LAST, 0.3, 1), NO, LAST, "leave-right"),
    (20, np.where(LAST, 0.3, 1), LAST, NO, None), (20, np.where(FIRST | LAST, 0.3, 1), FIRST, LAST, None),
    (20, FULL, NO, NO, None)])
def test_crossings_by_edge_share_and_way(way, shown, left, right, name):
    x = np.linspace(50, 50 + way, 10)
    assert scene_seeing.crossing(x, np.full(10, 40.0), shown, left, right) == name
    if name:
        assert scene_seeing.crossing(x, np.linspace(40, 55, 10), shown, left, right) is None
        assert scene_seeing.crossing(x, np.linspace(40, 53, 10), shown, left, right) == name


@pytest.mark.parametrize("degrees", [-225, -90, 0, 35, 225])
@pytest.mark.parametrize("period", [72, 90, 120])
def test_a_steady_turn_is_found_over_gaps(degrees, period):
    time = np.delete(np.linspace(0, 1, 49), np.r_[10:24, 40:44])
    turn = np.mod(np.deg2rad(degrees) * time + 0.7, np.deg2rad(period))
    assert np.rad2deg(scene_seeing.steady_turn(turn, time, period)) == pytest.approx(degrees, abs=3)
    wild = np.random.default_rng(0).uniform(0, np.deg2rad(period), len(time))
    assert np.rad2deg(scene_seeing.steady_turn(wild, time, period)) == pytest.approx(60)
    assert scene_seeing.steady_turn(turn, time, None) == 0


def test_the_softened_clip_is_as_far_as_it_says():
    frames = true(BASE, 3)[:9].astype(np.float32)
    made = [measure_judge.softened(frames, 0, sigma) for sigma in (0.1, 0.6)]
    assert [psnr(video, as_uint8(frames)).mean() for video in made] == pytest.approx([30, 30], abs=0.3)
    grain = [np.abs(np.diff(video.astype(int), axis=2)).mean() for video in made]
    assert grain[1] < 0.85 * grain[0]  # less of it is noise
    hard = measure_judge.softened(frames, 0, 4.0)
    assert psnr(hard, as_uint8(frames)).mean() < 25


def test_the_measurement_names_what_is_missed(monkeypatch, capsys):
    found = measure_judge.judged(2, "scenes", 9, 3, HEIGHT)
    assert found["true"] == found["soft"] == [] and found["parts"] == PARTS and len(found["seconds"]) == 2
    monkeypatch.setattr(scene_seeing, "look", lambda frames: scene_seeing.Scene((), None, None))
    found = measure_judge.judged(2, "scenes", 9, 3, HEIGHT)
    assert set(found["true"]) == set(PARTS) and "soft: missed colour, shape" in capsys.readouterr().out
