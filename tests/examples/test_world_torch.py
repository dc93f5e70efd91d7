"""The small model's own parts that need PyTorch: the painter, the vocabulary, the unit-spread latents."""
import sys
from pathlib import Path

import numpy as np
import pytest

from lowbit_video.eval import world

torch = pytest.importorskip("torch", reason="the training code is written in PyTorch")
FOLDER = Path(__file__).parents[2] / "examples" / "small_cogvideox"


@pytest.fixture
def small(monkeypatch):
    """The folder's modules, importable as its own scripts see them."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.torch
def test_torch_paints_what_numpy_paints(small):
    from clips import ClipPool, as_uint8

    pool = ClipPool(12, seed=3, device="cpu")
    index = [1, 5, 5, 9]
    video, mask = pool.paint(index, first=4, frames=9)
    wanted = world.render(pool.plan.take(index))[:, 4:13]
    assert video.shape == (4, 3, 9, 128, 192) and mask.shape == (4, 1, 9, 128, 192)
    np.testing.assert_allclose(as_uint8(video), wanted, atol=0.51)
    ground = world.backgrounds(pool.plan.tone[index], pool.plan.texture[index], 128, 192)[:, None]
    np.testing.assert_array_equal(mask[:, 0].numpy(), np.abs(wanted - ground).max(-1) > 8)
    assert not any(world.held_out(meaning) for meaning in pool.meanings)


@pytest.mark.torch
def test_torch_paints_the_long_world_as_numpy_does(small):
    from dataclasses import replace

    from clips import ClipPool, as_uint8

    pool = ClipPool(40, seed=3, device="cpu", of="scenes")
    index = [next(i for i, m in enumerate(pool.meanings) if m.texture == name) for name in world.LONG.textures]
    video, mask = pool.paint(index, first=20, frames=5, height=96)
    whole = world.plan(pool.meanings, 3, height=96, world=world.LONG).take(index)
    cut = {name: getattr(whole, name)[:, 20:25] for name in ("x", "y", "radius", "angle")}
    ground = replace(whole.ground, **{name: getattr(whole.ground, name)[:, 20:25] for name in ("x", "y", "zoom")})
    whole = replace(whole, ground=ground, **cut)
    wanted = world.render(whole, 96, 128)
    assert video.shape == (5, 3, 5, 96, 128) and mask.shape == (5, 1, 5, 96, 128)
    np.testing.assert_allclose(as_uint8(video), wanted, atol=0.6)
    np.testing.assert_array_equal(mask[:, 0].numpy(), np.abs(wanted - world.paint_ground(whole, 96, 128)).max(-1) > 8)


@pytest.mark.parity
@pytest.mark.parametrize("of, length", [(world.SMALL, 32), (world.LONG, 64)], ids=["small", "long"])
def test_vocabulary_reads_alike_in_transformers(small, tmp_path, of, length):
    transformers = pytest.importorskip("transformers", reason="compares with transformers' tokenizer")
    from tokens import Tokens, build_vocabulary

    build_vocabulary(tmp_path, of, length)
    ours, theirs = Tokens(tmp_path), transformers.T5Tokenizer.from_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    captions = [world.caption_of(meaning, rng) for meaning in world.draw_meanings(400, 9, world=of)]
    ids = ours(captions)
    assert (ids != 2).all() and (ids[:, -1] == 0).all(), "a caption of the world has unknown words or is too long"
    captions += ["", "A Panda plays the GUITAR, wow!", "  two  spaces ", "42 x 17"]
    wanted = theirs(captions, padding="max_length", max_length=length, truncation=True, return_tensors="np").input_ids
    np.testing.assert_array_equal(ours(captions), wanted)


@pytest.mark.parity
def test_rescaled_latents_decode_to_the_same_video(small):
    pytest.importorskip("diffusers", reason="the model is diffusers' AutoencoderKLCogVideoX")
    from models import TINY, build_vae, rescale_latents

    torch.manual_seed(0)
    vae = build_vae(TINY).eval()
    video = torch.randn(1, 3, 9, 32, 48)
    with torch.no_grad():
        before = vae.encode(video).latent_dist
        shown = vae.decode(before.mode()).sample
        std = before.mode().std((0, 2, 3, 4))
        rescale_latents(vae, std)
        after = vae.encode(video).latent_dist
        torch.testing.assert_close(after.mode().std((0, 2, 3, 4)), torch.ones_like(std))
        torch.testing.assert_close(after.std * std[:, None, None, None], before.std, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(vae.decode(after.mode()).sample, shown, rtol=1e-3, atol=1e-4)


@pytest.mark.parity
def test_words_stage_puts_meaning_into_the_encoder(small, tmp_path):
    pytest.importorskip("transformers", reason="the text encoder is transformers' T5EncoderModel")
    from contextlib import nullcontext

    import words
    from models import TINY, build_text_encoder
    from tokens import Tokens, build_vocabulary

    meaning = world.parse("a small red circle moves left over a dotted blue background")
    parts = words.Parts()
    names = dict(zip(parts.names, parts.labels(meaning)))
    assert (names["pair"], names["colour 1"], names["motion 1"], names["texture"], names["size 1"]) == (0, 0, 0, 3, 0)
    assert names["background"] == words.COLOURS.index("blue") and names["shape 2"] == words.NO_LABEL
    build_vocabulary(tmp_path)
    tokens = Tokens(tmp_path)
    ids, labels = (torch.from_numpy(part) for part in words.caption_set(tokens, 1000, 1))
    held, wanted = (torch.from_numpy(part) for part in words.caption_set(tokens, 200, 2, held=True))
    torch.manual_seed(0)
    encoder = build_text_encoder(TINY, len(tokens))
    heads, steps = words.teach(encoder, ids, labels, seconds=600, batch=32, autocast=nullcontext, lr=5e-3, most_steps=150)
    found = dict(zip(parts.names, words.accuracy(encoder, heads, held, wanted, nullcontext).T))
    assert steps == 150
    assert found["pair"][1] > 0.9 and found["texture"][1] > 0.8  # read from picked tokens; chance: 0.5, 0.25
    assert found["shape 1"][1] > 0.35  # chance: 0.17


@pytest.mark.torch
def test_every_part_of_a_long_caption_has_its_label(small):
    pytest.importorskip("transformers", reason="the text encoder is transformers' T5EncoderModel")
    pytest.importorskip("diffusers", reason="the model is made of diffusers' classes")
    import words

    parts = words.Parts(world.LONG)
    meaning = world.parse("a red circle enters from the left and a small white star spins over a cloudy blue background as the "
                          "camera zooms out", world.LONG)
    found = dict(zip(parts.names, parts.labels(meaning)))
    assert found == {
        "pair": 1, "texture": 4, "background": words.COLOURS.index("blue"), "camera": 6,
        "shape 1": 0, "colour 1": words.COLOURS.index("red"), "size 1": 1, "motion 1": world.LONG.motions.index("enter-left"),
        "shape 2": 3, "colour 2": words.COLOURS.index("white"), "size 2": 0, "motion 2": world.LONG.motions.index("spin"),
        **{f"{name} 3": words.NO_LABEL for name in ("shape", "colour", "size", "motion")}}
    assert [parts.classes[parts.names.index(name)] for name in ("pair", "texture", "camera", "motion 3")] == [3, 5, 7, 18]
