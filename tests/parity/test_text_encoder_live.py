"""The T5 encoder and tokenizer against transformers, both directions of saving and loading."""
import random

import numpy as np
import paddle
import pytest

from lowbit_video.pipelines.shared.t5 import T5EncoderModel, relative_position_buckets
from lowbit_video.pipelines.shared.t5_tokenizer import T5Tokenizer

pytest.importorskip("torch", reason="needs PyTorch")
transformers = pytest.importorskip("transformers", reason="needs transformers")
pytestmark = pytest.mark.parity

TOLERANCE = 1e-4


def make(goldens, seed, **changes):
    import torch

    rng = random.Random(seed)
    config = dict(
        vocab_size=rng.choice([40, 90]), d_model=rng.choice([16, 36]), d_kv=rng.choice([8, 20]), d_ff=rng.choice([24, 60]),
        num_layers=rng.choice([1, 3]), num_heads=rng.choice([1, 4]), relative_attention_num_buckets=rng.choice([8, 32]),
        relative_attention_max_distance=rng.choice([20, 128]),
        feed_forward_proj=rng.choice(["gated-gelu", "relu", "gated-silu", "gelu"]),
    )
    torch.manual_seed(seed)
    model = transformers.T5EncoderModel(transformers.T5Config(**config | changes))
    return goldens.randomized(model, seed), goldens.run_t5(model, seed, length=rng.choice([1, 7, 226]))


@pytest.mark.parametrize("seed", range(6))
def test_from_transformers_and_back(goldens, tmp_path, seed):
    theirs, arrays = make(goldens, seed)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = T5EncoderModel.from_pretrained(tmp_path / "theirs")
    ids, mask = paddle.to_tensor(arrays["ids"]), paddle.to_tensor(arrays["mask"])
    assert np.abs(ours(ids).numpy() - arrays["out"]).max() <= TOLERANCE
    attended = arrays["mask"].any(axis=1)  # a row without any attended token has no meaning
    assert np.abs(ours(ids, mask).numpy() - arrays["masked"])[attended].max() <= TOLERANCE

    ours.save_pretrained(tmp_path / "ours", max_shard_size=["10GB", "5KB"][seed % 2])
    back, info = transformers.T5EncoderModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    again = goldens.run_t5(back.eval(), seed, length=arrays["ids"].shape[1])
    np.testing.assert_allclose(again["out"], arrays["out"], atol=1e-5)
    wanted = dict(theirs.config.to_dict())
    for name in ("dense_act_fn", "is_gated_act", "d_ff", "layer_norm_epsilon", "is_encoder_decoder"):
        assert getattr(back.config, name) == wanted[name]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_weights_both_ways(goldens, tmp_path, dtype):
    import torch

    theirs, _ = make(goldens, 0)
    kind = getattr(torch, dtype)
    theirs = theirs.to(kind)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="6KB")
    ours = T5EncoderModel.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours", dtype=dtype)
    back = transformers.T5EncoderModel.from_pretrained(tmp_path / "ours", dtype=kind).state_dict()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(back[name].to(kind), tensor), name


@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (8, 20), (16, 100), (32, 64)])
def test_buckets(num_buckets, max_distance):
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    offsets = torch.arange(600)[None, :] - torch.arange(600)[:, None]
    want = T5Attention._relative_position_bucket(offsets, True, num_buckets, max_distance)
    np.testing.assert_array_equal(relative_position_buckets(600, num_buckets, max_distance), want.numpy())


def test_published_size_without_its_memory():
    """T5 v1.1 XXL, the text encoder of every CogVideoX, has transformers' tensors by name and shape."""
    import torch

    config = dict(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
    with torch.device("meta"):
        theirs = transformers.T5EncoderModel(transformers.T5Config(**config))
    ours = T5EncoderModel.from_config(config)
    want = {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items() if key not in ours.tied_tensors}
    linear = {f"{key}.weight" for key, layer in ours.named_sublayers() if isinstance(layer, paddle.nn.Linear)}
    got = {key: tuple(tensor.shape)[:: -1 if key in linear else 1] for key, tensor in ours.state_dict().items()}
    assert got == want
    assert sum(parameter.numel() for parameter in theirs.parameters()) / 1e9 == pytest.approx(4.76, abs=0.01)


# ----------------------------------------------------------------------------------------------------------------- tokenizer


@pytest.fixture(scope="module")
def tokenizers(goldens, tmp_path_factory):
    """Theirs from spiece.model; ours from that, and from the tokenizer.json that they save; theirs from what we save."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for name in ("published", "json"):
        (folder / name).mkdir()
    (folder / "published" / "spiece.model").write_bytes(goldens.sentencepiece_model())
    theirs = transformers.T5Tokenizer.from_pretrained(folder / "published")
    theirs.save_pretrained(folder / "json")
    (folder / "json" / "spiece.model").unlink(missing_ok=True)
    ours = {name: T5Tokenizer.from_pretrained(folder / name) for name in ("published", "json")}
    back = {}
    for name, tokenizer in ours.items():
        tokenizer.save_pretrained(folder / f"{name}_ours")
        back[name] = transformers.T5Tokenizer.from_pretrained(folder / f"{name}_ours")
    return theirs, ours, back


def test_training_the_small_tokenizer_repeats(goldens):
    assert goldens.sentencepiece_model() == (goldens.GOLDENS / "tokenizer" / "spiece.model").read_bytes()


@pytest.mark.parametrize("name", ["published", "json"])
def test_tokenizer(goldens, tokenizers, name):
    theirs, ours, back = tokenizers
    texts = goldens.tokenizer_texts(1500, seed=9)
    wrong = [text for text in texts if theirs(text).input_ids != ours[name].encode(text)]
    assert not wrong
    assert [theirs(text).input_ids for text in texts] == [back[name](text).input_ids for text in texts]
    for options in (
        dict(padding="max_length", max_length=226, truncation=True), dict(padding="max_length", max_length=3, truncation=True),
        dict(padding="longest"), dict(padding="longest", max_length=5, truncation=True, add_special_tokens=False),
    ):
        want, got = theirs(texts, return_tensors="np", **options), ours[name](texts, **options)
        np.testing.assert_array_equal(got.input_ids, want.input_ids)
        np.testing.assert_array_equal(got.attention_mask, want.attention_mask)
