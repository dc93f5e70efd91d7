"""The world of the long clips: its words, what a camera shows, and things that cross, cover each other, enter and leave."""
import pickle
import zlib
from dataclasses import replace

import numpy as np
import pytest

from lowbit_video.eval import world
from lowbit_video.eval.world import LONG, SMALL, crossings, grounds, scene


@pytest.fixture(scope="module")
def meanings():
    return world.draw_meanings(300, 5, world=LONG)


@pytest.fixture(scope="module")
def plan(meanings):
    return world.plan(meanings, 6, frames=25, world=LONG, height=128)


def first_frames_of(camera, texture, frames=9, seed=0):
    """The background alone, `[F, 96, 128, 3]`, and its plan."""
    meaning = world.Meaning((scene.Thing("red", "circle", "still"),), texture, "blue", camera=camera)
    plan = world.plan([meaning], seed, frames, 96, LONG)
    return world.paint_ground(plan, 96, 128)[0], plan.ground


def test_the_small_world_never_moves():
    meanings = world.draw_meanings(300, 11) + world.draw_meanings(100, 12, held=True)
    rng = np.random.default_rng(5)
    captions = [world.caption_of(meaning, rng) for meaning in meanings]
    assert zlib.crc32("\n".join(captions).encode()) == 2723701635
    assert zlib.crc32("".join("01"[world.held_out(m)] for m in meanings).encode()) == 798863701
    assert all(world.parse(caption) == meaning for caption, meaning in zip(captions, meanings))
    plan = world.plan(meanings, 7)
    frames = world.render(plan.take(range(0, 60, 6)))
    assert zlib.crc32(np.round(frames).astype(np.uint8).tobytes()) == 1394172990
    assert [zlib.crc32(np.ascontiguousarray(a).tobytes()) for a in (plan.x, plan.radius)] == [507954980, 1866289628]


def test_long_captions_are_read_back(meanings):
    rng = np.random.default_rng(0)
    for meaning in meanings + world.draw_meanings(100, 2, held=True, world=LONG):
        caption = world.caption_of(meaning, rng)
        assert world.parse(caption, LONG) == meaning and world.hint(caption, LONG) is None, caption


@pytest.mark.parametrize("caption, motions, texture, camera", [
    ("a red ball enters from the left and a blue box rests on a mottled white background", ["enter-left", "still"], "cloudy",
     "still"),
    ("while the camera tilts down, a red star exits to the right over a graded green backdrop", ["leave-right"], "shaded",
     "pan-down"),
    ("a red star moves left, a white ring spins and a black box moves from left to right, the camera moves closer",
     ["left", "spin", "right"], None, "zoom-in"),
])
def test_free_wording_of_long_captions(caption, motions, texture, camera):
    found = world.parse(caption, LONG)
    assert ([t.motion for t in found.things], found.texture, found.camera) == (motions, texture, camera)
    assert found.unknown == ()


def test_the_small_world_has_no_words_for_the_long_one():
    assert world.parse("a red circle moves left over a blue background as the camera pans left").unknown == (
        "as", "camera", "pans")
    assert "dotted" in world.parse("a red star spins on a dotted blue background", LONG).unknown
    assert "two or three shapes" in world.hint("a panda", LONG) and "zooms" in world.hint("a panda", LONG)
    assert "one or two shapes" in world.hint("a panda")


def test_every_kind_comes_as_often_as_it_should():
    many = world.draw_meanings(2000, 1, world=LONG)
    for texture, share in LONG.textures.items():
        assert abs(np.mean([m.texture == texture for m in many]) - share) < 0.04
    assert abs(np.mean([len(m.things) == 3 for m in many]) - 0.25) < 0.05
    assert all(m.camera == "still" for m in many if m.texture in ("plain", "shaded"))
    assert {m.camera for m in many} == set(scene.CAMERAS) and {t.motion for m in many for t in m.things} == set(LONG.motions)
    single = world.draw_meanings(20, 1, world=LONG, counts={1: 1.0})
    assert all(len(m.things) == 1 for m in single)
    share = np.mean([world.held_out(scene.draw_scene(np.random.default_rng(i))) for i in range(600)])
    assert 0.1 < share < 0.2 and not any(world.held_out(m) for m in many)
    for m in many[:300]:
        inside = world.scene.tones(m.background, LONG)
        for share in np.linspace(0, 1, 5):
            tone = inside[0] + share * (inside[1] - inside[0])
            assert all(np.linalg.norm(tone - np.array(world.COLOURS[t.colour])) >= scene.MIN_CONTRAST - 1e-3 for t in m.things)


def test_more_of_what_is_hard():
    things = [t for m in world.draw_meanings(1500, 1, world=LONG, more=world.More(spin=0.3, small=0.5)) for t in m.things]
    sized = [t for t in things if t.motion not in ("grow", "shrink")]
    assert abs(np.mean([t.motion == "spin" for t in things]) - (0.3 + 0.7 / len(LONG.motions))) < 0.03
    assert abs(np.mean([t.size == "small" for t in sized]) - (0.5 + 0.5 / 3)) < 0.03
    assert {t.motion for t in things} == set(LONG.motions) and {t.size for t in sized} == set(world.SIZES)
    assert not any(t.shape in scene.ROUND for t in things if t.motion == "spin")
    assert not any(t.size for t in things if t.motion in ("grow", "shrink"))
    always = world.draw_meanings(50, 1, world=LONG, more=world.More(spin=1.0))
    assert all(t.motion == "spin" for m in always for t in m.things)
    for more in ({"spin": -0.1}, {"small": 1.1}):
        with pytest.raises(ValueError, match="give a probability, 0 to 1"):
            world.More(**more)


def test_things_keep_inside_unless_they_cross_the_edge(meanings, plan):
    rows = [(row, meanings[clip].things[row - int(np.searchsorted(plan.clip, clip))].motion)
            for row, clip in enumerate(plan.clip)]
    for row, motion in rows:
        x, y, radius = plan.x[row], plan.y[row], plan.radius[row]
        assert (y >= radius).all() and (y + radius <= 128).all()
        inside = (x >= radius - 1e-3) & (x + radius <= crossings.WIDTH + 1e-3)
        outside = (x + 1.16 * radius < 0) | (x - 1.16 * radius > crossings.WIDTH)
        if motion not in scene.CROSSINGS:
            assert inside.all(), motion
            continue
        ends = (outside, inside) if motion.startswith("enter") else (outside[::-1], inside[::-1])
        assert ends[0][0] and ends[1][-1], motion
        side = x[0] if motion.startswith("enter") else x[-1]
        assert (side < 0) == motion.endswith("left") and inside.mean() > 0.4


def test_some_pass_in_front_and_none_is_hidden_for_long(meanings, plan):
    hidden, meet = [], []
    for clip in range(len(meanings)):
        paths = [np.stack([a[row] for a in (plan.x, plan.y, plan.radius, plan.angle)])
                 for row in np.flatnonzero(plan.clip == clip)]
        found = crossings.overlaps(paths)
        hidden += list(found[0])
        meet.append(found[2])
    assert np.mean(meet) > 0.4 and np.mean(np.array(hidden) > 0.2) < 0.01
    near, far = (np.array([[x], [50.0], [10.0], [0.0]]) for x in (50.0, 58.0))
    assert [list(part) if isinstance(part, np.ndarray) else part for part in crossings.overlaps([near, far])] == [
        [1, 0], [1, 1], True]


def test_a_later_thing_lies_in_front():
    things = tuple(scene.Thing(colour, "square", "still") for colour in ("red", "white"))
    plan = world.plan([world.Meaning(things, "plain", "blue", camera="still")], 0, 5, 96, LONG)
    plan = replace(plan, x=np.full_like(plan.x, 60), y=np.full_like(plan.y, 48))
    assert (world.render(plan, 96, 128)[0, :, 48, 60] == world.COLOURS["white"]).all()
    backwards = replace(plan, rgb=plan.rgb[::-1])
    assert (world.render(backwards, 96, 128)[0, :, 48, 60] == world.COLOURS["red"]).all()


@pytest.mark.parametrize("texture", ["striped", "checkered", "cloudy"])
@pytest.mark.parametrize("camera, way", [
    ("pan-left", (1, 0)), ("pan-right", (-1, 0)), ("pan-up", (0, 1)), ("pan-down", (0, -1))])
def test_a_panning_camera_moves_the_background_the_other_way(texture, camera, way):
    frames, ground = first_frames_of(camera, texture)
    # as many frames as make every step a whole number of pixels
    pixels = 96 / 128 * float(abs(ground.x[0, -1] - ground.x[0, 0]) + abs(ground.y[0, -1] - ground.y[0, 0]))
    assert grounds.PAN[0] * 0.75 - 0.1 <= pixels <= grounds.PAN[1] * 0.75 + 0.1
    whole = replace(ground, x=ground.x * round(pixels) / pixels, y=ground.y * round(pixels) / pixels)
    frames = grounds.paint_grounds(whole, 96, 128)[0]
    far = round(pixels)
    moved = np.roll(frames[0], (way[1] * far, way[0] * far), (0, 1))
    inner = (slice(far, 96 - far) if way[1] else slice(None), slice(far, 128 - far) if way[0] else slice(None))
    np.testing.assert_allclose(frames[-1][inner], moved[inner], atol=2)
    assert np.abs(frames[-1] - frames[0]).mean() > 5


@pytest.mark.parametrize("texture", ["striped", "checkered", "cloudy"])
@pytest.mark.parametrize("camera", ["zoom-in", "zoom-out"])
def test_a_zooming_camera_keeps_the_middle(texture, camera):
    frames, ground = first_frames_of(camera, texture, 9, 3)
    grows = float(ground.zoom[0, -1] / ground.zoom[0, 0])
    assert grounds.ZOOM[0] - 1e-3 < (grows if camera == "zoom-in" else 1 / grows) < grounds.ZOOM[1] + 1e-3
    small, large = (frames[0], frames[-1]) if camera == "zoom-in" else (frames[-1], frames[0])
    grows = max(grows, 1 / grows)
    y, x = np.mgrid[:96, :128]
    at = [np.round((a - (n - 1) / 2) / grows + (n - 1) / 2).astype(int) for a, n in ((y, 96), (x, 128))]
    assert np.abs(small[at[0], at[1]] - large).mean() < 0.35 * np.abs(small - large).mean()


def test_a_still_camera_shows_one_background_and_textures_blend_two_tones():
    for texture in LONG.textures:
        frames, _ = first_frames_of("still", texture)
        assert (frames == frames[0]).all()
        first, second = scene.tones("blue", LONG)
        share = (frames[0] - first) @ (second - first) / ((second - first) @ (second - first))
        np.testing.assert_allclose(frames[0], first + share[..., None] * (second - first), atol=0.1)
        assert (share.std() > 0.15) == (texture != "plain") and -1e-3 <= share.min() and share.max() <= 1.001
        assert np.ptp(share) > 0.8 or texture == "plain"


def test_worlds_are_found_by_name():
    assert world.WORLDS == {"shapes": SMALL, "scenes": LONG}
    assert all(pickle.loads(pickle.dumps(one)) is one for one in (SMALL, LONG))
    assert (LONG.frames, LONG.height, LONG.width) == (49, 384, 512) and SMALL.most_things == 2 and LONG.most_things == 3
