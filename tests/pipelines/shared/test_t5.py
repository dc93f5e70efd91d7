"""The T5 encoder against goldens written by transformers."""
import json
from pathlib import Path

import numpy as np
import paddle
import pytest

from lowbit_video.pipelines.shared.config import ConfigError
from lowbit_video.pipelines.shared.t5 import T5EncoderModel, relative_position_buckets
from lowbit_video.pipelines.shared.weights import read_header

GOLDENS = Path(__file__).resolve().parents[2] / "goldens"
KINDS = ("t5_gated", "t5_relu")
TOLERANCE = 1e-4
TINY = dict(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("kind", KINDS)
def test_golden(kind, masked):
    model = T5EncoderModel.from_pretrained(GOLDENS / kind)
    arrays = np.load(GOLDENS / kind / "io.npz")
    mask = paddle.to_tensor(arrays["mask"]) if masked else None
    out = model(paddle.to_tensor(arrays["ids"]), mask).numpy()
    want = arrays["masked" if masked else "out"]
    assert out.shape == want.shape and np.abs(want).max() > 0.5
    assert np.abs(out - want).max() <= TOLERANCE


def test_the_mask_hides_and_its_absence_does_not():
    arrays = np.load(GOLDENS / "t5_gated" / "io.npz")
    assert np.abs(arrays["out"][1] - arrays["masked"][1]).max() > 100 * TOLERANCE
    model = T5EncoderModel.from_pretrained(GOLDENS / "t5_gated")
    ids = arrays["ids"].copy()
    hidden = arrays["mask"] == 0
    ids[hidden] = (ids[hidden] + 1) % 64
    out = model(paddle.to_tensor(ids), paddle.to_tensor(arrays["mask"])).numpy()
    np.testing.assert_allclose(out[~hidden], arrays["masked"][~hidden], atol=TOLERANCE)


def test_compiled():
    model = T5EncoderModel.from_pretrained(GOLDENS / "t5_gated")
    arrays = np.load(GOLDENS / "t5_gated" / "io.npz")
    with paddle.no_grad():
        out = paddle.jit.to_static(model.forward, full_graph=True)(paddle.to_tensor(arrays["ids"])).numpy()
    assert np.abs(out - arrays["out"]).max() <= TOLERANCE


def test_buckets():
    """Single positions near by, logarithmic steps further out, keys ahead in the upper half."""
    buckets = relative_position_buckets(200, 32, 128)
    np.testing.assert_array_equal(buckets[0, :9], [0, 17, 18, 19, 20, 21, 22, 23, 24])
    np.testing.assert_array_equal(buckets[:9, 0], [0, 1, 2, 3, 4, 5, 6, 7, 8])
    assert buckets[0, 127] == buckets[0, 199] == 31 and buckets[199, 0] == 15
    assert buckets[0, 15] == 25 and buckets[0, 16] == 26  # log2: 16 is exactly two of eight steps


def test_round_trip_as_transformers_names_things(tmp_path):
    model = T5EncoderModel.from_pretrained(GOLDENS / "t5_gated")
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    want = read_header(GOLDENS / "t5_gated" / "model.safetensors")
    got = read_header(tmp_path / "model.safetensors")
    assert {name: entry.shape for name, entry in got.items()} == {name: entry.shape for name, entry in want.items()}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "t5" and config["architectures"] == ["T5EncoderModel"] and config["is_gated_act"]
    again = T5EncoderModel.from_pretrained(tmp_path)
    ids = paddle.to_tensor([[3, 1, 4, 1, 5]])
    np.testing.assert_array_equal(again(ids).numpy(), model(ids).numpy())


def test_other_names_of_the_same_embedding_and_a_decoder_to_ignore(tmp_path):
    """Published folders name the embedding once or twice, and whole T5 models have a decoder."""
    from safetensors.numpy import load_file, save_file

    folder = GOLDENS / "t5_relu"
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["T5ForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    tensors["decoder.final_layer_norm.weight"] = np.ones(24, np.float32)
    tensors["lm_head.weight"] = np.ones((64, 24), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    ids = paddle.to_tensor([[3, 1, 4]])
    out = T5EncoderModel.from_pretrained(tmp_path)(ids)
    np.testing.assert_array_equal(out.numpy(), T5EncoderModel.from_pretrained(folder)(ids).numpy())


def test_published_config_is_read(tmp_path):
    """The keys of the XXL encoder's config.json in published CogVideoX folders."""
    published = dict(
        _name_or_path="google/t5-v1_1-xxl", architectures=["T5EncoderModel"], classifier_dropout=0.0,
        decoder_start_token_id=0, dense_act_fn="gelu_new", dropout_rate=0.1, eos_token_id=1, feed_forward_proj="gated-gelu",
        initializer_factor=1.0, is_encoder_decoder=True, is_gated_act=True, layer_norm_epsilon=1e-06, model_type="t5",
        num_decoder_layers=24, output_past=True, pad_token_id=0, relative_attention_max_distance=128,
        relative_attention_num_buckets=32, tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.42.3",
        use_cache=True, **TINY,
    )
    T5EncoderModel(**{**TINY, "feed_forward_proj": "gated-gelu"}).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(published))
    model = T5EncoderModel.from_pretrained(tmp_path)
    assert model.config.d_model == 8 and model.config.feed_forward_proj == "gated-gelu"
    (tmp_path / "config.json").write_text(json.dumps(published | {"is_quantum": True}))
    with pytest.raises(ConfigError, match="does not know: is_quantum"):
        T5EncoderModel.from_pretrained(tmp_path)


def test_unknown_activation():
    with pytest.raises(ValueError, match="'gated-tanh' is not supported; use one of relu"):
        T5EncoderModel(**TINY, feed_forward_proj="gated-tanh")
