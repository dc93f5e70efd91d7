"""The report without a browser: self-contained, escaped, complete; Markdown and PNG; charts; speed files; the commands."""
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("paddle", reason="PaddlePaddle is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")
sys.path.insert(0, str(Path(__file__).parents[1]))

from planted import NotANumber, SwapHeads  # noqa: E402
from toy_pipeline import ToyPipeline  # noqa: E402

from lowbit_video.app.cli import main  # noqa: E402
from lowbit_video.eval.compare.candidates import Candidate  # noqa: E402
from lowbit_video.eval.compare.layers import measure_layers  # noqa: E402
from lowbit_video.eval.compare.paired import compare  # noqa: E402
from lowbit_video.eval.compare.settings import Settings  # noqa: E402
from lowbit_video.eval.report import picture  # noqa: E402
from lowbit_video.eval.report.bootstrap import Interval  # noqa: E402
from lowbit_video.eval.report.charts import frontier, ticks  # noqa: E402
from lowbit_video.eval.report.data import load, read_speed  # noqa: E402
from lowbit_video.eval.report.markdown import markdown  # noqa: E402
from lowbit_video.eval.report.page_data import short_names  # noqa: E402
from lowbit_video.eval.report.text import over_floor, over_floor_text, times  # noqa: E402
from lowbit_video.eval.report.write import write_report  # noqa: E402
from lowbit_video.eval.video import read_video  # noqa: E402

PROMPTS = ['a "red" <b>ball</b> </script>', "two blue squares"]
SETTINGS = Settings("toy", steps=2)
QUIET = lambda line: None  # noqa: E731


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A small evaluation with a layer table and its report."""
    folder, pipe = tmp_path_factory.mktemp("report"), ToyPipeline()
    planted = [Candidate("swap", SwapHeads), Candidate("nan", NotANumber)]
    compare(pipe, PROMPTS, ["int8+fp16", *planted], folder, settings=SETTINGS, metrics=["psnr", "ssim", "flicker"], say=QUIET)
    table = measure_layers(pipe, PROMPTS[0], ["int8+fp16"], settings=SETTINGS, measured_shares=False, say=QUIET)
    table.save(folder / "layers.npz")
    return folder, write_report(folder, say=QUIET)


def test_the_page_needs_nothing_from_outside(results):
    page = results[1]["html"].read_text()
    outside = re.sub(r"http://www.w3.org/[0-9a-z/]+", "", page)
    assert not re.search(r"https?://|<link|@import|src=\"(?!data:)", outside)
    assert "{{" not in page and "default-src 'none'" in page


def test_prompts_are_escaped_and_the_data_is_whole(results):
    page = results[1]["html"].read_text()
    assert "<b>ball" not in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S).group(1))
    assert [p["text"] for p in data["prompts"]] == PROMPTS
    assert [run["name"] for run in data["runs"]] == ["exact", "floor", "int8+fp16", "swap", "nan"]
    assert data["prompts"][0]["reel"]["runs"] == ["exact", "int8+fp16", "swap"]  # the failed run has no film
    assert "NaN" in data["prompts"][0]["runs"]["nan"]["error"]
    assert data["prompts_sort"] == {"key": "swap", "up": True, "figure": "psnr"}
    assert len(data["layers"]["values"]["int8+fp16"]["share"]["steps"]) == 3
    assert page.count('type="application/base64"') == 2


def test_the_films_show_what_the_clips_show(results, tmp_path):
    import base64

    page = results[1]["html"].read_text()
    (tmp_path / "reel.mp4").write_bytes(base64.b64decode(re.search(r'id="reel-0">(.*?)</script>', page).group(1)))
    film = read_video(tmp_path / "reel.mp4")
    exact = next(v for v in load(results[0]).videos.values() if v["run"] == "exact" and v["prompt"] == PROMPTS[0])
    clip = read_video(results[0] / exact["clip"])
    frames, height, width = clip.shape[:3]
    assert film.shape[0] == frames
    assert np.abs(film[:, :height, :width].astype(int) - clip).mean() < 8  # hard colour edges and half-size chroma


def test_markdown_has_every_run_with_interval_and_floor(results):
    text = results[1]["markdown"].read_text()
    rows = {line.split(" | ")[0].strip("| `"): line for line in text.splitlines() if line.startswith("| ")}
    assert set(rows) == {"run", "exact", "noise floor (exact, once more)", "int8+fp16", "swap", "nan"}
    assert re.search(r"\d+\.\d \[\d+\.\d, \d+\.\d\].*\+\d+ dB \[\+\d+, \+\d+\]", rows["swap"]) and "failed" in rows["nan"]
    assert "CPU reference, not a speed" in text  # seconds of the NumPy oracle must not pass for a speed
    assert "(report.png)" in text and "2 prompts, 1 seed each" in text


def test_groups_and_another_floor_are_said_where_lines_name_them(results, tmp_path):
    assert "By kind of prompt" not in results[1]["html"].read_text() and not load(results[0]).groups
    lines = [json.loads(line) for line in (results[0] / "results.jsonl").read_text().splitlines()]
    for line in lines:
        line |= {"group": "<striped>" if line["prompt"] == PROMPTS[0] else "plain"} if line["kind"] == "video" else {
            "floor": "another kernel"}
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = load(tmp_path)
    assert list(report.groups) == ["<striped>", "plain"]
    page = write_report(tmp_path, films=False, say=QUIET)["html"].read_text()
    kinds = re.search(r'id="groups".*?</section>', page, re.S).group(0)
    assert "&lt;striped&gt;" in kinds and "<striped>" not in kinds and ">1 prompt<" in kinds
    for group in report.groups.values():
        assert f"{group.row('swap').cells['psnr'].value.value:.1f}" in kinds
    assert "The floor (another kernel) is" in page and "reads the keys in another order" not in page
    assert "reads the keys in another order" in results[1]["html"].read_text()
    assert "that of the floor, another kernel." in markdown(report)


def test_smaller_films_where_asked(results):
    from lowbit_video.eval.report.films import make_reels

    report = load(results[0])
    whole, half = (next(iter(make_reels(report, QUIET, side).values())) for side in (560, report_width(report) // 2))
    assert (half.width, half.height) == (whole.width // 2, whole.height // 2)


def test_an_evaluation_cut_off_behind_the_exact_videos_has_a_report(results, tmp_path):
    lines = [json.loads(line) for line in (results[0] / "results.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line.get("run", "exact") == "exact"]
    assert 1 < len(kept) < len(lines)
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    made = write_report(tmp_path, films=False, say=QUIET)
    assert "No candidate has a PSNR yet." in made["html"].read_text()
    assert made["png"].read_bytes().startswith(b"\x89PNG")


def test_the_page_says_what_its_films_cost(results, tmp_path):
    from lowbit_video.eval.report.films import make_reels

    report, said = load(results[0]), []
    for crf in (12, 45):
        page = write_report(results[0], out=tmp_path / str(crf), film_crf=crf, say=QUIET)["html"].read_text()
        worst = max(reel.levels for reel in make_reels(report, QUIET, crf=crf).values())
        said.append(float(re.search(r"differ by up to ([\d.]+) of 255 levels", page)[1]))
        assert said[-1] == pytest.approx(worst, abs=0.051)
    assert 0 < said[0] < said[1]
    assert "{{" not in re.sub(r"<script.*?</script>", "", page, flags=re.S)
    assert "{{levels}}" not in write_report(results[0], out=tmp_path, films=False, say=QUIET)["html"].read_text()


def report_width(report):
    clip = next(v["clip"] for v in report.videos.values() if "clip" in v)
    return read_video(report.folder / clip).shape[2]


def test_the_picture_is_a_png_with_something_in_it(results):
    import imageio.v3 as iio

    picture = iio.imread(results[1]["png"])
    assert picture.shape[1] == 1650 and picture[..., :3].std() > 20


def test_a_long_prompt_stands_beside_the_pictures_title(results, monkeypatch):
    from matplotlib.figure import Figure

    drawn, frame = [], np.zeros((24, 32, 3), np.uint8)
    monkeypatch.setattr(picture, "frames_of", lambda report: (("a rather long word " * 9).strip(), [("exact", frame)] * 2))
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **named: drawn.append(figure))
    picture.draw_picture(load(results[0]))
    [figure] = drawn
    title, prompt = (text.get_window_extent() for text in figure.texts[:2])
    words = figure.texts[1].get_text()
    assert words.count("rather") == 9 and words.count("\n") == 1
    assert title.x1 < prompt.x0 and prompt.y1 <= figure.bbox.y1
    above = min(axes.get_window_extent().y1 for axes in figure.axes[:2])
    assert prompt.y0 > above


def test_a_small_page_without_films(results, tmp_path):
    paths = write_report(results[0], out=tmp_path, films=False, say=QUIET)
    assert "application/base64" not in paths["html"].read_text()
    assert paths["html"].stat().st_size < 120_000


def test_speed_comes_from_a_benchmark_if_named(results, tmp_path):
    rows = [{"tokens": 17776, "precision": "int8+fp16", "speedup": s, "error": None} for s in (1.4, 1.7)]
    rows += [{"tokens": 4096, "precision": "int8+fp16", "speedup": 9.0}, {"tokens": 17776, "precision": None, "speedup": 1.0}]
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"about": {"gpu": "H200"}, "rows": rows}))
    assert read_speed(path) == ({"exact": 1.0, "int8+fp16": 1.7}, "attention speed-up, H200, 17776 tokens")
    assert "attention speed-up, H200" in markdown(load(results[0], speed=path))
    assert "not a speed" not in markdown(load(results[0], speed=path))
    named = [{**row, "shape": f"s{row['tokens']}"} for row in rows] + [{"method": "FA", "tokens": 1, "speedup": 1.0}]
    path.write_text(json.dumps({"about": {}, "rows": named}))
    title = "attention speed-up over FA, GPU, s4096, 4096 tokens"
    assert read_speed(path, "s4096") == ({"exact": 1.0, "int8+fp16": 9.0}, title)
    with pytest.raises(ValueError, match="no shape 'none' in it; there are: s17776, s4096"):
        read_speed(path, "none")
    for odd in ({}, {"rows": 3}, {"rows": [3, {"precision": "int8+fp16", "speedup": "2", "tokens": 3}], "about": 3}):
        path.write_text(json.dumps(odd))
        with pytest.raises(ValueError, match="no row with a precision"):
            read_speed(path)
    path.write_text("[" * 100000)
    with pytest.raises(ValueError, match="bench.json is not valid JSON"):
        read_speed(path)


def test_a_model_that_does_not_follow_its_prompts_is_said_to(results, tmp_path):
    lines = [json.loads(line) for line in (results[0] / "results.jsonl").read_text().splitlines()]
    for kept, found in ((0.0, True), (1.0, False)):
        for line in lines:
            line.get("figures", {})["adherence.all"] = kept
        (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        paths = write_report(tmp_path, films=False, say=QUIET)
        for kind in ("html", "markdown"):
            assert ("adherence is near zero" in paths[kind].read_text()) == found


def test_numbers_for_people():
    assert [times(v) for v in (1.44, 31.7, 999, 1234, 251_500, 1.69e6, np.inf, np.nan)] == [
        "1.4×", "32×", "999×", "1\u202f230×", "251\u202f500×", "1.69 million ×", "∞×", "–"]
    assert [over_floor(v) for v in (1.0, 0.1, 9800, 0.0, np.inf, np.nan)] == [
        "+0 dB", "−20 dB", "+80 dB", "−∞ dB", "∞ dB", "–"]
    assert over_floor_text(Interval(100.0, 10.0, 1000.0, 8)) == "+40 dB [+20, +60]" and over_floor_text(None) == "no floor"
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0]) and ticks(17, 42) == [20, 25, 30, 35, 40]
    assert frontier([(1, 10), (2, 20), (3, 15), (2.5, 20)], faster_is_higher=False) == [(2, 20), (1, 10)]
    assert frontier([(1, 10), (2, 20), (3, 15)], faster_is_higher=True) == [(2, 20), (3, 15)]
    assert short_names(["transformer_blocks.0.attn1", "transformer_blocks.12.attn1"]) == ["layer 0", "layer 12"]


def test_the_commands(results, tmp_path, capsys):
    assert main(["eval", "report", str(results[0]), "--to", str(tmp_path), "--no-films"]) == 0
    assert (tmp_path / "report.md").is_file() and "report.html" in capsys.readouterr().out
    assert main(["eval", "metrics"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"psnr +paired +dB +higher is better +ready", out) and "needs --weights lpips=PATH" in out
    prompts = tmp_path / "p.txt"
    prompts.write_text("a red ball\n")
    for arguments, words in (
        (["report", str(tmp_path / "none")], "no results here"),
        (["compare", "--prompts", str(tmp_path / "none.txt")], "none.txt"),
        (["compare", "--prompts", str(prompts), "--precisions", "int9+fp16"], "int9"),
        (["compare", "--prompts", str(prompts), "--metrics", "lpips"], "--weights lpips=PATH"),
        (["compare", "--prompts", str(prompts), "--model", str(tmp_path / "nowhere")], "nowhere"),
    ):
        assert main(["eval", *arguments]) == 2
        assert words in capsys.readouterr().err


def test_without_matplotlib_a_report_is_refused_before_the_first_video(tmp_path, capsys, monkeypatch):
    from lowbit_video.eval import cli
    from lowbit_video.eval.report import write

    prompts = tmp_path / "p.txt"
    prompts.write_text("a red ball\n")
    made = []
    monkeypatch.setattr(write.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(cli, "load", lambda args: made.append(args) or (None, None))
    for arguments in (["compare", "--prompts", str(prompts)], ["report", str(tmp_path)]):
        assert main(["eval", *arguments]) == 2
        error = capsys.readouterr().err
        assert "pip install '.[eval]' from the checkout" in error and "--no-report" in error and error.count("\n") == 1
    assert not made
    monkeypatch.setattr("lowbit_video.eval.compare.paired.compare", lambda *given, **named: None)
    assert main(["eval", "compare", "--prompts", str(prompts), "--no-report", "--metrics", "psnr"]) == 0 and made


def test_a_whole_evaluation_of_a_random_model_by_command(tmp_path, capsys):
    from lowbit_video.pipelines.cogvideox import make_random_pipeline

    make_random_pipeline(tmp_path / "model", seed=0, kind="2b")
    (tmp_path / "p.txt").write_text("a red ball\na blue square\n")
    small = ["--model", str(tmp_path / "model"), "--steps", "2", "--frames", "8", "--height", "32", "--width", "48"]
    common = ["--precisions", "int8+fp16", "--out"]
    assert main(["eval", "compare", "--prompts", str(tmp_path / "p.txt"), *small, *common, str(tmp_path / "out"),
                 "--metrics", "psnr,ssim,motion_smoothness", "--limit", "1", "--order", "hilbert"]) == 0
    assert main(["eval", "layers", "--prompt", "a red ball", *small, *common, str(tmp_path / "out" / "layers.npz")]) == 0
    out = capsys.readouterr().out
    assert "[3/3] int8+fp16" in out and "final latent error" in out
    assert (tmp_path / "out" / "report.html").is_file()
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [line.get("run") for line in lines] == [None, "exact", "floor", "int8+fp16"]
    assert lines[0]["order"] == "hilbert" and lines[0]["settings"]["steps"] == 2 and lines[3]["figures"]["psnr"] > 20
