"""The goldens on a GPU, in every type, through Paddle's own GPU build or a custom device."""
from pathlib import Path

import numpy as np
import paddle
import pytest

from lowbit_video.pipelines.cogvideox.transformer import CogVideoXTransformer3DModel
from lowbit_video.pipelines.shared.t5 import T5EncoderModel

GOLDENS = Path(__file__).resolve().parents[2] / "goldens"
# of the largest output; float32 products may be TF32 on some devices
RELATIVE = {"float32": 2e-3, "float16": 1e-2, "bfloat16": 6e-2}


def gpu_name():
    """The first GPU as Paddle names it, or None."""
    if paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count():
        return "gpu:0"
    found = paddle.device.get_available_custom_device()
    return found[0] if found else None


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(gpu_name() is None, reason="needs an NVIDIA GPU that Paddle can use"),
]


@pytest.fixture(autouse=True)
def on_gpu():
    before = paddle.get_device()
    paddle.set_device(gpu_name())
    yield
    paddle.set_device(before)


def close(out, want, dtype):
    out = out.astype("float32").numpy()
    assert np.isfinite(out).all()
    return np.abs(out - want).max() <= RELATIVE[dtype] * np.abs(want).max()


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("kind", ["transformer_2b", "transformer_5b", "transformer_5b_learned", "transformer_15"])
def test_transformer(kind, dtype):
    model = CogVideoXTransformer3DModel.from_pretrained(GOLDENS / kind, dtype=dtype)
    assert {str(parameter.dtype) for parameter in model.parameters()} == {f"paddle.{dtype}"}
    assert not any(parameter.place.is_cpu_place() for parameter in model.parameters())
    arrays = np.load(GOLDENS / kind / "io.npz")
    tensor = lambda name: paddle.to_tensor(arrays[f"{name}_0"])
    rotary = (tensor("cos"), tensor("sin")) if "cos_0" in arrays else None
    ofs = paddle.to_tensor([2.0]) if model.config.ofs_embed_dim else None
    with paddle.no_grad():
        out = model(tensor("latents"), tensor("text"), tensor("timestep"), ofs=ofs, image_rotary_emb=rotary)
    assert str(out.dtype) == f"paddle.{dtype}"
    assert close(out, arrays["out_0"], dtype)


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("kind", ["t5_gated", "t5_relu"])
def test_text_encoder(kind, dtype):
    model = T5EncoderModel.from_pretrained(GOLDENS / kind, dtype=dtype)
    for name, parameter in model.named_parameters():
        kept = dtype == "float16" and name.endswith(".wo.weight")
        assert str(parameter.dtype) == f"paddle.{'float32' if kept else dtype}", name
    arrays = np.load(GOLDENS / kind / "io.npz")
    ids, mask = paddle.to_tensor(arrays["ids"]), paddle.to_tensor(arrays["mask"])
    with paddle.no_grad():
        assert close(model(ids), arrays["out"], dtype)
        assert close(model(ids, mask), arrays["masked"], dtype)


def test_float16_text_encoder_survives_large_sums():
    """Sums beyond 65504 stay finite, as the published XXL weights need."""
    model = T5EncoderModel.from_pretrained(GOLDENS / "t5_gated", dtype="float16")
    block = model.encoder.block[0].layer[1].DenseReluDense
    block.wo.set_state_dict({"weight": block.wo.weight * 1e6})
    with paddle.no_grad():
        out = model(paddle.to_tensor([[3, 1, 4, 1]])).astype("float32").numpy()
    assert np.isfinite(out).all() and out.any()


@pytest.mark.parametrize("dtype", RELATIVE)
def test_saving_from_the_gpu(dtype, tmp_path):
    model = CogVideoXTransformer3DModel.from_pretrained(GOLDENS / "transformer_2b", dtype=dtype)
    model.save_pretrained(tmp_path)
    again = CogVideoXTransformer3DModel.from_pretrained(tmp_path, dtype=dtype)
    for (name, one), two in zip(model.state_dict().items(), again.state_dict().values()):
        np.testing.assert_array_equal(one.astype("float32").numpy(), two.astype("float32").numpy(), err_msg=name)
