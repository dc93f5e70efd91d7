"""The kernel benchmark without a GPU: shapes, statistics, tables, errors, plot."""
import contextlib
import dataclasses
import json
import math
import types
from pathlib import Path

import numpy as np
import pytest

from lowbit_video import Recipe, attention
from lowbit_video.app import cli
from lowbit_video.eval.speed import accuracy, bench, shapes, timing, tune
from lowbit_video.eval.speed import cli as speed
from lowbit_video.eval.speed.experiments import hopper_builds, portable_tiles
from lowbit_video.eval.speed.shapes import Shape
from lowbit_video.kernels import tuning
from lowbit_video.kernels.attention.hopper.build import CONFIGS
from lowbit_video.kernels.variants import VARIANTS
from lowbit_video.precision import Precision
from lowbit_video.runtime import cuda_driver, detect

from helpers import naive_attention, qkv


def row(**fields):
    values = dict(shape="32k", batch=1, heads=24, tokens=32768, head_dim=128, causal=False, dtype="float16", framework="torch",
                  method="int8+fp8 (triton-int-fp8)", precision="int8+fp8", variant="triton-int-fp8", total_ms=15.5,
                  total_low_ms=15.4, total_high_ms=15.7, kernel_ms=15.0, quant_ms=0.5, quant_gb_s=2900.0, tflops=851.0,
                  kernel_tflops=879.0, speedup=2.49, sqnr_db=27.5, relative_l1=0.0397, relative_l1_v_plus_1=0.0381,
                  extra_mib=288.0, host_us=140.0, allocations=2, alloc_us=24.6, first_call_ms=2100.0, runs=19)
    return bench.Row(**values | fields)


ABOUT = dict(gpu="NVIDIA H200", arch=[9, 0], driver="13.0", framework="torch", python="3.12.3", versions={"triton": "3.6.0"},
             commit="abc1234")


def test_shapes_by_group_name_and_numbers():
    assert shapes.parse_shapes(None) == shapes.MODELS + shapes.ANCHORS
    quick = [s.dims for s in shapes.parse_shapes(None, quick=True)]
    assert quick == [(2, 30, 17776, 64), (1, 24, 32768, 128), (4, 32, 8192, 128)]
    picked = shapes.parse_shapes("anchors; Wan 2.1; 1,2,300,64 ; (1,2,300,64,causal)")
    assert picked[:3] == shapes.ANCHORS and picked[3].heads == 40
    assert [s.causal for s in picked[4:]] == [False, True] and picked[4].flops == 2 * picked[5].flops == 4 * 2 * 300**2 * 64
    assert {s.tokens for s in shapes.SWEEP} == {1024 * 2**i for i in range(8)}
    with pytest.raises(ValueError, match="neither a group .models, anchors, sweep., a model"):
        shapes.parse_shapes("1,2,3")


def test_filters_name_precisions_variants_and_backends():
    assert bench.specs_for(None) == bench.SPECS and bench.specs_for(["int8+fp8", "triton"]) == ("int8+fp8",)
    both = bench.chosen(["int8+fp8", "triton"])
    assert both("int8+fp8", "triton-int-fp8")
    assert not both("int8+fp8", "hopper-int8") and not both("int8+fp16", "triton-int-fp16")
    assert both("cuDNN", "") and both("exact", "triton-exact")  # what is compared with stays
    assert bench.chosen(["hopper-int8"])("int8+fp16", "hopper-int8")
    with pytest.raises(ValueError, match="no variant or precision 'int9'"):
        bench.chosen(["int9"])
    with pytest.raises(ValueError, match="'mine.toml' is a recipe, and one precision is wanted here"):
        bench.chosen(["mine.toml"])


def test_of_a_recipe_its_low_bit_precisions_are_timed_and_all_are_tuned():
    rules = [{"rung": "int8+fp8"}, {"steps": "0-0.2", "rung": "exact"}, {"heads": [0], "rung": "int4+fp8 pooled 0.3"},
             {"layers": "a.*", "rung": "int8+fp8"}, {"layers": "b.*", "rung": "int4+fp16 rotate"}]
    recipe, said = Recipe(rules, source="mine.toml"), []
    assert bench.specs_of(recipe, said.append) == ("int8+fp8", "int4+fp16 rotate")
    assert said[0].startswith("mine.toml: left out int4+fp8 pooled 0.3; ") and "bench step --recipe" in said[0]
    assert tune.specs_of(recipe, said.append) == ("int8+fp8", "exact", "int4+fp8", "int4+fp16 rotate")
    assert said[1:] == ["mine.toml: int4+fp8 pooled 0.3 has no tiles or lengths of its own; those of int4+fp8 serve it"]
    with pytest.raises(ValueError, match=r"the keys everywhere \(int4\+fp8 pooled 0.3\), and .*recipe_attention"):
        bench.specs_of(Recipe([rules[2]]), said.append)
    assert bench.specs_of(Recipe.load("safe"), said.append) == ("int8+fp16",) and len(said) == 2


@pytest.mark.parametrize("command", ["kernels", "tune"])
def test_a_recipes_precisions_take_the_place_of_the_others(command, tmp_path, monkeypatch, capsys):
    given = []
    monkeypatch.setattr(speed, "pick_framework", lambda name: "torch")
    monkeypatch.setattr(bench, "bench_shape", lambda shape, **choices: given.append(choices) or [row(shape=shape.name)])
    monkeypatch.setattr(bench, "environment", lambda framework: ABOUT)
    monkeypatch.setattr(bench, "save", lambda *what, **how: [])
    monkeypatch.setattr(tune, "tune", lambda shapes, **choices: given.append(choices))
    run = lambda *more: cli.main(["bench", command, "--shapes", "1,2,300,64", "--out", str(tmp_path / "out"), *more])
    assert run("--recipe", "safe", "--variants", "triton") == run("--recipe", "safe") == 0
    assert [tuple(choices["specs"]) for choices in given] == [("int8+fp16", "exact")[:2 if command == "tune" else 1]] * 2
    assert run() == run("--variants", "int8+fp8") == 0
    assert given[2]["specs"] == {"kernels": bench.SPECS, "tune": None}[command] and tuple(given[3]["specs"]) == ("int8+fp8",)
    capsys.readouterr()
    for more, words in ((["--recipe", "none.toml"], "no such file: none.toml"),
                        (["--recipe", "safe", "--variants", "triton", "int8+fp8"],
                         "--recipe safe and --variants int8+fp8 both name precisions; give one of them")):
        assert run(*more) == 2 and words in capsys.readouterr().err
    assert len(given) == 4


def test_every_gpu_variant_is_a_benchmark_case():
    shape, served = shapes.MODELS[0], set()
    for spec in (*bench.SPECS, "int8/int2+fp8", "int2+fp8", "fp8+fp16", "exact"):
        served |= {v.name for v in bench.fitting(shape, Precision(spec), "float16", (9, 0))}
    wanted = {v.name for v in VARIANTS if v.device == "cuda" and v.backend == "triton"}
    assert wanted <= served
    assert all(v.pv != ("fp8",) for v in bench.fitting(shape, Precision("int8+fp16"), "float16", (8, 0)))


def test_what_cannot_rotate_is_not_timed():
    at = lambda dim: bench.fitting(shapes.Shape("", 1, 1, 1000, dim), Precision("int8+fp8 rotate"), "float16", (9, 0))
    assert at(64) and not at(96)


def test_quantisation_bytes_count_every_pass():
    shape = shapes.Shape("", 1, 1, 1000, 64)
    n = 64_000
    assert bench.quantisation_bytes(shape, Precision("int8+fp16", smooth_k=False), "float16") == 2 * n * 2 + 2 * n
    assert bench.quantisation_bytes(shape, Precision("int8+fp8"), "float16") == n * 2 * (1 + 2 + 2) + 3 * n
    assert bench.quantisation_bytes(shape, Precision("int4+fp16"), "float16") == n * 2 * (2 + 2) + n


def test_table_and_json(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    flash = row(method="FlashAttention-2", precision=None, variant=None, kernel_ms=None, quant_gb_s=None, kernel_tflops=None,
                speedup=1.0, total_ms=38.6, tflops=342.0, relative_l1_v_plus_1=None)
    wrong = row(method="int2+fp16 (triton-int-fp16)", error="relative L1 nan is not under 0.7: wrong, hence not timed",
                total_ms=None, tflops=None)
    rows = [row(), flash, wrong]
    rows += [row(shape="sweep", tokens=1024 * 2**i, tflops=300.0 + 50 * i) for i in range(4)]
    paths = bench.save(rows, ABOUT, tmp_path, "kernels")
    data = json.loads(paths[0].read_text())
    assert data["about"] == ABOUT and data["rows"][0] == dataclasses.asdict(rows[0])
    table = paths[1].read_text()
    assert "## (1, 24, 32768, 128) 32k, float16" in table and "NVIDIA H200" in table and "commit abc1234" in table
    assert "| int8+fp8 (triton-int-fp8) | 15.500 | 15.000 | 2900 | 851 | 879 | 2.49x | 27.5 | 0.0397 | 0.0381 | 288 |" in table
    assert "| FlashAttention-2 | 38.600 |  |  | 342 |" in table and "wrong, hence not timed" in table
    widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
    assert widths == {len(bench.COLUMNS) + 1}
    assert paths[2].stat().st_size > 10_000
    assert "| 288 | 140 | 24.6 |" in table
    assert "851 TFLOP/s" in bench.describe(rows[0]) and "host 140 us (2 allocations 24.6), first" in bench.describe(rows[0])
    assert "host 140 us, first" in bench.describe(row(allocations=None, alloc_us=None))


def test_results_from_before_allocations_were_told_apart_are_shown_without():
    content = json.loads((Path(bench.__file__).parent / "results" / "kernels.json").read_text())
    rows = [bench.Row(**{name: value for name, value in one.items() if not name.startswith("alloc")})
            for one in content["rows"]]
    cells = [line.split(" | ") for line in bench.markdown(rows, content["about"]).splitlines() if "(triton-int-fp8)" in line]
    assert cells and all(len(line) == len(bench.COLUMNS) and float(line[-2]) > 0 and line[-1] == " |" for line in cells)


def test_median_and_spread():
    t = timing.summarise([5.0, 1.0, 2.0, 3.0, 4.0, 100.0, 2.5, 2.6, 2.7, 2.8], host_us=7.0)
    assert (t.median_ms, t.low_ms, t.high_ms, t.runs, t.host_us) == (2.75, 2.0, 100.0, 10, 7.0)


class FakeDevice:
    """A clock instead of a GPU: calls and memory fills advance it; events read it."""

    def __init__(self, monkeypatch):
        self.now, self.fills, self.order = 0.0, 0, []
        device = self

        class Event:
            def record(self, stream):
                self.at = device.now

            def elapsed_ms(self, later):
                return later.at - self.at

        monkeypatch.setattr(cuda_driver, "Event", Event)
        monkeypatch.setattr(cuda_driver, "synchronize", lambda stream: None)
        monkeypatch.setattr(cuda_driver, "fill_bytes", self.fill)

    def fill(self, pointer, value, count, stream):
        assert count == timing.L2_BYTES
        self.now += 0.07
        self.fills += 1

    def call(self, name, ms):
        def run():
            self.order.append(name)
            self.now += ms

        return run


def test_methods_are_timed_in_turns_from_a_cold_cache(monkeypatch):
    class Memory:
        def data_ptr(self):
            return 0

    class Runtime:
        stream = staticmethod(lambda t: 0)
        empty = staticmethod(lambda shape, dtype, like: Memory())

    device = FakeDevice(monkeypatch)
    timer = timing.Timer(Runtime, None)
    calls = {"a": device.call("a", 2.0), "b": device.call("b", 20.0)}
    times = timing.time_together(timer, calls, budget_ms=240.0, rounds=4)
    assert times["a"].median_ms == pytest.approx(2.0) and times["b"].median_ms == pytest.approx(20.0)  # fills are not counted
    assert times["a"].runs == times["b"].runs == 12
    turns = "".join(device.order)
    assert turns.endswith("aaaabbbb" + "bbbbaaaa" + "aaaabbbb" + "bbbbaaaa")  # four runs a turn, of which the first settles
    assert device.fills >= 32
    device.order.clear()
    slow = timing.time_together(timer, {"a": calls["a"], "b": device.call("b", 200.0)}, budget_ms=240.0)
    assert slow["a"].runs == slow["b"].runs == timing.LEAST_ROUNDS
    assert "".join(device.order).endswith("aab" + "baa" + "aab")
    quick = timing.time_together(timer, {"a": device.call("a", 0.1)})
    assert quick["a"].runs == 40 == 8 * 5


def test_of_slow_calls_every_run_counts_and_is_told(monkeypatch):
    device = FakeDevice(monkeypatch)
    runtime = types.SimpleNamespace(stream=lambda t: 0, empty=lambda *_: types.SimpleNamespace(data_ptr=lambda: 0))
    timer, seen, wrong = timing.Timer(runtime, None), [], []

    def broken():
        if device.order.count("c") == 2:
            raise MemoryError("too little")
        device.call("c", 700.0)()

    calls = {"a": device.call("a", 600.0), "b": device.call("b", 1500.0), "c": broken}
    times = timing.time_together(timer, calls, budget_ms=4500.0, slow_ms=1000.0, told=lambda times: seen.append(
        {name: taken.runs for name, taken in times.items()}), failed=lambda *what: wrong.append(what))
    assert "".join(device.order) == "abc" + "cba" + "ab"
    assert {name: (taken.median_ms, taken.runs) for name, taken in times.items()} == {
        "a": (pytest.approx(600.0), 3), "b": (pytest.approx(1500.0), 3)}
    assert seen[0] == {"a": 1} and seen[2] == dict(a=1, b=1, c=1) and seen[-2:] == [dict(a=3, b=3, c=2), dict(a=3, b=3)]
    assert [name for name, _ in wrong] == ["c"] and isinstance(wrong[0][1], MemoryError)
    with pytest.raises(MemoryError):
        timing.time_together(timer, calls, slow_ms=1000.0)
    device.order.clear()
    once = timing.time_together(timer, {"a": calls["a"], "b": calls["b"]}, budget_ms=1.0, slow_ms=1000.0, least_rounds=1)
    assert "".join(device.order) == "ab" and once["b"].runs == 1 and once["b"].host_us > 0
    device.order.clear()
    assert timing.time_together(timer, {"a": calls["a"]}, budget_ms=1.0, slow_ms=1000.0)["a"].runs == timing.LEAST_ROUNDS
    assert len(device.order) > 2 * timing.LEAST_ROUNDS  # which are quick are run before they count
    wrong.clear()
    assert timing.time_together(timer, {"c": broken}, failed=lambda *what: wrong.append(what)) == {} and len(wrong) == 1


def test_a_run_that_depends_on_the_one_before_it_biases_neither_call(monkeypatch):
    device = FakeDevice(monkeypatch)
    runtime = types.SimpleNamespace(stream=lambda t: 0, empty=lambda *_: types.SimpleNamespace(data_ptr=lambda: 0))

    def call(name):
        def run():  # slow after another call, as where that one left clocks or power low
            device.now += 10.0 if device.order and device.order[-1] == name else 11.0
            device.order.append(name)

        return run

    times = timing.time_together(timing.Timer(runtime, None), {name: call(name) for name in "abc"})
    assert {round(ms, 6) for t in times.values() for ms in (t.median_ms, t.high_ms)} == {10.0}


def test_a_calls_own_allocations_are_timed_apart_from_its_host_time(framework, monkeypatch):
    """On a clock: a tensor takes 1 us and 1 us more for each KiB, and the rest of a call 100 us."""
    shape = Shape("", 1, 2, 64, 64)
    q, k, v = (framework.tensor(a.transpose(0, 2, 1, 3), "float16") for a in qkv(q_len=64))
    runtime, device = detect.runtime_of(q), FakeDevice(monkeypatch)
    empty, right, seconds = runtime.empty, attention(q, k, v, "exact", tensor_layout="HND"), [0.0]

    def timed_empty(dims, dtype, like):
        seconds[0] += 1e-6 * (1 + math.prod(dims) * np.dtype(dtype).itemsize / 2**10)
        return empty(dims, dtype, like)

    def call():
        runtime.empty(shape.dims, "float16", q)
        runtime.empty((1000, 3), "uint8", q)
        seconds[0] += 100e-6
        device.call("ours", 2.0)()
        return right

    variant = next(v for v in VARIANTS if v.name == "triton-exact")
    methods = [bench._Method("exact (triton-exact)", call, runtime, "exact", variant),
               bench._Method("another library's", call, runtime)]
    monkeypatch.setattr(bench, "_methods", lambda *_: (methods, [], (q, k, v, v)))
    monkeypatch.setattr(bench, "_call_counting_memory", lambda method, out_bytes: (method.call(), 0.0))
    monkeypatch.setattr(detect, "anchor", lambda framework: q)
    monkeypatch.setattr(runtime, "stream", lambda like: 0)
    monkeypatch.setattr(runtime, "empty", timed_empty)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: seconds[0])
    ours, other = bench.bench_shape(shape, framework=framework.name, dtype="float16", specs=())
    assert runtime.empty is timed_empty
    assert (ours.allocations, other.allocations, other.alloc_us) == (2, None, None)
    of_both = 2 + (1 * 2 * 64 * 64 * 2 + 3000) / 2**10
    assert ours.alloc_us == pytest.approx(of_both) and ours.host_us == other.host_us == pytest.approx(100 + of_both)


@pytest.mark.parametrize("causal", [False, True])
def test_sampled_reference_is_softmax_attention(framework, causal):
    arrays = qkv(batch=2, heads=6, kv_heads=3, q_len=300, kv_len=280)
    q, k, v = (framework.tensor(a.transpose(0, 2, 1, 3)) for a in arrays)
    runtime = detect.runtime_of(q)
    sampled = accuracy.reference(runtime, q, k, v, scale=0.125, causal=causal)
    wanted, wanted_lse = naive_attention(*arrays, causal=causal)
    assert sampled.heads == ((0, 0), (1, 5)) and len(sampled.rows) == 160 and sampled.rows[0] == 0 and sampled.rows[-1] == 299
    for (b, h), values in zip(sampled.heads, sampled.values):
        np.testing.assert_allclose(values, wanted[b, sampled.rows, h], atol=2e-5)
    out = framework.tensor(wanted.transpose(0, 2, 1, 3))
    assert accuracy.errors(runtime, out, sampled)[0] < 1e-5
    assert accuracy.errors(runtime, out * 1.01, sampled)[0] == pytest.approx(0.01, rel=1e-2)
    assert np.isnan(accuracy.errors(runtime, out * float("nan"), sampled)[0])
    h = [a.transpose(0, 2, 1, 3) for a in arrays]
    _, lse = accuracy.softmax_rows(h[0][1, 5], h[1][1, 2], h[2][1, 2], np.arange(300), 300, 0.125, causal)
    np.testing.assert_allclose(lse, wanted_lse[1, 5], atol=1e-4)


def test_sqnr_is_in_decibel():
    x = np.random.default_rng(0).standard_normal(1000)
    assert accuracy.sqnr_db(x * 1.1, x) == pytest.approx(20.0) and accuracy.sqnr_db(x, x) == float("inf")


@pytest.mark.parametrize("command", ["kernels", "tune"])
def test_without_a_gpu_the_command_says_so(command, capsys):
    if cuda_driver.device_count():
        pytest.skip("this machine has a GPU")
    assert cli.main(["bench", command]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
    assert cli.main(["bench", command, "--shapes", "big"]) == 2
    assert "'big' is neither a group" in capsys.readouterr().err


def test_tuning_is_written_with_where_it_was_measured_and_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(tune.detect, "anchor", lambda framework: None)
    monkeypatch.setattr(tune.detect, "runtime_of", lambda like: types.SimpleNamespace(arch=lambda t: (9, 0)))
    monkeypatch.setattr(bench, "environment", lambda framework: dict(gpu="a GPU", framework=framework, commit="abc"))
    monkeypatch.setattr(tune, "tune_tiles", lambda *_: tuning.TileConfig(64, 128, 4, 2))
    monkeypatch.setattr(tune, "shortest_useful", lambda *_: 2048)
    path = tune.tune([Shape("", 1, 2, 300, 64)], framework="torch", dtype="float16", specs=["int8+fp16", "exact"],
                     out=tmp_path / "tuning.json", log=lambda text: None)
    assert json.loads(path.read_text())[0] == {"about": {"gpu": "a GPU", "framework": "torch", "commit": "abc"}}
    tile = tuning.TileConfig(64, 128, 4, 2)
    assert tuning.load(str(path)) == {("int8+fp16", (9, 0), 64): tile, ("fp16", (9, 0), 64): tile}
    lengths = tuning.load_lengths(str(path))
    assert lengths["hopper-int8", "fp16", (9, 0), 64] == lengths["triton-int-fp16", "fp16", (9, 0), 64] == 2048


@pytest.mark.parametrize("dtype,family", [("float16", "fp16"), ("bfloat16", "fp16"), ("float32", "fp32")])
def test_exact_rows_are_filed_under_what_lookup_asks_for(tmp_path, monkeypatch, dtype, family):
    from lowbit_video.kernels.formats import FORMAT_OF_DTYPE

    monkeypatch.setattr(tune.detect, "anchor", lambda framework: None)
    monkeypatch.setattr(tune.detect, "runtime_of", lambda like: types.SimpleNamespace(arch=lambda t: (9, 0)))
    monkeypatch.setattr(bench, "environment", lambda framework: {})
    tile = tuning.TileConfig(32, 32, 4, 1)
    monkeypatch.setattr(tune, "tune_tiles", lambda *_: tile)
    path = tune.tune([Shape("", 1, 2, 300, 64)], framework="torch", dtype=dtype, specs=["exact"], out=tmp_path / "tuning.json",
                     log=lambda text: None)
    assert tuning.load(str(path)) == {(family, (9, 0), 64): tile}
    monkeypatch.setenv(tuning.ENVIRONMENT, str(path))
    own = FORMAT_OF_DTYPE[dtype]
    assert tuning.lookup(tuning.family(own, own, "fp16"), (9, 0), 64) == tile  # as the launcher asks
    other = "fp32" if family == "fp16" else "fp16"
    assert tuning.lookup(other, (9, 0), 64) == tuning.TABLE[other, (9, 0), 64]


def test_experiments_have_the_default_builds_and_a_name_for_each():
    builds = hopper_builds.candidates().values()
    named = {(head_dim, pv, tune.describe(config)) for head_dim, pv, config in builds}
    assert len(named) == len(builds)
    for (head_dim, fp8_pv), config in CONFIGS.items():
        assert (head_dim, "fp8" if fp8_pv else "fp16", config) in builds
    for text in (*portable_tiles.TILES.values(), *portable_tiles.RIVALS.values()):
        tiles = portable_tiles.parse_tiles(text)
        assert len({tune.describe(tile) for tile in tiles}) == len(tiles)
    assert portable_tiles.parse_tiles("64x128 4 2 168 1") == [
        tuning.TileConfig(64, 128, 4, 2, max_registers=168, sum_mma=True)]


def test_only_calls_that_compute_the_right_thing_are_timed(monkeypatch):
    """The tuner's verdict on tiles that are right, wrong and broken, and on a backend that does not serve the shape."""
    class Runtime:
        arch = staticmethod(lambda like: (9, 0))
        launch_guard = staticmethod(lambda like: contextlib.nullcontext())

    def call_for(variant, precision, shape, runtime, q, k, v, config):
        def run():
            if config.num_stages == 4:
                raise RuntimeError("out of resource")
            return config.block_m

        assert variant.backend == "triton"
        return types.SimpleNamespace(run=run, attend=lambda: None)

    said, tiles = [], [tuning.TileConfig(m, 64, 4, stages) for m, stages in ((16, 2), (32, 2), (64, 2), (64, 4))]
    monkeypatch.setattr(tune.detect, "anchor", lambda framework: None)
    monkeypatch.setattr(tune.detect, "runtime_of", lambda like: Runtime)
    monkeypatch.setattr(tune.inputs, "make_inputs", lambda *args, **options: (None, None, None))
    monkeypatch.setattr(tune.bench, "call_for", call_for)
    monkeypatch.setattr(tune.accuracy, "reference", lambda *args, **options: None)
    monkeypatch.setattr(tune.accuracy, "errors", lambda runtime, out, want: ({16: 0.01, 32: 0.01, 64: float("nan")}[out], 0.0))
    monkeypatch.setattr(tune.timing, "Timer", lambda *args: None)
    monkeypatch.setattr(tune.timing, "time_together", lambda timer, calls, **options: {
        name: timing.Timing(1.0 if name.startswith("32x") else 2.0, 0, 0, 1, 0) for name in calls})
    given = Shape("", 1, 2, 300, 64), "int8+fp16"
    assert tune.fastest(*given, "triton", tiles, "torch", "float16", said.append) == tiles[1]
    assert ["wrong" in text for text in said[:2]] == [True, False] and "out of resource" in said[1] and "32x64" in said[2]
    assert tune.fastest(Shape("", 1, 2, 300, 96), "int8+fp16", "hopper", tiles, "torch", "float16", said.append) is None


def test_what_float32_tensors_can_tune():
    assert tune.chosen_specs(None, "float32") == ("exact",) and tune.chosen_specs(None, "float16") == tune.SPECS
    assert tune.chosen_specs(["fp32", "exact"], "float32") == ("fp32", "exact")
    tried = {(t.block_m, t.block_n, t.num_warps, t.num_stages) for t in tune.candidates(64, "float32")}
    for (family, *_), tile in tuning.TABLE.items():  # measuring may not end with less than what is there
        assert family != "fp32" or (tile.block_m, tile.block_n, tile.num_warps, tile.num_stages) in tried
    for specs, dtype, message in ((["int8+fp16"], "float32", "which float32 ones share; pass float16 or bfloat16"),
                                  (["fp32"], "float16", "exact attention runs in their own format; pass 'exact'"),
                                  (["fp16"], "bfloat16", "fp16 cannot be tuned with bfloat16 tensors")):
        with pytest.raises(ValueError, match=message):
            tune.tune([], framework="torch", dtype=dtype, specs=specs, out=None)


def test_every_result_kept_says_where_it_was_measured():
    folder = Path(bench.__file__).parent / "results"
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        content = content[0] if isinstance(content, list) else content
        if "Triton 3.6.0, auto" in content:  # results of several worlds, each with its own
            content = content["Triton 3.6.0, auto"]
        about = content.get("about", content)  # of several GPUs it stands among the results
        assert about["gpu"] and about["versions"]["triton"] and about["commit"], path.name
    assert tuning.load_lengths(str(folder / "lengths.json")).keys() == tuning.FASTER_FROM.keys()


def test_the_shortest_useful_lengths_are_what_the_results_say():
    """The longer of lengths.json and the sweep; FP8 Q and K, which the sweep lacks, as INT8 of the same backend."""
    folder = Path(bench.__file__).parent / "results"
    rows = [r for r in json.loads((folder / "sweep.json").read_text())["rows"] if r["shape"] == "sweep"]
    tflops = {(r["method"], r["head_dim"], r["tokens"]): r["tflops"] for r in rows}
    lengths = sorted({r["tokens"] for r in rows})
    for (variant, pv, arch, head_dim), tokens in tuning.load_lengths(str(folder / "lengths.json")).items():
        method = f"int8+{pv} ({variant.replace('triton-fp8', 'triton-int-fp8').replace('hopper-fp8', 'hopper-int8')})"
        slower = [n for n in lengths if tflops[method, head_dim, n] <= tflops["exact (triton-exact)", head_dim, n]]
        crossing = lengths[lengths.index(max(slower)) + 1] if slower else lengths[0]
        assert tuning.FASTER_FROM[variant, pv, arch, head_dim] == max(tokens, crossing), (variant, pv, head_dim)


ROOT = Path(__file__).parents[2]
STEP_METHODS = ("fa2", "cudnn", "fa4", "int8+fp8", "int8+fp16", "none")
STEPS = {"CogVideoX-2b, eager": ("step_parts", "cogvideox-2b", "eager"),
         "CogVideoX-2b, blocks compiled": ("step_parts", "cogvideox-2b", "blocks"),
         "CogVideoX-5b, eager": ("step_large", "cogvideox-5b", "eager"),
         "CogVideoX-5b, blocks compiled": ("step_large", "cogvideox-5b", "blocks"),
         "CogVideoX-1.5-5b, eager": ("step_large", "cogvideox-1.5-5b", "eager"),
         "CogVideoX-1.5-5b, blocks compiled": ("step_large_compiled", "cogvideox-1.5-5b", "blocks"),
         "Wan2.1-1.3B, eager": ("step_parts", "wan2.1-1.3b", "eager"),
         "Wan2.1-1.3B, blocks compiled": ("step_parts", "wan2.1-1.3b", "blocks"),
         "Wan2.1-14B, 720p, eager": ("step_large", "wan2.1-14b-720p", "eager"),
         "Wan2.1-14B, 720p, blocks compiled": ("step_large_compiled", "wan2.1-14b-720p", "blocks"),
         "HunyuanVideo, 720p, eager": ("step_large", "hunyuanvideo-720p", "eager"),
         "HunyuanVideo, 720p, blocks compiled": ("step_large_compiled", "hunyuanvideo-720p", "blocks")}
"""The rows of the README's table of steps: the file, model and mode that they are of."""
NOT_NOTED = ("CogVideoX-2b, eager", "CogVideoX-2b, blocks compiled", "Wan2.1-1.3B, eager")
"""Those of which the notes do not say what attention adds."""


def step_result(file, model, mode):
    """(what `bench step` has of a model, its rows of a mode by method)."""
    models = json.loads((Path(bench.__file__).parent / "results" / f"{file}.json").read_text())["models"]
    result = next(result for result in models if result["model"] == model)
    return result, {row["method"]: row for row in result["rows"] if row["mode"] == mode}


def step_cells(rows, methods):
    """A step's ms by method, ours with the speed-up over FlashAttention-4's."""
    return [f"{row['median_ms']:.0f}" + f" ({rows['fa4']['median_ms'] / row['median_ms']:.2f}x)" * ("+" in method)
            if (row := rows.get(method)) else "" for method in methods]


def table_of(file, first):
    """The rows of a Markdown table that follow its header, which begins as given; cells without blanks and stars."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith(first)) + 2
    end = next(i for i in range(begin, len(lines)) if not lines[i].startswith("|"))
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines[begin:end]]


def test_the_readmes_steps_are_what_was_measured():
    shown = table_of("README.md", "| | tokens | FlashAttention-2 | cuDNN | FlashAttention-4 | int8+fp8 | int8+fp16 | no")
    assert [row[0] for row in shown] == list(STEPS)
    for (title, tokens, *cells), of in zip(shown, STEPS.values()):
        result, rows = step_result(*of)
        assert (int(tokens), cells) == (result["video_tokens"], step_cells(rows, STEP_METHODS)), title


def test_where_the_readme_says_it_loses_is_what_was_measured():
    results = ROOT / "eval" / "speed" / "results"
    swept, rows = (json.loads((results / f"{name}.json").read_text())["rows"] for name in ("sweep", "kernels"))
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split("Where it loses:", 1)[1].split())
    tflops = {(r["shape"], r["tokens"], r["method"]): r["tflops"] for r in swept if r["head_dim"] == 128 and not r["causal"]}
    ours = [f"int8+fp16 ({variant})" for variant in ("hopper-int8", "triton-int-fp16")]
    over = {(shape, tokens): [tflops[shape, tokens, method] / tflops[shape, tokens, "cuDNN"] for method in ours]
            for shape, tokens, _ in tflops}
    longer = [ratios for (shape, tokens), ratios in over.items() if shape == "sweep" and tokens >= 4096]
    (least, portable_least), (most, portable_most) = (map(pick, zip(*longer)) for pick in (min, max))
    assert (f"From 4K to 128K tokens `int8+fp16` at head dim 128 is at {least:.2f} to {most:.2f} times cuDNN on Hopper's "
            f"kernel and at {portable_least:.2f} to {portable_most:.2f} times on the portable one "
            "({:.2f} and {:.2f} at Wan 2.1's 75600 tokens".format(*over["Wan 2.1", 75600])) in text

    by_precision = {name: {r["shape"]: r for r in rows if r["tokens"] >= 8192 and r["method"] == method}
                    for name, method in (("exact", "exact (triton-exact)"), ("int4+fp16", "int4+fp16 (triton-int-fp16)"),
                                         ("int2+fp16", "int2+fp16 (triton-int-fp16)"))}
    ranges = {name: [pick(r["speedup"] for r in own.values()) for pick in (min, max)] for name, own in by_precision.items()}
    assert ("from 8K tokens on `int4+fp16` is at {:.2f} to {:.2f} times FlashAttention-2, ".format(*ranges["int4+fp16"])
            + "`int2+fp16` at {:.2f} to {:.2f}, ".format(*ranges["int2+fp16"])
            + "exact at {:.2f} to {:.2f} (PyTorch tensors".format(*ranges["exact"])) in text
    faster = {shape for name in ("int4+fp16", "int2+fp16") for shape, row in by_precision[name].items()
              if row["tflops"] > by_precision["exact"][shape]["tflops"]}
    assert faster == {"HunyuanVideo"} and "slower than our own exact kernel but for HunyuanVideo's 118806 tokens" in text


def test_the_largest_steps_of_diffusers_dispatcher_are_what_was_measured():
    shown = table_of("docs/diffusers.md", "| ms a step, one H100 |")
    for (_, tokens, *cells), model in zip(shown, ("wan2.1-14b-720p", "hunyuanvideo-720p"), strict=True):
        result, rows = step_result("step_large", model, "eager")
        peak = f"{max(row['peak_gib'] for row in rows.values()):.1f}"
        assert (int(tokens), cells) == (result["video_tokens"], [*step_cells(rows, STEP_METHODS[1:]), peak]), model


def test_what_the_notes_say_attention_adds_to_a_step_is_what_was_measured():
    shown = table_of("eval/speed/NOTES.md", "| | FlashAttention-4 | of its step |")
    assert sorted(row[0] for row in shown) == sorted(STEPS.keys() - set(NOT_NOTED))
    for title, *cells in shown:
        _, rows = step_result(*STEPS[title])
        adds = {method: rows[method]["median_ms"] - rows["none"]["median_ms"] for method in rows}
        ours = [method for method in ("int8+fp8", "int8+fp16") if method in rows]
        assert cells == [f"{adds['fa4']:.0f}", f"{rows['fa4']['attention_share']:.0%}".replace("%", " %"),
                         *(f"{adds[method]:.0f} ({adds['fa4'] / adds[method]:.2f}x)" for method in ours),
                         *[""] * (2 - len(ours)),
                         ", ".join(f"{rows[method]['speedup_over_exact']:.2f}x" for method in ours)], title


def test_a_named_commit_goes_before_the_checkouts(monkeypatch):
    monkeypatch.setenv("LOWBIT_VIDEO_COMMIT", "def5678")
    assert bench.settings.commit() == bench.settings.environment()["commit"] == "def5678"
    monkeypatch.delenv("LOWBIT_VIDEO_COMMIT")
    assert bench.settings.commit() != "def5678"
