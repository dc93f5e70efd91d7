"""A step of Paddle's CogVideoX by attention, dry, on small models; both frameworks' results in one table."""
import argparse
import json
import sys

import numpy as np
import paddle
import pytest

import lowbit_video
from lowbit_video.app.cli import main
from lowbit_video.eval.speed import cogvideox
from lowbit_video.eval.speed.step import measure, names, paddle_methods, paddle_models, paddle_side, run, table
from lowbit_video.files import write_json
from lowbit_video.hook.processors import ExactAttnProcessor
from lowbit_video.hook.report import attention_modules
from lowbit_video.pipelines.cogvideox.transformer import CogVideoXTransformer3DModel


def measured(methods, modes, say=lambda text: None, save=lambda result: None):
    return measure.measure(paddle_side.PaddleSide(), "cogvideox-2b", methods, modes, True, 1.0, say, save)


def test_a_dry_run_checks_and_times_every_method():
    saved = []
    methods = ["paddle", "fa2", "exact", "int8+fp8", "int8+fp8 apart", "int8+fp8 pooled 0.5 always 6", "none"]
    result = measured(methods, ["eager", "model"], save=lambda result: saved.append(len(result["rows"])))
    assert not result["failed"] and saved[-2:] == [6, 6]
    assert result["left_out"] == {"fa2": "it takes PyTorch's tensors",
                                  "mode model": "what surrounds the blocks stays eager in Paddle"}
    assert (result["framework"], result["video_tokens"], result["batch"], result["layers"], result["dtype"]) == (
        "paddle", 48, 2, 2, "float32")
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == [method for method in methods if method != "fa2"]
    assert rows["paddle"]["sqnr_db"] > 100 and rows["exact"]["sqnr_db"] > 100
    assert rows["none"]["sqnr_db"] < 10 < rows["int8+fp8"]["sqnr_db"] < 100
    assert rows["int8+fp8 apart"]["sqnr_db"] != rows["int8+fp8"]["sqnr_db"]
    best = min(rows[method]["median_ms"] for method in ("paddle", "exact"))
    assert rows["int8+fp8"]["speedup_over_exact"] == pytest.approx(best / rows["int8+fp8"]["median_ms"])
    assert all(row["mode"] == "eager" and row["runs"] == 3 and "peak_gib" not in row for row in rows.values())
    why = "; prologue apart: pooling needs the means of tiles of normed keys first"
    kinds = result["ran"]  # of 2 modules: a check, 3 turns
    assert kinds == {"Paddle's own": 8, "exact (reference-exact)": 8, "int8+fp8 (reference-lowbit)": 8,
                     "int8+fp8 (reference-lowbit, fused prologue of two pieces)": 8,
                     f"int8+fp8 pooled 0.5 (reference-lowbit{why})": 8}


def test_which_methods_fuse_norms_and_positions():
    """A recipe may, so its graph is its own: one that is fused serves no exact method."""
    methods = ["int8+fp8", "safe", "a/b.toml", "int8+fp8 apart", "safe apart", "int8+fp8 pooled 0.3", "exact", "paddle", "none"]
    assert [name for name in methods if names.fuses(name)] == ["int8+fp8", "safe", "a/b.toml"]


def test_compiled_methods_share_a_graph_but_those_whose_prologue_is_fused(monkeypatch):
    monkeypatch.setitem(paddle_models.TINY, "num_layers", 1)  # to trace one takes seconds
    made, compiled = [], paddle_side.compiled
    monkeypatch.setattr(paddle_side, "compiled", lambda model: made.append(model) or compiled(model))
    result = measured(["int8+fp8", "none", "int8+fp8 apart"], ["eager", "blocks"])
    assert len(made) == 2
    rows = {(row["method"], row["mode"]): row for row in result["rows"]}
    assert len(rows) == 6 and not result["failed"]
    assert all(row["sqnr_to_eager_db"] > 60 for (_, mode), row in rows.items() if mode == "blocks")
    assert rows["none", "blocks"]["sqnr_db"] < 10
    assert result["ran"] == {"int8+fp8 (reference-lowbit)": 8, "int8+fp8 (reference-lowbit, fused prologue of two pieces)": 4,
                             "int8+fp8 (reference-lowbit, fused prologue)": 4}


def test_one_that_fails_is_told_and_the_others_are_timed(monkeypatch):
    def broken(self, *given, **named):
        raise MemoryError("too little")

    monkeypatch.setattr(paddle_methods.PaddleAttention, "attend", broken)
    result = measured(["paddle", "exact", "none"], ["eager"])
    assert [row["method"] for row in result["rows"]] == ["exact", "none"]
    assert list(result["failed"]) == ["paddle"] and "too little" in result["failed"]["paddle"]
    assert result["rows"][0]["sqnr_db"] == float("inf")

    def no_graph(model):
        raise RuntimeError("no kernel for pd_op.unsqueeze")

    monkeypatch.setattr(paddle_side, "compiled", no_graph)
    result = measured(["exact", "none"], ["blocks", "eager"])
    assert list(result["failed"]) == ["exact, blocks", "none, blocks"] and len(result["rows"]) == 2
    assert "pd_op.unsqueeze" in result["failed"]["exact, blocks"]
    monkeypatch.setattr(measure, "_time", broken)
    assert "timing, eager" in measured(["exact"], ["eager"])["failed"]


def test_one_that_fails_in_a_turn_is_told(monkeypatch):
    calls, own = [], paddle_methods.NoAttention.attend

    def second_round_fails(self, *given, **named):
        calls.append(self)
        if len(calls) > 4:  # of 2 modules: a check and a turn
            raise MemoryError("too little")
        return own(self, *given, **named)

    monkeypatch.setattr(paddle_methods.NoAttention, "attend", second_round_fails)
    result = measured(["exact", "none", "paddle"], ["eager"])
    assert list(result["failed"]) == ["none, timing, eager"] and "too little" in result["failed"]["none, timing, eager"]
    assert {row["method"]: row["runs"] for row in result["rows"]} == {"exact": 3, "none": 1, "paddle": 3}


def test_what_was_measured_is_written_after_every_check_and_turn():
    saved = []
    measured(["exact", "none"], ["eager"], save=lambda result: saved.append(
        ([row["method"] for row in result.get("not_timed", ())], [row["runs"] for row in result["rows"]],
         [row["attention_share"] is not None for row in result["rows"]], dict(result["ran"]))))
    waiting, runs, shares, ran = zip(*saved)
    assert waiting[:5] == ([], ["exact"], ["exact", "none"], ["none"], [])
    assert runs[2:] == ([], [1], [1, 1], [1, 2], [2, 2], [3, 2], *[[3, 3]] * (len(runs) - 8))
    assert shares[3:5] == ([False], [True, True]) and ran[1] == {"exact (reference-exact)": 2}


def test_no_step_begins_that_would_not_end_in_time():
    def measured_in(left):
        saved, seconds = [], iter(left)
        result = measure.measure(paddle_side.PaddleSide(), "cogvideox-2b", ["exact", "paddle", "none"], ["eager"], True, 1.0,
                                 lambda text: None, saved.append, left_s=lambda: next(seconds, 0.0))
        return result, {row["method"]: row["runs"] for row in result["rows"]}

    result, runs = measured_in([999.0] * 2 + [998.0] * 3 + [1e-6] * 99)  # 2 checks, the first is known; a turn; nothing more
    assert runs == {"exact": 1, "paddle": 1, "none": 1}
    assert sorted(result["failed"]) == [f"{method}, timing, eager" for method in ("exact", "none", "paddle")]
    assert "TimeoutError: 0 s were left, and a step takes 0.0" in result["failed"]["none, timing, eager"]
    assert [row["method"] for row in measured_in([1e-6] * 9)[0]["not_timed"]] == ["exact"]  # no other is quicker, it is taken
    result, runs = measured_in([999.0, -1.0, -1.0])
    assert list(result["failed"]) == ["none, eager", "exact, timing, eager", "paddle, timing, eager"] and runs == {}
    assert [row["method"] for row in result["not_timed"]] == ["exact", "paddle"]
    page = table.markdown(dict(gpu="g", versions={}, commit="c"), [dict(result, not_timed=[
        dict(row, title=names.title(row["method"])) for row in result["not_timed"]])])
    assert "Not timed: exact, ours, eager." in page and "Failed: none, eager: TimeoutError: " in page


def test_a_model_that_cannot_be_made_is_told(monkeypatch):
    def too_large(*given):
        raise MemoryError("of 80 GB")

    monkeypatch.setattr(paddle_side.PaddleSide, "make", too_large)
    saved = []
    result = measured(["exact"], ["eager"], save=lambda result: saved.append(dict(result["failed"])))
    assert saved[-1] == result["failed"] == {"the model": "MemoryError: of 80 GB"} and result["rows"] == []
    page = table.markdown(dict(gpu="g", versions={}, commit="c"), [result])
    assert "## cogvideox-2b, Paddle\n" in page and "Failed: the model: MemoryError: of 80 GB" in page


def test_what_an_earlier_call_measured_is_taken_as_it_is(monkeypatch, tmp_path):
    bench = lambda *more: main(["bench", "step", "--tiny", "--framework", "paddle", "--modes", "eager", "--rounds", "1",
                                "--out", str(tmp_path), *more])
    read = lambda: json.loads((tmp_path / "step.json").read_text())
    assert bench("--methods", "exact", "int8+fp16") == 0
    written = read()
    first = written["models"][0]["rows"]
    assert [(row["method"], row["runs"]) for row in first] == [("exact", 1), ("int8+fp16", 1)]
    other = dict(written["models"][0], framework="torch")
    write_json(tmp_path / "step.json", dict(written, models=[other, *written["models"]]))
    assert bench("--methods", "exact", "int8+fp8", "--go-on") == 0
    beside, result = read()["models"]
    assert beside == other and [row["method"] for row in result["rows"]] == ["exact", "int8+fp16", "int8+fp8"]
    assert [row["median_ms"] for row in result["rows"][:2]] == [row["median_ms"] for row in first]
    assert result["rows"][2]["speedup_over_exact"] == first[0]["median_ms"] / result["rows"][2]["median_ms"]
    fused = "(reference-lowbit, fused prologue"
    assert {f"int8+fp8 {fused} of two pieces)", f"int8+fp16 {fused})"} < set(result["ran"])
    write_json(tmp_path / "step.json", dict(written, about=dict(written["about"], commit="another")))
    assert bench("--methods", "exact", "paddle", "--go-on") and read()["models"] == written["models"]
    assert bench("--rounds", "0") == 2


def test_where_no_method_can_run_nothing_is_timed():
    result = measured(["fa2"], ["eager"])
    assert result["rows"] == [] and list(result["left_out"]) == ["fa2"]


def test_a_model_is_as_before_afterwards_and_runs_as_the_method_says():
    side = paddle_side.PaddleSide()
    model, given = side.make(side.entry("cogvideox-5b"), tiny=True)
    before = [module.processor for module in attention_modules(model).values()]
    plain = model(**given).numpy()
    with side.methods_of(model, side.entry("cogvideox-5b"), ["none", "int8+fp8", "paddle"], None) as ways:
        for name, low_bit in (("int8+fp8", True), ("none", False), ("paddle", False)):
            side.begin_mode(model, "blocks" if name == "none" else "eager")
            out = side.step(model, given, ways[name])().numpy()
            assert {module.processor.low_bit for module in attention_modules(model).values()} == {low_bit}
            assert np.array_equal(out, plain) is (name == "paddle")
            assert "run_blocks" not in model.__dict__
    assert [module.processor for module in attention_modules(model).values()] == before
    with side.methods_of(model, side.entry("cogvideox-5b"), ["none"], None) as ways:
        ways["none"].put()
    assert [module.processor for module in attention_modules(model).values()] == before
    assert all(isinstance(processor, ExactAttnProcessor) for processor in before) and not lowbit_video.remove(model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_and_what_it_takes_are_the_same_every_time_and_random(dtype):
    (model, given), (again, same) = (paddle_models.MODELS["cogvideox-2b"].make(dtype, tiny=True) for _ in range(2))
    assert {str(x.dtype) for x in model.parameters()} == {f"paddle.{dtype}"}
    values = lambda x: x.astype("float32").numpy()
    for (name, one), other in zip(model.named_parameters(), again.parameters()):
        one, other = values(one), values(other)
        assert np.array_equal(one, other), name
        if one.ndim > 1:
            inputs = 16 if name == "patch_embed.proj.weight" else one.shape[0]  # 4 channels of patches of 2 x 2
            assert one.std() * inputs**0.5 == pytest.approx(1, abs=0.35), name
        else:
            want = 0.0 if name.endswith("bias") else paddle_models.QK_GAIN if ".norm_q." in name or ".norm_k." in name else 1.0
            assert (one == want).all(), name
    assert all(np.array_equal(values(given[key]), values(same[key])) for key in ("hidden_states", "encoder_hidden_states"))
    assert given["hidden_states"].dtype == model.proj_out.weight.dtype and given["timestep"].tolist() == [500, 500]
    assert paddle.get_default_dtype() == "float32"


def test_full_sizes_are_the_published_ones():
    tokens = {}
    for name, entry in paddle_models.MODELS.items():
        config = CogVideoXTransformer3DModel(**{**entry.config, "num_layers": 0}).config
        tokens[name] = entry.tokens(config), config.max_text_seq_length == entry.leading_text(), entry.config["num_layers"]
    assert tokens == {"cogvideox-2b": (17550, True, 30), "cogvideox-5b": (17550, True, 42),
                      "cogvideox-1.5-5b": (44880, True, 42)}
    assert list(tokens) == list(run.PADDLE_MODELS) and set(cogvideox.LATENTS) == set(cogvideox.CONFIGS)


@pytest.mark.parametrize("device, out", [("cpu", False), ("gpu:0", False), ("cudev:0", True)])
def test_paddles_own_attention_is_left_out_where_it_needs_a_matrix_of_all_tokens(device, out):
    assert bool(paddle_methods.why_not("paddle", device)) is out
    assert paddle_methods.why_not("none", device) is paddle_methods.why_not("exact", device) is None
    assert all(paddle_methods.why_not(name, device) for name in ("pytorch", "fa2", "cudnn", "fa4", "sage"))


def row(method, mode, ms):
    return dict(method=method, mode=mode, title=names.title(method), median_ms=ms, sqnr_db=30.0)


def test_the_table_has_paddles_time_over_pytorchs():
    base = dict(video_tokens=48, batch=2, dtype="bfloat16", left_out={}, failed={})
    torchs = dict(base, model="cogvideox-2b", framework="torch",
                  rows=[row("fa2", "eager", 90.0), row("exact", "eager", 100.0), row("int8+fp8", "eager", 80.0)])
    paddles = dict(base, model="cogvideox-2b", framework="paddle",
                   rows=[row("exact", "eager", 110.0), row("int8+fp8", "eager", 60.0), row("int8+fp8", "blocks", 50.0)])
    about = dict(gpu="a card", versions={}, commit="c", ended={"Paddle": -11})
    lines = table.markdown(about, [torchs, dict(paddles, model="cogvideox-5b"), paddles]).splitlines()
    begin = lines.index("## cogvideox-2b: Paddle over PyTorch")
    assert lines[begin + 6:begin + 8] == ["| exact, ours | eager | 100.0 | 110.0 | 1.100 |",
                                          "| int8+fp8 | eager | 80.0 | 60.0 | 0.750 |"]
    assert not any(line.startswith("| int8+fp8 | blocks") for line in lines)
    assert "PyTorch's fastest exact eager step is by FlashAttention-2, 90.0 ms; Paddle's fastest exact eager step is by " \
        "exact, ours, 110.0 ms." in lines
    assert "## cogvideox-5b, Paddle: 48 tokens, batch 2, bfloat16" in lines
    assert "## cogvideox-5b: Paddle over PyTorch" not in lines
    assert any(line.startswith("The process of Paddle ended with status -11") for line in lines)


def arguments(**other):
    return argparse.Namespace(**dict(framework=["torch", "paddle"], models=["cogvideox-2b"], methods=None, pooled=[], recipe=[],
                                     prologue_apart=False, modes=["eager"], profile=False, parts=False, budget_ms=1.0, rounds=3,
                                     limit_s=9.0, go_on=False, tiny=True)
                              | other)


def test_both_frameworks_have_our_exact_attention():
    args = arguments(recipe=["safe"])
    for framework, others in (("torch", ["pytorch", "fa2", "cudnn", "fa4", "sage"]), ("paddle", ["paddle"])):
        found = run.methods_for(framework, args, both=True)
        assert set(found) == {*others, "exact", "int8+fp8", "int8+fp16", "none", "safe"} and len(found) == len(set(found))
        assert run.methods_for(framework, arguments(methods=["int8+fp8", "none"]), both=True) == ["int8+fp8", "none"]
    assert "exact" not in run.methods_for("torch", args, both=False)


def test_each_framework_has_a_process_and_what_one_measured_outlives_the_others_end(monkeypatch, tmp_path):
    calls = []

    class Done:
        def __init__(self, returncode):
            self.returncode = returncode

    def process(command):
        framework, given, part = command[-3:]
        calls.append((framework, json.loads(given)))
        if framework == "paddle":
            write_json(part, dict(about=dict(gpu="a card"), models=[dict(framework=framework)]))
        return Done(-6 if framework == "torch" else 0)

    monkeypatch.setattr(run.subprocess, "run", process)
    file = tmp_path / "step.json"
    written = run._in_processes(["torch", "paddle"], arguments(out=tmp_path, name="step", run=print), file)
    assert written == json.loads(file.read_text()) == dict(about=dict(gpu="a card", ended={"PyTorch": -6}),
                                                           models=[dict(framework="paddle")])
    assert list(tmp_path.iterdir()) == [file] and [framework for framework, _ in calls] == ["torch", "paddle"]
    assert argparse.Namespace(**calls[0][1]) == arguments()
    with pytest.raises(ValueError, match="nothing was measured; the processes ended with status -6"):
        run._in_processes(["torch"], arguments(), file)


def test_the_command_times_paddle_in_a_process_and_writes_all_files(tmp_path, capsys):
    assert main(["bench", "step", "--tiny", "--framework", "paddle", "--methods", "exact", "int8+fp8", "none", "--modes",
                 "eager", "--pooled", "0.5", "--profile", "--out", str(tmp_path), "--name", "ours"]) == 0
    written = json.loads((tmp_path / "ours.json").read_text())
    result, = written["models"]
    assert result["framework"] == "paddle" and written["about"]["gpu"] == "no GPU" and written["about"]["tiny"]
    assert [one["method"] for one in result["rows"]] == ["exact", "int8+fp8", "none", "int8+fp8 pooled 0.5 always 6"]
    assert [one["title"] for one in result["rows"]][0] == "exact, ours"
    assert [one["title"] for one in result["profiles"]] == [one["title"] for one in result["rows"]]
    page = (tmp_path / "ours.md").read_text()
    assert "# Where an eager step's time goes" in page and "## cogvideox-2b: no attention" in page
    assert page in capsys.readouterr().out and "## cogvideox-2b, Paddle: 48 tokens" in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours.json", "ours.md", "ours.png"]


@pytest.mark.parametrize("more, told", [(["--models", "wan2.1-1.3b"], "no Paddle model 'wan2.1-1.3b'; there are cogvideox-2b"),
                                        (["--methods", "flash_9"], "no method 'flash_9'; there are pytorch"),
                                        (["--pooled", "1.5"], "keep is 1.5")])
def test_what_does_not_exist_is_refused(capsys, tmp_path, more, told):
    assert main(["bench", "step", "--tiny", "--framework", "paddle", "--out", str(tmp_path), *more])
    assert told in capsys.readouterr().err


def test_full_size_needs_a_gpu(tmp_path):
    side = paddle_side.PaddleSide()
    if side.device != "cpu":
        pytest.skip("Paddle has a GPU here")
    with pytest.raises(ValueError, match="Paddle has none here; --tiny is a dry run"):
        run.measure_all("paddle", arguments(tiny=False), tmp_path / "step.json")
    assert not list(tmp_path.iterdir())
    assert "torch" not in sys.modules or "diffusers" in sys.modules  # Paddle's side asks for neither
