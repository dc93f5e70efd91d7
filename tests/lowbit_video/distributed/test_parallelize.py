"""One video on several ranks: the same as on one, whatever is shared; what cannot be shared is refused by name."""
import copy
import warnings

import numpy as np
import pytest

paddle = pytest.importorskip("paddle", reason="paddlepaddle is not installed")
from lowbit_video import (  # noqa: E402
    ExactAttnProcessor,
    LowBitAttnProcessor,
    UnsupportedError,
    apply,
    coverage,
    parallelize,
    remove,
    unparallelize,
)
from lowbit_video.pipelines import CogVideoXPipeline, make_random_pipeline  # noqa: E402

import toy_model  # noqa: E402
from helpers import sqnr_db  # noqa: E402
from ranks import run_threads  # noqa: E402

CALL = dict(num_inference_steps=2, num_frames=9, height=48, width=80, seed=3, progress=False, output_type="latent")
"""90 video tokens and 24 text tokens: one block of K's scales, so shares are even."""
FLOAT32_DB = 90.0
"""What float32 keeps of a sum taken in another order."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: make_random_pipeline(tmp_path_factory.mktemp(kind), kind=kind) for kind in ("2b", "5b", "1.5")}


def load(folder):
    return CogVideoXPipeline.from_pretrained(folder, device="cpu")


def on_ranks(folder, size, precision="exact", call=CALL, prompt="a cat", **degrees):
    """(latents of each rank, its pipe's handle's report)."""
    def work(wire):
        pipe = load(folder)
        apply(pipe, precision)
        handle = parallelize(pipe, wire=wire, **degrees)
        made = pipe(prompt, **call).frames.numpy()
        return made, handle.report()

    return run_threads(size, work)


def alone(folder, precision="exact", call=CALL, prompt="a cat"):
    pipe = load(folder)
    apply(pipe, precision)
    return pipe(prompt, **call).frames.numpy()


@pytest.mark.parametrize("kind, size, degrees", [
    ("2b", 2, dict(ulysses=2, cfg=1)), ("5b", 2, dict(ring=2, cfg=1)), ("5b", 2, dict(cfg=2)), ("1.5", 4, dict(ulysses=2)),
    ("5b", 4, dict(ulysses=2, ring=2, cfg=1)), ("2b", 3, dict(ring=3)), ("1.5", 4, dict(cfg=2, ring=2)), ("5b", 2, {})],
    ids=lambda value: str(value))
def test_exact_attention_gives_the_same_video_on_any_number_of_ranks(folders, kind, size, degrees):
    wanted = alone(folders[kind])
    made = on_ranks(folders[kind], size, **degrees)
    for got, report in made:
        assert sqnr_db(got, wanted) > FLOAT32_DB
        assert np.array_equal(got, made[0][0]), "ranks ended with different latents"
        assert report["ranks"] == size and not report["coverage_differs"]
    chosen = made[0][1]["degrees"]
    assert all(chosen[name] == degree for name, degree in degrees.items())
    assert chosen["cfg"] * chosen["ulysses"] * chosen["ring"] == size
