"""The small trained model on four processes over gloo: the video of one, and the scorer says the same of it."""
import json

import pytest

pytest.importorskip("paddle", reason="paddlepaddle is not installed")
from lowbit_video.app.generate import make  # noqa: E402
from lowbit_video.app.job import Job  # noqa: E402
from lowbit_video.eval.metrics.psnr import psnr  # noqa: E402
from lowbit_video.pipelines import read_video  # noqa: E402
from lowbit_video.pipelines.shared.small_model import small_model  # noqa: E402
from ranks import run_processes  # noqa: E402

JOB = dict(prompt="a large green star grows on a white background", precision="int8+fp16", steps=6, frames=17, height=64,
           width=96, seed=3)


def test_four_ranks_make_a_video_that_shows_what_one_makes(tmp_path):
    model = small_model()
    if model is None:
        pytest.skip("the small trained model is not in this tree")
    script = tmp_path / "script.py"
    script.write_text(f"""
from lowbit_video.app.generate import make
from lowbit_video.app.job import Job
from lowbit_video.distributed.watch import end_process

make(Job(model={str(model)!r}, out={str(tmp_path / "four")!r}, **{JOB}))
end_process(0)
""")
    run_processes(script, 4, tmp_path, environment={"LOWBIT_VIDEO_TIMEOUT": "200"})
    alone = make(Job(model=str(model), out=str(tmp_path / "one"), **JOB), say=lambda *_: None)
    shared = json.loads((tmp_path / "four" / "report.json").read_text())
    assert shared["parallel"]["degrees"] == {"cfg": 2, "ulysses": 2, "ring": 1, "vae": 4}
    assert shared["adherence"] == alone["adherence"] and len(shared["adherence"]) > 2
    videos = [read_video(tmp_path / name / "video.mp4")[0] for name in ("one", "four")]
    assert psnr(*videos).mean() > 22  # int8 costs about as much itself
    assert not shared["parallel"]["coverage_differs"]
