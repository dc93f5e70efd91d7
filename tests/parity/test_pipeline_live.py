"""The whole pipeline against diffusers: folders that this package makes are read there and give the same videos."""
import numpy as np
import paddle
import pytest

from lowbit_video.pipelines import CogVideoXPipeline, make_random_pipeline

torch = pytest.importorskip("torch", reason="needs PyTorch")
diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
pytest.importorskip("transformers", reason="needs transformers")
pytestmark = pytest.mark.parity

LEVELS = 2  # of 255
KINDS = ("2b", "5b", "1.5")
SIZE = dict(height=32, width=64, num_frames=9, num_inference_steps=4)
CASES = {
    "guided": dict(prompt="a panda plays the guitar", guidance_scale=6.0),
    "dynamic": dict(prompt=["snow", "a red ball"], guidance_scale=6.0, use_dynamic_cfg=True),
    "negative": dict(prompt=["snow"], negative_prompt=["dark rain"], guidance_scale=3.0),
    "8 frames": dict(prompt="snow", num_frames=8),
    "17 frames": dict(prompt="snow", num_frames=17, num_inference_steps=3),
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """The same small pipeline twice: read by diffusers from a folder written here, and ours."""
    folder = make_random_pipeline(tmp_path_factory.mktemp("made") / "model", seed=4, kind=request.param)
    return diffusers.CogVideoXPipeline.from_pretrained(folder), CogVideoXPipeline.from_pretrained(folder, device="cpu")


def compare(goldens, theirs, ours, arguments):
    arguments = {**SIZE, **arguments}
    want = goldens.run_pipeline(theirs, arguments)
    videos = 1 if isinstance(arguments["prompt"], str) else len(arguments["prompt"])
    shape, _ = ours._latent_shape(videos, arguments["num_frames"], arguments["height"], arguments["width"])
    latents = paddle.to_tensor(goldens.start_noise(shape))
    got = ours(latents=latents, generator=goldens.step_noise(), progress=False, **arguments).frames
    assert got.shape == want.shape
    assert want.std() > 0.05
    assert abs(got - want).max() * 255 <= LEVELS


@pytest.mark.parametrize("case", list(CASES))
def test_same_videos(goldens, pair, case):
    compare(goldens, *pair, CASES[case])


def test_same_videos_with_the_other_scheduler(goldens, pair):
    theirs, ours = pair
    own = theirs.scheduler, ours.scheduler
    classes = {type(own[1]).__name__: type(own[1])}
    try:
        goldens.with_other_scheduler(theirs)
        name = type(theirs.scheduler).__name__
        assert name not in classes
        import lowbit_video.pipelines as pipelines

        ours.scheduler = getattr(pipelines, name).from_config(own[1].config)
        compare(goldens, theirs, ours, CASES["guided"])
    finally:
        theirs.scheduler, ours.scheduler = own


def test_callbacks_see_the_same_latents(goldens, pair):
    theirs, ours = pair
    seen = {"theirs": [], "ours": []}

    def keep(name):
        def callback(pipe, step, timestep, tensors):
            seen[name].append((step, int(timestep), np.asarray(tensors["latents"])))
            return tensors

        return callback

    arguments = {**SIZE, **CASES["guided"]}
    goldens.run_pipeline(theirs, {**arguments, "callback_on_step_end": keep("theirs")})
    shape, _ = ours._latent_shape(1, arguments["num_frames"], arguments["height"], arguments["width"])
    ours(
        latents=goldens.start_noise(shape), generator=goldens.step_noise(), progress=False, output_type="latent",
        callback_on_step_end=keep("ours"), **arguments,
    )
    assert [s[:2] for s in seen["ours"]] == [s[:2] for s in seen["theirs"]]
    for mine, other in zip(seen["ours"], seen["theirs"]):
        np.testing.assert_allclose(mine[2], other[2], rtol=0, atol=2e-3)


def test_save_again_and_swap(goldens, pair, tmp_path):
    """diffusers writes, this package reads and writes, diffusers reads: one video throughout."""
    theirs, _ = pair
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="200KB")
    ours = CogVideoXPipeline.from_pretrained(tmp_path / "theirs", device="cpu")
    ours.save_pretrained(tmp_path / "ours")
    again = diffusers.CogVideoXPipeline.from_pretrained(tmp_path / "ours")
    compare(goldens, again, ours, CASES["guided"])
    arguments = {**SIZE, **CASES["guided"]}
    np.testing.assert_array_equal(goldens.run_pipeline(again, arguments), goldens.run_pipeline(theirs, arguments))
