"""Metrics that load local weights, on tiny stand-ins: CLIP, a TorchScript feature model, t2v_metrics, the world's scorer."""
import importlib.util
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from lowbit_video.eval.metrics import adherence, clip_temporal, clipsim, fvd, registry, vqa
from lowbit_video.eval.metrics.shared.clip_model import text_features
from lowbit_video.eval.metrics.shared.context import Context
from lowbit_video.eval.video import BadVideoError

RNG = np.random.default_rng(0)
VIDEO = RNG.random((3, 40, 48, 3))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A random CLIP of a few kilobytes, saved as transformers saves one."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = ["<|startoftext|>", "<|endoftext|>", *[chr(i) for i in range(97, 123)], *[f"{chr(i)}</w>" for i in range(97, 123)]]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)
    config = transformers.CLIPConfig(text_config={**small, "vocab_size": len(words), "eos_token_id": 1, "bos_token_id": 0},
                                     vision_config={**small, "image_size": 32, "patch_size": 16}, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.mark.torch
def test_clip_scores_are_cosines_of_the_models_own_embeddings(clip_folder):
    import torch
    from PIL import Image
    from transformers import CLIPModel, CLIPProcessor

    context = Context("a red ball", {"clip": str(clip_folder)})
    score, temporal = clipsim.measure(VIDEO, None, context), clip_temporal.measure(VIDEO, None, context)
    model, processor = CLIPModel.from_pretrained(clip_folder).eval(), CLIPProcessor.from_pretrained(clip_folder)
    frames = [Image.fromarray(np.rint(frame * 255).astype(np.uint8)) for frame in VIDEO]
    with torch.no_grad():
        out = model(**processor(images=frames, text=["a red ball"], return_tensors="pt"))
    assert score == pytest.approx(float((out.image_embeds @ out.text_embeds.T).mean()), abs=1e-4)
    expected = (out.image_embeds[1:] * out.image_embeds[:-1]).sum(1).mean()
    assert temporal == pytest.approx(float(expected), abs=1e-4)
    with pytest.raises(BadVideoError, match="at least 2 frames"):
        clip_temporal.measure(VIDEO[:1], None, Context("x", context.weights, {}, context.models))


@pytest.mark.torch
def test_features_come_from_the_named_torchscript(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")

    class Means(torch.nn.Module):
        def forward(self, video: torch.Tensor) -> torch.Tensor:
            return video.mean([2, 3, 4])

    torch.jit.script(Means()).save(str(tmp_path / "features.pt"))
    row = fvd.features(VIDEO, Context(weights={"fvd": str(tmp_path / "features.pt")}))
    assert np.allclose(row, 2 * VIDEO.mean((0, 1, 2)) - 1, atol=0.02)


@pytest.mark.torch
def test_a_feature_model_with_switches_gives_features_of_what_it_is_handed(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")

    class Switches(torch.nn.Module):
        def forward(self, video: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
            one, channels, frames, height, width = video.shape
            means = video.mean([0, 2, 3, 4])
            told = torch.tensor([int(rescale), int(resize), int(return_features), one, channels, frames, height, width])
            return torch.cat([told.to(means.dtype), means, video[0, 0, 0].std()[None]])

    torch.jit.script(Switches()).save(str(tmp_path / "features.pt"))
    checks = np.indices((8, 8)).sum(0) % 2  # a square that is stretched smoothly varies less than its corners
    row = fvd.features(np.broadcast_to(checks[None, ..., None], (4, 8, 8, 3)) * 1.0,
                       Context(weights={"fvd": str(tmp_path / "features.pt")}))
    assert row[:8].tolist() == [0, 0, 1, 1, 3, 4, 224, 224] and np.allclose(row[8:11], 0, atol=1e-5) and 0.3 < row[11] < 0.8


@pytest.mark.torch
def test_a_caption_that_is_longer_than_the_model_reads_is_cut(clip_folder):
    long = " ".join(["red"] * 100)
    rows = [text_features(text, Context(text, {"clip": str(clip_folder)})) for text in (long, long + " ball")]
    assert np.array_equal(*rows) and np.linalg.norm(rows[0]) == pytest.approx(1)


def test_vqa_asks_about_frames_with_the_named_folder(tmp_path, monkeypatch):
    calls = []

    class VQAScore:
        def __init__(self, model, device, cache_dir):
            calls.append((model, cache_dir))

        def __call__(self, images, texts):
            import imageio.v3 as iio

            assert texts == ["a red ball"]
            return np.array([[iio.imread(images[0]).mean() / 255]])

    pytest.importorskip("torch", reason="PyTorch is not installed")
    module = SimpleNamespace(VQAScore=VQAScore, __spec__=importlib.util.spec_from_loader("t2v_metrics", None))
    monkeypatch.setitem(sys.modules, "t2v_metrics", module)
    weights = {"vqa": f"{tmp_path}:clip-flant5-xl"}
    assert registry.metric("vqa").missing(weights) is None
    assert vqa.measure(VIDEO, None, Context("a red ball", weights)) == pytest.approx(VIDEO.mean(), abs=0.01)
    assert calls == [("clip-flant5-xl", str(tmp_path))]
    darker = np.linspace(1, 0, 29)[:, None, None, None] * np.ones((1, 8, 8, 3))
    seen = []
    monkeypatch.setattr(VQAScore, "__call__", lambda self, images, texts: seen.append(images) or np.zeros((1, 1)))
    vqa.measure(darker, None, Context("a red ball", {"vqa": str(tmp_path)}))
    assert [int(image[-8:-4]) for (image,) in seen] == [0, 4, 8, 12, 16, 20, 24, 28]  # eight, from the first to the last
    assert calls[1:] == [("clip-flant5-xxl", str(tmp_path))]


def test_adherence_speaks_of_each_part_and_of_nothing_outside_the_world():
    world = pytest.importorskip("lowbit_video.eval.world", reason="the small model's world is not here")
    [meaning] = world.draw_meanings(1, seed=3, pair_share=0.0)
    rng = np.random.default_rng(0)
    caption = world.caption_of(meaning, rng)
    frames = np.rint(world.render(world.plan([meaning], seed=3))[0]).astype(np.uint8)
    verdict = adherence.measure(frames, None, Context(caption))
    assert set(verdict) == {"colour", "shape", "motion", "background", "all"} and verdict["all"] == 1.0
    wrong = adherence.measure(255 - frames, None, Context(caption))
    assert wrong["colour"] == 0.0 and wrong["all"] == 0.0
    assert adherence.measure(frames, None, Context("waves break on a sandy beach")) is None


def test_what_is_missing_is_said_for_each():
    for name, words in (("lpips", "alex"), ("clipsim", "CLIPModel"), ("clip_temporal", "CLIPModel"), ("vqa", "clip-flant5"),
                        ("fvd", "TorchScript")):
        reason = registry.metric(name).missing({})
        assert "--weights" in reason and words in reason
    assert "no such file or folder" in registry.metric("fvd").missing({"fvd": "/no/such.pt"})
