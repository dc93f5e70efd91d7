"""Model folders with faults: every field of every JSON another kind of value, weight files cut, lengthened and lied about.

A folder is refused by an error of ours before a video is made, or it is a model: then its video has the shape asked for.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit_video.pipelines import CogVideoXPipeline, load

from golden_cases import GOLDENS
from own_errors import result_or_refusal

PARTS = {
    "model_index.json": None,
    "scheduler/scheduler_config.json": None,
    "tokenizer/tokenizer_config.json": None,
    "tokenizer/tokenizer.json": None,
    "text_encoder/config.json": None,
    "transformer/config.json": None,
    "vae/config.json": None,
}
WEIGHTS = (
    "text_encoder/model.safetensors",
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
)
JSON_VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    5,
    64,
    1e308,
    -0.5,
    0.5,
    2**31,
    2**63,
    float("nan"),
    float("inf"),
    "",
    "2",
    "silu",
    "text \0",
    [],
    [1],
    [1, 2],
    ["a"],
    [[]],
    [None] * 4,
    [2, 4, 4, 4],
    {},
    {"a": 1},
    "x" * 3000,
)
KINDS = ("pipeline_2b", "pipeline_5b", "pipeline_15")


def copied(tmp_path_factory, kind):
    folder = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(GOLDENS / kind, folder)
    (folder / "io.npz").unlink(missing_ok=True)
    return folder


def works_or_is_refused(folder):
    """The error of a folder that is refused; None for one whose pipeline makes a video."""
    pipe, error = result_or_refusal(lambda: load(folder, device="cpu"))
    if error is not None:
        return error
    assert isinstance(pipe, CogVideoXPipeline)
    call = lambda: pipe("a cat", height=64, width=64, num_frames=1, num_inference_steps=1, seed=0, progress=False)
    out, error = result_or_refusal(call)
    if error is None:
        assert out.frames.shape == (1, 1, 64, 64, 3) and np.isfinite(out.frames).all()
    return error


@pytest.mark.parametrize("part", PARTS)
@given(data=st.data())
def test_a_field_of_another_kind_is_refused_or_can_be_meant(part, data, tmp_path_factory):
    folder = copied(tmp_path_factory, data.draw(st.sampled_from(KINDS)))
    path = folder / part
    if not path.is_file():
        return
    content = json.loads(path.read_text())
    how = data.draw(st.sampled_from(("field", "field", "field", "field", "missing", "surplus", "whole", "text")))
    key = data.draw(st.sampled_from(sorted(content)))
    value = data.draw(st.sampled_from(JSON_VALUES))
    if how == "missing":
        del content[key]
    elif how == "surplus":
        content["surplus"] = value
    else:
        content[key] = value
    if how == "text":
        text = path.read_bytes()
        at = data.draw(st.integers(0, len(text)))
        path.write_bytes(
            data.draw(
                st.sampled_from(
                    (
                        text[:at],
                        text[:at] + b"\xff\xfe" + text[at:],
                        b"\xef\xbb\xbf" + text,
                        b"[" * 100000,
                        b"",
                        text.decode().encode("utf-16"),
                        b'{"a": ' + b"9" * 5000 + b"}",
                    )
                )
            )
        )
    else:
        path.write_text(json.dumps(value if how == "whole" else content))
    try:
        works_or_is_refused(folder)
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("part", WEIGHTS)
@given(data=st.data())
def test_weights_with_faults_are_refused(part, data, tmp_path_factory):
    folder = copied(tmp_path_factory, "pipeline_2b")
    path = folder / part
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    names = sorted(name for name in header if name != "__metadata__")
    name = data.draw(st.sampled_from(names))
    how = data.draw(
        st.sampled_from(
            (
                "cut",
                "longer",
                "length",
                "header",
                "missing",
                "surplus",
                "dtype",
                "shape",
                "offsets",
                "field",
                "twice",
                "nan",
                "overlap",
                "gone",
                "folder",
                "pointer",
            )
        )
    )
    entry = header[name]
    may_work = how == "longer"
    if how == "missing":
        del header[name]
    elif how == "surplus":
        header["surplus.weight"] = dict(entry)
    elif how == "dtype":
        was, entry["dtype"] = entry["dtype"], data.draw(
            st.sampled_from(("F64", "F32", "BF16", "I8", "F8_E4M3", "f16", "", None, 3, ["F16"], {"F16": 1}))
        )
        may_work = {was, str(entry["dtype"])} <= {"F16", "BF16"} or was == entry["dtype"]  # as wide: no reader could tell
    elif how == "shape":
        shape = entry["shape"]
        entry["shape"] = data.draw(
            st.sampled_from(
                (
                    shape[::-1],
                    shape + [1],
                    [1] + shape,
                    [-n for n in shape],
                    [float(n) for n in shape],
                    [str(n) for n in shape],
                    [],
                    None,
                    "shape",
                    [2**62, 4],
                    [0],
                    [True] * len(shape),
                    [[n] for n in shape],
                )
            )
        )
        may_work = entry["shape"] == shape
    elif how == "offsets":
        begin, end = entry["data_offsets"]
        entry["data_offsets"] = data.draw(
            st.sampled_from(
                (
                    [begin + 2, end + 2],
                    [end, begin],
                    [-4, end - begin - 4],
                    [begin],
                    [begin, end, end],
                    None,
                    "ab",
                    [begin + 0.5, end + 0.5],
                    [str(begin), str(end)],
                    [2**70, 2**70 + end - begin],
                    {},
                )
            )
        )
    elif how == "field":
        header[name] = data.draw(st.sampled_from((None, 3, "x", [], {}, {"dtype": "F16"}, [1, 2])))
    elif how == "overlap":
        other = header[data.draw(st.sampled_from(names))]
        entry["data_offsets"] = [
            other["data_offsets"][0],
            other["data_offsets"][0] + entry["data_offsets"][1] - entry["data_offsets"][0],
        ]
        may_work = True
    elif how == "nan":
        body, may_work = b"\xff" * len(body), True
    text = json.dumps(header).encode()
    if how == "header":
        at = data.draw(st.integers(0, len(text) - 1))
        text = data.draw(
            st.sampled_from(
                (
                    text[:at],
                    text[:at] + b"\xff" + text[at + 1 :],
                    b"[" * 50000,
                    b"[]",
                    b"3",
                    b"",
                    b"null",
                    b'{"a": ' + b"9" * 5000 + b"}",
                )
            )
        )
    if how == "twice":
        text = text[:-1] + b"," + json.dumps({name: entry})[1:].encode()
        may_work = True
    claimed = data.draw(st.sampled_from((0, 7, length - 1, length + 1, 2**40, 2**64 - 1))) if how == "length" else len(text)
    made = claimed.to_bytes(8, "little") + text + body
    made = made[: data.draw(st.integers(0, len(made) - 1))] if how == "cut" else made + b"\0" * 100 if how == "longer" else made
    if how in ("gone", "folder"):
        path.unlink()
        if how == "folder":
            path.mkdir()
    else:
        path.write_bytes(b"version https://git-lfs" if how == "pointer" else made)
    try:
        error = works_or_is_refused(folder)
        assert error is not None or may_work, f"{how} was taken"
    finally:
        shutil.rmtree(folder)
