"""The tokenizer against ids written by transformers' T5Tokenizer."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from lowbit_video.pipelines.shared.config import ConfigError
from lowbit_video.pipelines.shared.t5_tokenizer import T5Tokenizer

GOLDENS = Path(__file__).resolve().parents[2] / "goldens"
KINDS = ("tokenizer", "tokenizer_json")


def load(kind):
    return T5Tokenizer.from_pretrained(GOLDENS / kind), json.loads((GOLDENS / kind / "expected.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return T5Tokenizer.from_pretrained(GOLDENS / "tokenizer")


@pytest.mark.parametrize("kind", KINDS)
def test_golden(kind):
    tokenizer, expected = load(kind)
    wrong = [text for text, ids in zip(expected["texts"], expected["ids"]) if tokenizer.encode(text) != ids]
    assert not wrong
    assert len(expected["texts"]) > 15 and max(map(len, expected["ids"])) > 150


@pytest.mark.parametrize("kind", KINDS)
def test_golden_padded_and_truncated(kind):
    tokenizer, expected = load(kind)
    got = tokenizer(expected["texts"], padding="max_length", max_length=16, truncation=True)
    np.testing.assert_array_equal(got.input_ids, expected["padded"])
    np.testing.assert_array_equal(got.attention_mask, expected["mask"])
    assert got.input_ids.dtype == np.int64


def test_end_padding_and_length(tokenizer):
    got = tokenizer(["a panda", ""], padding="longest")
    assert got.input_ids.shape == got.attention_mask.shape
    assert got.input_ids[0, -1] == 1 and list(got.input_ids[1, :2]) == [1, 0]
    assert tokenizer("a panda", max_length=226, padding="max_length").input_ids.shape == (1, 226)
    long = tokenizer("a panda " * 300, padding="max_length", max_length=226, truncation=True)
    assert long.input_ids.shape == (1, 226) and long.input_ids[0, -1] == 1 and long.attention_mask.all()
    bare = tokenizer(["a panda", "a"], add_special_tokens=False)
    assert [len(row) for row in bare.input_ids] == [len(row) for row in bare.attention_mask]
    assert 1 not in bare.input_ids[0]


def test_decode(tokenizer):
    ids = tokenizer("a panda plays the guitar.", padding="max_length", max_length=40).input_ids
    assert tokenizer.batch_decode(ids) == ["a panda plays the guitar."]


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind, tmp_path):
    tokenizer, expected = load(kind)
    tokenizer.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["spiece.model", "tokenizer_config.json"]
    again = T5Tokenizer.from_pretrained(tmp_path)
    assert len(again) == len(tokenizer)
    assert all(again.encode(text) == ids for text, ids in zip(expected["texts"], expected["ids"]))


def test_lone_surrogate_is_a_question_mark(tokenizer):
    assert tokenizer.encode("a\udc80b") == tokenizer.encode("a?b")


@pytest.mark.parametrize("kwargs, error, words", [
    (dict(text=["a", 3]), TypeError, "must be a string, got int"),
    (dict(text="a", padding="max_length"), ValueError, "need max_length"),
    (dict(text="a", truncation=True), ValueError, "need max_length"),
    (dict(text="a", padding="left"), ValueError, "'left' is not known"),
    (dict(text="a", padding="longest", max_length=0), ValueError, "at least 1"),
    (dict(text="a panda plays", padding="max_length", max_length=2), ValueError, "pass truncation=True"),
])
def test_bad_input(tokenizer, kwargs, error, words):
    with pytest.raises(error, match=words):
        tokenizer(**kwargs)


def test_bad_folders(tmp_path):
    with pytest.raises(ConfigError, match="looked for spiece.model and tokenizer.json"):
        T5Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ConfigError, match="spiece.model: not a sentencepiece model"):
        T5Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    with pytest.raises(ConfigError, match="describes a CLIPTokenizer"):
        T5Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("content, words", [
    ('{"model": {"type": "BPE", "vocab": {}}}', "BPE tokenizer; T5's is Unigram"),
    ('{"model": {"type": "Unigram", "vocab": [["a"]]}}', "not the tokenizer.json of a unigram tokenizer"),
    ('{"model": ', "not valid JSON"),
    ('{"model": {"type": "Unigram", "vocab": [["a", -1.0]]}}', "not a sentencepiece model"),
])
def test_bad_tokenizer_json(tmp_path, content, words):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=words):
        T5Tokenizer.from_pretrained(tmp_path)


def test_spiece_model_comes_first(tmp_path):
    """A folder with both is read by the published file."""
    shutil.copy(GOLDENS / "tokenizer" / "spiece.model", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert len(T5Tokenizer.from_pretrained(tmp_path)) > 150
