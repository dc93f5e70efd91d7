"""The benchmark of several GPUs without one: what is started, how ranks' times become one, what is measured, its tables."""
import argparse
import contextlib
import json
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest

paddle = pytest.importorskip("paddle", reason="paddlepaddle is not installed")
from lowbit_video import Recipe, coverage  # noqa: E402
from lowbit_video.app import cli  # noqa: E402
from lowbit_video.distributed.group import Group, Traffic  # noqa: E402
from lowbit_video.eval.speed.parallel import apart, attention, decode, memory, step, table, worker  # noqa: E402
from lowbit_video.eval.speed.parallel.arguments import add_arguments  # noqa: E402
from lowbit_video.eval.speed.parallel.clock import Clock  # noqa: E402
from lowbit_video.eval.speed.shapes import Shape  # noqa: E402
from lowbit_video.pipelines.cogvideox.random_model import TRANSFORMER  # noqa: E402
from lowbit_video.pipelines.cogvideox.transformer import CogVideoXTransformer3DModel  # noqa: E402
from lowbit_video.pipelines.shared import device_memory  # noqa: E402
from lowbit_video.runtime import cuda_driver, detect  # noqa: E402
from ranks import run_threads  # noqa: E402

# --- What is started


@pytest.fixture
def started(monkeypatch):
    """What would have been started, and the script in it; the machine has 4 GPUs."""
    seen = []

    def run(command, env):
        script = next((Path(part) for part in command if part.endswith("worker.py")), None)
        seen.append((command, script and script.read_text(), env))
        return types.SimpleNamespace(returncode=7)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(cuda_driver, "device_count", lambda: 4)
    return seen


GIVEN = ["--parts", "attention", "step", "--shapes", "8k", "--models", "5b", "2b", "--precision", "int8+fp16", "exact",
         "--tiles", "--recipe", "safe", "--splits", "ring3", "--rounds", "4", "--more", "1"]


@pytest.mark.parametrize("framework", ["paddle", "torch"])
def test_a_process_for_each_gpu_is_told_everything(framework, started, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    out = tmp_path / "here.json"
    assert cli.main(["bench", "parallel", "--gpus", "3", "--framework", framework, "--out", str(out), *GIVEN,
                     *["--compile", "--cuda-graph"] * (framework == "torch")]) == 7
    [(command, script, environment)] = started
    if framework == "torch":
        assert command[1:6] == ["-m", "torch.distributed.run", "--nproc_per_node=3", "-m",
                                "lowbit_video.eval.speed.parallel.worker"]
        rest = command[6:]
    else:
        assert command[1:5] == ["-m", "paddle.distributed.launch", "--devices", "0,1,2"]
        assert "from lowbit_video.eval.speed.parallel.worker import main" in script
        rest = command[command.index(next(part for part in command if part.endswith("worker.py"))) + 1:]
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    told = parser.parse_args(rest)
    assert vars(told) == dict(framework=framework, parts=["attention", "step"], shapes="8k", models=["5b", "2b"], tiles=True,
                              precision=["int8+fp16", "exact"], recipe="safe", splits=["ring3"], rounds=4, more=1, out=out,
                              compile=framework == "torch", cuda_graph=framework == "torch")
    assert environment["OMP_NUM_THREADS"] == "3"


def test_where_files_lie_does_not_depend_on_the_folder_of_a_process(started, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "parallel"]) == 7
    command, _, _ = started[0]
    assert command[command.index("--out") + 1] == str(tmp_path / "outputs/bench/parallel.json")
    assert not {"--tiles", "--recipe", "--splits", "--rounds", "--compile", "--cuda-graph"} & set(command)
    assert command[command.index("--devices") + 1] == "0,1"


@pytest.mark.parametrize("framework", ["paddle", "torch"])
def test_eight_gpus_are_eight_processes(framework, started, monkeypatch):
    monkeypatch.setattr(cuda_driver, "device_count", lambda: 8)
    assert cli.main(["bench", "parallel", "--gpus", "8", "--framework", framework, "--splits", "cfg2 x ulysses4"]) == 7
    command = started[0][0]
    assert "--nproc_per_node=8" in command if framework == "torch" else "0,1,2,3,4,5,6,7" in command
    assert command[command.index("--splits") + 1] == "cfg2 x ulysses4"


def test_a_recipe_is_read_before_anything_is_started(started, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for given, says in ((["--recipe", "mine.toml"], "no such file: mine.toml"),
                        (["--precision", "mine.toml"], "'mine.toml' is a recipe, and one precision is wanted here")):
        assert cli.main(["bench", "parallel", *given]) == 2 and says in capsys.readouterr().err
    assert not started
    Recipe([{"rung": "exact"}]).save(tmp_path / "mine.toml")
    assert cli.main(["bench", "parallel", "--recipe", "mine.toml"]) == 7
    command = started[0][0]
    assert command[command.index("--recipe") + 1] == str(tmp_path / "mine.toml")


def test_a_recipe_is_of_the_step_and_a_precision_of_a_layer(monkeypatch, tmp_path):
    said = []
    wire = types.SimpleNamespace(rank=1, size=2, barrier=lambda: None)
    monkeypatch.setattr(worker, "wire_and_like", lambda framework: (wire, None))
    monkeypatch.setattr(worker, "Clock", lambda *given: None)
    monkeypatch.setattr(attention, "measure", lambda shape, precision, *rest: said.append(precision))
    monkeypatch.setattr(step, "measure", lambda model, precision, *rest: said.append(precision))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    run = lambda *more: worker._measure(parser.parse_args(["--parts", "attention", "step", "--shapes", "1,2,64,64", *more]))
    run()
    run("--recipe", "mine.toml")
    assert said == ["int8+fp8", "int8+fp8", "int8+fp8", "mine.toml"]
    said.clear()
    run("--precision", "exact", "int8+fp8", "int4+fp16", "--models", "2b", "5b")  # exact is beside the others in a layer
    assert said == ["int8+fp8", "int4+fp16", *["exact", "int8+fp8", "int4+fp16"] * 2]
    said.clear()
    run("--precision", "exact")
    assert said == ["exact", "exact"]
    monkeypatch.setattr(step, "measure", lambda *given: said.append(given[-2:]))
    said.clear()
    run("--precision", "exact", "--framework", "torch", "--compile")
    run("--precision", "exact", "--framework", "torch", "--cuda-graph")
    assert said == ["exact", (True, False), "exact", (False, True)]


@pytest.mark.parametrize("gpus", ["5", "1", "0"])
def test_too_few_gpus_are_said_in_a_line(gpus, started, capsys):
    assert cli.main(["bench", "parallel", "--gpus", gpus]) == 2 and not started
    captured = capsys.readouterr()
    assert f"--gpus {gpus}: this machine has 4 NVIDIA GPUs, and two at least" in captured.err and captured.err.count("\n") == 1


@pytest.mark.parametrize("given, says", [
    (["--splits", "ring2", "ulysses4"], "no such split by 2 GPUs: ulysses4; there are: ring2, ulysses2, cfg2"),
    (["--cuda-graph"], "--cuda-graph records PyTorch's launches, and --framework is paddle; add --framework torch"),
    (["--compile"], "--compile compiles diffusers' blocks, and --framework is paddle; add --framework torch"),
    (["--rounds", "0"], "--rounds 0: one at least"), (["--precision", "int8+fp8", "int9"], "unknown precision 'int9'")])
def test_what_cannot_be_measured_is_said_before_anything_is_started(given, says, started, capsys):
    assert cli.main(["bench", "parallel", *given]) == 2 and not started and says in capsys.readouterr().err


# --- The clock


class FakeClock(Clock):
    """A clock without a GPU. now: what the call that just ran took on this rank, ms."""

    def __init__(self, wire, now=lambda: 1.0):
        self.like = paddle.zeros([1])
        self.world, self.runtime = Group(wire, range(wire.size), Traffic()), detect.runtime_of(self.like)
        self.now, self.turns = now, []

    def once(self, call, passes=0):
        call()
        self.turns.append(passes)
        return self.now()


def test_a_time_is_the_median_over_turns_of_the_slowest_rank():
    """Not the slowest rank's median (3), nor that of the ranks' means (2.5)."""
    own = [{"a": [1, 5, 1], "b": [1, 1, 1]}, {"a": [4, 2, 3], "b": [2, 2, 9]}]
    assert run_threads(2, lambda wire: FakeClock(wire).medians(own[wire.rank])) == [{"a": 4, "b": 2}] * 2


def test_calls_take_turns_every_other_round_backwards():
    def work(wire):
        ran, inside = [], []
        clock = FakeClock(wire, now=lambda: float(len(ran)))
        calls = {name: lambda name=name: ran.append(name) for name in "ab"}
        clock.together(calls, rounds=2, passes=5)
        assert ran == list("abab" "ab" "ba") and clock.turns == [5] * 4  # two rounds that warm, two that count

        @contextlib.contextmanager
        def around(name):
            inside.append(name)
            yield
            inside.append("/" + name)

        ran.clear()
        times = clock.together(calls, rounds=3, around=around)
        assert ran == list("aabb" "bbaa" "aabb")  # the first in a turn does not count
        assert inside == ["a", "/a", "b", "/b", "b", "/b", "a", "/a", "a", "/a", "b", "/b"]
        return times

    assert run_threads(2, work) == [{"a": 8.0, "b": 6.0}] * 2


def test_memory_is_of_each_rank_and_none_where_nothing_counts():
    own = [{"a": 1.5, "b": float("nan")}, {"a": 2.5, "b": 3.0}]
    told = run_threads(2, lambda wire: FakeClock(wire).peaks(own[wire.rank]))
    assert told == [{"a": [1.5, 2.5], "b": None}] * 2


def test_a_peak_is_counted_anew_by_the_framework(monkeypatch):
    said, peaks = [], {}
    cuda = types.SimpleNamespace(is_available=lambda: True, reset_peak_memory_stats=lambda: said.append("anew"),
                                 max_memory_allocated=lambda: (1 + len(said)) * 2**30)
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(device_memory, "restart_peak", lambda device: said.append(device))
    monkeypatch.setattr(device_memory, "peak_gib", lambda device: 1.0 + len(said))
    for framework in ("torch", "paddle"):
        said.clear()
        with memory.counted(types.SimpleNamespace(NAME=framework), peaks, framework):
            assert said == ["anew" if framework == "torch" else "cpu"] and framework not in peaks
            said.append("a step")
    assert peaks == {"torch": 3.0, "paddle": 3.0}
    monkeypatch.setattr(device_memory, "peak_gib", lambda device: None)
    with memory.counted(types.SimpleNamespace(NAME="paddle"), peaks, "paddle"):
        pass
    assert np.isnan(peaks["paddle"])


# --- What is measured

SHAPE = Shape("tiny", 1, 4, 300, 64)
TIMES = {"one": 8.0, "one exact": 16.0, "ulysses2, codes": 5.0, "ulysses2, exact": 10.0, "ulysses2, codes / computed": 4.5,
         "ulysses2, codes / exchanged": 1.25}


def count_passed(wire):
    """Bytes of every transfer of this rank's from now on, as they are made."""
    passed, own = [], wire.exchange

    def exchange(sent, sent_bytes, received, received_bytes):
        passed.append(sum(sent_bytes))
        return own(sent, sent_bytes, received, received_bytes)

    wire.exchange = exchange
    return passed


def test_attention_on_two_ranks_beside_one(monkeypatch):
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal(SHAPE.dims).astype(np.float32) for _ in range(3)]
    monkeypatch.setattr(attention, "make_inputs", lambda *_: [paddle.to_tensor(x) for x in inputs])
    said = []

    def work(wire):
        clock, passed, replayed = FakeClock(wire), count_passed(wire), {}

        def together(calls, rounds):
            assert rounds == 3
            for name in [name for name in calls if " / " in name]:
                passed.clear()
                calls[name]()
                assert name.endswith("exchanged") or not passed, "what is computed alone sends nothing"
                replayed[name] = sum(passed)
            return {name: TIMES.get(name, 4.0) for name in calls}

        clock.together = together
        say = said.append if wire.rank == 0 else lambda text: None
        result = attention.measure(SHAPE, "int8+fp16", wire, clock, say, rounds=3)
        for name, row in result["methods"].items():
            assert row["bytes"] is None or replayed[f"{name} / exchanged"] == row["bytes"]["sent_total"] > 0
        return result

    result, other = run_threads(2, work, patience=120)
    assert result["shares"] == [256, 44] and (result["ranks"], result["shape"]) == (2, [1, 4, 300, 64])
    methods = result["methods"]
    assert list(methods) == [
        "one", "one exact", "ulysses2, 16bit", "ulysses2, codes", "ulysses2, int4 codes", "ulysses2, codes, int8 output",
        "ulysses2, exact", "ring2, 16bit", "ring2, codes", "ring2, int4 codes", "ring2, exact"]
    assert len(said) == 11 and "ulysses2, codes: 5.000 ms, 80.0 % of ideal" in said[3]
    assert said[3].endswith("4.500 ms computed and 1.250 ms exchanged") and "computed" not in said[0]
    apart = {name: (row["computed_ms"], row["exchanged_ms"]) for name, row in methods.items() if row["bytes"]}
    assert apart.pop("ulysses2, codes") == (4.5, 1.25) and set(apart.values()) == {(4.0, 4.0)} and len(apart) == 8
    share = {name: row["of_ideal"] for name, row in methods.items()}
    assert share["ulysses2, codes"] == 8 / 2 / 5 and share["ulysses2, exact"] == 16 / 2 / 10 and share["one"] == 0.5
    errors = {name: row["l1"] for name, row in methods.items()}
    assert errors == {name: row["l1"] for name, row in other["methods"].items()}, "errors are those of all ranks' rows"
    assert all(error < 1e-6 for name, error in errors.items() if "exact" in name)
    assert 0.002 < errors["one"] < 0.03 and all(abs(error - errors["one"]) < 0.005 for name, error in errors.items()
                                                if "exact" not in name and "int4" not in name)
    assert methods["one"]["bytes"] is None
    sent = {name: row["bytes"]["sent_total"] for name, row in methods.items() if row["bytes"]}
    assert sent["ulysses2, codes, int8 output"] < sent["ulysses2, codes"] < sent["ulysses2, 16bit"] == sent["ulysses2, exact"]
    assert sent["ring2, int4 codes"] < sent["ring2, codes"] < sent["ring2, 16bit"] == sent["ring2, exact"]
    assert sent["ulysses2, int4 codes"] < sent["ulysses2, codes"]


@pytest.mark.parametrize("precision, wanted", [
    ("int8+fp8", ["16bit", "codes", "int4 codes", "codes, int8 output"]), ("exact", ["16bit"]), ("fp16", ["16bit"]),
    ("int4+fp16", ["16bit", "codes", "codes, int8 output"]), ("fp8+fp8", ["16bit", "codes", "codes, int8 output"])])
def test_what_can_travel_is_what_the_precision_has(precision, wanted):
    found = apart.formats(precision)
    assert list(found) == wanted and found["16bit"] == ("16bit", "16bit")
    assert found.get("codes", ("auto", "16bit")) == ("auto", "16bit")
    assert found.get("int4 codes", ("int4", "16bit")) == ("int4", "16bit")
    assert found.get("codes, int8 output", ("auto", "int8")) == ("auto", "int8")


def test_a_silent_wire_gives_what_the_first_transfer_of_these_sizes_brought():
    def work(wire):
        tapped, passed = apart.TappedWire(wire), count_passed(wire)
        sizes = (([0, 40], [0, 56]), ([56, 0], [40, 0]))[wire.rank]
        (count, awaited), received = map(sum, sizes), []
        for value, silent in ((1, False), (2, False), (3, True), (4, False)):
            received.append(paddle.full([awaited], 99, "uint8"))
            with tapped.silent() if silent else contextlib.nullcontext():
                tapped.exchange(paddle.full([count], value, "uint8"), sizes[0], received[-1], sizes[1]).wait()
        assert [one.tolist() for one in received] == [[value] * awaited for value in (1, 2, 1, 4)]
        assert passed == [count] * 3 and tapped.passed == [tuple(map(tuple, sizes))] * 4
        assert tapped.kept_gib == awaited / 2**30
        tapped.barrier()
        return tapped.rank, tapped.size

    assert run_threads(2, work) == [(0, 2), (1, 2)]


def test_every_way_to_share_a_step_has_a_name():
    assert step.splits(2) == {"ring2": dict(cfg=1, ulysses=1, ring=2), "ulysses2": dict(cfg=1, ulysses=2, ring=1),
                              "cfg2": dict(cfg=2, ulysses=1, ring=1)}
    assert list(step.splits(3)) == ["ring3", "ulysses3"]
    assert list(step.splits(4)) == ["ring4", "ulysses2 x ring2", "ulysses4", "cfg2 x ring2", "cfg2 x ulysses2"]
    assert list(step.splits(8)) == ["ring8", "ulysses2 x ring4", "ulysses4 x ring2", "ulysses8", "cfg2 x ring4",
                                    "cfg2 x ulysses2 x ring2", "cfg2 x ulysses4"]
    assert step.splits(8)["cfg2 x ulysses2 x ring2"] == dict(cfg=2, ulysses=2, ring=2)


class StubModel:
    """Answers the latents, a thousandth larger where it is shared by a ring; tells the other rank 64 bytes a degree."""

    shared = wire = None

    def rotary_tables(self, frames, height, width):
        assert (frames, height, width) == (2, 4, 6)
        return "tables"

    def __call__(self, latents, text, timestep, image_rotary_emb):
        assert image_rotary_emb == "tables" and text.shape == [2, 226, 4096] and timestep.shape == [2]
        if self.shared:
            sizes = [64 * self.shared["ring"] * (rank != self.wire.rank) for rank in range(self.wire.size)]
            self.wire.exchange(*[paddle.zeros([sum(sizes)], "uint8"), sizes] * 2).wait()
        return latents.astype("float32") * (1.001 if self.shared and self.shared["ring"] > 1 else 1)


@pytest.fixture
def stubs(monkeypatch):
    """`own.model`: of each rank's thread. `traffic`: what parallelize was given."""
    found = types.SimpleNamespace(own=threading.local(), traffic=[])

    @contextlib.contextmanager
    def parallelize(model, exchange, output, wire, **degrees):
        counted = Traffic()
        counted.sent["while it was shared out"] = 99
        found.traffic.append((degrees, exchange, output))
        model.shared, model.wire = degrees, wire
        yield types.SimpleNamespace(mesh=types.SimpleNamespace(traffic=counted))
        model.shared = None

    @contextlib.contextmanager
    def counted(runtime, peaks, name):
        yield
        peaks[name] = 5.0 if found.own.model.shared is None else 3.0 + found.own.model.wire.rank

    def make(name):
        found.own.model = StubModel()
        return found.own.model

    monkeypatch.setattr(step, "apply", lambda model, precision: None)
    monkeypatch.setattr(step, "parallelize", parallelize)
    monkeypatch.setattr(step, "counted", counted)
    monkeypatch.setitem(step.LATENTS, "2b", (2, 4, 6))
    monkeypatch.setattr(step, "paddle_transformer", make)
    return found


def test_a_step_by_every_split_beside_one_gpu(stubs):
    def work(wire):
        shared, passed = lambda: stubs.own.model.shared or {"ring": 0, "cfg": 0}, count_passed(wire)
        clock = FakeClock(wire, now=lambda: {0: 100.0, 2: 60.0}[shared()["ring"]] if shared()["ring"] != 1 else
                          50.0 + wire.rank / shared()["cfg"])
        timed, together = [], clock.together

        def watched(calls, rounds, *rest):
            for name in (name for name in calls if " / " in name):
                passed.clear()
                with rest[1](name):
                    calls[name]()
                    calls[name]()
                assert passed == ([] if name.endswith("computed") else [128 if "ring2" in name else 64] * 2), name
            timed.append((list(calls), rounds))
            return together(calls, rounds, *rest)

        clock.together = watched
        result = step.measure("2b", "int8+fp8", "paddle", wire, clock, lambda text: None, rounds=3, more=1)
        return result, timed

    (result, timed), _ = run_threads(2, work)
    ways = result["ways"]
    assert [(name, row["ms"], row["of_ideal"]) for name, row in list(ways.items())[:4]] == [
        ("one", 100, 0.5), ("ring2", 60, pytest.approx(5 / 6)), ("ulysses2", 51, 50 / 51), ("cfg2", 50.5, 50 / 50.5)]
    more = ["ulysses2, 16bit", "ulysses2, int4 codes", "ulysses2, codes, int8 output"]
    assert list(ways)[4:] == more, "of the fastest whose tensors travel"
    apart = [f"{name} / {part}" for name in [*list(ways)[1:]] for part in ("computed", "exchanged")]
    assert timed == [(list(ways)[:4], 3), (more, 3), (apart, 2)]
    assert ways["ring2"]["sqnr_db"] == pytest.approx(60, abs=0.1)
    assert ways["one"]["sqnr_db"] is None and ways["cfg2"]["sqnr_db"] is None
    assert ways["one"]["bytes"] is None and ways["ring2"]["bytes"]["sent"] == {}  # what was counted before the step is gone
    assert ways["one"]["memory_gib"] == pytest.approx([5, 5]) and ways["cfg2"]["memory_gib"] == pytest.approx([3, 4])
    assert (ways["ring2"]["computed_ms"], ways["ring2"]["exchanged_ms"]) == (60, 100) and "computed_ms" not in ways["one"]
    alone = {tuple(degrees.values())[1:] for degrees, *travels in stubs.traffic if travels == ["int4", "16bit"]}
    assert alone == {(2, 1)} and (result["exchange"], result["output"]) == ("auto", "16bit")
    assert {tuple(travels) for _, *travels in stubs.traffic} == {("auto", "16bit"), ("16bit", "16bit"), ("int4", "16bit"),
                                                                  ("auto", "int8")}


def test_a_step_as_a_cuda_graph_is_recorded_once_a_way_and_replayed_in_its_turns(stubs, monkeypatch):
    def work(wire):
        passed, made, replayed = count_passed(wire), [], []

        def record(call):
            made.append(call)
            out = []

            def replay():
                if not out:
                    passed.clear()
                    out.append((call(), sum(passed), dict(stubs.own.model.shared or {})))
                replayed.append(out[0][1:])
                return out[0][0]

            return replay

        own.record, clock, timed = record, FakeClock(wire), []

        def together(calls, rounds, passes, around):
            shared_out = len(stubs.traffic)
            for name, call in calls.items():
                replayed.clear()
                with around(name):
                    call()
                timed.append((name, *replayed[0]))
            assert len(stubs.traffic) == shared_out, "nothing is shared out for a turn"
            return dict.fromkeys(calls, 1.0)

        clock.together = together
        result = step.measure("2b", "int8+fp8", "paddle", wire, clock, said.append, rounds=1, only=["ring2", "cfg2"], more=1,
                              cuda_graph=True)
        return result, timed, len(made)

    own, said = threading.local(), []
    monkeypatch.setattr(step, "_recorder", lambda: own.record)
    (result, timed, made), _ = run_threads(2, work)
    ways = ["one", "ring2", "cfg2", "ring2, 16bit", "ring2, int4 codes"]
    assert list(result["ways"]) == ways and result["cuda_graph"] and made == len(ways) + 2 * (len(ways) - 1)
    bytes_of = {name: number for name, number, _ in timed}
    assert [bytes_of[name] for name in ways[:3]] == [0, 128, 64]
    assert [bytes_of[f"ring2 / {part}"] for part in ("computed", "exchanged")] == [0, 128]
    assert {name: degrees.get("ring") for name, _, degrees in timed if "exchanged" not in name} == {
        name: None if name == "one" else 1 if "cfg2" in name else 2 for name in bytes_of if "exchanged" not in name}
    assert result["ways"]["ring2"]["sqnr_db"] == pytest.approx(60, abs=0.1) and result["ways"]["ring2"]["memory_gib"] == [
        pytest.approx(3), pytest.approx(4)]
    assert "int8+fp8, as a CUDA graph, ring2: 1.0 ms" in " ".join(said)


def test_what_no_cuda_graph_can_hold_is_told_and_the_rest_is_timed(stubs, monkeypatch):
    def recorder():
        def record(call):
            if (stubs.own.model.shared or {}).get("ring") == 2 or wires[0]._silent:
                raise ValueError("no graph")
            return call

        return record

    tap, said, wires = apart.TappedWire, [], []
    monkeypatch.setattr(step, "TappedWire", lambda wire: wires.append(tap(wire)) or wires[0])
    monkeypatch.setattr(step, "_recorder", recorder)
    every = {"ring1": dict(cfg=1, ulysses=1, ring=2), "cfg1": dict(cfg=1, ulysses=1, ring=1)}
    monkeypatch.setattr(step, "splits", lambda size: every)
    [result] = run_threads(1, lambda wire: step.measure("2b", "exact", "paddle", wire, FakeClock(wire), said.append, rounds=1,
                                                        cuda_graph=True))
    assert list(result["ways"]) == ["one", "cfg1"] and "exchanged_ms" in result["ways"]["cfg1"]
    assert "computed_ms" not in result["ways"]["cfg1"] and said[-1].endswith("ms exchanged")
    assert result["failed"] == dict.fromkeys(["ring1", "cfg1 / computed"], "ValueError: no graph")


@pytest.mark.parametrize("precision", ["exact", "safe"])
def test_exact_steps_and_recipes_travel_one_way(precision, stubs, monkeypatch):
    monkeypatch.setattr(step, "denoising_step", lambda model, number, of: contextlib.nullcontext())
    result, _ = run_threads(2, lambda wire: step.measure("2b", precision, "paddle", wire, FakeClock(wire), lambda text: None,
                                                         rounds=1, only=["cfg2", "ring2"], more=2))
    assert list(result["ways"]) == ["one", "ring2", "cfg2"] and set(stubs.traffic[0][1:]) == {"auto", "16bit"}


@pytest.mark.parametrize("more", [0, 1])
def test_what_cannot_travel_is_told_and_the_rest_is_timed(more, stubs, monkeypatch):
    served, said = StubModel.__call__, []

    def call(self, *given, **named):
        if any(travels == ["int4", "16bit"] for _, *travels in stubs.traffic[-1:]) and self.shared:
            raise RuntimeError("no such kernel")
        return served(self, *given, **named)

    monkeypatch.setattr(StubModel, "__call__", call)
    measure = lambda wire: step.measure("2b", "int8+fp8", "paddle", wire, FakeClock(wire), said.append, rounds=1, more=more,
                                        only=["ring1"])
    monkeypatch.setattr(step, "splits", lambda size: {"ring1": dict(cfg=1, ulysses=1, ring=2)})
    [result] = run_threads(1, measure)
    assert list(result["ways"]) == ["one", "ring1", "ring1, 16bit"][:2 + more]
    assert result["failed"] == ({"ring1, int4 codes": "RuntimeError: no such kernel"} if more else {})
    assert len(said) == 2 + 2 * more


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_small_models_step_by_every_split(ranks, monkeypatch):
    """By the real wrappers: what travels each way, and that nothing does where computation is apart."""
    monkeypatch.setattr(step, "TEXT_TOKENS", 226)
    monkeypatch.setattr(step, "TEXT_CHANNELS", TRANSFORMER["text_embed_dim"])
    monkeypatch.setitem(step.LATENTS, "2b", (3, 20, 20))  # 526 tokens
    paddle.seed(0)
    models = [CogVideoXTransformer3DModel(**{**TRANSFORMER, "in_channels": 16}) for _ in range(ranks)]
    for model in models:
        model.set_state_dict(models[0].state_dict())
        model.eval()
    own = threading.local()
    monkeypatch.setattr(step, "paddle_transformer", lambda name: models[own.rank])
    ulysses = f"ulysses{ranks}" if ranks == 2 else "cfg2 x ulysses2"
    monkeypatch.setattr(step, "splits", lambda size, every=step.splits: {name: every(size)[name] for name in (
        f"ring{ranks}", ulysses)})

    def work(wire):
        own.rank, passed, counts = wire.rank, count_passed(wire), {}
        clock = FakeClock(wire)

        def together(calls, rounds, passes, around):
            for name, call in calls.items():
                with around(name):
                    call()
                    passed.clear()
                    call()
                    counts[name] = sum(passed)
            return dict.fromkeys(calls, 1.0)

        clock.together = together
        result = step.measure("2b", "int8+fp8", "paddle", wire, clock, lambda text: None, rounds=1, more=2)
        for name, row in list(result["ways"].items())[1:]:
            assert counts[f"{name} / computed"] == 0
            assert counts[name] == counts[f"{name} / exchanged"] == row["bytes"]["sent_total"] > 0, name
        return result

    result = run_threads(ranks, work, patience=120)[0]
    ways = result["ways"]
    sent = {name: row["bytes"]["sent_total"] for name, row in ways.items() if row["bytes"]}
    for split in (f"ring{ranks}", ulysses):
        assert sent[f"{split}, int4 codes"] < sent[split] < sent[f"{split}, 16bit"]
        assert 15 < ways[f"{split}, int4 codes"]["sqnr_db"] < ways[split]["sqnr_db"]
    assert sent[f"{ulysses}, codes, int8 output"] < sent[ulysses] and f"ring{ranks}, codes, int8 output" not in ways


def test_a_step_by_a_recipe_is_that_at_half_of_the_denoising(monkeypatch, tmp_path):
    Recipe([{"rung": "exact"}, {"steps": "0.5-0.6", "rung": "int4+fp16"}]).save(tmp_path / "mine.toml")
    model = CogVideoXTransformer3DModel(**{**TRANSFORMER, "in_channels": 16})
    model.eval()
    monkeypatch.setattr(step, "TEXT_CHANNELS", model.config.text_embed_dim)
    monkeypatch.setitem(step.LATENTS, "2b", (3, 4, 6))
    monkeypatch.setattr(step, "paddle_transformer", lambda name: model)
    monkeypatch.setattr(step, "splits", lambda size: {})
    only = lambda wire: step.measure("2b", str(tmp_path / "mine.toml"), "paddle", wire, FakeClock(wire), lambda text: None)
    [result] = run_threads(1, only)
    assert {run[0] for module in coverage(model).modules for run in module.runs} == {
        "steps 0.5-0.6: int4+fp16 (reference-lowbit, fused prologue)"}
    assert result["precision"].endswith("mine.toml") and list(result["ways"]) == ["one"]


@pytest.mark.parametrize("wrong", [None, "all"])
def test_decoding_by_all_ranks_beside_one(monkeypatch, wrong):
    class Vae:
        group = degree = None
        tiles = False

        def enable_tiling(self):
            self.tiles = True

        def disable_tiling(self):
            self.tiles = False

        def decode(self, z):
            assert (self.group is None) == (self.degree is None)
            own.ms = {False: {False: 100, True: 300}, True: {False: 55, True: 200}}[bool(self.group)][self.tiles]
            return z.astype("float32") + (wrong == "all" and bool(self.group) and not self.tiles) + 10 * self.tiles

    own = threading.local()
    monkeypatch.setattr(decode, "LATENTS", (1, 2, 3, 4, 5))
    monkeypatch.setattr(decode, "paddle_vae", Vae)
    result, _ = run_threads(2, lambda wire: decode.measure(
        wire, FakeClock(wire, lambda: float(own.ms + wire.rank)), lambda text: None, tiled=True))
    assert {name: row["ms"] for name, row in result["ways"].items()} == {
        "one": 101, "all": 56, "one, tiles": 301, "all, tiles": 201}
    assert result["ways"]["all"]["speedup"] == 101 / 56 and result["ways"]["all, tiles"]["speedup"] == 301 / 201
    assert {name: row["equal"] for name, row in result["ways"].items()} == {
        "one": True, "all": wrong is None, "one, tiles": True, "all, tiles": True}


# --- Tables

STEP = "A step of CogVideoX-2b, int8+fp8"


def sent(total, of):
    return {"sent": {}, "in_16_bit": {}, "sent_total": total, "in_16_bit_total": of, "notes": []}


def result_of(framework, **parts):
    """A result of two GPUs; Paddle's is twice as slow."""
    times = 2 if framework == "paddle" else 1
    about = dict(gpu="NVIDIA H100", arch=[9, 0], driver="13.0", framework=framework, python="3.12", commit="abc1234",
                 versions={"triton": "3.6.0", framework: "9.9"}, ranks=2)
    methods = {"one": (7.0, 0.5, 0.0389, None), "one exact": (11.0, 0.5, 0.0, None),
               "ulysses2, codes": (3.8, 0.9211, 0.039, sent(640e6, 1000e6)),
               "ring2, 16bit": (9.0, 0.3889, 0.0388, sent(1000e6, 1000e6))}
    layers = [{"shape": [2, 30, 17776, 64], "name": "CogVideoX-2b", "precision": "int8+fp8", "ranks": 2, "shares": [8960, 8816],
               "methods": {name: dict(ms=times * ms, of_ideal=ideal, l1=l1, bytes=counted)
                           for name, (ms, ideal, l1, counted) in methods.items()}}]
    ways = {"one": (500.0, 0.5, None, None), "ring2": (290.0, 0.8621, 59.64, sent(5e6, 10e6)),
            "cfg2": (254.0, 0.9843, None, sent(2e6, 2e6))}
    steps = [{"model": "2b", "precision": "int8+fp8", "framework": framework, "ranks": 2, "exchange": "auto", "output": "16bit",
              "ways": {name: dict(ms=times * ms, of_ideal=ideal, sqnr_db=db, bytes=counted)
                       for name, (ms, ideal, db, counted) in ways.items()}}]
    decoded = {"latents": [1, 16, 13, 60, 90], "ranks": 2, "traffic": sent(1, 1), "ways": {
        "one": dict(ms=4000.0, speedup=1.0, equal=True), "all": dict(ms=2200.0, speedup=1.818, equal=True),
        "all, tiles": dict(ms=9000.0, speedup=0.444, equal=False)}}
    return {**about, "attention": layers, "steps": steps, "decode": decoded, **parts}


def tables_of(text):
    """{heading: [{column: cell}]}; every row as wide as its heading."""
    found, heading, columns = {}, "", None
    for line in text.splitlines():
        if line.startswith("#"):
            heading, columns = line.lstrip("# "), None
        elif line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if columns is None:
                columns = cells
            elif set(line) - set("| -"):
                assert len(cells) == len(columns), line
                found.setdefault(heading, []).append(dict(zip(columns, cells)))
    return found


def test_the_page_has_everything_that_was_measured_the_losers_too():
    page = table.markdown([result_of("paddle", decode=None), result_of("torch")])
    assert "- Paddle: 2 x NVIDIA H100; triton 3.6.0, paddle 9.9; driver 13.0; commit abc1234\n- PyTorch: 2 x" in page
    tables = tables_of(page)
    assert list(tables) == ["Attention of a layer: (2, 30, 17776, 64) CogVideoX-2b, int8+fp8", STEP,
                            "Decoding 49 frames of 480x720"]
    layers, steps, decoded = tables.values()
    assert len(layers) == 8 and layers[2] == {
        "framework": "Paddle", "GPUs": "2", "method": "ulysses2, codes", "ms": "7.600", "of an even share": "92.1 %",
        "rel. L1": "0.0390", "MB sent": "640.0", "of 16 bit": "0.640"}
    assert [layers[7][name] for name in ("method", "of an even share", "of 16 bit")] == ["ring2, 16bit", "38.9 %", "1.000"]
    assert layers[4] == {"framework": "PyTorch", "GPUs": "1", "method": "one", "ms": "7.000", "of an even share": "",
                         "rel. L1": "0.0389", "MB sent": "", "of 16 bit": ""}
    assert [row["SQNR, dB"] for row in steps] == ["", "59.6", "equal"] * 2 and steps[4]["of an even share"] == "86.2 %"
    assert [(row["framework"], row["way"], row["speed-up"], row["equal to the bit"]) for row in decoded] == [
        ("PyTorch", "one", "", "yes"), ("PyTorch", "all", "1.82x", "yes"), ("PyTorch", "all, tiles", "0.44x", "NO")]


def test_steps_as_cuda_graphs_are_named():
    result = result_of("torch")
    both = {"compiled": True, "cuda_graph": True}
    result["steps"] += [{**result["steps"][0], "cuda_graph": True}, {**result["steps"][0], **both}]
    page = table.markdown([result, result_of("torch", attention=[])])
    assert [name for name in tables_of(page) if "step" in name] == [
        STEP, f"{STEP}, as a CUDA graph", f"{STEP}, blocks compiled, as a CUDA graph"]
    assert "steps of 2b and 2b, as a CUDA graph and 2b, blocks compiled, as a CUDA graph" in page
    assert "| a step of 2b, as a CUDA graph: cfg2 |" in table.short([result])


def test_steps_of_compiled_blocks_are_named():
    result = result_of("torch")
    result["steps"].append({**result["steps"][0], "compiled": True})
    assert [name for name in tables_of(table.markdown([result])) if "step" in name] == [STEP, f"{STEP}, blocks compiled"]
    assert "| a step of 2b, blocks compiled: cfg2 |" in table.short([result])


def test_a_run_whose_keys_were_gathered_says_so():
    given = [result_of("torch"), {**result_of("torch"), "keys": "gathered"}, {**result_of("torch"), "keys": "round"}]
    told = [line for line in table.markdown(given).splitlines() if line.startswith("- PyTorch")]
    assert ["gathered" in line for line in told] == [False, True, False] and told[1].endswith(", codes of keys gathered")


def test_compiled_blocks_are_compiled_once_each():
    said = []
    block = types.SimpleNamespace(compile=lambda **how: said.append(how))
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    limit = torch._dynamo.config.recompile_limit
    step.compile_blocks(types.SimpleNamespace(transformer_blocks=[block, block]))
    assert said == [{"dynamic": False}] * 2 and torch._dynamo.config.recompile_limit == max(limit, 64)
    torch._dynamo.config.recompile_limit = limit


def test_what_was_not_measured_is_left_out():
    assert list(tables_of(table.markdown([result_of("torch", attention=[], decode=None)]))) == [STEP]
    assert tables_of(table.markdown([result_of("torch", attention=[], steps=[], decode=None)])) == {}


def test_the_short_table_has_frameworks_side_by_side(capsys, tmp_path):
    files = []
    for framework, parts in (("torch", {}), ("paddle", dict(attention=[]))):
        files.append(tmp_path / f"{framework}.json")
        files[-1].write_text(json.dumps(result_of(framework, **parts)))
    table.main([*map(str, files), "--short"])
    rows = tables_of(capsys.readouterr().out)[""]
    by_what = {row["on several GPUs"]: row for row in rows}
    assert list(by_what) == [
        *(f"a layer's attention, 17776 tokens: {name}" for name in ("one GPU", "ulysses2, codes", "ring2, 16bit")),
        *(f"a step of 2b: {name}" for name in ("one GPU", "ring2", "cfg2")),
        *(f"decoding 49 frames of 480x720: {name}" for name in ("one GPU", "all GPUs", "all GPUs, tiles"))]
    assert list(rows[0]) == ["on several GPUs", "Paddle", "PyTorch", "bytes of 16 bit", "how equal"]
    assert list(rows[1].values())[1:] == ["", "3.80 ms (92.1 %)", "0.640", "L1 0.0390"]
    assert list(by_what["a step of 2b: ring2"].values())[1:] == [
        "580 ms (86.2 %)", "290 ms (86.2 %)", "0.500", "59.6 dB"]
    assert list(by_what["a step of 2b: cfg2"].values())[-1] == "equal" and rows[3]["how equal"] == ""
    assert list(by_what["decoding 49 frames of 480x720: all GPUs, tiles"].values())[2:] == [
        "9.00 s (0.44x)", "", "DIFFERS"]
    other = result_of("paddle")
    other["steps"][0]["ways"]["ring2"]["sqnr_db"] = 0.04
    both = tables_of(table.short([other, result_of("torch")]))[""]
    [row] = [row for row in both if row["on several GPUs"].endswith("step of 2b: ring2")]
    assert row["how equal"] == "0.0 dB / 59.6 dB" and row["bytes of 16 bit"] == "0.500"
    table.main([str(files[0]), "--short"])
    assert list(tables_of(capsys.readouterr().out)[""][0]) == ["on several GPUs", "PyTorch", "bytes of 16 bit", "how equal"]


def test_the_short_table_may_have_the_fastest_alone_and_tells_precisions_apart():
    both = result_of("torch")
    [exact] = result_of("torch")["steps"]
    both["steps"].append({**exact, "precision": "exact"})
    exact["ways"]["one"]["ms"], exact["ways"]["ring2"]["ms"] = 100.0, 200.0
    wide = result_of("torch", steps=[], decode=None)
    wide["attention"][0]["shape"] = [2, 48, 17776, 64]
    rows = tables_of(table.short([both, wide], best=1))[""]
    assert [row["on several GPUs"] for row in rows] == [
        *(f"a layer's attention, 17776 tokens, {heads} heads: {way}" for heads in (30, 48)
          for way in ("one GPU", "ulysses2, codes")),
        "a step of 2b, int8+fp8: one GPU", "a step of 2b, int8+fp8: cfg2", "a step of 2b, exact: one GPU",
        "a step of 2b, exact: ring2",
        *(f"decoding 49 frames of 480x720: {way}" for way in ("one GPU", "all GPUs"))]
    low = result_of("torch", steps=[], decode=None)
    low["attention"][0]["precision"] = "int4+fp8"
    names = [row["on several GPUs"] for row in tables_of(table.short([result_of("torch"), low]))[""]]
    assert names[0] == "a layer's attention, 17776 tokens, int8+fp8: one GPU" and "int4+fp8" in names[3]
    with pytest.raises(ValueError, match="a step of 2b: one GPU: twice of PyTorch"):
        table.short([result_of("torch"), result_of("torch", attention=[])])


def test_runs_of_one_framework_are_numbered_and_what_was_measured_apart_has_columns():
    first, second = result_of("torch"), result_of("torch", commit="def5678", attention=[])
    page = table.markdown([first, result_of("paddle", attention=[]), second])
    assert "- PyTorch 1: 2 x NVIDIA H100;" in page and "- PyTorch 2: 2 x" in page and "- Paddle: 2 x" in page
    assert "commit abc1234: a layer's attention; steps of 2b; decoding\n" in page and table.APART not in page
    assert "commit def5678: steps of 2b; decoding\n" in page and table.NUMBERED in page and table.ONE_RUN not in page
    steps = tables_of(page)[STEP]
    assert [row["framework"] for row in steps] == ["PyTorch 1"] * 3 + ["Paddle"] * 3 + ["PyTorch 2"] * 3
    assert "GiB a GPU" not in steps[0] and table.NUMBERED not in table.markdown([first])
    assert "commit abc1234\n" in table.markdown([first]) and table.ONE_RUN in table.markdown([first])
    parts = dict(computed_ms=240.25, exchanged_ms=30.5)
    second["steps"][0]["ways"]["ring2"].update(parts, memory_gib=[7.25, 7.5])
    first["attention"][0]["methods"]["ulysses2, codes"].update(parts)
    first["decode"]["ways"]["all"]["memory_gib"] = [4.0, 5.0]
    page = table.markdown([first, second])
    layers, steps, decoded = tables_of(page).values()
    told = lambda row: (row["computed, ms"], row["exchanged, ms"])
    assert table.APART in page and told(layers[2]) == ("240.250", "30.500") and told(layers[1]) == ("", "")
    assert told(steps[4]) == ("240.2", "30.5") and steps[4]["GiB a GPU"] == "7.5" and steps[3]["GiB a GPU"] == ""
    assert [row["GiB a GPU"] for row in decoded[:3]] == ["", "5.0", ""]


def test_rank_0_writes_figures_and_page_after_each_part(monkeypatch, tmp_path):
    own, kept = threading.local(), result_of("paddle")
    out = tmp_path / "new folder" / "parallel.json"
    seen = []
    monkeypatch.setattr(worker, "wire_and_like", lambda framework: (own.wire, None))
    monkeypatch.setattr(worker, "Clock", lambda wire, like: None)
    about = {name: kept[name] for name in ("gpu", "driver", "framework", "versions", "commit")}
    monkeypatch.setattr(worker.bench, "environment", lambda framework: about)
    monkeypatch.setattr(worker.attention, "measure", lambda *_: kept["attention"][0])

    def measure_step(*_):
        if own.wire.rank == 0:
            seen.append(json.loads(out.read_text()))
        return kept["steps"][0]

    monkeypatch.setattr(worker.step, "measure", measure_step)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(["--out", str(out), "--parts", "attention", "step", "--shapes", "CogVideoX-2b"])

    def work(wire):
        own.wire = wire
        worker._measure(args)

    run_threads(2, work)
    written = json.loads(out.read_text())
    assert written["keys"] == "gathered"
    monkeypatch.setattr(worker, "MOST_BYTES", 0)
    run_threads(2, work)
    assert json.loads(out.read_text()) == {**written, "keys": "round"}
    assert seen[0]["attention"] == kept["attention"] == written["attention"] and seen[0]["steps"] == []
    assert written["steps"] == kept["steps"] and written["ranks"] == 2 and written["decode"] is None
    assert sorted(path.name for path in out.parent.iterdir()) == ["parallel.json", "parallel.md"]
    assert out.with_suffix(".md").read_text() == table.markdown([{**written, "keys": "round"}])


def test_the_readme_shows_what_was_measured():
    root = Path(__file__).parents[2]
    shown = (root / "README.md").read_text().partition("<!-- parallel:begin -->\n")[2].partition("<!-- parallel:end -->")[0]
    files = sorted((root / "eval" / "speed" / "results").glob("parallel_*.json"))
    assert shown == table.short([json.loads(file.read_text()) for file in files]), (
        "put what `python -m lowbit_video.eval.speed.parallel.table eval/speed/results/parallel_*.json --short` prints there")


# --- What the README says of four GPUs

FOUR = Path(table.__file__).parents[1] / "results"
COLUMNS = {"2b": ("paddle", "torch", "torch_compiled", "torch_graph", "torch_graph_compiled"),
           "5b": ("paddle_5b", "torch", "torch_compiled_5b", "torch_graph_5b", None),
           "1.5-5b": ("paddle_1.5-5b", "torch_1.5-5b", None, None, None)}
"""Of each model the files of the table's columns."""
WAYS = {"guidance and a ring of two": "cfg2 x ring2", "guidance and heads": "cfg2 x ulysses2"}


def test_the_readmes_steps_on_four_gpus_are_what_was_measured():
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    lines = text.split("\n| ms a step, one GPU -> four |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    assert len(lines) == 5
    for line in lines:
        title, *cells, memory_cell = (cell.strip().replace("**", "") for cell in line.strip("|").split("|"))
        model, way = title.split(" ", 1)[0].rstrip(","), WAYS[title.rsplit(", ", 1)[1]]
        for cell, name in zip(cells, COLUMNS[model], strict=True):
            if name is None:
                assert cell == "", title
                continue
            steps = json.loads((FOUR / f"parallel4_{name}.json").read_text())["steps"]
            ways = next(one["ways"] for one in steps if one["model"] == model and one["precision"] == "int8+fp8")
            one, four = ways["one"], ways[way]
            assert cell == f"{one['ms']:.0f} -> {four['ms']:.0f} ({100 * four['of_ideal']:.1f} %)", (title, name)
            if name.startswith("paddle"):
                assert memory_cell == " -> ".join(f"{max(row['memory_gib']):.1f}" for row in (one, four)), title
