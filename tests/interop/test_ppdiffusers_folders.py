"""Folders of CogVideoX pipelines, to ppdiffusers and from it: its real reader and writer, its text encoder and tokenizer.

The release has no CogVideoX: doubles stand for the other three parts.
"""
import json
import os

import numpy as np
import pytest

pytestmark = pytest.mark.interop
paddle = pytest.importorskip("paddle", reason="paddlepaddle is not installed")
pytest.importorskip("ppdiffusers", reason="ppdiffusers is not installed (make interop)")
from ppdiffusers.transformers import T5EncoderModel, T5Tokenizer  # noqa: E402

from lowbit_video.pipelines import CogVideoXPipeline, make_random_pipeline  # noqa: E402
from lowbit_video.pipelines.cogvideox import transformer  # noqa: E402
from lowbit_video.pipelines.shared.weights import WeightsError  # noqa: E402

from ppdiffusers_doubles import read_by_theirs, release  # noqa: E402

QUICK = dict(num_inference_steps=2, progress=False, height=32, width=48, num_frames=9, seed=0)


@pytest.fixture(autouse=True)
def released(monkeypatch):
    release(monkeypatch)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return CogVideoXPipeline.from_pretrained(make_random_pipeline(tmp_path_factory.mktemp("random"), kind="2b"), device="cpu")


def assert_same_weights(model, other):
    got, want = ({name: tensor.numpy() for name, tensor in one.state_dict().items()} for one in (model, other))
    got = {name: array for name, array in got.items() if name in want}
    assert list(got) == list(want)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_ppdiffusers_reads_what_is_saved_here(ours, tmp_path):
    ours.save_pretrained(tmp_path)
    theirs = read_by_theirs(tmp_path)
    assert isinstance(theirs.text_encoder, T5EncoderModel) and isinstance(theirs.tokenizer, T5Tokenizer)
    for part in ("transformer", "vae", "text_encoder"):
        assert_same_weights(getattr(theirs, part), getattr(ours, part))
    assert theirs.scheduler.config.snr_shift_scale == 3.0 and theirs.scheduler.config.prediction_type == "v_prediction"
    ids = theirs.tokenizer("a panda plays the guitar", return_tensors="pd").input_ids
    assert ids.tolist() == ours.tokenizer(["a panda plays the guitar"]).input_ids
    with paddle.no_grad():
        np.testing.assert_allclose(theirs.text_encoder(ids)[0].numpy(), ours.text_encoder(ids).numpy(), atol=1e-5)


@pytest.mark.parametrize("to_diffusers", [False, True])
def test_what_ppdiffusers_saves_is_read_here_and_makes_the_same_video(ours, tmp_path, to_diffusers):
    ours.save_pretrained(tmp_path / "ours")
    theirs = read_by_theirs(tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "theirs"), safe_serialization=True, to_diffusers=to_diffusers)
    stem = "diffusion_pytorch_model" if to_diffusers else "diffusion_paddle_model"
    assert f"{stem}.safetensors" in os.listdir(tmp_path / "theirs" / "transformer")
    again = CogVideoXPipeline.from_pretrained(tmp_path / "theirs", device="cpu")
    for part in ("transformer", "vae", "text_encoder"):
        assert_same_weights(getattr(again, part), getattr(ours, part))
    np.testing.assert_array_equal(again("a panda plays", **QUICK).frames, ours("a panda plays", **QUICK).frames)


def test_a_part_in_bfloat16_comes_back_as_it_was(ours, tmp_path):
    ours.save_pretrained(tmp_path / "ours")
    theirs = read_by_theirs(tmp_path / "ours").transformer
    theirs.to(dtype="bfloat16")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = transformer.CogVideoXTransformer3DModel.from_pretrained(tmp_path / "theirs")
    assert_same_weights(again, _as_float32(theirs))


def _as_float32(model):
    class Wide:
        def state_dict(self):
            return {name: tensor.astype("float32") for name, tensor in model.state_dict().items()}

    return Wide()


def test_bfloat16_of_safetensors_is_what_the_release_cannot_read(ours, tmp_path):
    """Should this fail, docs/ppdiffusers.md has a limit too many."""
    ours.save_pretrained(tmp_path, dtype="bfloat16")
    with pytest.raises(ValueError, match="incompatible array data type"):
        read_by_theirs(tmp_path)


def test_pickles_are_refused_with_what_to_do(ours, tmp_path):
    ours.save_pretrained(tmp_path / "ours")
    read_by_theirs(tmp_path / "ours").save_pretrained(str(tmp_path / "theirs"), safe_serialization=False)
    assert "model_state.pdparams" in os.listdir(tmp_path / "theirs" / "transformer")
    with pytest.raises(WeightsError, match=r"found model_state\.pdparams\. .*safe_serialization=True\) in ppdiffusers"):
        CogVideoXPipeline.from_pretrained(tmp_path / "theirs", device="cpu")


def test_ppdiffusers_index_names_its_own_libraries(ours, tmp_path):
    """What is read here is really what ppdiffusers writes."""
    ours.save_pretrained(tmp_path / "ours")
    read_by_theirs(tmp_path / "ours").save_pretrained(str(tmp_path / "theirs"))
    index = json.loads((tmp_path / "theirs" / "model_index.json").read_text())
    assert index["transformer"] == ["ppdiffusers", "CogVideoXTransformer3DModel"] and "_ppdiffusers_version" in index
    assert index["text_encoder"] == ["ppdiffusers.transformers", "T5EncoderModel"]
