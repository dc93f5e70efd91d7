"""The command line: random words end in a result, in usage, or in one line of ours; never in a traceback."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit_video.app import cli
from lowbit_video.app.job import Job, job_of

from own_errors import why_not_own

WORDS = (
    "",
    "-1",
    "0",
    "1",
    "2",
    "3",
    "7",
    "8",
    "64",
    "65",
    "1e9",
    "1e400",
    "nan",
    "inf",
    "-inf",
    "0.5",
    "12345678901234567890",
    "9" * 5000,
    "no",
    "auto",
    "CogVideoX-2b",
    "THUDM/CogVideoX-5b",
    "cogvideox-1.5-5B",
    "nvlink",
    "pcie4",
    "ib400",
    "int8+fp8",
    "int8+fp16",
    "exact",
    "int4",
    "paddle",
    "torch",
    "16bit",
    "int8",
    "codes",
    "float16",
    "float64",
    "--",
    "-",
    "--help=1",
    "=",
    "a=b",
    "*=exact",
    ",",
    ",,",
    "1,2",
    "0,1,x",
    "1,2,3,4",
    "1,2,3,64;x",
    "sweep",
    "models",
    "a\0b",
    "/",
    "/proc",
    "/dev/null",
    "/no/such/file",
    "x" * 300,
    "²",
    "٣",
    "1_0",
    " 4 ",
    "0x10",
    "lpips=/no",
    "psnr",
    "psnr,ssim",
    "cpu",
    "gpu:99",
    "triton",
    "hopper",
    "reference",
    "nccl",
)
COMMANDS = {
    ("plan",): (
        "--model",
        "--gpus",
        "--link",
        "--precision",
        "--exchange",
        "--output",
        "--framework",
        "--steps",
        "--frames",
        "--height",
        "--width",
        "--no-text-encoder",
        "--measured",
    ),
    ("kernels",): ("--markdown", "--json", "--check"),
    ("doctor",): ("--json", "--model"),
    ("eval", "metrics"): ("--weights",),
    ("eval", "report"): ("--to", "--layers", "--speed", "--speed-shape", "--no-films"),
    ("bench", "kernels"): ("--variants", "--quick", "--shapes", "--framework", "--dtype", "--budget-ms", "--jobs", "--name"),
    ("bench", "tune"): ("--variants", "--shapes", "--framework", "--dtype", "--jobs", "--no-lengths", "--lengths-only"),
}
"""Commands that end at once on a machine without a GPU, and their options."""


def ends(argv):
    """(exit status, error): a result, argparse's usage, or an error of this project or of the system that names a file."""
    try:
        return cli._run(list(argv), argv[0]) or 0, None
    except SystemExit as end:
        assert end.code in (0, 2), end
        return end.code, None
    except OSError as error:
        return 2, error
    except Exception as error:
        reason = why_not_own(error)
        assert reason is None or isinstance(error, ImportError), reason
        return 2, error


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@given(data=st.data())
def test_odd_words_end_in_a_result_or_in_a_line_of_ours(command, data, tmp_path_factory, capsys):
    word = st.sampled_from(WORDS)
    pairs = data.draw(st.lists(st.tuples(st.sampled_from(COMMANDS[command]), st.lists(word, max_size=2)), max_size=3))
    argv = [*command, *data.draw(st.lists(word, max_size=1) if command == ("eval", "report") else st.just([]))]
    for option, words in pairs:
        joined = len(words) == 1 and data.draw(st.booleans())
        argv += [f"{option}={words[0]}"] if joined else [option, *words]
    if command[0] == "bench":
        argv += ["--out", str(tmp_path_factory.mktemp("bench") / "out.json")]
    status, error = ends(argv)
    shown = capsys.readouterr()
    if status == 2 and error is None:
        assert "usage: lowbit-video" in shown.err
    if status == 0 and command == ("plan",) and "--help" not in " ".join(argv):
        figures = re.findall(r"\d+\.\d+", shown.out)
        assert "tokens" in shown.out and figures and "nan" not in shown.out and " inf" not in shown.out


JOB_WORDS = (*WORDS, "\udcff")
SETTINGS = [f"--{name.replace('_', '-')}" for name in Job.__dataclass_fields__]


@given(data=st.data())
def test_odd_words_make_a_job_that_can_be_meant_or_are_refused(data, capsys):
    argv = ["generate"]
    for option in data.draw(st.lists(st.sampled_from(SETTINGS), max_size=4)):
        argv += [f"{option}={data.draw(st.sampled_from(JOB_WORDS))}"] if option not in ("--compile", "--compare") else [option]
    try:
        args = cli.build_parser("generate").parse_args(argv)
    except SystemExit as end:
        assert end.code in (0, 2) and "usage: lowbit-video" in "".join(capsys.readouterr())
        return
    try:
        job = job_of(args)
    except Exception as error:
        reason = why_not_own(error)
        assert reason is None, reason
        return
    for name in ("steps", "frames", "height", "width"):
        assert getattr(job, name) is None or 0 < getattr(job, name) < 2**31
    assert job.fps is None or 0 < job.fps < 1e300
    assert job.prompt is None or job.prompt.strip()
    assert "+" in job.precision or job.precision in ("exact", "fp16", "bf16", "fp32")
    json.dumps(vars(job))
