"""The PTX that kernels write by hand, run on NumPy arrays: a register of many threads is an array."""
from __future__ import annotations

import functools
import re
import struct
from typing import Any

import ml_dtypes
import numpy as np


def run_ptx(text: str, registers: dict[str, Any]) -> None:
    """Runs a text's instructions on registers by name: float32 for floats, uint32 for bits, bool for predicates.

    A store that happens is an error: the only ones there are stand for fences, on conditions that are never true.
    """
    skipping = None
    for line, label, here, behind in _instructions(text):
        if line.rstrip(":") == skipping or label == skipping:
            skipping, here = None, behind
        op, *words = here
        if skipping is not None or not op or op.endswith(":"):
            continue
        if op.startswith("@"):
            if words[0].startswith("st."):
                assert not np.any(registers[op[1:]]), f"a fence's store happens: {line}"
            elif words[0] == "bra.uni" and op.startswith("@!"):
                skipping = words[1] if not np.any(registers[op[2:]]) else None
            else:
                raise AssertionError(f"unknown instruction {line!r}")
            continue
        registers[words[0]] = _value(op, [_read(word, registers) for word in words[1:]], words)


@functools.cache
def _instructions(text: str) -> list[tuple[str, str, list[str], list[str]]]:
    """(line, its label, its words, the words behind its label) of each."""
    words = lambda line: line.replace(",", " ").replace("{", " ").replace("}", " ").split() or [""]
    lines = [line.strip() for line in re.sub(r"\.reg[^;]*;", "", text).strip().strip("{}").split(";")]
    labels = [(line, *line.rpartition(": ")) for line in lines]
    return [(line, label, words(line), words(rest)) for line, label, _, rest in labels]


def _read(word: str, registers: dict[str, Any]) -> Any:
    if word in registers:
        return registers[word]
    if word.startswith("0f"):
        return np.float32(struct.unpack(">f", bytes.fromhex(word[2:]))[0])
    return np.array(int(word, 0), np.int64).astype(np.uint32)


def _halves(bits: Any, dtype: Any = np.float16) -> tuple[np.ndarray, np.ndarray]:
    """The low and the high half of 32-bit registers."""
    bits = np.asarray(bits, np.uint32)
    return tuple((bits >> shift & 0xFFFF).astype(np.uint16).view(dtype) for shift in (0, 16))


def _pair(low: Any, high: Any, dtype: Any) -> np.ndarray:
    """Two values of 16 bits in a 32-bit register."""
    low, high = (np.asarray(x).astype(dtype).view(np.uint16).astype(np.uint32) for x in (low, high))
    return low | high << np.uint32(16)


def _e4m3(x: Any) -> np.ndarray:
    return np.clip(np.asarray(x, np.float32), -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8).astype(np.uint32)


def _value(op: str, given: list[Any], words: list[str]) -> Any:
    if op == "mov.b32":
        low, *high = given
        return np.asarray(low, np.uint32) | np.asarray(high[0], np.uint32) << np.uint32(16) if high else low
    if op == "fma.rn.f32":
        return (np.asarray(given[0], np.float64) * given[1] + given[2]).astype(np.float32)
    if op == "mul.f32":
        return given[0] * given[1]
    if op == "ex2.approx.ftz.f32":
        return np.exp2(given[0])
    if op == "cvt.rn.satfinite.e4m3x2.f32":
        return _e4m3(given[1]) | _e4m3(given[0]) << np.uint32(8)
    if op in ("cvt.rn.f16x2.f32", "cvt.rn.bf16x2.f32"):
        return _pair(given[1], given[0], np.float16 if ".f16x2" in op else ml_dtypes.bfloat16)
    if op == "cvt.rn.relu.f16x2.f32":
        return _pair(*(np.maximum(x, np.float32(0)) for x in reversed(given)), np.float16)
    if op == "fma.rn.f16x2":
        a, b, c = (_halves(x) for x in given)
        return _pair(*(a[i].astype(np.float64) * b[i] + c[i] for i in (0, 1)), np.float16)
    if op == "prmt.b32":
        source = np.asarray(given[0], np.uint64) | np.asarray(given[1], np.uint64) << np.uint64(32)
        picked = [(source >> np.uint64(8 * int(digit, 16)) & np.uint64(255)) << np.uint64(8 * i)
                  for i, digit in enumerate(reversed(words[3][2:]))]
        return sum(picked).astype(np.uint32)
    if op == "or.b32":
        return np.bitwise_or(*(np.asarray(x).view(np.uint32) for x in given))
    if op == "vote.sync.any.pred":
        return np.any(given[0])
    if op.startswith("setp."):
        a, b, *before = given
        if op.endswith(".s32"):
            a, b = (np.asarray(x).view(np.int32) for x in (a, b))
        found = {"ne": np.not_equal, "neu": np.not_equal, "gt": np.greater, "lt": np.less,
                 "nan": lambda x, y: np.isnan(x) | np.isnan(y)}[op.split(".")[1]](a, b)
        return found | before[0] if ".or." in op else found
    raise AssertionError(f"unknown instruction {op!r}")
