"""The scorer must agree with true renders and must not be fooled by wrong ones."""
from collections import Counter

import numpy as np
import pytest

from lowbit_video.eval import world
from lowbit_video.eval.world import captions, judge, painting, recognition, seeing

from helpers import clip_of

FRAMES = 17


def renders(count, seed, held=False):
    """Captioned true clips, as (caption, uint8 frames), one at a time."""
    meanings = world.draw_meanings(count, seed, held)
    plan = world.plan(meanings, seed, FRAMES)
    rng = np.random.default_rng(seed)
    for i, meaning in enumerate(meanings):
        frames = world.render(plan.take([i]))[0]
        yield world.caption_of(meaning, rng), frames


def as_uint8(frames):
    return np.clip(np.round(frames), 0, 255).astype(np.uint8)


def blurred(frames, rng):
    """What a small autoencoder does: soft edges, a tint, some noise."""
    for axis in (1, 2):
        for _ in range(2):
            frames = (np.roll(frames, 1, axis) + 2 * frames + np.roll(frames, -1, axis)) / 4
    return frames + 6 * rng.standard_normal(frames.shape, np.float32) + rng.normal(0, 6, 3)


def smeared(frames, sigma):
    """Frames `[F, H, W, 3]` under a Gaussian of `sigma` pixels, edges repeated."""
    frames = np.asarray(frames, np.float32)
    reach = int(3 * sigma) + 1
    kernel = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    for axis in (1, 2):
        size = frames.shape[axis]
        at = np.clip(np.arange(size)[:, None] + np.arange(-reach, reach + 1), 0, size - 1)
        matrix = np.zeros((size, size), np.float32)
        np.add.at(matrix, (np.arange(size)[:, None], at), np.broadcast_to(kernel / kernel.sum(), at.shape))
        frames = np.moveaxis(np.tensordot(matrix, frames, (1, axis)), 0, axis)
    return frames


def soft(frames, seed=0):
    """Blurred by 1.5 pixels, with slight noise, uint8."""
    noise = 4 * np.random.default_rng(seed).standard_normal(frames.shape, np.float32)
    return as_uint8(smeared(frames, 1.5) + noise)


def test_agrees_with_true_renders():
    """As they are, tinted and soft: a caption's clip is drawn once."""
    rng, count = np.random.default_rng(1), 50
    right = Counter()
    for caption, frames in renders(count, 40):
        for change, changed in (("true", frames), ("tinted", blurred(frames, rng)), ("soft", soft(frames))):
            verdict = judge.score(as_uint8(changed), caption)
            right.update((change, part) for part in judge.PARTS if getattr(verdict, part))
    assert all(right[change, part] >= count - 1 for change in ("true", "tinted", "soft") for part in judge.PARTS), right


def clip(caption, seed=0):
    return clip_of(caption, seed, FRAMES)


def test_every_motion_is_told_from_every_other():
    own = {motion: captions._MOTION_WORDS[motion] for motion in world.SMALL.motions}
    for motion, words in own.items():
        caption = f"a red star {words[0].format(v='moves')} on a blue background"
        frames = clip(caption)
        assert seeing.look(frames).things[0].motion == motion
        for other, other_words in own.items():
            wanted = f"a red star {other_words[0].format(v='moves')} on a blue background"
            if other != motion and other in ("left", "up-right", "still", "spin", "grow", "bounce-up-down"):
                assert not judge.score(frames, wanted).motion, (motion, other)


@pytest.mark.parametrize("said, shown, part", [
    ("a red circle moves left on a blue background", "a green circle moves left on a blue background", "colour"),
    ("a red circle moves left on a blue background", "a red square moves left on a blue background", "shape"),
    ("a red ring moves left on a blue background", "a red circle moves left on a blue background", "shape"),
    ("a red circle moves left on a blue background", "a red circle moves up-left on a blue background", "motion"),
    ("a red circle moves left on a blue background", "a red circle moves left on a green background", "background"),
    ("a red circle moves left on a blue background", "a red circle moves left on a striped blue background", "background"),
    ("a red circle moves left on a blue background",
     "a red circle moves left and a white star stands still on a blue background", "colour"),
    ("a red circle moves left and a white star stands still on a blue background",
     "a red circle moves left on a blue background", "colour"),
    ("a red circle moves left and a white star stands still on a blue background",
     "a red circle stands still and a white star moves left on a blue background", "motion"),
])
@pytest.mark.parametrize("change", [lambda f: f, soft], ids=["true", "soft"])
def test_says_no_to_one_wrong_part(said, shown, part, change):
    frames = change(clip(shown))
    verdict = judge.score(frames, said)
    assert not getattr(verdict, part), verdict.scene
    assert judge.score(frames, shown).all


@pytest.mark.parametrize("motion", ["moves left", "moves up", "moves down and to the right", "grows", "shrinks"])
def test_says_no_to_the_reverse(motion):
    caption = f"a large yellow cross {motion} over a checkered purple background".replace(
        "large ", "" if motion in ("grows", "shrinks") else "large ")
    frames = clip(caption)
    assert judge.score(frames, caption).all
    backwards = judge.score(frames[::-1], caption)
    assert not backwards.motion and backwards.colour and backwards.shape and backwards.background


def painted(background, *layers):
    """Frames of shapes that move left: each layer is (colour, shape, x at first, y, radius), as uint8 `[F, H, W, 3]`."""
    frames = np.empty((FRAMES, world.HEIGHT, world.WIDTH, 3), np.float32)
    frames[:] = world.COLOURS[background]
    y, x = np.mgrid[: world.HEIGHT, : world.WIDTH] + 0.5
    for colour, shape, left, top, radius in layers:
        for i, frame in enumerate(frames):
            name = shape if isinstance(shape, str) else shape[i % len(shape)]
            inside = 0.5 - painting.signed_distance(name, (x - left + 5 * i) / radius, (y - top) / radius) * radius
            frame += np.clip(inside, 0, 1)[..., None] * (np.array(world.COLOURS[colour]) - frame)
    return as_uint8(frames)


@pytest.mark.parametrize("change", [lambda f: f, soft], ids=["true", "soft"])
@pytest.mark.parametrize("background, extra", [
    ("blue", ("red", "circle", 150, 30, 15)),  # a second one of the same colour
    ("yellow", ("orange", "circle", 150, 30, 15)),  # of the colour that the edges have too
    ("yellow", ("orange", "circle", 150, 42, 13)),  # the same, touching
    ("yellow", ("orange", "ring", 150, 90, 45)),  # around it
], ids=["same colour", "edge colour", "touching", "around"])
def test_says_no_to_a_shape_too_many(background, extra, change):
    caption = f"a red circle moves left on a {background} background"
    circle = ("red", "circle", 150, 90, 21)
    assert judge.score(change(painted(background, circle)), caption).all
    verdict = judge.score(change(painted(background, extra, circle)), caption)
    assert not verdict.colour, verdict.scene


@pytest.mark.parametrize("change", [lambda f: f, soft], ids=["true", "soft"])
def test_says_no_to_a_shape_that_does_not_stay_the_same(change):
    frames = change(painted("blue", ("red", ("circle", "star"), 150, 64, 24)))
    verdict = judge.score(frames, "a red circle moves left on a blue background")
    assert verdict.colour and verdict.motion and verdict.scene.things[0].shape is None, verdict.scene


@pytest.mark.parametrize("background", ["blue", "yellow", "white"])
@pytest.mark.parametrize("shape", world.SHAPES)
def test_an_edge_is_no_thing_and_a_smear_has_no_shape(shape, background):
    frames = painted(background, ("red", shape, 150, 60, 24))
    for sigma in (1.5, 2.5):
        scene = seeing.look(as_uint8(smeared(frames, sigma)))
        assert [(t.colour, t.shape, t.motion) for t in scene.things] == [("red", shape, "left")], (sigma, scene)
    scene = seeing.look(as_uint8(smeared(frames, 8)))
    assert all(t.shape is None for t in scene.things), scene


def test_says_no_to_noise_and_to_nothing():
    caption = "a red circle moves left on a blue background"
    noise = np.random.default_rng(0).integers(0, 256, (FRAMES, 128, 192, 3), np.uint8)
    for frames in (noise, np.zeros_like(noise), np.full_like(noise, 128)):
        verdict = judge.score(frames, caption)
        assert not (verdict.colour or verdict.shape or verdict.motion or verdict.background), verdict.scene
    empty = np.broadcast_to(np.array(world.COLOURS["blue"], np.uint8), noise.shape)
    verdict = judge.score(empty, caption)
    assert verdict.background and not (verdict.colour or verdict.shape or verdict.motion)
    frozen = np.repeat(clip(caption)[:1], FRAMES, 0)
    assert not judge.score(frozen, caption).motion
    shuffled = clip(caption)[np.random.default_rng(0).permutation(FRAMES)]
    assert not judge.score(shuffled, caption).motion


def test_connected_areas_are_counted_per_frame():
    drawn = [["#.#.", "#.#.", "###.", "...#"], ["....", ".##.", "....", "####"], ["....", "....", "....", "...."]]
    mask = np.array([[[c == "#" for c in row] for row in frame] for frame in drawn])
    labels, sizes = seeing._areas(mask)
    assert sorted(sizes) == [1, 2, 4, 7] and ((labels >= 0) == mask).all()
    assert len(set(labels[0][mask[0]])) == 2 and labels[0, 0, 0] == labels[0, 0, 2] != labels[0, 3, 3]
    assert all(sizes[labels[labels >= 0]] == [np.sum(labels == n) for n in labels[labels >= 0]])
    assert not len(seeing._areas(mask[2:])[1])


def test_what_the_caption_leaves_open_counts_as_met():
    verdict = judge.score(clip("a red circle moves left on a blue background"), "a circle")
    assert verdict.shape and verdict.motion and verdict.background


@pytest.mark.parametrize("frames", [np.zeros((9, 64, 64, 3)), np.zeros((64, 64, 3), np.uint8), np.zeros((2, 64, 64, 3), "u1")],
                         ids=["float", "one image", "two frames"])
def test_refuses_what_is_no_video(frames):
    with pytest.raises(ValueError, match="frames are"):
        judge.score(frames, "a red circle")


@pytest.mark.parametrize("name", ["half disc", "bar"])
def test_what_is_no_shape_of_the_world_gets_no_name(name):
    frames = np.empty((9, 128, 192, 3), np.uint8)
    frames[:] = world.COLOURS["blue"]
    y, x = np.mgrid[:128, :192]
    for i, frame in enumerate(frames):
        dx, dy = x - 60 - 8 * i, y - 64
        inside = (dx**2 + dy**2 < 28**2) & (dx > 0) if name == "half disc" else (abs(dx) < 30) & (abs(dy) < 6)
        frame[inside] = world.COLOURS["red"]
    thing, = seeing.look(frames).things
    assert (thing.colour, thing.motion, thing.shape) == ("red", "right", None), thing


def red_circle(frames, *more):
    """A red circle that moves left over blue in `frames` (by number) of 17, and other layers."""
    clip = painted("blue", ("red", "circle", 150, 64, 21), *more)
    empty = painted("blue", *more)
    there = np.isin(np.arange(FRAMES), list(frames))
    return np.where(there[:, None, None, None], clip, empty)


def test_a_thing_is_there_in_four_of_five_frames():
    kept = [f for f in range(FRAMES) if f not in (3, 8, 12)]
    assert [t.colour for t in seeing.look(red_circle(kept)).things] == ["red"]  # 14 of 17
    assert seeing.look(red_circle(kept[1:])).things == ()  # 13 of 17


@pytest.mark.parametrize("share, background", [(0.40, "blue"), (0.50, None)])
def test_a_background_is_more_than_half_of_the_pixels(share, background):
    frames = painted("blue")
    noise = np.random.default_rng(0)
    spoilt = noise.random(frames.shape[:3]) < share
    frames[spoilt] = (255, 255, 255)
    assert seeing.look(frames).background == background


@pytest.mark.parametrize("count, things", [(8, 1), (9, 2)])
def test_a_second_thing_of_the_colour_is_there_in_half_of_the_frames(count, things):
    first = painted("blue", ("red", "circle", 150, 90, 21))
    both = painted("blue", ("red", "circle", 150, 90, 21), ("red", "circle", 150, 30, 15))
    frames = np.where((np.arange(FRAMES) < count)[:, None, None, None], both, first)
    assert len(seeing.look(frames).things) == things


@pytest.mark.parametrize("radius, things", [(8, 1), (12, 2)])  # a seventh and a third of the first one's area
def test_a_second_thing_of_the_colour_has_a_share_of_its_area(radius, things, monkeypatch):
    monkeypatch.setattr(seeing, "EXTRA_SHARE", 0.25)
    frames = painted("blue", ("red", "circle", 150, 90, 21), ("red", "circle", 150, 30, radius))
    assert len(seeing.look(frames).things) == things


STILL = dict(x=np.full(17, 96.0), y=np.full(17, 64.0), size=np.full(17, 20.0), turn=np.zeros(17))


def there_and_back(way):
    return np.concatenate([np.linspace(0, way, 9), np.linspace(way, 0, 9)[1:]])


@pytest.mark.parametrize("change, motion", [
    ({}, "still"),
    (dict(x=np.linspace(96, 96 + 18.5, 17)), "right"), (dict(x=np.linspace(96, 96 + 17.5, 17)), None),
    (dict(x=np.linspace(96, 96 - 18.5, 17)), "left"), (dict(y=np.linspace(64, 64 + 18.5, 17)), "down"),
    (dict(y=np.linspace(64, 64 - 18.5, 17)), "up"),
    (dict(x=np.linspace(96, 96 + 20, 17), y=np.linspace(64, 64 + 20 * np.tan(np.deg2rad(22)), 17)), "right"),
    (dict(x=np.linspace(96, 96 + 20, 17), y=np.linspace(64, 64 + 20 * np.tan(np.deg2rad(23)), 17)), "down-right"),
    (dict(size=np.linspace(20, 20 * 1.47, 17)), "grow"), (dict(size=np.linspace(20, 20 * 1.43, 17)), "still"),
    (dict(size=np.linspace(20, 20 / 1.47, 17)), "shrink"), (dict(size=np.linspace(20, 20 / 1.43, 17)), "still"),
    (dict(size=np.linspace(20, 32, 17), x=np.linspace(96, 96 + 15, 17)), "grow"),
    (dict(size=np.linspace(20, 32, 17), x=np.linspace(96, 96 + 17, 17)), None),
    (dict(x=96 + there_and_back(18.5)), "bounce-sideways"), (dict(x=96 + there_and_back(17.5)), None),
    (dict(y=64 - there_and_back(18.5)), "bounce-up-down"),
    (dict(x=96 + there_and_back(30), y=np.linspace(64, 64 + 13, 17)), "bounce-sideways"),
    (dict(x=96 + there_and_back(30), y=np.linspace(64, 64 + 15, 17)), None),
    (dict(x=96 + there_and_back(11.5)), "still"), (dict(x=96 + there_and_back(12.5)), None),
    (dict(x=np.linspace(96, 96 + 8.5, 17)), "still"), (dict(x=np.linspace(96, 96 + 9.5, 17)), None),
    (dict(turn=np.deg2rad(np.linspace(0, 82, 17))), "spin"), (dict(turn=np.deg2rad(np.linspace(0, 78, 17))), None),
    (dict(turn=np.deg2rad(np.linspace(0, 38, 17))), "still"), (dict(turn=np.deg2rad(np.linspace(0, 42, 17))), None),
    (dict(turn=np.deg2rad([*np.linspace(0, 120, 9), *np.linspace(110, 95, 8)])), "spin"),
    (dict(turn=np.deg2rad([*np.linspace(0, 120, 9), *np.linspace(110, 85, 8)])), None),
], ids=lambda value: "" if isinstance(value, dict) else str(value))
def test_motions_on_either_side_of_every_limit(change, motion):
    assert recognition.motion_of(**STILL | change) == motion
