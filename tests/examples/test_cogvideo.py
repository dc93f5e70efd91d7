"""The main job, end to end on a small random model: examples/cogvideo.py and `lowbit-video generate`."""
import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("paddle", reason="paddlepaddle is not installed")
from lowbit_video import LowBitAttnProcessor, apply, coverage, remove  # noqa: E402
from lowbit_video.app import cli, generate  # noqa: E402
from lowbit_video.app import job as job_module
from lowbit_video.eval.metrics.psnr import psnr  # noqa: E402
from lowbit_video.pipelines import CogVideoXPipeline, make_random_pipeline, read_video  # noqa: E402
from lowbit_video.pipelines.shared import small_model  # noqa: E402

SCRIPT = pathlib.Path(__file__).parents[2] / "examples" / "cogvideo.py"
SMALL = ["--steps", "2", "--frames", "9", "--height", "48", "--width", "80"]
CALL = dict(num_inference_steps=2, num_frames=9, height=48, width=80, seed=3, progress=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_random_pipeline(tmp_path_factory.mktemp("model") / "random", seed=0)


def command(model, out, *more):
    return cli.main(["generate", "--model", str(model), "--out", str(out), *SMALL, *more])


def test_the_script_compares_at_int4_fp8(model, tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--model", model, "--out", "out", *SMALL, "--fps", "12", "--precision", "int4+fp8",
         "--compare", "--seed", "5", "--prompt", "a cat"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    for name, size in (("video", (48, 80)), ("full_precision", (48, 80)), ("side_by_side", None)):
        frames, fps = read_video(out / f"{name}.mp4")
        assert len(frames) == 9 and fps == 12
        assert size is None or frames.shape[1:3] == size
    assert frames.shape[1] > 48 and frames.shape[2] >= 160
    quality = json.loads((out / "quality.json").read_text())
    assert len(quality["psnr_db"]) == len(quality["ssim"]) == 9 and 25 < min(quality["psnr_db"]) < 120
    assert (out / "quality.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((out / "report.json").read_text())
    assert report["video"] == {"frames": 9, "height": 48, "width": 80, "fps": 12}
    assert report["job"]["precision"] == "int4+fp8" and report["job"]["seed"] == 5
    assert {"load", "text_encode", "denoise", "decode", "mp4"} <= set(report["seconds"])
    for module in report["coverage"]["modules"]:
        assert module["calls"] == 2 and module["runs"][0]["variant"].startswith("int4+fp8")
    assert "2 of 2 attention modules ran at low bit" in done.stdout and "seconds: load" in done.stdout
    assert report["peak_memory_gib"] is None and "peak memory: Paddle does not count it on cpu" in done.stdout
    assert "untouched" in done.stdout and "denoise" in done.stderr
    assert not list(out.glob("*.tmp*")) and not list(out.glob(".*"))


def test_low_bit_differs_and_remove_is_bit_identical(model):
    pipe = CogVideoXPipeline.from_pretrained(model, device="cpu")
    before = pipe.attn_processors
    exact = pipe("a cat", **CALL).frames[0]
    pipe.set_attn_processor(LowBitAttnProcessor("int8+fp16"))
    by_processor = pipe("a cat", **CALL).frames[0]
    pipe.set_attn_processor(before)
    apply(pipe, "int8+fp16")
    low = pipe("a cat", **CALL).frames[0]
    assert np.array_equal(low, by_processor) and not np.array_equal(low, exact) and psnr(low, exact).min() > 35
    assert remove(pipe) and pipe.attn_processors == before
    assert np.array_equal(pipe("a cat", **CALL).frames[0], exact)


def test_only_the_transformers_attention_changes(model):
    import paddle

    pipe = CogVideoXPipeline.from_pretrained(model, device="cpu")
    latents = paddle.to_tensor(np.random.default_rng(0).standard_normal((1, 2, 8, 6, 10)).astype(np.float32))
    run = lambda: (pipe.encode_prompt("a cat").numpy(), pipe.decode_latents(latents).numpy())
    exact = run()
    apply(pipe, "int2+fp8")
    assert all(np.array_equal(a, b) for a, b in zip(run(), exact))
    assert dict(coverage(pipe).untouched) == {"vae": 0, "text_encoder": 2}
    assert all(m.calls == 0 for m in coverage(pipe).modules)


@pytest.mark.parametrize("precision", ["int8+fp16", "exact"])
def test_compiled_equals_eager(model, precision):
    job = generate.Job(model=model, prompt="a cat", precision=precision, steps=2, frames=9, height=48, width=80, device="cpu")
    videos, calls = [], []
    for compiled in (False, True):
        pipe = CogVideoXPipeline.from_pretrained(model, device="cpu")
        if compiled:
            pipe.compile()
        apply(pipe, precision)
        run = generate.run_pipeline(pipe, job, progress=False)
        videos.append(run.video)
        calls.append([m.calls for m in run.coverage.modules])
    assert np.abs(videos[0] - videos[1]).max() <= 1e-5
    assert calls == [[2, 2], [2, 2]]
    remove(pipe)
    names = [op.name() for op in pipe.transformer.run_blocks.concrete_program.main_program.global_block().ops]
    assert sum("lowbit_attention" in name for name in names) == 2


def test_compare_and_compile_together(model, tmp_path, capsys):
    assert command(model, tmp_path, "--compile", "--compare", "--modules", "transformer_blocks.1.*=int4+fp16") == 0
    report = json.loads((tmp_path / "report.json").read_text())
    runs = [module["runs"][0]["variant"] for module in report["coverage"]["modules"]]
    assert runs[0].startswith("int8+fp16") and runs[1].startswith("int4+fp16")
    assert 30 < report["comparison"]["mean_psnr_db"] < 120
    assert "against full precision: PSNR" in capsys.readouterr().out


def test_an_error_in_a_compiled_graph_is_as_clear_as_an_eager_one(model, tmp_path, capsys):
    for more in ([], ["--compile"]):
        assert command(model, tmp_path, "--backend", "triton", *more) == 2
        err = capsys.readouterr().err
        ours = err[err.index("lowbit-video: error:"):]  # Paddle's executor prints a traceback of its own before
        assert "transformer_blocks.0.attn1" in ours and "it needs an NVIDIA GPU" in ours and "Traceback" not in ours
    assert not (tmp_path / "video.mp4").exists()
    assert command(model, tmp_path, "--backend", "triton", "--fallback", "exact") == 0
    assert "it needs an NVIDIA GPU" in capsys.readouterr().out


WRONG = {
    "precision": (["--precision", "int9"], "unknown precision 'int9'; there are:"),
    "steps": (["--steps", "0"], "steps is 0"),
    "frames": (["--frames", "-3"], "frames is -3"),
    "fps": (["--fps", "nan"], "fps is nan"),
    "seed": (["--seed", "-1"], "seed is -1"),
    "guidance": (["--guidance", "inf"], "guidance is inf"),
    "prompt": (["--prompt", " "], "the prompt is empty"),
    "dtype": (["--dtype", "int8"], "unknown dtype 'int8'"),
    "device": (["--device", "gpu:77"], "device 'gpu:77' is not available"),
    "ranks": (["--cfg-degree", "2", "--ulysses-degree", "2"], "--ulysses-degree 2 --cfg-degree 2 shares the work of several "
              "processes, and one runs; launch them: python -m paddle.distributed.launch --devices 0,1,2,3 "),
    "exchange": (["--exchange", "int4"], "--exchange int4 shares the work of several processes"),
    "degree": (["--ring-degree", "0"], "ring_degree is 0; it must be positive"),
    "pattern": (["--modules", "x"], "write PATTERN=PRECISION"),
    "pattern-precision": (["--modules", "x=int9"], "--modules x=int9: unknown precision"),
}


def test_ways_to_exchange_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="unknown exchange 'int2'; there are: auto, 16bit, int8, int4"):
        generate.Job(exchange="int2")
    with pytest.raises(ValueError, match="unknown exchange_output 'int4'; there are: 16bit, int8"):
        generate.Job(exchange_output="int4")


@pytest.mark.parametrize("arguments, message", WRONG.values(), ids=WRONG)
def test_wrong_requests_are_named_before_the_model_is_loaded(model, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(generate, "load_pipeline", lambda *args: pytest.fail("the model was loaded first"))
    assert command(model, tmp_path / "out", *arguments) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_an_output_folder_that_cannot_be_written_is_named_first(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generate, "load_pipeline", lambda *args: pytest.fail("the model was loaded first"))
    (tmp_path / "file").write_text("x")
    assert command(model, tmp_path / "file") == 2
    assert f"cannot write into {tmp_path / 'file'}" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "x"


def test_compare_without_matplotlib_says_so_first(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generate, "load_pipeline", lambda *args: pytest.fail("the model was loaded first"))
    find = generate.importlib.util.find_spec
    monkeypatch.setattr(generate.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert command(model, tmp_path, "--compare") == 2
    assert "pip install '.[eval]' from the checkout" in capsys.readouterr().err


def test_sizes_that_do_not_divide_name_the_nearest(model, tmp_path, capsys):
    assert command(model, tmp_path, "--height", "50") == 2
    assert "height is 50 and must be a multiple of 16" in capsys.readouterr().err
    assert command(model, tmp_path, "--frames", "7") == 2
    assert "num_frames is 7" in capsys.readouterr().err
    assert command(model, tmp_path, "--modules", "blocks.9=exact") == 2
    assert "'blocks.9' names no attention module" in capsys.readouterr().err
    assert not (tmp_path / "video.mp4").exists()


def test_a_folder_that_is_no_model_is_named(tmp_path, capsys):
    assert command(tmp_path / "none", tmp_path / "out") == 2
    assert "no such folder" in capsys.readouterr().err
    assert command(tmp_path, tmp_path / "out") == 2
    assert "it has no model_index.json" in capsys.readouterr().err
    (tmp_path / "generation.json").write_text("{")
    assert command(tmp_path, tmp_path / "out") == 2
    assert "generation.json is not valid JSON" in capsys.readouterr().err


def test_a_random_model_is_made_where_it_is_asked_for(tmp_path, capsys):
    assert cli.main(["generate", "--model", "random", "--out", str(tmp_path), *SMALL]) == 0
    out = capsys.readouterr().out
    assert "making a small random model" in out and "the video is noise" in out
    assert (tmp_path / "random_model" / "model_index.json").is_file() and (tmp_path / "video.mp4").is_file()


def test_the_small_model_is_the_default_with_its_own_settings_and_is_judged(model, tmp_path, capsys, monkeypatch):
    folder = tmp_path / small_model.SMALL_MODEL
    shutil.copytree(model, folder)
    (folder / "generation.json").write_text(json.dumps({"num_inference_steps": 2, "guidance_scale": 2.5, "num_frames": 9,
                                                        "height": 48, "width": 80, "fps": 10, "world": "shapes"}))
    monkeypatch.setattr(small_model, "small_model", lambda: folder)
    assert cli.main(["generate", "--out", str(tmp_path / "out"), "--guidance", "1", "--prompt", "a panda plays chess"]) == 0
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["job"]["steps"] == 2 and report["job"]["guidance"] == 1 and report["video"]["fps"] == 10
    assert set(report["adherence"]) >= {"colour", "shape", "motion", "background", "sees"}
    assert "scorer: colour" in out and "hint: this small model knows" in out


def test_a_copy_of_the_small_model_is_judged_wherever_it_lies(model, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(model, folder)
    for settings, judged in ((SCRIPT.parent / "small_cogvideox" / "model" / "generation.json", True), (None, False)):
        if settings:
            shutil.copy(settings, folder)
        else:
            (folder / "generation.json").unlink()
        assert command(folder, tmp_path / "out") == 0
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        assert ("adherence" in report) == judged
        assert report["job"]["prompt"] == (job_module.SMALL_PROMPT if judged else job_module.OTHER_PROMPT)


def test_a_failing_comparison_loses_nothing(model, tmp_path, monkeypatch):
    def broken(*args):
        raise MemoryError("the twin did not fit")

    monkeypatch.setattr(generate, "compare_twin", broken)
    with pytest.raises(MemoryError):
        command(model, tmp_path, "--compare")
    assert len(read_video(tmp_path / "video.mp4")[0]) == 9
    assert json.loads((tmp_path / "report.json").read_text())["coverage"]["modules"]


@pytest.mark.parametrize("more, exe, said", [
    (["--fps", "1e-9"], None, "fps is 1e-09; it must be from 0.01"),
    ([], "/nowhere/ffmpeg", "/nowhere/ffmpeg does not start"),
], ids=["fps", "no ffmpeg"])
def test_what_the_encoder_refuses_is_known_before_the_work(model, tmp_path, monkeypatch, capsys, more, exe, said):
    if exe:
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", exe)
    monkeypatch.setattr(generate, "load_pipeline", None)
    assert command(model, tmp_path, *more) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_prompt_that_the_terminal_cannot_show_ends_no_work(model, tmp_path, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert command(model, tmp_path, "--prompt", "a cat \N{CAT FACE} \udc80") == 0
    terminal.flush()
    assert rb"prompt: a cat \U0001f431 \udc80" in terminal.buffer.getvalue()
    assert len(read_video(tmp_path / "video.mp4")[0]) == 9


def test_a_video_with_nan_is_refused(model):
    class Pipe:
        transformer = CogVideoXPipeline.from_pretrained(model, device="cpu").transformer

        def __call__(self, prompt, **given):
            frames = np.zeros((1, 9, 48, 80, 3), np.float32)
            frames[0, 2, :4] = np.nan
            return type("Output", (), {"frames": frames, "timings": {}, "memory": {}})

    with pytest.raises(ValueError, match="the video has 960 NaN or infinite values"):
        generate.run_pipeline(Pipe(), generate.Job(prompt="a cat"))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_ctrl_c_leaves_no_half_written_video(model, tmp_path, compiled):
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--model", model, "--out", str(tmp_path), *SMALL, "--steps", "900",
         *(["--compile"] if compiled else [])],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, bufsize=1, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # a background job's children ignore it
    try:
        seen, deadline = "", time.monotonic() + 60
        while not re.search(r"\D[1-9]\d*/900", seen) and time.monotonic() < deadline:  # not every step is shown
            character = process.stderr.read(1)
            assert character, f"it ended before it could be interrupted:\n{seen}"
            seen += character
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=30)[1]
    finally:
        process.kill()
    assert process.returncode == 130, seen + rest
    assert "interrupted" in rest and "Traceback" not in rest
    assert not list(tmp_path.glob("*.mp4"))
