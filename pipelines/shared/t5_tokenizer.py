"""The T5 tokenizer: prompts to padded token ids, by sentencepiece.

Gives the ids of transformers' T5Tokenizer: pieces, then 1 (end), then 0 (padding). Reads `spiece.model`, as published folders
have it, or the `tokenizer.json` that newer transformers write instead.
Source: transformers, models/t5/tokenization_t5.py (behaviour; own code). What differs: a literal "▁" (U+2581) followed by a
combining character may be cut elsewhere.
"""
from __future__ import annotations

import base64
import binascii
import os
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import sentencepiece

from lowbit_video.arguments import whole
from lowbit_video.files import write_whole

from .config import ConfigError, read_json, write_json

MODEL_NAME = "spiece.model"
JSON_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
PAD_ID, EOS_ID, UNK_ID = 0, 1, 2
SPECIAL_TOKENS = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
DEFAULT_EXTRA_IDS = 100
MAX_EXTRA_IDS = 100_000
# Unicode's White_Space without U+000B, which T5's normalization deletes
SPACES = dict.fromkeys(
    [9, 10, 12, 13, 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000], " "
)
# kinds of pieces in a sentencepiece model
NORMAL, UNKNOWN, CONTROL = 1, 2, 3


@dataclass
class Encoding:
    """Token ids and which of them are not padding: [B, N] int64 arrays, or lists of lists where nothing was padded."""

    input_ids: Any
    attention_mask: Any


class T5Tokenizer:
    """Turns texts into T5 token ids.

    Args:
        model: a serialized sentencepiece model.
        extra_ids: how many sentinels "<extra_id_0>" ... follow the pieces (in falling order, as T5 has them).
        config: further contents of tokenizer_config.json, kept for `save_pretrained`.
    Raises:
        ConfigError: not a sentencepiece model, or one whose special ids are not T5's.
    """

    def __init__(self, model: bytes, extra_ids: int = DEFAULT_EXTRA_IDS, config: dict[str, Any] | None = None):
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ConfigError(f"not a sentencepiece model: {error}") from None
        found = (self.pieces.pad_id(), self.pieces.eos_id(), self.pieces.unk_id())
        if found != (PAD_ID, EOS_ID, UNK_ID):
            wanted = (PAD_ID, EOS_ID, UNK_ID)
            raise ConfigError(f"the sentencepiece model has {found} for padding, end and unknown; T5's are {wanted}")
        self.extra_ids = extra_ids
        self.config = dict(config or {})
        count = self.pieces.get_piece_size()
        self.special_ids = {"<pad>": PAD_ID, "</s>": EOS_ID, "<unk>": UNK_ID}
        self.special_ids.update({f"<extra_id_{i}>": count + extra_ids - 1 - i for i in range(extra_ids)})
        self._special = re.compile("(" + "|".join(map(re.escape, self.special_ids)) + ")")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> T5Tokenizer:
        """Reads a tokenizer's folder.

        Raises:
            ConfigError: neither spiece.model nor tokenizer.json is there, one is damaged, or another class wrote them.
        """
        folder = os.fspath(folder)
        model_path, json_path, config_path = (os.path.join(folder, name) for name in (MODEL_NAME, JSON_NAME, CONFIG_NAME))
        config = read_json(config_path) if os.path.isfile(config_path) else {}
        name = config.get("tokenizer_class", "T5Tokenizer")
        if not isinstance(name, str) or name not in ("T5Tokenizer", "T5TokenizerFast"):
            raise ConfigError(f"{config_path} describes a {name}, expected a T5Tokenizer")
        if os.path.isfile(model_path):
            with open(model_path, "rb") as file:
                model = file.read()
            source = model_path
        elif os.path.isfile(json_path):
            model = _model_from_json(json_path)
            source = json_path
        else:
            raise ConfigError(f"no tokenizer in {folder}: looked for {MODEL_NAME} and {JSON_NAME}")
        try:
            extra_ids = whole("extra_ids", config.get("extra_ids", DEFAULT_EXTRA_IDS), 0, MAX_EXTRA_IDS)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{config_path}: {error}") from None
        try:
            return cls(model, extra_ids, config)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes spiece.model and tokenizer_config.json, which transformers' T5Tokenizer reads."""
        folder = os.fspath(folder)
        os.makedirs(folder, exist_ok=True)
        with write_whole(os.path.join(folder, MODEL_NAME)) as temporary:
            temporary.write_bytes(self.pieces.serialized_model_proto())
        config = {**self.config, **SPECIAL_TOKENS, "extra_ids": self.extra_ids, "tokenizer_class": "T5Tokenizer"}
        write_json(os.path.join(folder, CONFIG_NAME), config)

    def __len__(self) -> int:
        return self.pieces.get_piece_size() + self.extra_ids

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Returns the ids of one text, the end token last; special tokens in the text become their ids."""
        if not isinstance(text, str):
            raise TypeError(f"a prompt must be a string, got {type(text).__name__}")
        # T5Tokenizer splits at all of Unicode's spaces, sentencepiece at those that its model's normalization makes spaces;
        # a lone surrogate (a badly decoded byte) becomes "?"
        text = text.translate(SPACES).encode("utf-8", "replace").decode("utf-8")
        ids: list[int] = []
        for part in self._special.split(text):
            if part in self.special_ids:
                ids.append(self.special_ids[part])
            else:
                ids += self.pieces.encode(part)
        return [*ids, EOS_ID] if add_special_tokens else ids

    def __call__(
        self,
        text: str | Iterable[str],
        padding: str | bool = False,
        max_length: int | None = None,
        truncation: bool = False,
        add_special_tokens: bool = True,
    ) -> Encoding:
        """Encodes texts as a batch.

        Args:
            text: one text or several; one gives a batch of one.
            padding: "max_length", "longest" (or True), or False for lists of different lengths.
            max_length: ids to a text, the end token included; needed by padding="max_length" and by truncation.
            truncation: cut longer texts, keeping the end token.
            add_special_tokens: end each text with the end token.
        Raises:
            TypeError: a text that is no string.
            ValueError: max_length missing or below 1, or an unknown padding.
        """
        if padding not in ("max_length", "longest", True, False):
            raise ValueError(f"padding {padding!r} is not known; use 'max_length', 'longest' or False")
        if max_length is None and (padding == "max_length" or truncation):
            raise ValueError("padding='max_length' and truncation need max_length")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        texts = [text] if isinstance(text, str) else list(text)
        rows = []
        for one in texts:
            ids = self.encode(one, add_special_tokens)
            if truncation and len(ids) > max_length:
                ids = [*ids[: max_length - 1], EOS_ID] if add_special_tokens else ids[:max_length]
            rows.append(ids)
        if padding is False:
            return Encoding(rows, [[1] * len(row) for row in rows])
        longest = max(map(len, rows), default=0)
        width = max_length if padding == "max_length" else longest
        if longest > width:
            raise ValueError(f"a text has {longest} ids, max_length is {max_length}; pass truncation=True or a larger one")
        input_ids = np.full((len(rows), width), PAD_ID, dtype=np.int64)
        attention_mask = np.zeros((len(rows), width), dtype=np.int64)
        for i, row in enumerate(rows):
            input_ids[i, : len(row)] = row
            attention_mask[i, : len(row)] = 1
        return Encoding(input_ids, attention_mask)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids; padding, end tokens and sentinels are left out."""
        count = self.pieces.get_piece_size()
        return self.pieces.decode([i for i in map(int, ids) if i < count and i not in (PAD_ID, EOS_ID)])

    def batch_decode(self, rows: Iterable[Iterable[int]]) -> list[str]:
        """Returns the text of each row of ids."""
        return [self.decode(row) for row in rows]


def _model_from_json(path: str) -> bytes:
    """Makes a sentencepiece model of a tokenizer.json: the same pieces, scores and normalization.

    Raises:
        ConfigError: not the tokenizer.json of a unigram tokenizer.
    """
    content = read_json(path)
    try:
        if content["model"].get("type", "Unigram") != "Unigram":
            raise ConfigError(f"{path} holds a {content['model']['type']} tokenizer; T5's is Unigram")
        vocabulary = [(str(piece), float(score)) for piece, score in content["model"]["vocab"]]
        normalizers = content.get("normalizer") or []
        if isinstance(normalizers, dict):
            normalizers = normalizers.get("normalizers", [normalizers])
        charsmap = b""
        for normalizer in normalizers:
            if normalizer.get("type") == "Precompiled":
                charsmap = base64.b64decode(normalizer["precompiled_charsmap"] or "")
    except (KeyError, TypeError, AttributeError, ValueError, binascii.Error) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is not the tokenizer.json of a unigram tokenizer: {error!r}") from None

    kinds = {"<pad>": CONTROL, "</s>": CONTROL, "<unk>": UNKNOWN}
    model = b""
    for piece, score in vocabulary:
        if re.fullmatch(r"<extra_id_\d+>", piece):
            continue
        kind = kinds.get(piece, NORMAL)
        model += _message(1, _text(1, piece.encode()) + _float(2, score) + _integer(3, kind))
    ids = _integer(40, UNK_ID) + _integer(41, -1) + _integer(42, EOS_ID) + _integer(43, PAD_ID)
    model += _message(2, _integer(3, 1) + ids)
    # a space before the first word, no doubled spaces, and spaces as U+2581
    return model + _message(3, _text(2, charsmap) + _integer(3, 1) + _integer(4, 1) + _integer(5, 1))


# protobuf's wire format, as far as a sentencepiece model needs it


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _text(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


_message = _text
