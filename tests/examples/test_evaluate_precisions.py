"""The evaluation by precision at toy size on a CPU: it goes on where it stopped, frameworks agree, its table is right."""
import contextlib
import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the example is written in PyTorch")
pytest.importorskip("diffusers", reason="the model is made of diffusers' classes")
pytest.importorskip("transformers", reason="the text encoder is transformers' T5EncoderModel")
pytest.importorskip("skimage", reason="SSIM is scikit-image's")
from graph_double import doubled  # noqa: E402
from lowbit_video import Recipe  # noqa: E402
from lowbit_video.cuda_graphs.forward import CudaGraph  # noqa: E402
from lowbit_video.errors import UnsupportedError  # noqa: E402
from lowbit_video.eval.metrics.shared.device import Device  # noqa: E402
from lowbit_video.pipelines.shared.video_files import BadFramesError  # noqa: E402

FOLDER = Path(__file__).parents[2] / "examples" / "small_cogvideox"
pytestmark = pytest.mark.torch
BEGUN = ["--captions", "3", "--together", "2", "--steps", "2", "--workers", "1", "--no-page", "--device", "cpu"]


@pytest.fixture(scope="module")
def whole(code, model, tmp_path_factory):
    """A finished evaluation."""
    out = tmp_path_factory.mktemp("whole")
    assert code.main([*BEGUN, "--model", str(model), "--out", str(out), "--precisions", "int8+fp16", "int2+fp16"]) == 0
    return out


def lines(folder, kind="video"):
    return [line for line in map(json.loads, (folder / "results.jsonl").read_text().splitlines()) if line["kind"] == kind]


def test_every_run_is_measured_against_the_exact_video_of_its_noise(code, whole):
    made = lines(whole)
    assert [line["run"] for line in made] == [
        run for count in (2, 1) for run in ("exact", "floor", "int8+fp16", "int2+fp16") for _ in range(count)]
    assert {sum(line["attention"].values()) for line in made if line["run"] != "exact"} == {2 * code.models.TINY.layers}
    by_run = {run: [line for line in made if line["run"] == run] for run in ("exact", "floor", "int8+fp16", "int2+fp16")}
    psnr = {run: np.mean([line["figures"]["psnr"] for line in own]) for run, own in by_run.items() if run != "exact"}
    assert psnr["floor"] > 110 > psnr["int8+fp16"] + 20 and psnr["int8+fp16"] > psnr["int2+fp16"] + 20 > 40
    assert all("psnr" not in line["figures"] and "attention" not in line for line in by_run["exact"])
    assert all(list(line["attention"]) == ["exact (reference-exact)"] for line in by_run["floor"])
    assert all(next(iter(line["attention"])).startswith("int8+fp16 (") for line in by_run["int8+fp16"])
    assert all(line["fallbacks"] == 0 for line in made if line["run"] != "exact")
    assert all(0 < line["seconds"] == line["timings"]["denoise"] < 30 for line in made)
    groups = {line["prompt"]: line["group"] for line in made}
    assert all((group in caption) or group in ("plain", "dotted") for caption, group in groups.items())
    clips = {line["prompt"] for line in made if "clip" in line}
    assert {groups[caption] for caption in clips} == set(groups.values()) and len(clips) == len(set(groups.values()))
    assert all((whole / line["clip"]).stat().st_size > 500 for line in made if "clip" in line)


def test_the_table_says_what_the_lines_say(whole):
    record, made = json.loads((whole / "precisions.json").read_text()), lines(whole)
    own = [line for line in made if line["run"] == "int8+fp16"]
    row = record["rows"]["int8+fp16"]
    assert row["psnr"]["value"] == pytest.approx(np.mean([line["figures"]["psnr"] for line in own]))
    assert row["psnr"]["low"] < row["psnr"]["value"] < row["psnr"]["high"]
    median = {run: np.median([line["seconds"] for line in made if line["run"] == run]) for run in record["rows"]}
    assert record["best_exact"] == min(("exact", "floor"), key=median.get)
    assert row["seconds"]["value"] == pytest.approx(median["int8+fp16"])
    assert row["speed_up"]["value"] == pytest.approx(median[record["best_exact"]] / median["int8+fp16"])
    assert record["rows"][record["best_exact"]]["speed_up"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert sum(group["captions"] for group in record["groups"].values()) == record["captions"] == 3
    for name, group in record["groups"].items():
        mine = [line["figures"]["psnr"] for line in own if line["group"] == name]
        assert group["rows"]["int8+fp16"]["psnr"]["value"] == pytest.approx(np.mean(mine))
    error = lambda run: np.mean([10 ** (-line["figures"]["psnr"] / 20) for line in made if line["run"] == run])
    assert row["psnr_over_floor_db"]["value"] == pytest.approx(20 * np.log10(error("int8+fp16") / error("floor")), abs=1e-6)
    assert record["dtype"] == "float32" and {"lpips", "cuDNN", "FlashAttention-4"} <= set(record["missing"])
    text = (whole / "precisions.md").read_text()
    assert "compiled" not in text and "CUDA graph" not in text
    assert "is not a speed" not in text and "its seconds are not a speed" in text
    assert text.count("| int2+fp16 |") == 1 + len(record["groups"]) and "lpips (needs --weights lpips=PATH" in text


def test_the_tables_are_made_of_a_folder_alone(code, whole, monkeypatch):
    written = {name: (whole / name).read_bytes() for name in ("precisions.json", "precisions.md")}
    for name in written:
        (whole / name).unlink()
    monkeypatch.setattr(code.evaluate, "TorchMaker", None)
    assert code.main(["--out", str(whole), "--tables", "--no-page"]) == 0
    assert {name: (whole / name).read_bytes() for name in written} == written
    with pytest.raises(SystemExit):
        code.main(["--out", str(whole), "--weights", "lpips"])


@pytest.mark.parametrize(("asked", "said"), [
    (["--clips", "1", "--no-page"], "no clip can be kept: .*does not start.*--clips 0 keeps none"),
    (["--clips", "0"], "matplotlib draws: .*--no-page makes the tables alone"), (["--clips", "0", "--no-page"], None)])
def test_what_cannot_be_kept_is_said_before_the_work(code, model, tmp_path, monkeypatch, asked, said):
    class Reached(Exception):
        pass

    def begin(*_):
        raise Reached

    find = importlib.util.find_spec
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nowhere/ffmpeg")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "matplotlib" else find(name, *more))
    monkeypatch.setattr(code.evaluate, "TorchMaker", begin)
    with pytest.raises(SystemExit if said else Reached, match=said):
        code.main(["--model", str(model), "--out", str(tmp_path), "--precisions", "int8+fp16", *asked])


@pytest.mark.parametrize(("asked", "said"), [(["--tile-side", "0"], "--tile-side 0: at least one pixel"),
                                             (["--film-crf", "-1"], "--film-crf -1"),
                                             (["--film-crf", "52"], "0 (lossless) to 51")])
def test_a_page_that_cannot_be_is_refused_at_once(code, whole, capsys, asked, said):
    with pytest.raises(SystemExit):
        code.main(["--out", str(whole), "--tables", *asked])
    assert said in capsys.readouterr().err


def test_the_page_is_made_as_asked(code, whole, monkeypatch):
    asked = []
    monkeypatch.setattr(code.evaluate, "write_report", lambda out, **how: asked.append((out, how)))
    assert code.main(["--out", str(whole), "--tables", "--tile-side", "1", "--film-crf", "51"]) == 0
    assert code.main(["--out", str(whole), "--tables", "--film-crf", "0"]) == 0
    sizes = [(1, 51), (code.evaluate.TILE_SIDE, 0)]
    assert asked == [(whole, {"tile_side": side, "film_crf": crf}) for side, crf in sizes]


@pytest.fixture(scope="module")
def parts(code, model, tmp_path_factory):
    """The same evaluation by two processes, the second caption in the other."""
    folders = [tmp_path_factory.mktemp("part") for _ in range(2)]
    for number, out in enumerate(folders, 1):
        begun = [*BEGUN, "--part", f"{number}/2", "--model", str(model), "--out", str(out)]
        assert code.main([*begun, "--precisions", "int8+fp16", "int2+fp16"]) == 0
    return folders


def test_parts_together_are_what_one_process_makes(code, whole, parts, tmp_path):
    captions = list(dict.fromkeys(line["prompt"] for line in lines(whole)))
    assert [list(dict.fromkeys(line["prompt"] for line in lines(part))) for part in parts] == [captions[::2], captions[1::2]]
    assert code.main(["--join", *map(str, reversed(parts)), "--out", str(tmp_path), "--no-page"]) == 0
    made = lines(tmp_path)
    assert list(dict.fromkeys(line["prompt"] for line in made)) == captions
    figures = [{(v["prompt"], v["run"]): v["figures"] for v in lines(folder)} for folder in (tmp_path, whole)]
    assert figures[0] == figures[1]
    assert {v["clip"] for v in made if "clip" in v} == {v["clip"] for v in lines(whole) if "clip" in v}
    assert all((tmp_path / v["clip"]).stat().st_size > 500 for v in made if "clip" in v)
    timed = ("seconds", "speed_up")
    one, joined = ({name: value for name, value in json.loads((folder / "precisions.json").read_text()).items()
                    if name not in ("best_exact", "environment")} for folder in (whole, tmp_path))
    for record in (one, joined):
        for row in record["rows"].values():
            assert all(row.pop(name)["value"] > 0 for name in timed)
    assert joined == one and joined["captions"] == joined["captions_wanted"] == 3
    assert "Not finished: 3 captions" in (parts[0] / "precisions.md").read_text()
    with pytest.raises(ValueError, match="has results; give another --out"):
        code.main(["--join", *map(str, parts), "--out", str(tmp_path)])


def test_parts_of_another_kind_are_refused(code, parts, tmp_path, capsys):
    def with_run(name, **changed):
        folder = tmp_path / name
        folder.mkdir()
        stored = [json.loads(line) for line in (parts[1] / "results.jsonl").read_text().splitlines()]
        stored = [line | changed if line["kind"] == "run" else line for line in stored]
        (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in stored))
        return folder

    run, out = lines(parts[1], "run")[0], tmp_path / "out"
    for number, (changed, said) in enumerate((
            ({"dtype": "float16"}, "dtype float16"), ({"compiled": True}, "compiled True"),
            ({"framework": "paddle"}, "framework paddle"), ({"order": "hilbert"}, "order hilbert"),
            ({"backend": "triton"}, "backend triton"), ({"reference": "another"}, "reference another"),
            ({"cuda_graph": True}, "cuda_graph True"),
            ({"settings": run["settings"] | {"steps": 5}}, "steps 5 -> 2"), ({"prompts": run["prompts"][:2]}, "prompts"),
            ({"seeds": [1]}, "seeds"), ({"environment": run["environment"] | {"device": "another"}}, "device another"))):
        folder = with_run(str(number), **changed)
        with pytest.raises(ValueError, match=f"{number} was run otherwise than .*{said}"):
            code.main(["--join", str(parts[0]), str(folder), "--out", str(out)])
    with pytest.raises(ValueError, match="exact of '.*' is in .* and in"):
        code.main(["--join", *map(str, parts), str(with_run("again")), "--out", str(out)])
    assert not out.exists()
    for text in ("0/2", "3/2", "1", "1/0", "a/b"):
        with pytest.raises(SystemExit):
            code.evaluate.arguments(["--part", text])
        assert "write I/N" in capsys.readouterr().err


def test_it_goes_on_where_it_was_stopped_with_the_same_figures(code, model, whole, tmp_path, monkeypatch, capfd):
    begun = [*BEGUN, "--model", str(model), "--out", str(tmp_path), "--precisions", "int8+fp16", "int2+fp16"]
    made, make = [], code.makers.TorchMaker.make

    def killed(self, *call):
        made.append(call)
        if len(made) == 9:  # of each run, first two steps of no caption, then two captions: this is int8+fp16's second
            raise KeyboardInterrupt
        return make(self, *call)

    monkeypatch.setattr(code.makers.TorchMaker, "make", killed)
    with pytest.raises(KeyboardInterrupt):
        code.main(begun)
    assert [line["run"] for line in lines(tmp_path)] == ["exact", "exact", "floor", "floor"]
    assert code.main([*begun, "--minutes", "0"]) == 0 and len(lines(tmp_path)) == 4
    assert "time is over" in capfd.readouterr().out
    assert json.loads((tmp_path / "precisions.json").read_text())["not_made"] == ["int8+fp16", "int2+fp16"]
    assert "Not made before the time was over: int8+fp16, int2+fp16." in (tmp_path / "precisions.md").read_text()
    assert code.main(begun) == 0
    assert "Not made" not in (tmp_path / "precisions.md").read_text()
    assert len(made) == 9 + 3 * 3 + 4 * 2  # the exact videos of the first two captions are made again, as references
    figures = [{(v["prompt"], v["run"]): v["figures"] for v in lines(folder)} for folder in (tmp_path, whole)]
    assert figures[0] == figures[1]
    count = len(made)
    assert code.main(begun) == 0 and len(made) == count
    with pytest.raises(ValueError, match="was begun with dtype float32"):
        code.main([*begun, "--dtype", "bfloat16"])


def test_paddle_makes_the_same_videos_of_the_same_noise(code, model, whole, tmp_path):
    pytest.importorskip("paddle", reason="paddlepaddle is not installed")
    begun = [*BEGUN, "--model", str(model), "--out", str(tmp_path), "--framework", "paddle", "--precisions", "int2+fp16"]
    assert code.main([*begun, "--beside", str(whole)]) == 0
    record = json.loads((tmp_path / "precisions.json").read_text())
    apart = record["beside"]["psnr_db"]
    assert len(apart) == len(record["groups"]) and min(apart.values()) > 55  # of 8-bit clips
    for name, folder in (("floor_db", tmp_path), ("floor_there_db", whole)):
        floors = {v["prompt"]: v["figures"]["psnr"] for v in lines(folder) if v["run"] == "floor"}
        assert record["beside"][name] == {caption: floors[caption] for caption in apart}
    here, there = (np.mean(list(record["beside"][name].values())) for name in ("floor_db", "floor_there_db"))
    told = f"Of the same {len(apart)} the noise floor is at {here:.1f} dB here and {there:.1f} there."
    assert told in (tmp_path / "precisions.md").read_text() and f"{here:.1f}" != f"{there:.1f}"
    theirs = json.loads((whole / "precisions.json").read_text())["rows"]["int2+fp16"]["psnr"]["value"]
    assert record["rows"]["int2+fp16"]["psnr"]["value"] == pytest.approx(theirs, abs=0.1)
    assert record["framework"] == "paddle" and "captions are" in (tmp_path / "precisions.md").read_text()


def beside_a_gpu(code, monkeypatch, framework="torch"):
    """The tensors of a framework on a CPU as the GPU that compares videos."""
    monkeypatch.setattr(code.evaluate, "gpu_of", lambda maker: Device(framework, "cpu:0" if framework == "torch" else "cpu"))


@pytest.mark.parametrize("framework, workers", [("torch", "2"), ("paddle", "1")])
def test_a_device_compares_the_videos_with_the_figures_of_the_workers(framework, workers, code, model, whole, tmp_path,
                                                                     monkeypatch):
    pytest.importorskip(framework, reason=f"of torch and Paddle, {framework} is not installed")
    beside_a_gpu(code, monkeypatch, framework)
    compared, seen = [], code.scoring.measured
    monkeypatch.setattr(code.evaluate, "compared", lambda *pair: compared.append(pair) or code.scoring.compared(*pair))
    if workers == "1":  # in this process
        monkeypatch.setattr(code.scoring, "measured", lambda video, reference, *job: seen(video, {None: None}[reference], *job))
    begun = [*BEGUN, "--model", str(model), "--precisions", "int8+fp16", "int2+fp16", "--workers", workers]
    assert code.main([*begun, "--out", str(tmp_path / "gpu")]) == 0 and len(compared) == 3 * 3
    assert {context.device.framework for *_, context in compared} == {framework}
    made = lines(tmp_path / "gpu")
    for one, other in zip(made, lines(whole), strict=True):
        assert one["figures"] == pytest.approx(other["figures"], rel=1e-12) and one["frames"] == other["frames"]
        assert one.keys() == other.keys() and list(one["figures"]) == list(other["figures"])
    for clip in [line["clip"] for line in made if "clip" in line]:
        assert (tmp_path / "gpu" / clip).read_bytes() == (whole / clip).read_bytes()
    monkeypatch.setattr(code.scoring, "measured", seen)
    assert code.main([*begun, "--captions", "1", "--out", str(tmp_path / "cpu"), "--compare-on", "cpu"]) == 0
    assert len(compared) == 3 * 3


@pytest.mark.parametrize("name, framework, cuda, there", [
    ("cpu", "torch", True, None), ("cpu", "paddle", True, None), ("cuda:1", "torch", True, Device("torch", "cuda:1")),
    ("gpu:0", "paddle", False, Device("paddle", "gpu:0")), ("cudev:0", "paddle", True, Device("torch", "cuda"))])
def test_a_gpu_that_makes_videos_compares_them(name, framework, cuda, there, code, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert code.scoring.gpu_of(SimpleNamespace(framework=framework, pipe=SimpleNamespace(device=name))) == there


def test_a_device_that_errs_or_fails_compares_nothing(code, monkeypatch, capfd):
    device, tried = Device("torch", "cpu:0"), (("psnr", "ssim", "adherence"), {}, 64, 80)
    assert code.scoring.trusted(None, *tried) is None
    assert code.scoring.trusted(device, *tried) is device and capfd.readouterr().out == ""
    assert code.scoring.trusted(Device("torch", "nowhere"), *tried) is None
    assert "workers compare the videos, not torch's nowhere: RuntimeError" in capfd.readouterr().out
    unit = Device.unit
    monkeypatch.setattr(Device, "unit", lambda self, frames: (32 * unit(self, frames)).round() / 32)
    assert code.scoring.trusted(device, *tried) is None
    said = capfd.readouterr().out
    assert "not torch's cpu:0: psnr is " in said and "ssim is " in said


@pytest.mark.parametrize("device", [None, "torch"])
def test_nothing_is_at_work_while_a_video_is_timed(device, code, model, tmp_path, monkeypatch):
    """Workers begin when a run's videos are all denoised, and have ended before the next run's first timed one."""
    log, make, decode = [], code.makers.TorchMaker.make, code.makers.TorchMaker.decode
    if device:
        beside_a_gpu(code, monkeypatch, device)
    monkeypatch.setattr(code.evaluate, "kept_shares", lambda *_: {})
    monkeypatch.setattr(code.makers.TorchMaker, "make", lambda self, caption, noise, steps=None: log.append(
        "warm" if steps else "timed") or make(self, caption, noise, steps))
    monkeypatch.setattr(code.makers.TorchMaker, "decode", lambda self, latents: log.append("decoded") or decode(self, latents))

    def start(self, *job):
        log.append("begun")
        return lambda: log.append("ended") or code.scoring.measured(*job)

    monkeypatch.setattr(code.scoring.Workers, "start", start)
    begun = [*BEGUN, "--captions", "2", "--model", str(model), "--out", str(tmp_path), "--precisions", "int8+fp16"]
    assert code.main(begun) == 0
    scored, ended = ["decoded", "begun"] * 2, ["ended"] * 2
    run = [*ended, "timed", "timed", *scored]
    assert log == ["warm", "timed", "timed", *scored, "warm", *run, "warm", *run, *ended]


@pytest.mark.parametrize("device", [None, "torch"])
def test_a_broken_video_is_a_result(device, code, model, tmp_path, monkeypatch):
    """Of a run, and of the reference, with which none of its caption can be compared then."""
    if device:
        beside_a_gpu(code, monkeypatch, device)
    decode, made = code.makers.TorchMaker.decode, []

    def breaks(self, latents):
        made.append(latents)
        if len(made) == 6:  # two captions of the exact run, of the floor, of int8+fp16
            raise BadFramesError("not finite")
        return np.full_like(decode(self, latents), np.nan) if len(made) == 1 else decode(self, latents)

    monkeypatch.setattr(code.makers.TorchMaker, "decode", breaks)
    begun = [*BEGUN, "--captions", "2", "--model", str(model), "--out", str(tmp_path), "--precisions", "int8+fp16"]
    assert code.main(begun) == 0
    broken = [(line["run"], "NaN" in line["error"] or line["error"]) for line in lines(tmp_path) if "error" in line]
    other = "the exact video is broken" if device else True
    assert broken == [("exact", True), ("floor", other), ("int8+fp16", other), ("int8+fp16", "not finite")]
    rows = json.loads((tmp_path / "precisions.json").read_text())["rows"]
    assert [rows[run]["failed"] for run in rows] == [1, 1, 2] and rows["floor"]["psnr"]["value"] > 110


def test_what_a_kernel_does_not_serve_is_a_failure_in_the_table(code, model, tmp_path, monkeypatch):
    make = code.makers.TorchMaker.make

    def refuses(self, caption, noise, steps=None):
        if any("int4" in str(p) for p in self.pipe.transformer.attn_processors.values()):
            raise UnsupportedError("no kernel here")
        latents, seconds = make(self, caption, noise, steps)
        if any("int2" in str(p) for p in self.pipe.transformer.attn_processors.values()):
            latents = torch.full_like(latents, np.nan)
        return latents, seconds

    monkeypatch.setattr(code.makers.TorchMaker, "make", refuses)
    begun = [*BEGUN, "--captions", "2", "--model", str(model), "--out", str(tmp_path)]
    assert code.main([*begun, "--precisions", "int4+fp16", "int2+fp16", "int8+fp16"]) == 0
    errors = {line["run"]: line["error"] for line in lines(tmp_path) if "error" in line}
    assert errors.keys() == {"int4+fp16", "int2+fp16"} and "NaN" in errors["int2+fp16"]
    record = json.loads((tmp_path / "precisions.json").read_text())
    assert [record["rows"][run]["failed"] for run in ("int4+fp16", "int2+fp16", "int8+fp16")] == [2, 2, 0]
    assert "| int4+fp16 (failed on 2) | - |" in (tmp_path / "precisions.md").read_text()


def test_another_exact_kernel_takes_its_tensors_in_the_order_it_is_made_for(code):
    q, k, v = (torch.randn(2, 9, 3, 32, generator=torch.Generator().manual_seed(i)) for i in range(3))
    wanted = torch.einsum("bhnm,bmhd->bnhd", torch.softmax(torch.einsum("bnhd,bmhd->bhnm", q, k) * 0.3, -1), v)
    found = code.makers.by_sdpa(torch.nn.attention.SDPBackend.MATH, q, k, v, 0.3)
    torch.testing.assert_close(found, wanted)
    calls = []
    processor = code.makers.OtherExactProcessor("mine", lambda *call: calls.append(call) or "out")
    assert processor.attend(q, k, v, scale=0.3) == "out" and calls[0][0] is q and calls[0][3] == 0.3
    out, lse = processor.attend(q, k, v, scale=0.3, return_lse=True)
    torch.testing.assert_close(out, wanted)
    assert len(calls) == 1 and lse.shape == (2, 3, 9)


def test_blocks_are_compiled_for_a_run_and_not_after_it(code):
    blocks = torch.nn.ModuleList([torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)])
    maker = object.__new__(code.makers.TorchMaker)
    maker.pipe = SimpleNamespace(transformer=SimpleNamespace(transformer_blocks=blocks))
    for wanted in (True, False):
        with pytest.raises(KeyError), maker.compiled(wanted):
            assert [block._compiled_call_impl is not None for block in blocks] == [wanted] * 2
            raise KeyError  # whatever happens
        assert all(block._compiled_call_impl is None for block in blocks)
    with pytest.raises(ValueError, match="leave it out with --framework paddle"), code.makers.PaddleMaker.compiled(None, True):
        pass


def test_compiled_runs_say_so_and_are_not_mixed_with_others(code, model, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(code.makers.TorchMaker, "compiled",
                        lambda self, wanted: asked.append(wanted) or contextlib.nullcontext())
    begun = [*BEGUN, "--captions", "1", "--model", str(model), "--out", str(tmp_path), "--precisions", "int8+fp16"]
    assert code.main([*begun, "--compile"]) == 0 and asked == [True] * 3
    assert ", blocks compiled, " in (tmp_path / "precisions.md").read_text()
    with pytest.raises(ValueError, match="was begun with compiled True"):
        code.main(begun)


def test_the_transformer_is_a_graph_for_a_run_and_not_after_it(code, monkeypatch):
    doubled(monkeypatch)
    maker = object.__new__(code.makers.TorchMaker)
    maker.pipe = SimpleNamespace(transformer=torch.nn.Linear(3, 3))
    for wanted in (True, False):
        with pytest.raises(KeyError), maker.graphed(wanted):
            assert isinstance(vars(maker.pipe.transformer).get("forward"), CudaGraph) == wanted
            raise KeyError  # whatever happens
        assert "forward" not in vars(maker.pipe.transformer)
    with pytest.raises(ValueError, match="leave it out with --framework paddle"), code.makers.PaddleMaker.graphed(None, True):
        pass


def test_runs_of_cuda_graphs_say_so_and_what_ran(code, model, tmp_path, monkeypatch):
    recorded = doubled(monkeypatch)
    recipe = tmp_path / "mine.toml"
    Recipe([{"rung": "int8+fp16"}, {"steps": "0-0.5", "rung": "int4+fp16"}]).save(recipe)
    begun = [*BEGUN, "--captions", "1", "--model", str(model), "--out", str(tmp_path / "out"), "--precisions", "int8+fp16",
             str(recipe)]
    assert code.main([*begun, "--cuda-graph"]) == 0
    assert ", the transformer as one CUDA graph, " in (tmp_path / "out/precisions.md").read_text()
    record = json.loads((tmp_path / "out/precisions.json").read_text())
    layers = code.models.TINY.layers
    ran = {run: row["attention"] for run, row in record["rows"].items()}
    assert record["cuda_graph"] is True and sum(ran["int8+fp16"].values()) == 2 * layers, "as often as without a graph"
    assert len(ran) == 4 and sorted(ran[list(ran)[-1]].values()) == [layers, layers], ran
    assert len(recorded) == len(ran) + 1, "a graph for each kind of step"
    with pytest.raises(ValueError, match="was begun with .*cuda_graph True"):
        code.main(begun)


@pytest.mark.parametrize("asked, cudnn, flash", [
    (("cuDNN", "FlashAttention-4"), True, None), (("cuDNN",), True, "not asked for"), (("FlashAttention-4",), False, None),
    ((), False, "not asked for")])
def test_other_exact_kernels_run_where_they_are_asked_for(code, asked, cudnn, flash):
    there = [code.makers.Candidate(f"exact ({name})", object) for name in ("cuDNN",)]
    maker = SimpleNamespace(other_exact=lambda: (list(there), {"FlashAttention-4": "no such package"}))
    runs, lacking = code.makers.runs_of(maker, ["int8+fp8"], asked)
    assert [run.label for run in runs] == ["exact", "floor", *["exact (cuDNN)"] * cudnn, "int8+fp8"]
    assert lacking == ({} if cudnn else {"cuDNN": "not asked for"}) | {"FlashAttention-4": flash or "no such package"}


@pytest.mark.parametrize("run, exact", [("exact", True), ("floor", True), ("exact (cuDNN)", True), ("int8+fp16", False),
                                        ("my:exact", False)])
def test_the_fastest_exact_attention_is_sought_among_exact_ones(code, run, exact):
    assert code.table.is_exact(run) is exact


def test_a_curve_is_drawn_over_what_pooled_runs_and_recipes_keep(code, model, tmp_path, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes", reason="matplotlib is not installed")
    larger, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(model, larger)
    generation = json.loads((larger / "generation.json").read_text()) | {"height": 96, "width": 128, "num_frames": 17}
    (larger / "generation.json").write_text(json.dumps(generation))
    rung, recipe = "int8+fp8 pooled 0.5 always 32", str(tmp_path / "r.toml")
    Recipe([{"rung": "int8+fp8"}, {"rung": rung, "steps": "0-0.5", "heads": [0]}]).save(recipe)
    begun = ["--captions", "1", "--steps", "2", "--workers", "1", "--device", "cpu", "--no-page", "--order", "hilbert",
             "--model", str(larger), "--out", str(out), "--precisions"]
    assert code.main([*begun, "int8+fp8", rung, recipe]) == 0
    record = json.loads((out / "precisions.json").read_text())
    # 32 text and 5 x 6 x 8 video tokens: 3 key tiles; 2 query tiles, of which the first has text and sees all
    kept = {"int8+fp8": 1.0, rung: 5 / 6, recipe: 1 - 1 / 6 / 4}
    assert record["kept"] == pytest.approx(kept, abs=1e-12) and record["order"] == "hilbert"
    for group, rows in {"all": record["rows"], **{name: own["rows"] for name, own in record["groups"].items()}}.items():
        series = record["curve"][group]
        assert {name: [run["run"] for run in own] for name, own in series.items()} == {
            "int8+fp8": [rung, "int8+fp8"], "recipes": [recipe]}
        assert series["int8+fp8"][0]["psnr"] == rows[rung]["psnr"] and series["recipes"][0]["kept"] == record["kept"][recipe]
    psnr = {run: record["rows"][run]["psnr"]["value"] for run in kept}
    assert psnr[rung] < psnr[recipe] != psnr["int8+fp8"], "it pools a twenty-fourth, which a random model may bear by chance"
    assert record["below"][rung]["psnr"]["value"] == pytest.approx(psnr["int8+fp8"] - psnr[rung])
    table = (out / "precisions.md").read_text()
    assert "| tiles kept, % |" in table and "tokens in the order hilbert" in table
    drawn = []
    monkeypatch.setattr(axes.Axes, "errorbar", lambda self, x, y, spread, **how: drawn.append((x, list(y), how["label"])))
    monkeypatch.setattr(axes.Axes, "legend", lambda *given, **how: None)
    code.curve.plot_curve(out / "curve.png", record["curve"], "title")
    assert len(drawn) == 2 * len(record["curve"]) and (out / "curve.png").stat().st_size > 5000
    assert drawn[0] == (pytest.approx([500 / 6, 100]), [psnr[rung], psnr["int8+fp8"]], "int8+fp8 everywhere")
    with pytest.raises(ValueError, match="was begun with order hilbert; give another --out"):
        code.main([*(word for word in begun if word not in ("--order", "hilbert")), rung])


def test_how_far_runs_are_below_the_one_that_pools_nothing(code):
    """By caption: means of differences, of PSNR and of what a video shows."""
    video = lambda run, prompt, psnr, right, **more: {"run": run, "prompt": prompt, "figures": {
        "psnr": psnr, "ssim": 0.5, "adherence.shape": right, **more}}
    videos = [video("int8+fp8", "a", 40.0, 1.0), video("int8+fp8", "b", 30.0, 1.0), video("r.toml", "b", 24.0, 0.0),
              video("r.toml", "a", 36.0, 1.0), video("floor", "a", 50.0, 1.0), video("floor", "b", 41.0, 1.0),
              {"run": "broken", "prompt": "a", "error": "NaN"},
              {"run": "exact", "prompt": "a", "figures": {"adherence.shape": 1.0}}]
    kept = {"exact": 1.0, "floor": 1.0, "r.toml": 0.5, "int8+fp8": 1.0}
    found = code.table.below_of(videos, ["a", "b"], kept)
    assert set(found) == {"r.toml", "floor"} and set(found["r.toml"]) == {"psnr", "adherence.shape"}
    assert found["r.toml"]["psnr"] == {"value": 5.0, "low": 4.0, "high": 6.0} and found["floor"]["psnr"]["value"] == -10.5
    assert found["r.toml"]["adherence.shape"] == {"value": 0.5, "low": 0.0, "high": 1.0}
    assert code.table.below_of(videos, ["a", "b"], {**kept, "int8+fp8": 0.9}) == {}
