"""The small model's sentencepiece vocabulary: every word of the world is one piece, other words fall apart into letters.

A unigram model in the layout of T5 (pad 0, </s> 1, <unk> 2, case folded), so that `transformers.T5Tokenizer` and bare
sentencepiece read the same `spiece.model`.
"""
from __future__ import annotations

import io
import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from lowbit_video.eval import world

MAX_TOKENS = 32  # the longest caption of the small world has 27; of the long one 50
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'-()&/\"_+*%#@$="
LETTER_SCORE = -14.0  # far below any word's, so that a known word is never spelt
SPACE = "\u2581"


def build_vocabulary(folder: str | Path, of: world.World = world.SMALL, length: int = MAX_TOKENS) -> None:
    """Write `spiece.model` and `tokenizer_config.json` for a world's captions of at most `length` pieces into `folder`."""
    rng = np.random.default_rng(0)
    captions = [world.caption_of(meaning, rng) for meaning in world.draw_meanings(4000, 0, world=of)]
    trained = io.BytesIO()  # for its header (normaliser, special pieces); its pieces are replaced below
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*captions, LETTERS]), model_writer=trained, vocab_size=400, hard_vocab_limit=False, pad_id=0,
        eos_id=1, unk_id=2, bos_id=-1, normalization_rule_name="nmt_nfkc_cf", character_coverage=1.0, num_threads=1,
        minloglevel=2, model_type="unigram")
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(trained.getvalue())
    special = [sentencepiece_model_pb2.ModelProto.SentencePiece.FromString(p.SerializeToString()) for p in model.pieces[:3]]
    del model.pieces[:]
    model.pieces.extend(special)
    starts = Counter(SPACE + word for caption in captions for word in re.findall(r"(?:^| )([a-z]+)", caption))
    inside = Counter(word for caption in captions for word in re.findall(r"-([a-z]+)", caption))  # up-left
    counts = starts + inside
    scored = {piece: math.log(n / counts.total()) for piece, n in counts.items()}
    for letter in LETTERS + SPACE:
        scored.setdefault(letter, LETTER_SCORE)
    for piece, score in sorted(scored.items(), key=lambda item: (-item[1], item[0])):
        model.pieces.add(piece=piece, score=score)
    model.trainer_spec.vocab_size = len(model.pieces)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.SerializeToString())
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "additional_special_tokens": [], "eos_token": "</s>",
              "unk_token": "<unk>", "pad_token": "<pad>", "model_max_length": length}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def length_of(folder: str | Path) -> int:
    """Tokens of a caption, as the vocabulary in `folder` says."""
    return json.loads((Path(folder) / "tokenizer_config.json").read_text())["model_max_length"]


class Tokens:
    """Captions to ids `[count, length]`, by bare sentencepiece: pieces, then </s>, then pad."""

    def __init__(self, folder: str | Path):
        self.length = length_of(folder)
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(Path(folder) / "spiece.model"))

    def __len__(self) -> int:
        return self.model.get_piece_size()

    def __call__(self, captions: list[str]) -> np.ndarray:
        ids = np.zeros((len(captions), self.length), np.int64)
        for row, pieces in zip(ids, self.model.encode(captions)):
            pieces = pieces[: self.length - 1] + [1]
            row[: len(pieces)] = pieces
        return ids
