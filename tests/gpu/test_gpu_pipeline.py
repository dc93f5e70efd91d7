"""The VAE and the whole pipeline on Paddle's GPU, in every type, against the goldens that diffusers wrote on a CPU."""
import numpy as np
import pytest

from golden_cases import GOLDENS, cases

pytestmark = pytest.mark.gpu

# Largest and mean error of decoded pixels (range about [-4, 4]) by type; float32 leaves room for TF32 convolutions.
VAE_ERRORS = {"float32": (0.02, 0.002), "float16": (0.03, 0.003), "bfloat16": (0.2, 0.03)}
# The same of a video's pixels in levels of 255, after four guided steps.
VIDEO_LEVELS = {"float32": (4, 0.3), "float16": (6, 0.5), "bfloat16": (24, 2.5)}


@pytest.fixture(scope="module")
def device(gpu):
    if gpu.name != "paddle":
        pytest.skip("the pipeline is Paddle's; set LOWBIT_TEST_FRAMEWORK=paddle")
    from lowbit_video.runtime.detect import default_paddle_device

    return default_paddle_device()


@pytest.mark.parametrize("dtype", VAE_ERRORS)
@pytest.mark.parametrize("name", ["decode_1", "decode_4", "decode_5", "decode_tiled", "encode_17"])
def test_vae(device, name, dtype):
    import paddle

    from lowbit_video.pipelines import AutoencoderKLCogVideoX
    from lowbit_video.pipelines.cogvideox.pipeline import on_device

    with on_device(device):
        model = AutoencoderKLCogVideoX.from_pretrained(GOLDENS / "vae_small", dtype=dtype)
        if name.endswith("tiled"):
            model.enable_tiling(*cases.VAE_TILE)
        x = paddle.to_tensor(cases.vae_inputs()[name]).astype(dtype)
        if name.startswith("decode"):
            got = model.decode(x)[..., :: cases.VAE_STRIDE, :: cases.VAE_STRIDE]
        else:
            posterior = model.encode(x)
            got = paddle.concat([posterior.mean, posterior.logvar], axis=1)
        assert str(got.dtype).endswith(dtype)
        got = got.astype("float32").numpy()
    error = abs(got - np.load(GOLDENS / "vae_small" / "io.npz")[name])
    largest, mean = VAE_ERRORS[dtype]
    assert error.max() < largest and error.mean() < mean


@pytest.mark.parametrize("dtype", VIDEO_LEVELS)
@pytest.mark.parametrize("kind", list(cases.PIPELINES))
def test_video(device, kind, dtype):
    from lowbit_video.pipelines import CogVideoXPipeline

    pipe = CogVideoXPipeline.from_pretrained(GOLDENS / kind, dtype=dtype, device=device)
    arguments = {**cases.PIPELINE_SIZE, **cases.PIPELINE_CASES["guided"]}
    shape, _ = pipe._latent_shape(1, arguments["num_frames"], arguments["height"], arguments["width"])
    output = pipe(latents=cases.start_noise(shape), generator=cases.step_noise(), progress=False, **arguments)
    got = output.frames[:, :, :: cases.VIDEO_STRIDE, :: cases.VIDEO_STRIDE] * 255
    error = abs(got - np.load(GOLDENS / kind / "io.npz")["guided"].astype(np.float32))
    largest, mean = VIDEO_LEVELS[dtype]
    assert error.max() <= largest and error.mean() <= mean


def test_a_seed_gives_the_same_noise_as_on_the_cpu(device):
    from lowbit_video.pipelines import CogVideoXPipeline

    def first_latents(where):
        seen = []
        pipe = CogVideoXPipeline.from_pretrained(GOLDENS / "pipeline_2b", device=where)
        pipe.transformer.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].numpy()))
        pipe("snow", seed=3, num_inference_steps=1, progress=False, height=32, width=48, num_frames=9, output_type="latent")
        return seen[0]

    np.testing.assert_array_equal(first_latents(device), first_latents("cpu"))
