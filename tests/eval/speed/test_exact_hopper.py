"""The experiment that checks and times the exact Hopper kernel: its checks see faults, and what fails costs itself alone."""
import json
import types

import numpy as np
import pytest

pytest.importorskip("triton", reason="needs Triton, which exists for Linux only")

from lowbit_video.eval.speed import timing, tune  # noqa: E402
from lowbit_video.eval.speed.experiments import exact_hopper, hopper_builds  # noqa: E402
from lowbit_video.eval.speed.shapes import parse_shapes  # noqa: E402
from lowbit_video.kernels.attention import reference  # noqa: E402
from lowbit_video.kernels.attention.hopper.build import EXACT_CONFIGS  # noqa: E402


def test_it_has_the_default_builds_and_a_name_for_each():
    builds = exact_hopper.candidates()
    named = {(head_dim, tune.describe(config)) for head_dim, config in builds.values()}
    assert len(named) == len(builds) and all(name.split()[0] == str(head_dim) for name, (head_dim, _) in builds.items())
    for head_dim in EXACT_CONFIGS:
        assert builds[exact_hopper.default_name(head_dim)] == (head_dim, EXACT_CONFIGS[head_dim])
    assert {parse_shapes(text)[0].head_dim for text in exact_hopper.FIRST} == set(EXACT_CONFIGS)


def test_rows_are_judged_one_by_one():
    wanted = np.ones((100, 64), np.float32)
    wanted[7] = 0
    assert exact_hopper.off_by(wanted, wanted) == (0, 0)
    for row, value, worst in ((3, 1.01, pytest.approx(0.01)), (7, 1e-6, np.inf), (5, np.nan, np.inf)):
        got = wanted.copy()
        got[row] = value
        assert exact_hopper.off_by(got, wanted)[1] == worst


class Numpy:
    """What the checks ask of a runtime, of arrays."""

    shape = staticmethod(np.shape)
    to_numpy = staticmethod(np.asarray)
    arch = staticmethod(lambda like: (9, 0))
    from_numpy = staticmethod(lambda x, like, dtype: x.astype(np.float16))


@pytest.fixture
def numpy_runtime(monkeypatch):
    monkeypatch.setattr(exact_hopper.detect, "anchor", lambda framework: None)
    monkeypatch.setattr(exact_hopper.detect, "runtime_of", lambda like: Numpy)


@pytest.mark.parametrize("fault", [None, "mask", "group", "lse", "nan"])
def test_a_faulty_kernel_does_not_pass_the_edges(numpy_runtime, monkeypatch, fault):
    def call_of(runtime, q, k, v, causal, lse, config):
        def run():
            given = [x.astype(np.float32) for x in (q, k[:, ::-1] if fault == "group" else k, v)]
            if fault == "mask" and causal and k.shape[2] > 1:  # one key is hidden too many
                given[1:] = given[1][:, :, :-1], given[2][:, :, :-1]
            out, sums = reference.attn_fwd(*given, scale=q.shape[3] ** -0.5, causal=causal, p_format="fp16")
            if fault == "nan":
                out[-1, -1, -1] = np.nan
            return out.astype(np.float16), sums + 0.01 * (fault == "lse")

        return types.SimpleNamespace(run=run)

    monkeypatch.setattr(exact_hopper, "call_of", call_of)
    monkeypatch.setattr(exact_hopper, "EDGES", ((2, 129), (65, 70), (40, 20)))
    found = exact_hopper.check_edges(64, "float16")
    assert found["ok"] == (fault is None) and found["cases"] == 6 and bool(found["wrong"]) == (fault is not None), found


@pytest.mark.parametrize("fault, message", [(None, None), ("wrong", "wrong"), ("unsteady", "two runs differ")])
def test_a_build_is_right_in_every_row_and_twice_the_same(numpy_runtime, monkeypatch, fault, message):
    runs = []

    def make_inputs(runtime, shape, dtype, like, v_offset):
        return np.random.default_rng(0).standard_normal((3, *shape), np.float32).astype(np.float16)

    def call_of(runtime, q, k, v, causal, lse, config):
        out, _ = reference.attn_fwd(*(x.astype(np.float32) for x in (q, k, v)), scale=0.125)
        runs.append(0)
        out[1, 2, -1] += 0.05 * (fault == "wrong" or (fault == "unsteady" and len(runs) % 2))
        return types.SimpleNamespace(run=lambda: out)

    monkeypatch.setattr(exact_hopper, "SHORT", (2, 3, 70))
    monkeypatch.setattr(exact_hopper.inputs, "make_inputs", make_inputs)
    monkeypatch.setattr(exact_hopper, "call_of", call_of)
    found = exact_hopper.check(exact_hopper.default_name(64))
    assert found["ok"] == (fault is None) and found.get("message") == message


@pytest.fixture
def played(numpy_runtime, monkeypatch):
    """Timing where a call's result says how long it takes; "128 lazy" breaks, "64 turns" is wrong."""
    names = {build: name for name, build in exact_hopper.candidates().items()}

    def call_for(variant, precision, shape, runtime, q, k, v, config=None):
        name = exact_hopper.OURS if config is None else names[shape.head_dim, config]

        def run():
            if name == "128 lazy":
                raise RuntimeError("out of resource")
            return name

        return types.SimpleNamespace(run=run)

    monkeypatch.setattr(exact_hopper.inputs, "make_inputs", lambda *args, **options: (None,) * 3)
    monkeypatch.setattr(exact_hopper.accuracy, "reference", lambda *args, **options: None)
    monkeypatch.setattr(exact_hopper.accuracy, "errors", lambda runtime, out, wanted: (0.5 if out == "64 turns" else 1e-4, 60))
    monkeypatch.setattr(exact_hopper.bench, "call_for", call_for)
    monkeypatch.setattr(exact_hopper.bench, "environment", lambda framework: {})
    monkeypatch.setattr(exact_hopper.timing, "Timer", lambda *args: None)
    monkeypatch.setattr(exact_hopper.timing, "time_together", lambda timer, calls, **options: {
        name: timing.Timing(1.0 + len(name), 1.0, 2.0, 8, 40.0) for name in calls})


def test_what_fails_costs_itself_alone(played, monkeypatch, tmp_path, capsys):
    out = tmp_path / "found.json"
    asked = []

    def check_all(names, workers, module):
        asked.append(names)
        return {name: dict(ok=name != "64 hold") for name in names}

    monkeypatch.setattr(hopper_builds, "check_all", check_all)
    monkeypatch.setattr(exact_hopper.sys, "argv", ["x", "--out", str(out)])
    assert exact_hopper.main() == 0
    report = json.loads(out.read_text())
    assert set(asked[0]) == {*exact_hopper.candidates(), *exact_hopper.EDGE_CHECKS}
    short, long, *rest = report["times"]
    assert set(short["rows"]) == {name for name in exact_hopper.candidates() if name.startswith("64") and name not in
                                  ("64 hold", "64 turns")} | {exact_hopper.OURS}
    assert "wrong" in short["failed"]["64 turns"] and "out of resource" in long["failed"]["128 lazy"]
    assert "FlashAttention-2" in short["failed"]  # it says why it is missing
    default = exact_hopper.default_name(64)
    assert list(rest[0]["rows"])[:-1] == exact_hopper.best(short, 64, 4)
    assert rest[0]["rows"][default]["config"]["block_n"] == 128
    assert len(report["times"]) == len(exact_hopper.FIRST) + len(exact_hopper.REST)
    assert "TFLOP/s" in capsys.readouterr().out


def test_a_default_build_that_fails_fails_the_run_and_time_that_is_up_is_said(played, monkeypatch, tmp_path):
    out = tmp_path / "found.json"
    monkeypatch.setattr(hopper_builds, "check_all", lambda names, workers, module: {
        name: dict(ok=True) for name in names if name != exact_hopper.default_name(128)})  # one gives no answer
    monkeypatch.setattr(exact_hopper.sys, "argv", ["x", "--out", str(out), "--seconds", "0", "--only", "64 hold"])
    assert exact_hopper.main() == 1
    report = json.loads(out.read_text())
    assert all("skipped" in found for found in report["times"]) and len(report["checks"]) == 3 + len(exact_hopper.EDGE_CHECKS)
