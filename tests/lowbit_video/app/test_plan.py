"""`lowbit-video plan`: what it lists, writes, draws and refuses."""
import importlib.util
import json
import pathlib
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from lowbit_video.app import cli, plan, plan_plot
from lowbit_video.distributed.cost.figures import load_figures
from lowbit_video.distributed.cost.models import find_model
from lowbit_video.distributed.cost.task import Task

SMALL = str(pathlib.Path(__file__).parents[3] / "examples" / "small_cogvideox" / "model")


def lines_of(capsys, *argv):
    assert cli.main(["plan", *argv]) == 0
    return capsys.readouterr().out.splitlines()


def rows_of(lines):
    """{column: cell} of each line of the table."""
    head = next(number for number, line in enumerate(lines) if line.lstrip().startswith("GPUs"))
    names = re.split(r"\s{2,}", lines[head].strip())
    return [dict(zip(names, line.split())) for line in lines[head + 1:lines.index("", head)]]


def test_splits_are_listed_best_first(capsys):
    lines = lines_of(capsys, "--model", "CogVideoX-5b", "--gpus", "8", "--link", "nvlink")
    rows = rows_of(lines)
    assert len(rows) == 7 and {row["GPUs"] for row in rows} == {"8"}
    assert [float(row["video s"]) for row in rows] == sorted(float(row["video s"]) for row in rows)
    for row in rows:
        assert int(row["cfg"]) * int(row["ulysses"]) * int(row["ring"]) == 8
        assert float(row["efficiency"].rstrip("%")) == pytest.approx(100 * float(row["speed-up"]) / 8, abs=1)
    assert "17776 tokens" in lines[0] and "travel as codes of int8+fp8" in lines[1]


def test_without_a_number_the_best_of_each_is_listed(capsys):
    rows = rows_of(lines_of(capsys))
    assert [int(row["GPUs"]) for row in rows] == list(plan.COUNTS) and rows[0]["speed-up"] == "1.00"
    best = rows_of(lines_of(capsys, "--gpus", "16"))[0]
    assert best in rows


def test_options_change_what_is_planned(tmp_path, capsys):
    path = tmp_path / "quick_host.json"
    path.write_text(json.dumps({"programs": {"paddle": {"layer_host_us": 0}}}))
    lines = lambda *argv: lines_of(capsys, "--gpus", "4", "--measured", str(path), *argv)
    shared = lambda *argv: next(row for row in rows_of(lines(*argv)) if row["ulysses"] == "4")
    step = lambda *argv: float(shared(*argv)["step ms"])
    usual = step()
    assert "The host launches a layer in 4.4 ms" in "\n".join(lines_of(capsys, "--gpus", "8"))
    assert "The host launches" not in "\n".join(lines())
    assert step("--link", "pcie4") > 1.2 * usual and step("--precision", "exact") > 1.1 * usual
    assert step("--exchange", "16bit") > usual and step("--frames", "25") < 0.6 * usual
    assert step("--height", "240", "--width", "368") < 0.4 * usual
    sent = lambda *argv: float(shared(*argv)["MB sent"])
    assert sent("--output", "int8") < sent() < sent("--exchange", "16bit")
    video = lambda *argv: float(rows_of(lines_of(capsys, "--gpus", "1", *argv))[0]["video s"])
    assert video("--steps", "150") - video("--steps", "100") == pytest.approx(video("--steps", "100") - video(), abs=0.2)
    assert video("--steps", "100") > 1.4 * video()
    memory = lambda *argv: float(rows_of(lines_of(capsys, "--gpus", "1", *argv))[0]["GiB a GPU"])
    assert memory("--no-text-encoder") == pytest.approx(memory() - 8.9, abs=0.2)


def test_a_recipe_is_planned_as_the_mean_of_its_steps(tmp_path, capsys):
    (mine := tmp_path / "mine.toml").write_text('format = 1\n[[rules]]\nrung = "int8+fp8"\n[[rules]]\nsteps = "0-0.25"\n'
                                                'rung = "exact"\n')
    (half := tmp_path / "half.toml").write_text('format = 1\n[[rules]]\nrung = "int8+fp8"\n')
    lines = lambda *argv: lines_of(capsys, "--gpus", "1", "--framework", "torch", *argv)
    step = lambda *argv: float(rows_of(lines(*argv))[0]["step ms"])
    low, exact = step("--precision", "int8+fp8"), step("--precision", "exact")
    assert step("--recipe", str(mine), "--steps", "4") == pytest.approx(0.75 * low + 0.25 * exact, abs=0.1)
    assert step("--recipe", str(mine), "--steps", "50") == pytest.approx((37 * low + 13 * exact) / 50, abs=0.1)
    text = "\n".join(lines("--recipe", str(mine), "--steps", "4", "--json", str(tmp_path / "plan.json")))
    assert f"attention {mine} (int8+fp8 in 75%, exact in 25%); Q, K and V travel as codes of int8+fp8 or 16 bit, the" in text
    assert "Steps differ: step ms and MB sent are means of the 4." in text and "measured:" not in text
    about = json.loads((tmp_path / "plan.json").read_text())["about"]
    assert about["precision"] == str(mine) and about["layers"] == {"int8+fp8": 22.5, "exact": 7.5}
    assert "Steps differ" not in "\n".join(lines("--recipe", str(half)))
    assert "attention the preset safe (int8+fp16 in 87%, exact in 13%)" in "\n".join(lines("--recipe", "safe"))


def test_what_cannot_be_is_named_with_its_reason(capsys):
    text = "\n".join(lines_of(capsys, "--model", SMALL, "--gpus", "8"))
    assert "cannot be: ulysses 8: 4 heads are fewer than 8 ranks" in text and "fewer blocks of 128 than 8 ranks" in text


def test_links_between_hosts_are_said(capsys):
    assert "goes over ib400" in "\n".join(lines_of(capsys, "--gpus", "16"))
    assert "goes over ib400" not in "\n".join(lines_of(capsys, "--gpus", "8"))


def test_everything_is_written_as_json(tmp_path, capsys):
    path = tmp_path / "plan.json"
    rows = rows_of(lines_of(capsys, "--gpus", "4", "--json", str(path)))
    written = json.loads(path.read_text())
    assert [round(split["step_ms"], 1) for split in written["splits"]] == [float(row["step ms"]) for row in rows]
    alone = rows_of(lines_of(capsys, "--gpus", "1"))[0]
    for split, row in zip(written["splits"], rows):
        assert float(row["speed-up"]) == pytest.approx(float(alone["step ms"]) / float(row["step ms"]), rel=0.01)
        assert float(row["speed-up"]) == pytest.approx(split["speed_up"], abs=0.01)
        assert float(row["MB sent"]) == pytest.approx(split["sent_bytes"] / 1e6, abs=0.6)
        assert float(row["GiB a GPU"]) == pytest.approx(split["memory_gib"], abs=0.06)
        assert split["step_ms"] == pytest.approx(sum(split["step"].values()))
        assert split["sent_bytes"] == sum(split["sent"].values()) and split["gpus"] == 4
    assert [split["gpus"] for split in written["scaling"]] == list(plan.COUNTS)
    assert written["about"]["tokens"] == 17776 and written["about"]["wire"] == "codes of int8+fp8"


def test_measured_rows_stand_beside_what_is_modelled(tmp_path, capsys):
    path = tmp_path / "mine.json"
    row = {"what": "transformer", "model": "CogVideoX-2b", "framework": "torch", "precision": "int8+fp8", "cfg": 2, "ms": 250}
    others = [{**row, **other, "ms": 9999} for other in ({"model": "CogVideoX-5b"}, {"framework": "paddle"}, {"link": "pcie4"},
                                                         {"precision": "int8+fp16"}, {"frames": 9})]
    path.write_text(json.dumps({"rows": [row, *others], "video": {"decode_ns": 0}}))
    more = tmp_path / "more.json"
    more.write_text(json.dumps({"rows": [{**row, "what": "layer", "cfg": 1, "ulysses": 2, "exchange": "16bit", "ms": 4.9},
                                         {**row, "what": "layer", "cfg": 1, "ulysses": 2, "output": "int8", "ms": 4.2}]}))
    text = "\n".join(lines_of(capsys, "--gpus", "2", "--framework", "torch", "--measured", str(path), str(more)))
    assert "measured: transformer on cfg 2: 250.0 ms, modelled 24" in text and "9999" not in text
    told = re.findall(r": ([\d.]+) ms, modelled ([\d.]+) \(([+-][\d.]+)%\)", text)
    assert len(told) > 3 and any(abs(float(off)) > 0.5 for *_, off in told)
    for ms, modelled, off in told:
        assert float(off) == pytest.approx(100 * (float(modelled) / float(ms) - 1), abs=1.5)
        assert float(off) * (float(modelled) - float(ms)) >= 0
    assert "layer on ulysses 2, exchange 16bit: 4.9 ms" in text and "ulysses 2, output int8: 4.2 ms" in text
    assert "measured: transformer on one rank: 498.0 ms" in text
    assert {line["decode s"] for line in rows_of(text.splitlines())} == {"0.00"}


def test_of_cuda_graphs_no_host_sets_the_pace(tmp_path, capsys):
    """They are compared with what was measured so, and the others with the others."""
    row = {"what": "transformer", "model": "CogVideoX-2b", "framework": "torch", "precision": "int8+fp8", "cfg": 2, "ring": 2}
    rows = [{**row, "ms": 77.7}, {**row, "ms": 66.6, "cuda_graph": True}]
    (path := tmp_path / "mine.json").write_text(json.dumps({"rows": rows, "programs": {"torch": {"layer_host_us": 9000}}}))
    lines = lambda *more: "\n".join(lines_of(capsys, "--gpus", "8", "--framework", "torch", "--measured", str(path), *more))
    usual, graph = lines(), lines("--cuda-graph", "--json", str(tmp_path / "plan.json"))
    assert "77.7 ms" in usual and "66.6 ms" not in usual and "77.7 ms" not in graph and "66.6 ms" in graph
    assert "runs it, as a CUDA graph\n" in graph and "as a CUDA graph" not in usual
    assert "The host launches" in usual and "The host launches" not in graph
    assert float(rows_of(graph.splitlines())[0]["step ms"]) < 100 < 270 < float(rows_of(usual.splitlines())[0]["step ms"])
    assert json.loads((tmp_path / "plan.json").read_text())["about"]["cuda_graph"] is True


@pytest.mark.parametrize("argv, words", [
    (["--cuda-graph"], "the framework is paddle; add --framework torch"),
    (["--model", "CogVideoX-9b"], "unknown model 'CogVideoX-9b'; there are: CogVideoX-2b, CogVideoX-5b, CogVideoX-1.5-5b"),
    (["--link", "rope"], "unknown link 'rope'; there are: nvlink, pcie4, ib400"), (["--gpus", "65"], "65 GPUs; from 1 to 64"),
    (["--gpus", "0"], "0 GPUs"), (["--precision", "int9"], "unknown precision 'int9'; there are: fp16"),
    (["--precision", "int2+fp8"], "attention at int2+fp8 is not measured; there are: int8+fp8"),
    (["--precision", "mine.toml"], "'mine.toml' is a recipe, and one precision is wanted here"),
    (["--recipe", "none.toml"], "no such file: none.toml"),
    (["--recipe", "safe", "--precision", "exact"], "--precision exact and --recipe safe are both given; give one of them"),
    (["--recipe", str(pathlib.Path(SMALL).parent / "long" / "recipe.toml")], "pooled keys on several GPUs are not measured"),
    (["--framework", "jax"], "there are: paddle, torch"), (["--steps", "0"], "0 steps"),
    (["--height", "100"], "multiples of 16"), (["--measured", "none.json"], "no such file: none.json"),
    (["--plot", "plan.jpg"], "ends in .png")])
def test_mistakes_are_one_line(argv, words, capsys):
    assert cli.main(["plan", *argv]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.out == "" and captured.err.count("\n") == 1


def test_a_plot_without_matplotlib_is_refused_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["plan", "--plot", str(tmp_path / "plan.png")]) == 2
    assert "pip install '.[eval]' from the checkout" in capsys.readouterr().err


def test_the_plot_tells_the_measured_from_the_modelled(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from matplotlib.figure import Figure

    figures = load_figures()
    task = Task(find_model("CogVideoX-2b"), figures, framework="torch")
    later = [{"what": "transformer", "source": "later", **split, "gpus": max(split.values(), default=1), "ms": ms}
             for split, ms in (({}, 520.0), ({"cfg": 2}, 260.0), ({"ring": 2}, 280.0), ({"ulysses": 2}, 279.0))]
    others = [{**later[1], **travels, "ms": 1.0} for travels in ({"exchange": "16bit"}, {"output": "int8"}, {"what": "layer"})]
    compared = plan.compare(task, figures) + later + [{**later[1], "source": "alone", "ms": 270.0}] + others
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: (drawn.append(figure), path.write_bytes(b"png")))
    plan_plot.plot_scaling(task, plan.best_by_count(task), compared, tmp_path / "plan.png")
    plan_plot.plot_scaling(replace(task, cuda_graph=True), plan.best_by_count(task), compared, tmp_path / "plan.png")
    assert ["as a CUDA graph" in figure.get_suptitle() for figure in drawn] == [False, True]
    times, shares = drawn[0].axes
    lines = {line.get_label(): line for line in times.lines}
    assert list(lines["modelled, best split"].get_xdata()) == list(plan.COUNTS)
    assert (list(lines["measured"].get_xdata()), list(lines["measured"].get_ydata())) == (
        [1, 1, 2, 2, 2, 2], [498.0, 520.0, 260.0, 280.0, 279.0, 270.0])
    assert [list(lines["measured, best split"].get_data()[axis]) for axis in (0, 1)] == [[1, 2], [498, 260]]
    best = {line.get_label(): line for line in shares.lines}["measured, best split"]
    assert [list(best.get_data()[axis]) for axis in (0, 1)] == [[1, 2], [100, 100]]
    efficiency = {line.get_label(): line for line in shares.lines}["measured"]
    wanted = [100, 100, 100, 100 * 260 / 280, 100 * 260 / 279]  # each beside one GPU of the same source, or not at all
    assert list(efficiency.get_ydata()) == pytest.approx(wanted)
    texts = [text.get_text() for text in shares.texts]
    assert texts[:2] == ["1·2·1\n1·1·2", "2·1·1"] and len(texts) == 2 + len(plan.COUNTS) - 1
    assert (tmp_path / "plan.png").read_bytes() == b"png"


def test_a_picture_is_written(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    lines_of(capsys, "--model", "CogVideoX-1.5-5b", "--gpus", "2", "--plot", str(tmp_path / "plan.png"))
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.png"]


def test_planning_imports_no_framework():
    code = ("import sys, lowbit_video.app.cli as c\nc.main(['plan', '--gpus', '2'])\n"
            "bad = {'paddle', 'torch', 'triton', 'matplotlib'} & set(sys.modules)\nassert not bad, bad")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
