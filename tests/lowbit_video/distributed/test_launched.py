"""`generate` on processes that the launcher starts: one video, written by rank 0, and every way to fail ends all of them."""
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("paddle", reason="paddlepaddle is not installed")
from lowbit_video.app.job import OTHER_PROMPT  # noqa: E402
from lowbit_video.eval.metrics.psnr import psnr  # noqa: E402
from lowbit_video.pipelines import CogVideoXPipeline, make_random_pipeline, read_video  # noqa: E402
from ranks import launch, run_processes  # noqa: E402

ROOT = pathlib.Path(__file__).parents[3]
SCRIPT = ROOT / "examples" / "cogvideo.py"
SIZE = dict(frames=9, height=48, width=80)
SMALL = ["--frames", "9", "--height", "48", "--width", "80"]
BROKEN = """
import os, signal, sys, time
import lowbit_video.pipelines.cogvideox.transformer as module
from lowbit_video.app import cli

forward, calls = module.CogVideoXTransformer3DModel.forward, []

def broken(self, *given, **more):
    calls.append(1)
    if len(calls) == 2 and os.environ["PADDLE_TRAINER_ID"] == "1":
        {fault}
    return forward(self, *given, **more)

module.CogVideoXTransformer3DModel.forward = broken
sys.exit(cli.main(["generate", *sys.argv[1:]]))
"""
"""The job, but rank 1 meets with something in the second step."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_random_pipeline(tmp_path_factory.mktemp("model") / "random", kind="5b")


def test_two_ranks_make_the_video_of_one_and_rank_0_alone_writes_and_prints(model, tmp_path):
    """Four jobs on the same two: exact, compared at low bit, compiled. Each rank has a folder of its own to write to."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import os
import numpy as np
from lowbit_video.app import generate
from lowbit_video.app.generate import make
from lowbit_video.app.job import Job
from lowbit_video.distributed.watch import end_process

finish = generate._finish

def keep(pipe, job, run, report, out, say):  # the codec makes more of float rounding than it is
    report = finish(pipe, job, run, report, out, say)
    np.save(out / "video.npy", run.video)
    return report

generate._finish = keep

out = {str(tmp_path)!r} + "/rank" + os.environ["PADDLE_TRAINER_ID"]
job = dict(model={model!r}, steps=2, seed=4, **{SIZE})
make(Job(**{{**job, "frames": 17}}, precision="exact", ulysses_degree=2, out=out + "/long"))  # two pieces for the VAE
make(Job(**job, precision="exact", ulysses_degree=2, out=out + "/exact"))
make(Job(**job, compare=True, ring_degree=2, exchange="16bit", out=out + "/low"))
make(Job(**job, precision="exact", compile=True, ulysses_degree=2, out=out + "/compiled"))
end_process(0)
""")
    (first, second), _ = run_processes(script, 2, tmp_path)
    pipe = CogVideoXPipeline.from_pretrained(model, device="cpu")
    make = lambda frames: pipe(OTHER_PROMPT, seed=4, num_inference_steps=2, num_frames=frames, height=48, width=80,
                               progress=False).frames[0]
    alone = make(9)
    video = lambda name: np.load(tmp_path / "rank0" / name / "video.npy")
    assert np.abs(video("long") - make(17)).max() < 1e-4
    assert np.abs(video("exact") - alone).max() < 1e-4 and np.abs(video("compiled") - alone).max() < 1e-4
    assert 25 < psnr(video("low"), alone).min() < 80
    twin, _ = read_video(tmp_path / "rank0" / "low" / "full_precision.mp4")
    exact, _ = read_video(tmp_path / "rank0" / "exact" / "video.mp4")
    assert psnr(twin / 255, exact / 255).min() > 40  # the codec makes more of float rounding than it is
    assert not (tmp_path / "rank1").exists()
    for words in ("prompt:", "seconds:", "report:", "denoise"):
        assert words in first and words not in second, words
    report = json.loads((tmp_path / "rank0" / "low" / "report.json").read_text())
    parallel = report["parallel"]
    assert parallel["degrees"] == {"cfg": 1, "ulysses": 1, "ring": 2, "vae": 2} and parallel["ranks"] == 2
    assert [traffic["sent_total"] > 10_000 for traffic in parallel["traffic"]] == [True, True]
    assert parallel["coverage_differs"] == {} and len(parallel["devices"]) == 2
    assert report["coverage"]["modules"][0]["runs"][0]["variant"].startswith("int8+fp16")
    assert "2 ranks: ring 2, vae 2" in first and "rank 1 sent" in first


def test_a_rank_that_raises_ends_all_with_its_own_error(model, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(BROKEN.format(fault="raise RuntimeError('the second step broke')"))
    begin = time.monotonic()
    status, (launcher, *logs), _ = launch(script, 3, tmp_path, "--model", model, "--out", tmp_path / "out", *SMALL,
                                          "--steps", "4", "--ring-degree", "3", check=False)
    assert status != 0 and time.monotonic() - begin < 60
    words = "rank 1 failed: RuntimeError: the second step broke"
    assert words in launcher and words in logs[0] and words in logs[2], "\n".join([launcher[-2000:], *logs])
    assert "Traceback" not in logs[0] and "the second step broke" in logs[1] and "Traceback" in logs[1]
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_a_rank_that_does_not_answer_is_named(model, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(BROKEN.format(fault="time.sleep(1000)"))
    status, (launcher, *_), _ = launch(script, 2, tmp_path, "--model", model, "--out", tmp_path / "out", *SMALL, "--steps", "4",
                                       environment={"LOWBIT_VIDEO_TIMEOUT": "4"}, check=False, timeout=60)
    assert status != 0
    assert re.search(r"rank 1 does not answer: it (stopped after exchange \d+ while rank 0 waits in exchange \d+|has not come)",
                     launcher), launcher[-3000:]
    assert not list((tmp_path / "out").glob("*.mp4"))


def start(folder, name, *arguments):
    """A launcher with a script, its output in a file; (process, file)."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    variables = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    variables.pop("CUDA_VISIBLE_DEVICES", None)
    output = folder / f"{name}.txt"
    process = subprocess.Popen(
        [sys.executable, "-m", "paddle.distributed.launch", "--log_dir", str(folder / f"log_{name}"), *map(str, arguments)],
        env=variables, stdout=output.open("w"), stderr=subprocess.STDOUT, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # a background job's children ignore it
    return process, output


def test_ctrl_c_ends_all(model, tmp_path):
    process, output = start(tmp_path, "both", "--nproc_per_node", 2, SCRIPT, "--model", model, "--out", tmp_path / "out",
                            *SMALL, "--steps", 900)
    try:
        deadline = time.monotonic() + 60
        while not re.search(r"\D[1-9]\d*/900", output.read_text()) and time.monotonic() < deadline:
            assert process.poll() is None, output.read_text()
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(30) != 0
    finally:
        process.kill()
    logs = [tmp_path / "log_both" / f"workerlog.{rank}" for rank in range(2)]
    deadline = time.monotonic() + 20
    while running(str(tmp_path / "out")) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not running(str(tmp_path / "out")), "a rank lives on"
    assert all("interrupted" in log.read_text() and "Traceback" not in log.read_text() for log in logs)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def running(words):
    """Whether a process with these words among its arguments runs."""
    for arguments in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if words in arguments.read_bytes().decode(errors="replace"):
                return True
        except OSError:
            pass
    return False


def test_two_launchers_make_one_video_and_one_random_model(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text("import sys\nfrom lowbit_video.app import cli\nsys.exit(cli.main(['generate', *sys.argv[1:]]))\n")
    launchers = [start(tmp_path, f"host{rank}", "--nnodes", 2, "--master", f"127.0.0.1:{port}", "--rank", rank,
                       "--nproc_per_node", 1, script, "--model", "random", "--out", out, *SMALL, "--steps", 2)
                 for rank in range(2)]
    try:
        statuses = [process.wait(120) for process, _ in launchers]
    finally:
        for process, _ in launchers:
            process.kill()
    texts = [output.read_text() for _, output in launchers]
    assert statuses == [0, 0], "\n".join(text[-3000:] for text in texts)
    assert len(read_video(out / "video.mp4")[0]) == 9 and (out / "random_model" / "model_index.json").is_file()
    assert "2 ranks: cfg 2, vae 2" in texts[0] and "making a small random model" in texts[0]
    assert "random model" not in texts[1] and "2 ranks" not in texts[1]
    assert json.loads((out / "report.json").read_text())["parallel"]["degrees"]["cfg"] == 2
