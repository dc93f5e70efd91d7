"""The steps of models by attention, dry, on small models: checked, timed, written, and model and diffusers as before."""
import copy
import json
import time
import warnings
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")
pytest.importorskip("diffusers", reason="needs diffusers")
import torch.nn.functional as F  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402

import dispatch_models  # noqa: E402
import lowbit_video  # noqa: E402
from lowbit_video.app.cli import main  # noqa: E402
from lowbit_video.eval.speed.step import measure, methods, models, names, parts, table, torch_side  # noqa: E402
from lowbit_video.hook.report import attention_modules  # noqa: E402

pytestmark = pytest.mark.parity


def bench(folder, *more):
    return main(["bench", "step", "--tiny", "--out", str(folder), *more])


def test_a_dry_run_checks_times_and_writes(tmp_path, capsys):
    before, sdpa = dispatch_models.state(), F.scaled_dot_product_attention
    asked = ["pytorch", "cudnn", "int8+fp8", "int8+fp8 apart", "none"]
    assert bench(tmp_path / "new", "--models", "cogvideox-2b", "wan2.1-1.3b", "--methods", *asked) == 0
    assert dispatch_models.state() == before and F.scaled_dot_product_attention is sdpa
    written = json.loads((tmp_path / "new" / "step.json").read_text())
    assert written["about"]["tiny"] and written["about"]["gpu"] == "no GPU"
    cogvideox, wan = written["models"]
    assert (cogvideox["video_tokens"], cogvideox["batch"], cogvideox["layers"]) == (48, 2, 2)
    assert (wan["video_tokens"], wan["batch"], wan["layers"]) == (192, 1, 2)
    for result in (cogvideox, wan):
        without = {} if result is cogvideox else {"int8+fp8 apart": "this model computes norms and positions itself"}
        assert result["left_out"] == {"cudnn": "needs an NVIDIA GPU"} | without and not result["failed"]
        rows = {(row["method"], row["mode"]): row for row in result["rows"]}
        assert set(rows) == {(name, mode) for name in asked if name not in result["left_out"]
                             for mode in ("eager", "blocks")}
        for mode in ("eager", "blocks"):
            exact, low, none = (rows[name, mode] for name in ("pytorch", "int8+fp8", "none"))
            assert exact["speedup_over_exact"] == 1 and none["attention_share"] == 0
            assert low["speedup_over_exact"] == pytest.approx(exact["median_ms"] / low["median_ms"])
            assert low["attention_share"] == pytest.approx(1 - none["median_ms"] / low["median_ms"])
            assert all(row["low_ms"] <= row["median_ms"] <= row["high_ms"] and row["runs"] == 3 for row in (exact, low, none))
            assert none["sqnr_db"] < 25 < low["sqnr_db"] < 120 < exact["sqnr_db"]
        kinds = ("(reference-lowbit)", 16), ("(reference-lowbit, fused prologue of two pieces)", 8), (
            "(reference-lowbit, fused prologue)", 8)
        both = {f"int8+fp8 {kind}": count for kind, count in kinds}
        # 2 modules, a check, 3 turns in each mode
        assert result["ran"] == dict(list(both.items())[:1 + 2 * (result is cogvideox)])
    page = (tmp_path / "new" / "step.md").read_text()
    assert page in capsys.readouterr().out and "## wan2.1-1.3b: 192 tokens, batch 1, float32" in page
    assert (tmp_path / "new" / "step.png").stat().st_size > 5000


def test_pooled_keys_and_recipes_are_run_eager_and_compiled_without_a_break(monkeypatch, tmp_path):
    entry = models.MODELS["cogvideox-2b"]
    monkeypatch.setitem(models.MODELS, "cogvideox-2b", replace(entry, tiny_latents=(5, 16, 16)))
    recipe = lowbit_video.Recipe([{"rung": "int8+fp8 pooled 0.5 always 6"}, {"rung": "exact", "steps": "0-0.4"}])
    recipe.save(tmp_path / "r.toml")
    asked = ["pytorch", str(tmp_path / "r.toml"), "int8+fp8 pooled 0.3 always 6"]
    assert bench(tmp_path, "--models", "cogvideox-2b", "--methods", "pytorch", "--pooled", "0.3", "--recipe", asked[1],
                 "--modes", "eager", "blocks", "model") == 0
    result, = json.loads((tmp_path / "step.json").read_text())["models"]
    assert not result["failed"] and not result["left_out"]
    rows = {(row["method"], row["mode"]): row for row in result["rows"]}
    assert set(rows) == {(name, mode) for name in asked for mode in ("eager", "blocks", "model")}
    assert all(rows[name, mode]["sqnr_to_eager_db"] > 60 for name in asked for mode in ("blocks", "model"))
    apart = "; prologue apart: pooling needs the means of tiles of normed keys first"
    assert result["ran"] == {f"int8+fp8 pooled 0.3 (reference-lowbit{apart})": 24,
                             f"steps 0.4-1: int8+fp8 pooled 0.5 (reference-lowbit{apart})": 24}
    assert rows[asked[1], "eager"]["title"] == "recipe r" and rows[asked[2], "eager"]["sqnr_db"] < 59
    assert not any(methods.why_not(name, "cuda", dispatches=True) for name in asked)
    assert "no backend" in methods.why_not("exact", "cuda", dispatches=True) and methods.why_not("exact", "cuda") is None


def test_recipes_and_pooled_keys_of_models_that_dispatch(monkeypatch, tmp_path):
    entry = models.MODELS["wan2.1-1.3b"]
    monkeypatch.setitem(models.MODELS, "wan2.1-1.3b", replace(entry, tiny_latents=(5, 16, 16)))
    monkeypatch.setattr("lowbit_video.kernels.variants.POOLED_FROM", 300)  # self attention is long enough, text is not
    paths = [str(tmp_path / f"{name}.toml") for name in ("one", "other")]
    lowbit_video.Recipe([{"rung": "int4+fp8"}, {"rung": "int8+fp16", "steps": "0.5-0.6", "heads": "0"}]).save(paths[0])
    lowbit_video.Recipe([{"rung": "exact"}, {"rung": "int8+fp16", "layers": "blocks.0.attn1"}]).save(paths[1])
    assert bench(tmp_path, "--models", "wan2.1-1.3b", "--methods", "pytorch", "int8+fp8", "--pooled", "0.3", "--recipe", *paths,
                 "--modes", "eager", "blocks") == 0
    result, = json.loads((tmp_path / "step.json").read_text())["models"]
    assert not result["failed"] and not result["left_out"]
    names = ["int8+fp8", *paths, "int8+fp8 pooled 0.3"]
    rows = {(row["method"], row["mode"]): row for row in result["rows"]}
    assert set(rows) == {(name, mode) for name in ("pytorch", *names) for mode in ("eager", "blocks")}
    assert all(rows[name, "blocks"]["sqnr_to_eager_db"] > 60 for name in names)
    quality = [rows[name, "eager"]["sqnr_db"] for name in (paths[1], "int8+fp8", paths[0])]
    assert quality == sorted(quality, reverse=True) and len(set(quality)) == 3
    ran = set(result["ran"])
    assert {"steps 0.5-0.6, heads 0: int8+fp16 (reference-lowbit)", "exact", "int8+fp8 (reference-lowbit)"} < ran
    assert "int8+fp8 pooled 0.3 (reference-lowbit)" in ran and not any("steps 0-" in what for what in ran)


def test_what_is_wrong_is_told_and_not_timed(monkeypatch, tmp_path):
    monkeypatch.setitem(measure.FLOOR_DB, "low bit", 200.0)
    assert bench(tmp_path, "--models", "ltx", "--modes", "eager", "--methods", "pytorch", "int8+fp8") == 1
    result, = json.loads((tmp_path / "step.json").read_text())["models"]
    assert list(result["failed"]) == ["int8+fp8, eager"] and "wanted 200" in result["failed"]["int8+fp8, eager"]
    assert [row["method"] for row in result["rows"]] == ["pytorch"]
    assert "Failed: int8+fp8, eager: AssertionError" in (tmp_path / "step.md").read_text()


@pytest.mark.parametrize("more, told", [(["--models", "wan9"], "no model 'wan9'; there are cogvideox-2b"),
                                        (["--methods", "flash_9"], "no method 'flash_9'; there are pytorch"),
                                        (["--recipe", "no.toml"], "no such file: no.toml"),
                                        (["--pooled", "1.5"], "keep is 1.5"),
                                        (["--methods", "fa2 apart"], "no method 'fa2 apart'"),
                                        (["--recipe", "no.toml apart"], "no such file: no.toml"),
                                        (["--methods", "exact pooled 0.3"], "no method 'exact pooled 0.3'")])
def test_what_does_not_exist_is_refused(capsys, tmp_path, more, told):
    assert bench(tmp_path, *more)
    assert told in capsys.readouterr().err


def test_all_models_are_measured_as_asked_and_one_failure_is_told(monkeypatch, tmp_path):
    asked = {}

    def measured(side, name, asked_methods, modes, tiny, budget_ms, say, save, profile, rounds, known, left_s, parts):
        asked[name] = (side.entry(name), asked_methods, modes, side.device, tiny, budget_ms, profile, rounds, known,
                       left_s() > 9, parts)
        result = dict(model=name, video_tokens=1, batch=1, dtype="float32", left_out={}, rows=[],
                      failed={"pytorch, eager": "why"} if name == "ltx" else {})
        save(result)
        return result

    monkeypatch.setattr(measure, "measure", measured)
    monkeypatch.setattr(table, "plot", lambda *given: None)
    assert bench(tmp_path, "--models", "all", "--methods", "pytorch", "--modes", "eager", "--budget-ms", "7", "--rounds",
                 "2", "--limit-s", "99", "--parts") == 1
    assert asked == {name: (entry, ["pytorch"], ["eager"], "cpu", True, 7.0, False, 2, None, True, True)
                     for name, entry in models.MODELS.items()}
    written = json.loads((tmp_path / "step.json").read_text())
    assert [result["model"] for result in written["models"]] == list(models.MODELS)
    assert bench(tmp_path, "--models", "flux", "--methods", "pytorch", "int8+fp8", "int4+fp8 apart", "--recipe", "safe",
                 "--pooled", "0.3", "--prologue-apart") == 0
    ours = ["int8+fp8", "int8+fp8 apart", "int4+fp8 apart", "safe", "safe apart"]
    assert asked["flux"][1] == ["pytorch", *ours, "int8+fp8 pooled 0.3", "int8+fp8 pooled 0.3 apart"]
    assert not asked["flux"][-1]
    assert names.title("a/b.toml apart") == "recipe b apart" and names.title("int8+fp8 apart") == "int8+fp8 apart"
    asked.clear()
    assert main(["bench", "step", "--out", str(tmp_path)]) and not asked  # published sizes need a GPU


def test_a_model_is_measured_on_its_own_keys_and_counts(monkeypatch):
    keys, side = [], torch_side.TorchSide()
    monkeypatch.setattr(torch_side, "methods_of", lambda *given: keys.append(given[-1]) or methods.methods_of(*given))
    counters["graph_break"]["of before"] = 1
    saved = []
    result = measure.measure(side, "hunyuanvideo", ["pytorch", "cudnn", "int8+fp8", "paddle"], ["eager"], True, 1.0,
                             lambda text: None, lambda result: saved.append(len(result["rows"])))
    assert keys == [result["video_tokens"] + 60] == [48 + 60] and saved[-2:] == [2, 2] and result["framework"] == "torch"
    assert result["left_out"] == {"cudnn": "needs an NVIDIA GPU", "paddle": "it takes Paddle's tensors"}
    assert not result["failed"] and result["layers"] == 3
    assert result["ran"] == {"int8+fp8 (reference-lowbit, leading keys)": 8}  # 2 modules, a check and 3 turns
    assert "of before" not in counters["graph_break"]
    result = measure.measure(side, "cogvideox-2b", ["int8+fp8", "pytorch"], ["eager"], True, 1.0, lambda text: None,
                             lambda result: None)
    # the last processors are PyTorch's
    assert result["ran"] == {"int8+fp8 (reference-lowbit, fused prologue of two pieces)": 8}
    assert methods.why_not("fa2", "cuda") is None
    assert methods.why_not("exact", "cuda") is None and "exact attention" in methods.why_not("exact", "cuda", dispatches=True)


def noisy(wanted, db):
    """The tensor with noise of so many dB below it."""
    noise = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    return wanted + noise * (wanted.square().mean() / noise.square().mean() / 10 ** (db / 10)).sqrt()


def test_kernels_that_do_not_take_a_model_are_told(monkeypatch):
    keys, released, side = set(), [], torch_side.TorchSide()

    def flash(q, k, v, scale):
        keys.add((q.shape[2], k.shape[2]))
        return methods.SDPA(q, k, v, scale=scale)

    def no_memory(*call):
        raise torch.OutOfMemoryError("Tried to allocate 14.10 GiB")

    def no_head_dim(*call):
        raise AssertionError("head_dim 64 is not supported")

    for name, operator in (("flash_2", flash), ("cudnn", no_memory), ("flash_4", no_head_dim)):
        monkeypatch.setattr(methods, name, operator)
    monkeypatch.setattr(torch_side, "why_not", lambda *given: None)
    monkeypatch.setattr(torch_side.TorchSide, "release", lambda self: released.append(1))
    asked = ["fa4", "fa2", "cudnn", "int8+fp8", "none"]
    result = measure.measure(side, "hunyuanvideo", asked, ["eager"], True, 1.0, lambda text: None, lambda result: None)
    assert {what: why.split(":")[0] for what, why in result["failed"].items()} == {
        "fa4": "AssertionError", "cudnn, eager": "OutOfMemoryError"} and "14.10 GiB" in result["failed"]["cudnn, eager"]
    assert [(row["method"], row["runs"]) for row in result["rows"]] == [("fa2", 3), ("int8+fp8", 3), ("none", 3)]
    assert (48 + 256, 48 + 60) in keys and len(released) == 6  # behind each that was asked, and the first one that ran


def test_a_step_is_held_against_pytorchs_and_against_itself_in_eager_mode():
    counters.clear()
    side = torch_side.TorchSide()
    wanted = torch.randn(1000, generator=torch.Generator().manual_seed(0))

    def checked(method, db, mode="eager", eager=None):
        def step():
            counters["stats"]["unique_graphs"] += 2
            return noisy(wanted, db)

        return measure._checked(side, mode, measure._predict(side, method, step), step, measure.array(wanted),
                                {} if eager is None else eager)

    eager = {}
    assert checked("int8+fp8", 15, eager=eager)["sqnr_db"] == pytest.approx(15, abs=0.1) and list(eager) == ["int8+fp8"]
    assert checked("none", -5)["graphs"] == 2
    for method, db, floor in (("int8+fp8", 8, 10), ("fa2", 15, 25), ("exact", 15, 25)):
        with pytest.raises(AssertionError, match=f"{db}.. dB beside the first method's prediction, wanted {floor}"):
            checked(method, db)
    with pytest.raises(AssertionError, match="not finite"):
        measure._checked(side, "eager", measure._predict(side, "none", lambda: wanted / 0), None, measure.array(wanted), {})
    assert checked("fa2", 30, "blocks", {"fa2": measure.array(noisy(wanted, 30))})["sqnr_to_eager_db"] == float("inf")
    with pytest.raises(AssertionError, match="beside itself in eager mode"):
        checked("int8+fp8", 15, "blocks", {"int8+fp8": measure.array(-wanted)})
    counters["graph_break"]["why"] = 1
    with pytest.raises(AssertionError, match="broken by {'why': 1}"):
        checked("int8+fp8", 15, "model")
    counters.clear()


def test_times_are_milliseconds_and_compared_with_the_fastest_exact_method():
    rows = [dict(method="pytorch", mode="eager", first_call_s=0.01)]
    measure._time(torch_side.TorchSide(), rows, {"pytorch": lambda: time.sleep(0.004)},
                  measure.Budget(1.0, 3, lambda: 9.0), lambda: None, None)
    assert 4 <= rows[0]["median_ms"] < 400 and rows[0]["runs"] == 3
    rows = [dict(method=method, mode="eager", median_ms=ms)
            for method, ms in (("pytorch", 300.0), ("fa2", 250.0), ("int8+fp8", 200.0), ("none", 100.0))]
    measure._compare(rows, lambda text: None)
    assert [round(row["speedup_over_exact"], 3) for row in rows] == [0.833, 1, 1.25, 2.5]
    assert [round(row["attention_share"], 3) for row in rows] == [0.667, 0.6, 0.5, 0]


def test_what_is_compiled_is_whole_and_what_was_compiled_is_not_any_more(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: asked.append((type(self).__name__, how)))
    model = torch.nn.Sequential()
    model.blocks = torch.nn.ModuleList([torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)])
    how, side = dict(fullgraph=True, backend="eager"), torch_side.TorchSide()
    for mode, compiled in (("eager", []), ("blocks", [("Linear", how)] * 2), ("model", [("Sequential", how)])):
        asked.clear()
        model.blocks[0]._compiled_call_impl = model._compiled_call_impl = print
        side.begin_mode(model, mode)
        assert asked == compiled and model._compiled_call_impl is model.blocks[0]._compiled_call_impl is None


def test_an_exact_kernel_gets_what_it_computes_alike_and_pytorch_the_rest(monkeypatch):
    q, k = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 9, 16)
    mask, given = torch.arange(9)[None] < 7, []

    def operator(*call):
        given.append(call)
        return call[0]

    monkeypatch.setattr(methods, "flash_2", operator)

    def served(keys, *call, **named):
        """Whether the kernel got the call: then with what, else what PyTorch made of it."""
        given.clear()
        with methods._context("fa2", keys)():
            out = F.scaled_dot_product_attention(*call, **named)
        return given[0] if given else out

    for length in (9, 7):  # of all keys, or of as many as the mask leaves
        x = q[:, :, :length]
        _, key, value, scale = served(7, x, x, x + 1, mask[:, :length])
        assert torch.equal(key, q[:, :, :7]) and torch.equal(value, q[:, :, :7] + 1) and scale == 0.25
    assert served(None, q, q, q, scale=0.3)[3] == 0.3
    for keys, call, named in (
            (7, (q[:, :, :6],) * 3, dict(attn_mask=mask[:, :6])), (7, (q[:, :, :5], q, q), dict(attn_mask=mask)),
            (None, (q, q, q), dict(attn_mask=mask, scale=0.3)), (None, (q, q, q), dict(is_causal=True)),
            (None, (q, k, k), dict(enable_gqa=True))):
        assert torch.equal(served(keys, *call, **named), F.scaled_dot_product_attention(*call, **named))
    with methods._context("none", None)():
        assert torch.equal(F.scaled_dot_product_attention(q, q, q, mask), q)


def test_operators_tell_the_truth_of_their_memory():
    x = torch.randn(1, 5, 2, 16)
    for q in (x.transpose(1, 2), x.transpose(1, 2).contiguous()):
        torch.library.opcheck(methods.nothing, (q, q, q, 1.0))


@pytest.mark.parametrize("name, kept", [("mochi", [1, 8]), ("hunyuanvideo", [60]), ("ltx", [60, 60]), ("wan2.1-1.3b", None)])
def test_a_model_and_what_it_takes_are_the_same_every_time(name, kept):
    (model, given), (again, same) = (models.MODELS[name].make("cpu", torch.bfloat16, tiny=True) for _ in range(2))
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(model.parameters(), again.parameters()))
    assert all(torch.equal(a, same[key]) for key, a in given.items() if isinstance(a, torch.Tensor))
    assert given["hidden_states"].dtype == torch.bfloat16 and given["timestep"].dtype == torch.int64
    assert kept is None or given["encoder_attention_mask"].sum(-1).tolist() == kept


@pytest.mark.parametrize("name", models.MODELS)
def test_a_method_replaces_the_models_whole_attention_and_only_while_it_runs(name):
    """Without attention the prediction is another one; exact kernels get every call that has no mask, text by its length."""
    entry = models.MODELS[name]
    model, given = entry.make("cpu", torch.float32, tiny=True)
    tokens, before = entry.tokens(model.config, tiny=True), dispatch_models.state()
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
                    now = [type(module.processor) for module in attention_modules(model).values()]
                    assert len({id(kind) for kind in now}) == len({kind.__name__ for kind in now})  # alike blocks share a graph
                    assert all(kind.__name__.endswith(f"_{method}") for kind in now) or method == "int8+fp8"
                    assert {getattr(module.processor, "fallback", "exact") for module in model.modules()
                            if hasattr(module, "processor")} == {"exact"}
            seen = served(ways["fa2"], keys, model, given)
        assert torch.equal(outs["pytorch"], plain)
        assert measure.sqnr_db(outs["none"], plain) < 25 < measure.sqnr_db(outs["int8+fp8"], plain) < 150
        assert torch.equal(model(**copy.deepcopy(given), return_dict=False)[0], plain)
    assert [module.processor for module in model.modules() if getattr(module, "processor", None) is not None] == processors
    assert dispatch_models.state() == before and not lowbit_video.remove(model)
    assert not any(hasattr(module, "attention_calls") for module in model.modules())
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


def test_weights_are_made_in_the_dtypes_of_from_pretrained(monkeypatch):
    """As in from_pretrained(torch_dtype=torch.bfloat16); its float32 weights would take half of the card of the largest."""
    asked, made = [], models.diffusers.WanTransformer3DModel

    def make(**config):
        asked.append(torch.get_default_dtype())
        return made(**config)

    monkeypatch.setattr(models.diffusers, "WanTransformer3DModel", make)
    model, _ = models.MODELS["wan2.1-14b"].make("cpu", torch.bfloat16, tiny=True)
    assert asked == [torch.bfloat16] and torch.get_default_dtype() == torch.float32
    kept = {name for name, x in [*model.named_parameters(), *model.named_buffers()] if x.dtype == torch.float32}
    embedder = {f"condition_embedder.time_embedder.linear_{i}.{what}" for i in (1, 2) for what in ("weight", "bias")}
    assert kept == {"scale_shift_table", "blocks.0.scale_shift_table", "blocks.0.norm2.weight", "blocks.0.norm2.bias",
                    "rope.freqs_cos", "rope.freqs_sin"} | embedder
    assert measure._dtype(model) == "bfloat16"


def test_full_sizes_are_the_published_ones():
    """Tokens of a sample at full size. Sources: the models' pipelines in diffusers 0.42.0 at the videos' sizes named there."""
    class Config(dict):
        __getattr__ = dict.get

    patches = {"wan2.1-1.3b": (1, 2, 2), "wan2.1-14b": (1, 2, 2), "wan2.1-14b-720p": (1, 2, 2), "ltx": 1, "flux": 1}
    tokens = {name: entry.tokens(Config(patch_size=patches.get(name, 2), **{"patch_size_t": entry.config.get("patch_size_t")}))
              for name, entry in models.MODELS.items()}
    assert tokens == {"cogvideox-2b": 17550, "cogvideox-5b": 17550, "cogvideox-1.5-5b": 44880, "mochi": 23850,
                      "wan2.1-1.3b": 32760, "wan2.1-14b": 32760, "wan2.1-14b-720p": 75600, "hunyuanvideo": 32640,
                      "hunyuanvideo-720p": 118800, "ltx": 7392, "flux": 4096}


def test_text_before_the_video_is_the_models_own():
    found = {name: (entry.leading_text(), entry.leading_text(tiny=True)) for name, entry in models.MODELS.items()}
    assert found.pop("cogvideox-2b") == found.pop("cogvideox-5b") == found.pop("cogvideox-1.5-5b") == (226, 6)
    assert set(found.values()) == {(0, 0)}


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


def test_shares_and_bars_are_of_the_last_mode_and_noise_of_eager_steps(monkeypatch, tmp_path):
    axes = pytest.importorskip("matplotlib.axes", reason="matplotlib is not installed")
    row = dict(low_ms=1.0, high_ms=1.0, runs=3, speedup_over_exact=1.0)
    rows = [row | dict(mode=mode, method=method, title=method, median_ms=factor * ms, attention_share=factor / 4,
                       sqnr_db=10 * factor, peak_gib=float(factor))
            for factor, mode in ((1, "eager"), (2, "blocks")) for method, ms in (("int8+fp8", 30.0), ("none", 10.0))]
    result = dict(model="m", video_tokens=7, batch=2, dtype="bfloat16", rows=rows, left_out={}, failed={})
    about = dict(gpu="G", versions={}, commit="c")
    assert "| int8+fp8 | 30.0 (1.00x) | 60.0 (1.00x) | 50% | 2.0 | 10.0 |" in table.markdown(about, [result])
    bars = []
    monkeypatch.setattr(axes.Axes, "barh", lambda self, names, widths, left=0, **how: bars.append((names, widths, left)))
    table.plot(about, [result], tmp_path / "step.png")
    assert bars == [(["int8+fp8"], [20.0], 0), (["int8+fp8"], [40.0], 20.0)]


@pytest.mark.parametrize("count, shape", [(1, (1, 1)), (2, (1, 2)), (3, (1, 3)), (4, (2, 2)), (5, (2, 3))])
def test_up_to_three_panels_stand_in_a_row_and_four_two_by_two(count, shape, monkeypatch, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is not installed")
    shapes, subplots = [], pyplot.subplots
    monkeypatch.setattr(pyplot, "subplots", lambda *sizes, **how: shapes.append(sizes) or subplots(*sizes, **how))
    row = dict(mode="eager", method="int8+fp8", title="int8+fp8", median_ms=20953.0)
    result = dict(model="m", video_tokens=7, rows=[row])
    table.plot(dict(gpu="G", commit="c"), [result] * count, tmp_path / "step.png")
    assert shapes == [shape]


def test_both_frameworks_are_timed_one_after_the_other_and_set_side_by_side(tmp_path):
    assert bench(tmp_path, "--framework", "torch", "paddle", "--methods", "exact", "none", "--modes", "eager") == 0
    written = json.loads((tmp_path / "step.json").read_text())
    assert [(result["framework"], result["model"]) for result in written["models"]] == [("torch", "cogvideox-2b"),
                                                                                        ("paddle", "cogvideox-2b")]
    torchs, paddles = ({row["method"]: row["median_ms"] for row in result["rows"]} for result in written["models"])
    assert list(torchs) == list(paddles) == ["exact", "none"]
    page = (tmp_path / "step.md").read_text()
    assert f"| {torchs['exact']:.1f} | {paddles['exact']:.1f} | {paddles['exact'] / torchs['exact']:.3f} |" in page


def test_pytorchs_step_has_the_parts_of_paddles():
    paddle_side = pytest.importorskip("lowbit_video.eval.speed.step.paddle_side", reason="needs Paddle")
    found = {}
    for side in (torch_side.TorchSide(), paddle_side.PaddleSide()):
        entry = side.entry("cogvideox-2b")
        model, given = side.make(entry, tiny=True)
        for method in ("none", "int8+fp8"):
            with side.methods_of(model, entry, [method], None) as ways:
                timeline = parts.Timeline(model, lambda: 0, lambda a, b: 1.0, fused=method == "int8+fp8")
                with timeline.watching():
                    side.step(model, given, ways[method])()
            found[side.name, method] = [part for part, *_ in timeline._marks]
        assert not any(module._forward_hooks for module in model.modules()) if side.name == "torch" else True
    for method in ("none", "int8+fp8"):
        torchs, paddles = ([part for part in found[name, method] if part not in ("embeddings", "final")]
                           for name in ("torch", "paddle"))
        assert torchs == paddles and {"embeddings", "final"} < set(found["torch", method])


def test_parts_are_cogvideoxs_and_other_models_say_so():
    side = torch_side.TorchSide()
    run = lambda name: measure.measure(side, name, ["pytorch"], ["eager"], True, 1.0, lambda text: None, lambda result: None,
                                       True)
    result = run("cogvideox-2b")
    one, = result["profiles"]
    assert set(one["parts"]) == set(parts.PARTS) and one["waits"] == {"reads": None, "on the CPU": {}}
    assert not result["failed"] and not result["left_out"]
    result = run("ltx")
    assert result["left_out"] == {"profile": "its parts are those of CogVideoX"} and "profiles" not in result


def test_waits_are_counted_where_they_are_and_pytorchs_word_on_its_mode_is_none(monkeypatch):
    """PyTorch says once a process that its debug mode may miss some; the texts are those of its csrc/cuda and c10/cuda."""
    def say(text, file, line):
        warnings.warn_explicit(f"{text} (Triggered internally at /pytorch/a.cpp:1.)", UserWarning, file, line)

    def mode(value):
        modes.append(value)
        if len(modes) == 1:
            say("Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations",
                "/site-packages/torch/cuda/__init__.py", 1270)

    def step():
        for _ in range(2):
            say("called a synchronizing CUDA operation", "/site-packages/diffusers/models/embeddings.py", 7)
        say("something else", "/site-packages/torch/cuda/__init__.py", 8)

    modes, side = [], torch_side.TorchSide()
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", mode)
    side.device = "cuda"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert side.waits(step) == {"reads": {"models/embeddings.py:7": 2}, "on the CPU": {}}
        assert side.waits(lambda: None)["reads"] == {} and modes == ["warn", 0] * 2
