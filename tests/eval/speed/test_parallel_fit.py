"""The model of cost's figures fitted to rows: what is found again, what matters, what is printed."""
import json

import numpy as np
import pytest

from lowbit_video.distributed.cost.figures import load_figures
from lowbit_video.distributed.cost.split import predict
from lowbit_video.eval.speed.parallel import fit

FIGURES = load_figures()
WAYS = [{}, {"ulysses": 4}, {"ring": 4}, {"cfg": 2, "ulysses": 2}, {"ulysses": 2, "ring": 2}]


def rows_of(figures, models=("CogVideoX-2b", "CogVideoX-5b")):
    """Rows of steps and their parts, as if these figures were what is."""
    rows = [{"what": what, "model": model, "framework": "torch", **way} for model in models for way in WAYS
            for what in ("transformer", "transformer computed", "transformer exchanged") if way or what == "transformer"]
    return [{**row, "ms": predict({**row, "ms": 1}, figures)} for row in rows]


def test_figures_that_made_the_rows_are_found_again():
    true = {"programs.torch.elementwise_ps": 60.0, "programs.torch.prologue_ps": 15.0, "links.nvlink.all_to_all_us": 130.0,
            "attention.64.block_us": 1.3, "programs.torch.models.CogVideoX-5b.elementwise_ps": 90.0}
    figures = FIGURES
    for name, value in true.items():
        figures = fit.with_figure(figures, name, value)
    begun = fit.with_figure(FIGURES, "programs.torch.prologue_ps", 0.0)  # no factor leads away from 0
    found = fit.figures_named(fit.fitted(rows_of(figures), begun, list(true)))
    assert {name: found[name] for name in true} == pytest.approx(true, rel=0.02)
    unlike = {name for name, value in fit.figures_named(FIGURES).items() if found[name] != value}
    assert unlike == set(true) - {"programs.torch.models.CogVideoX-5b.elementwise_ps"}
    fast = [{**row, "ms": 0.9 * row["ms"]} for row in rows_of(FIGURES)]
    assert fit.fitted(fast, FIGURES, ["around.hidden_share"]).around.hidden_share == 1


def test_influence_is_a_part_of_a_part():
    rows = rows_of(FIGURES, ["CogVideoX-2b"])
    slopes = fit.influence(rows, FIGURES, ["pace.int8+fp8.64", "links.nvlink.all_to_all_gb_s", "pace.exact.64"])
    assert slopes.shape == (len(rows), 3) and not slopes[:, 2].any() and 0.4 < slopes[0, 0] < 0.5
    exchanged = next(number for number, row in enumerate(rows) if row["what"] == "transformer exchanged")
    assert rows[exchanged]["ulysses"] == 4 and -1 < slopes[exchanged, 1] < -0.3 and slopes[exchanged, 0] == 0


def test_a_models_own_figure_and_a_wrong_name():
    mine = fit.with_figure(FIGURES, "programs.torch.models.CogVideoX-1.5-5b.elementwise_ps", 99.0)
    assert mine.programs["torch"].of("CogVideoX-1.5-5b").elementwise_ps == 99
    assert fit.figures_named(mine)["programs.torch.models.CogVideoX-1.5-5b.elementwise_ps"] == 99
    assert fit.figures_named(fit.with_figure(FIGURES, "attention.128.call_us", 7.0))["attention.128.call_us"] == 7
    for name, words in (("links.rope.small_us", "no figure 'rope'; there are: nvlink"), ("around.copy", "no figure 'copy'")):
        with pytest.raises(ValueError, match=words):
            fit.with_figure(FIGURES, name, 1.0)


def test_rows_are_printed_beside_what_is_modelled(tmp_path, capsys):
    path = tmp_path / "mine.json"
    rows = [{**row, "ms": 1.1 * row["ms"], "exchange": "auto"} for row in rows_of(FIGURES, ["CogVideoX-2b"])]
    path.write_text(json.dumps({"rows": rows}))
    fit.main([str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert f"{len(rows)} rows; off by 9.5% in the mean square, 9.5% at most" in lines
    assert "( -9.1%)  transformer computed CogVideoX-2b framework torch ulysses 4" in "\n".join(lines[:len(rows)])
    matters = [line.split()[-1] for line in lines[len(rows) + 2:]]
    assert matters[0] in ("attention.64.block_us", "pace.int8+fp8.64") and "pace.exact.64" not in matters
    fit.main([str(path), "--only", "exchanged", "cfg 2", "--fit", "links.nvlink.all_to_all_us", "links.nvlink.small_us"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and "0.0%)" in lines[0] and lines[1].startswith("1 rows; off by 0.0%")
    assert float(lines[2].removeprefix("links.nvlink.all_to_all_us: ")) > 88
    with pytest.raises(ValueError, match="no row of .* has nonsense"):
        fit.main([str(path), "--only", "nonsense"])


def test_errors_are_logarithms():
    row = {"what": "transformer", "model": "CogVideoX-2b", "ms": 1}
    ms = predict(row, FIGURES)
    assert fit.errors([{**row, "ms": ms}, {**row, "ms": 2 * ms}], FIGURES) == pytest.approx([0, -np.log(2)])
