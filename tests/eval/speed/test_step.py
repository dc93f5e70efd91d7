"""The steps of models by attention, dry, on small models: checked, timed, written, and model and diffusers as before."""
import copy
import json

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")
pytest.importorskip("diffusers", reason="needs diffusers")
import torch.nn.functional as F  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402

import dispatch_models  # noqa: E402
from lowbit_video.app.cli import main  # noqa: E402
from lowbit_video.eval.speed.step import measure, methods, models, table  # noqa: E402

pytestmark = pytest.mark.parity


def bench(folder, *more):
    return main(["bench", "step", "--tiny", "--out", str(folder), *more])


def test_a_dry_run_checks_times_and_writes(tmp_path, capsys):
    before, sdpa = dispatch_models.state(), F.scaled_dot_product_attention
    names = ["pytorch", "cudnn", "int8+fp8", "none"]
    assert bench(tmp_path / "new", "--models", "cogvideox-2b", "wan2.1-1.3b", "--methods", *names) == 0
    assert dispatch_models.state() == before and F.scaled_dot_product_attention is sdpa
    written = json.loads((tmp_path / "new" / "step.json").read_text())
    assert written["about"]["tiny"] and written["about"]["gpu"] == "no GPU"
    cogvideox, wan = written["models"]
    assert (cogvideox["video_tokens"], cogvideox["batch"], cogvideox["layers"]) == (48, 2, 2)
    assert (wan["video_tokens"], wan["batch"], wan["layers"]) == (192, 1, 2)
    for result in (cogvideox, wan):
        assert result["left_out"] == {"cudnn": "needs an NVIDIA GPU"} and not result["failed"]
        rows = {(row["method"], row["mode"]): row for row in result["rows"]}
        assert set(rows) == {(name, mode) for name in names if name != "cudnn" for mode in ("eager", "blocks")}
        for mode in ("eager", "blocks"):
            exact, low, none = (rows[name, mode] for name in ("pytorch", "int8+fp8", "none"))
            assert exact["speedup_over_exact"] == 1 and none["attention_share"] == 0
            assert low["speedup_over_exact"] == pytest.approx(exact["median_ms"] / low["median_ms"])
            assert low["attention_share"] == pytest.approx(1 - none["median_ms"] / low["median_ms"])
            assert all(row["low_ms"] <= row["median_ms"] <= row["high_ms"] and row["runs"] == 3 for row in (exact, low, none))
            assert none["sqnr_db"] < 25 < low["sqnr_db"] < 120 < exact["sqnr_db"]
        assert result["ran"] == {"int8+fp8 (reference-lowbit)": 16}  # 2 modules, a check and 3 turns in each mode
    page = (tmp_path / "new" / "step.md").read_text()
    assert page in capsys.readouterr().out and "## wan2.1-1.3b: 192 tokens, batch 1, float32" in page
    assert (tmp_path / "new" / "step.png").stat().st_size > 5000


def test_what_is_wrong_is_told_and_not_timed(monkeypatch, tmp_path):
    monkeypatch.setitem(measure.FLOOR_DB, "low bit", 200.0)
    assert bench(tmp_path, "--models", "ltx", "--modes", "eager", "--methods", "pytorch", "int8+fp8") == 1
    result, = json.loads((tmp_path / "step.json").read_text())["models"]
    assert list(result["failed"]) == ["int8+fp8, eager"] and "wanted 200" in result["failed"]["int8+fp8, eager"]
    assert [row["method"] for row in result["rows"]] == ["pytorch"]
    assert "Failed: int8+fp8, eager: AssertionError" in (tmp_path / "step.md").read_text()


@pytest.mark.parametrize("more, told", [(["--models", "wan9"], "no model 'wan9'; there are cogvideox-2b"),
                                        (["--methods", "flash_9"], "no method 'flash_9'; there are pytorch")])
def test_what_does_not_exist_is_refused(capsys, tmp_path, more, told):
    assert bench(tmp_path, *more)
    assert told in capsys.readouterr().err


def test_a_model_is_measured_on_its_own_keys_and_counts(monkeypatch):
    keys = []
    monkeypatch.setattr(measure, "methods_of", lambda *given: keys.append(given[-1]) or methods.methods_of(*given))
    monkeypatch.setattr(measure, "_compile", lambda *given: counters["graph_break"].update(new=0))
    counters["graph_break"]["of before"] = 1
    entry, saved = models.MODELS["hunyuanvideo"], []
    result = measure.measure("hunyuanvideo", entry, ["pytorch", "cudnn", "int8+fp8"], ["eager"], "cpu", True, 1.0,
                             lambda text: None, lambda result: saved.append(len(result["rows"])))
    assert keys == [result["video_tokens"] + 60] == [48 + 60] and saved == [2]
    assert result["left_out"] == {"cudnn": "needs an NVIDIA GPU"} and not result["failed"] and result["layers"] == 3
    assert result["ran"] == {"int8+fp8 (reference-lowbit, leading keys)": 8}  # 2 modules, a check and 3 turns
    assert "of before" not in counters["graph_break"]
    assert methods.why_not("fa2", "cuda") is None


@pytest.mark.parametrize("name", models.MODELS)
def test_a_method_replaces_the_models_whole_attention_and_only_while_it_runs(name):
    """Without attention the prediction is another one; exact kernels get every call that has no mask, text by its length."""
    entry = models.MODELS[name]
    model, given = entry.make("cpu", torch.float32, tiny=True)
    tokens = entry.tokens(model.config, tiny=True)
    keys = None if entry.text is None else tokens + entry.text
    with torch.no_grad():
        plain = model(**copy.deepcopy(given), return_dict=False)[0]
        processors = [module.processor for module in model.modules() if getattr(module, "processor", None) is not None]
        with methods.methods_of(model, entry.dispatches, ["pytorch", "fa2", "int8+fp8", "none"], keys) as ways:
            outs = {}
            for method, way in ways.items():
                if method == "fa2":
                    continue  # its operator needs a GPU; what it is given is looked at below
                with way.active():
                    outs[method] = model(**copy.deepcopy(given), return_dict=False)[0]
            seen = served(ways["fa2"], keys, model, given)
        assert torch.equal(outs["pytorch"], plain)
        assert measure.sqnr_db(outs["none"], plain) < 25 < measure.sqnr_db(outs["int8+fp8"], plain) < 150
        assert torch.equal(model(**copy.deepcopy(given), return_dict=False)[0], plain)
    assert [module.processor for module in model.modules() if getattr(module, "processor", None) is not None] == processors
    joint = tokens + {"cogvideox": 6, "flux": 512, "hunyuanvideo": 60}.get(name.split("-")[0], 0)
    assert any(k == joint or name == "mochi" and k > tokens for _, k in seen), seen


def served(way, keys, model, given):
    """(queries, keys) of each call that an exact kernel would get."""
    seen = []

    def operator(q, k, v, scale):
        seen.append((q.shape[2], k.shape[2]))
        assert scale == q.shape[3] ** -0.5
        return methods.SDPA(q, k, v, scale=scale)

    before, methods.flash_2 = methods.flash_2, operator
    try:
        made = methods.Method("fa2", methods._context("fa2", keys), way.put)
        with made.active():
            model(**copy.deepcopy(given), return_dict=False)
    finally:
        methods.flash_2 = before
    return seen


def test_full_sizes_are_the_published_ones():
    """Tokens of a sample at full size. Sources: the models' pipelines in diffusers 0.42.0 at the videos' sizes named there."""
    class Config(dict):
        __getattr__ = dict.get

    patches = {"wan2.1-1.3b": (1, 2, 2), "wan2.1-14b": (1, 2, 2), "ltx": 1, "flux": 1}
    tokens = {name: entry.tokens(Config(patch_size=patches.get(name, 2), **{"patch_size_t": entry.config.get("patch_size_t")}))
              for name, entry in models.MODELS.items()}
    assert tokens == {"cogvideox-2b": 17550, "cogvideox-5b": 17550, "cogvideox-1.5-5b": 44880, "mochi": 23850,
                      "wan2.1-1.3b": 32760, "wan2.1-14b": 32760, "hunyuanvideo": 32640, "ltx": 7392, "flux": 4096}


def test_the_table_tells_best_shares_and_what_is_missing():
    row = dict(mode="eager", low_ms=1.0, high_ms=1.0, runs=3, sqnr_db=40.0, peak_gib=12.34)
    rows = [row | dict(method="pytorch", title="PyTorch", median_ms=300.0, speedup_over_exact=0.8, attention_share=0.6667,
                       sqnr_db=float("inf")),
            row | dict(method="int8+fp8", title="int8+fp8", median_ms=200.0, speedup_over_exact=1.2, attention_share=0.5),
            row | dict(method="none", title="no attention", median_ms=100.0, speedup_over_exact=2.4, attention_share=0.0)]
    result = dict(model="m", video_tokens=7, batch=2, dtype="bfloat16", rows=rows, left_out={"fa4": "absent"}, failed={})
    page = table.markdown(dict(gpu="G", versions={"torch": "2"}, commit="c"), [result])
    assert "| PyTorch | 300.0 (0.80x) | 67% | 12.3 | itself |" in page
    assert "| int8+fp8 | 200.0 (1.20x) | 50% | 12.3 | 40.0 |" in page
    assert "| no attention | 100.0 |  | 12.3 |  |" in page and "Left out: fa4, absent." in page
