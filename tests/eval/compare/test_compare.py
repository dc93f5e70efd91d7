"""A whole evaluation on a toy pipeline: pairs, floor, planted defects, resuming after a kill -9, bad input."""
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("paddle", reason="PaddlePaddle is not installed")
HERE = Path(__file__).parents[1]
sys.path.insert(0, str(HERE))

from planted import Noise, NotANumber, SwapHeads, ZeroTail  # noqa: E402
from toy_pipeline import ToyPipeline  # noqa: E402

from lowbit_video import Recipe  # noqa: E402
from lowbit_video.eval.compare import paired  # noqa: E402
from lowbit_video.eval.compare.candidates import Candidate, applied, as_candidate  # noqa: E402
from lowbit_video.eval.compare.layers import by_module  # noqa: E402
from lowbit_video.eval.compare.paired import compare, read_prompts  # noqa: E402
from lowbit_video.eval.compare.settings import Settings, for_model  # noqa: E402
from lowbit_video.eval.compare.store import Store  # noqa: E402
from lowbit_video.eval.report.summary import CLEARLY_ABOVE, FAILED, summarise  # noqa: E402
from lowbit_video.eval.video import read_video  # noqa: E402

PROMPTS = ["a red ball", "two blue squares", "a green star"]
SETTINGS = Settings("toy", steps=2)
FAST = ["psnr", "ssim", "flicker"]


@pytest.fixture(scope="module")
def pipe():
    return ToyPipeline()


@pytest.fixture(scope="module")
def finished(pipe, tmp_path_factory):
    """One evaluation with every planted defect; (folder, lines that it said)."""
    folder, said = tmp_path_factory.mktemp("eval"), []
    planted = [Candidate(c.__name__, c) for c in (Noise, SwapHeads, ZeroTail, NotANumber)]
    compare(pipe, PROMPTS, ["int8+fp16", *planted], folder, settings=SETTINGS, metrics=FAST, say=said.append)
    return folder, said


def read(folder):
    store = Store(folder, write=False)
    return store.videos()


def test_every_planted_defect_is_clearly_above_the_floor(finished):
    summary = summarise(read(finished[0]))
    for run in ("Noise", "SwapHeads", "ZeroTail"):
        row = summary.row(run)
        assert row.verdict == CLEARLY_ABOVE
        assert row.cells["psnr"].times_floor.low > 100 and row.cells["ssim"].times_floor.low > 100
    assert summary.row("NotANumber").verdict == FAILED
    psnr = {run: summary.row(run).cells["psnr"].value for run in ("floor", "int8+fp16", "SwapHeads")}
    assert psnr["floor"].low > 100 > psnr["int8+fp16"].low > psnr["SwapHeads"].high


def test_the_floor_differs_but_hardly(finished):
    values = [v["figures"]["psnr"] for v in read(finished[0]) if v["run"] == "floor"]
    assert all(100 < value < 160 for value in values)  # 160 would be the very same bits: then nothing was reordered


def test_pairs_share_their_noise_and_the_record_is_whole(finished):
    folder, said = finished
    videos = read(folder)
    assert len(videos) == len({(v["prompt"], v["seed"], v["run"]) for v in videos}) == 21
    line = next(v for v in videos if v["run"] == "int8+fp16")
    [(variant, calls)] = line["attention"].items()
    assert variant.startswith("int8+fp16") and calls == 6 and line["fallbacks"] == 0
    assert len(line["frames"]["psnr"]) == 5
    assert line["figures"]["psnr"] == pytest.approx(np.mean(line["frames"]["psnr"]), abs=1e-4)
    exact = next(v for v in videos if v["run"] == "exact" and v["prompt"] == line["prompt"])
    assert "psnr" not in exact["figures"]
    a, b = (read_video(folder / v["clip"]) for v in (exact, line))
    assert a.shape == b.shape == (5, 36, 48, 3) and 0 < np.abs(a.astype(int) - b).mean() < 3
    assert said[-1].startswith("[21/21]") and "left" in said[-2] and any("FAILED" in s for s in said)
    assert not list((folder / "work").iterdir()) and not list(folder.glob("clips/.*"))


def test_a_second_start_repeats_nothing_and_a_new_candidate_is_added(finished, pipe):
    folder, _ = finished
    before = (folder / "results.jsonl").read_bytes()
    planted = [Candidate(c.__name__, c) for c in (Noise, SwapHeads, ZeroTail, NotANumber)]
    said = []
    compare(pipe, PROMPTS, ["int8+fp16", *planted], folder, settings=SETTINGS, metrics=FAST, say=said.append)
    assert (folder / "results.jsonl").read_bytes() == before
    assert said[-1] == "21 of 21 videos are finished already; 0 to make"
    with pytest.raises(ValueError, match="steps 2 -> 9"):
        compare(pipe, PROMPTS, ["int4+fp16"], folder, settings=Settings("toy", steps=9), metrics=FAST)
    compare(pipe, PROMPTS, ["int4+fp16"], folder, settings=SETTINGS, metrics=FAST, limit=1, say=said.append)
    assert (folder / "results.jsonl").read_bytes().startswith(before)
    added = read(folder)[21:]
    assert [(v["run"], v["prompt"]) for v in added] == [("int4+fp16", PROMPTS[0])]


KILLED = """
import sys
sys.path.insert(0, {here!r})
from toy_pipeline import ToyPipeline
from lowbit_video.eval.compare.paired import compare
from lowbit_video.eval.compare.settings import Settings
settings = Settings("toy", steps=2)
compare(ToyPipeline(), {prompts!r}, ["int8+fp16", "planted:Noise"], {out!r}, settings=settings, metrics=["psnr"])
"""


def test_kill_9_half_way_then_again_finishes_without_a_repeat(tmp_path, capsys):
    script = KILLED.format(here=str(HERE), prompts=PROMPTS, out=str(tmp_path))
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet)
    results = tmp_path / "results.jsonl"
    deadline = time.monotonic() + 120
    while not (results.exists() and results.read_bytes().count(b'"kind": "video"') >= 4) and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    with open(results, "ab") as file:
        file.write(b'{"kind": "video", "prompt": "a red b')  # as a kill inside the write would leave it
    before = [json.loads(line) for line in results.read_bytes().splitlines()[:-1]]
    finished = [(v["prompt"], v["seed"], v["run"]) for v in before if v["kind"] == "video"]
    assert 4 <= len(finished) < 12
    exec(script, {})
    assert f"{len(finished)} of 12 videos are finished already" in capsys.readouterr().out
    after = [json.loads(line) for line in results.read_bytes().splitlines()]
    assert after[: len(before)] == before
    keys = [(v["prompt"], v["seed"], v["run"]) for v in after if v["kind"] == "video"]
    assert len(keys) == len(set(keys)) == 12
    assert all((tmp_path / v["clip"]).is_file() for v in after if v["kind"] == "video")


class Stopped(Exception):
    """As if the machine had gone."""


@pytest.mark.parametrize("point", range(12))
def test_a_run_goes_on_from_every_point_at_which_it_can_stop(pipe, tmp_path, monkeypatch, point):
    """Before each video is made, and before and after its line is written, up to the second prompt's first."""
    points = iter(range(100))

    def stopping(work, *, after):
        def worked(*given, **named):
            if next(points) == point:
                raise Stopped
            made = work(*given, **named)
            if after and next(points) == point:
                raise Stopped
            return made
        return worked

    def write(path, video, fps):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")

    monkeypatch.setattr(paired, "write_lossless", write)
    monkeypatch.setattr(paired, "check_clips", lambda folder, fps: None)
    monkeypatch.setattr(paired, "environment", dict)
    again = lambda: compare(pipe, PROMPTS[:2], ["int8+fp16"], tmp_path, settings=Settings("toy", steps=1), metrics=["psnr"],
                            say=lambda line: None)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(paired, "generate", stopping(paired.generate, after=False))
        patch.setattr(Store, "append", stopping(Store.append, after=True))
        again()
    again()
    videos = read(tmp_path)
    assert [(v["prompt"], v["run"]) for v in videos] == [(p, r) for p in PROMPTS[:2] for r in ("exact", "floor", "int8+fp16")]
    assert all("seconds" in v and (tmp_path / v["clip"]).is_file() for v in videos)
    assert not list((tmp_path / "work").iterdir()) and summarise(videos).prompts == PROMPTS[:2]


def test_two_writers_are_refused_and_a_foreign_file_is_named(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(ValueError, match="another evaluation writes here"):
        Store(tmp_path)
    store.close()
    (tmp_path / "results.jsonl").write_text("hello\n")
    with pytest.raises(ValueError, match="results.jsonl:1: not a line of results"):
        Store(tmp_path)
    with pytest.raises(FileNotFoundError, match="no results here"):
        Store(tmp_path / "nowhere", write=False)


@pytest.mark.parametrize("line, words", [
    (b"3", "neither of run, video"), (b'{"kind": []}', "neither of"),
    (b'{"kind": "video", "prompt": "a", "seed": 0}', "run is None"),
    (b'{"kind": "video", "prompt": 3, "seed": 0, "run": "exact"}', "prompt is 3"),
    (b'{"kind": "run", "runs": []}', "settings is None"),
    (b'{"kind": "run", "runs": [], "settings": {}}', "name no model"),
    (b'{"a": "\xff"}', "decode"), (b"[" * 100000, "recursion"),
    (b'{"a": ' + b"9" * 5000 + b"}", "digits")], ids=lambda x: str(x)[:20])
def test_a_line_that_is_none_of_results_is_named(tmp_path, line, words):
    (tmp_path / "results.jsonl").write_bytes(line + b"\n")
    for write in (True, False):
        with pytest.raises(ValueError, match=f"results.jsonl:1: not a line of results .*{words}.*remove the line"):
            Store(tmp_path, write=write)


def test_bad_requests_are_named(pipe, tmp_path):
    for arguments, words in (
        (([], ["int8+fp16"]), "no prompts"),
        ((PROMPTS, []), "no candidates"),
        ((PROMPTS, ["int8+fp16", "int8+fp16"]), "named twice"),
        ((PROMPTS, ["int9+fp16"]), "int9"),
        ((PROMPTS, ["exact"]), "always runs"),
        ((PROMPTS, ["nosuchmodule:Thing"]), "cannot load the processor"),
        ((PROMPTS, ["planted:nosuch"]), "cannot load the processor"),
        ((PROMPTS, ["os:sep"]), "name a class"),
    ):
        with pytest.raises(ValueError, match=words):
            compare(pipe, *arguments, tmp_path)
    assert not list(tmp_path.iterdir())
    assert as_candidate("planted:Noise").make().__class__.__name__ == "Noise"


def test_prompt_files(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# a comment\n\n a red ball \nb\n")
    assert read_prompts(path) == ["a red ball", "b"]
    path.write_text("a red ball\nb\n", encoding="utf-8-sig")
    assert read_prompts(path) == ["a red ball", "b"]
    path.write_text("a red ball", encoding="utf-16")
    with pytest.raises(ValueError, match="prompts.txt is not UTF-8 text .*; save it as UTF-8"):
        read_prompts(path)
    path.write_text("x\nx\n")
    with pytest.raises(ValueError, match="'x' stands there more than once"):
        read_prompts(path)
    path.write_text("# nothing\n")
    with pytest.raises(ValueError, match="no prompt in it"):
        read_prompts(path)


def test_no_prompt_file_names_those_there_are(tmp_path, monkeypatch):
    root = paired.PROMPTS.parents[1]
    monkeypatch.chdir(root)
    there = "give a text of one prompt a line, such as eval/prompts/long_world.txt or eval/prompts/small_world.txt$"
    for given in ("nosuch.txt", "eval/cli.py/nosuch.txt"):
        with pytest.raises(FileNotFoundError, match=f"^no such file: {given}; {there}"):
            read_prompts(given)
    with pytest.raises(ValueError, match=f"^eval is a folder; {there}"):
        read_prompts("eval")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"such as {root}/eval/prompts/long_world.txt or "):
        read_prompts("nosuch.txt")
    monkeypatch.setattr(paired, "PROMPTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="give a text of one prompt a line$"):
        read_prompts("nosuch.txt")


def test_settings_come_from_the_model_folder_unless_asked(tmp_path):
    (tmp_path / "generation.json").write_text(json.dumps({"num_inference_steps": 25, "guidance_scale": 4.0, "fps": 10}))
    settings = for_model(tmp_path, steps=5)
    assert (settings.steps, settings.guidance, settings.fps, settings.height) == (5, 4.0, 10, None)
    assert settings.arguments() == {"num_inference_steps": 5, "guidance_scale": 4.0}


def test_a_recipe_is_a_candidate_by_its_file_or_its_name(pipe, tmp_path):
    assert as_candidate("safe").make() == Recipe.load("safe") and as_candidate("fast").label == "fast"
    Recipe([{"rung": "int8+fp16"}, {"layers": "*.0.*", "rung": "exact"}]).save(tmp_path / "mine.toml")
    mine = as_candidate(tmp_path / "mine.toml")
    with applied(pipe, mine, backend="reference"):
        processors = [str(block.attn1.processor) for block in pipe.transformer.transformer_blocks]
    assert processors == ["RecipeAttnProcessor(exact, backend=reference)"] + [
        "RecipeAttnProcessor(int8+fp16, backend=reference)"] * 2
    with pytest.raises(ValueError, match="no such file: .*none.toml"):
        as_candidate(tmp_path / "none.toml")
    assert list(map(str, by_module(mine, pipe.transformer, backend="reference").values())) == processors


def test_all_videos_of_a_folder_have_one_order_of_tokens(pipe, tmp_path, monkeypatch):
    Recipe([{"rung": "int8+fp16"}], {"order": "hilbert"}).save(tmp_path / "mine.toml")
    again = lambda *more: compare(pipe, PROMPTS[:1], [tmp_path / "mine.toml", *more], tmp_path / "out", metrics=["psnr"],
                                  settings=Settings("toy", steps=1), say=lambda text: None)
    with pytest.warns(UserWarning, match="mine.toml was calibrated with the tokens in the order 'hilbert'"):
        again()
    monkeypatch.setattr(pipe.transformer, "token_order", "hilbert", raising=False)  # which a toy says and does not do
    with pytest.raises(ValueError, match="out was begun with the tokens in the order 'raster', not 'hilbert'"):
        again("int8+fp8")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        applied(pipe, as_candidate(tmp_path / "mine.toml")).remove()


@pytest.mark.parametrize("stored, wanted", [
    ('{"world": "scenes"}', "scenes"), ('{"world": "other"}', "shapes"), (None, "shapes")])
def test_captions_are_read_in_the_world_of_the_models_folder(pipe, tmp_path, monkeypatch, stored, wanted):
    if stored:
        (tmp_path / "generation.json").write_text(stored)
    worlds, figures = [], paired.figures
    monkeypatch.setattr(paired, "figures", lambda video, reference, metrics, context: worlds.append(context.world) or figures(
        video, reference, metrics, context))
    compare(pipe, PROMPTS[:1], ["int8+fp16"], tmp_path / "out", settings=Settings(str(tmp_path), steps=1), metrics=["psnr"],
            say=lambda text: None)
    assert worlds == [wanted] * 3
