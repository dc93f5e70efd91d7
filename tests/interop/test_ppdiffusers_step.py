"""The experiment that times steps of ppdiffusers' models, dry, on small models of the package."""
import json

import pytest

pytestmark = pytest.mark.interop
paddle = pytest.importorskip("paddle", reason="paddlepaddle is not installed")
pytest.importorskip("ppdiffusers", reason="ppdiffusers is not installed (make interop)")

import lowbit_video as lv  # noqa: E402
from lowbit_video.eval.speed.experiments import ppdiffusers_step as experiment  # noqa: E402
from lowbit_video.hook.report import attention_modules  # noqa: E402

LOW = {"int8+fp8": 4, "int8+fp16": 4, "int8+fp8 and exact": 2}


def test_a_dry_run_checks_times_and_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LOWBIT_VIDEO_COMMIT", "abc")
    before = paddle.get_default_dtype()
    out = tmp_path / "new" / "step.json"
    assert experiment.main(["--tiny", "--models", "pixart-1024", "dit-2048", "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written["tiny"] and written["about"]["commit"] == "abc" and written["about"]["versions"]["ppdiffusers"] == "0.29.0"
    pixart, dit = written["models"]
    for result, blocks in ((pixart, 2), (dit, 2)):
        assert (result["tokens"], result["batch"], result["dtype"], result["layers"]) == (64, 2, "float32", blocks)
        rows = {row["method"]: row for row in result["rows"]}
        assert not any("left_out" in row for row in rows.values()) and all(row["ms"] > 0 for row in rows.values())
        assert rows["untouched"]["sqnr_db"] > 100 and rows["none"]["sqnr_db"] < 10 < rows["int8+fp8"]["sqnr_db"] < 100
    assert list(rows) == ["untouched", "exact", "int8+fp8", "int8+fp16", "none"]
    rows = {row["method"]: row for row in pixart["rows"]}
    assert list(rows) == list(experiment.METHODS)
    for name, modules in LOW.items():
        assert f"{modules} of 4 attention modules ran at low bit" in rows[name]["summary"]
        assert sum(rows[name]["ran"].values()) == 4
    assert pixart["own_processor"] == "AttnProcessor" and str(tmp_path) not in out.read_text()
    assert written["about"]["command"].endswith("ppdiffusers_step --tiny --models pixart-1024 dit-2048 --out step.json")
    page = out.with_suffix(".md").read_text()
    assert page in capsys.readouterr().out and "## dit-2048: 64 tokens, batch 2, float32" in page
    assert paddle.get_default_dtype() == before


def test_a_model_is_made_in_its_dtype_and_what_is_made_after_it_is_not():
    model, _ = experiment.step_of(experiment.MODELS["pixart-1024"] | experiment.TINY | dict(cross_attention_dim=144), "float16")
    assert {parameter.dtype for parameter in model.parameters()} == {paddle.float16}
    assert paddle.ones([1]).dtype == paddle.nn.Linear(1, 1).weight.dtype == paddle.float32
    assert (paddle.nn.Linear(2, 2).weight != 1).all()
    weights = {name: parameter.astype("float32") for name, parameter in model.named_parameters()}
    assert weights["transformer_blocks.0.attn1.to_q.weight"].std().item() == pytest.approx(1.2 / 12, rel=0.05)
    assert (weights["transformer_blocks.0.attn1.to_q.bias"] == 0).all()


@pytest.mark.parametrize("method, self_attention, text, fallback", [
    ("exact", "exact", "exact", None),
    ("int8+fp8", "int8+fp8", "int8+fp8", "exact"),
    ("int8+fp16", "int8+fp16", "int8+fp16", "exact"),
    ("int8+fp8 and exact", "int8+fp8", "exact", None),
])
def test_a_method_is_what_its_name_says(method, self_attention, text, fallback):
    model, _ = experiment.step_of(experiment.MODELS["pixart-1024"] | experiment.TINY | dict(cross_attention_dim=144), "float32")
    with experiment.methods_of(model)[method]():
        for name, attn in attention_modules(model).items():
            wanted = text if name.endswith("attn2") else self_attention
            assert attn.processor.precision == lv.Precision(wanted) and attn.processor.fallback == fallback


def test_methods_leave_the_model_as_it_was_and_text_alone_where_there_is_none():
    config = experiment.MODELS["dit-2048"] | experiment.TINY
    model, step = experiment.step_of(config, "float32")
    processors = [attn.processor for attn in attention_modules(model).values()]
    plain = step().numpy()
    methods = experiment.methods_of(model)
    assert "int8+fp8 and exact" not in methods
    for put in methods.values():
        with put():
            step()
        assert [attn.processor for attn in attention_modules(model).values()] == processors
    assert (step().numpy() == plain).all()


@pytest.mark.parametrize("name, tokens", [("pixart-1024", 4096), ("pixart-2048", 16384), ("dit-2048", 16384)])
def test_full_sizes_are_the_published_ones(name, tokens):
    config = experiment.MODELS[name]
    assert (config["sample_size"] // config["patch_size"]) ** 2 == tokens
    assert config["num_attention_heads"] * config["attention_head_dim"] == 1152 and config["num_layers"] == 28


def test_what_cannot_be_timed_is_told_by_the_exit_status(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "LOW_BIT_FLOOR_DB", 200.0)
    out = tmp_path / "step.json"
    assert experiment.main(["--tiny", "--models", "dit-2048", "--out", str(out)]) == 1
    result, = json.loads(out.read_text())["models"]
    left_out = {row["method"]: row["left_out"] for row in result["rows"] if "left_out" in row}
    assert set(left_out) == {"int8+fp8", "int8+fp16"} and all("wanted 200.0" in reason for reason in left_out.values())
