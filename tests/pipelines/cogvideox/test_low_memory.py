"""A pipeline with low memory: the same videos, fewer weights at a time. Paddle counts tensors on a CPU too."""
import threading
import warnings
from dataclasses import replace

import numpy as np
import paddle
import pytest

from lowbit_video import apply, coverage, parallelize
from lowbit_video.distributed.cost.memory import decode_bytes, needed_gib, step_bytes
from lowbit_video.distributed.cost.models import GIB, Model
from lowbit_video.errors import UnsupportedError
from lowbit_video.pipelines import AutoencoderKLCogVideoX, CogVideoXPipeline, CogVideoXTransformer3DModel
from lowbit_video.pipelines.cogvideox import pipeline as module
from lowbit_video.pipelines.cogvideox import vae as vae_module
from lowbit_video.pipelines.cogvideox.vae_room import SHARE, within
from lowbit_video.pipelines.shared.weights import StoredWeights

from golden_cases import GOLDENS

CALL = dict(num_inference_steps=2, progress=False, height=32, width=48, num_frames=9, seed=3)
ALLOCATED = ("Allocated", 0)


def load(kind="pipeline_2b", **options):
    return CogVideoXPipeline.from_pretrained(GOLDENS / kind, device="cpu", low_memory=True, **options)


def here(model):
    """Whether all of a model's weights have memory; not some of them."""
    there = {tensor._is_initialized() for tensor in model.state_dict().values()}
    assert len(there) == 1
    return there.pop()


def parts_here(pipe):
    return {name for name in ("text_encoder", "transformer", "vae") if here(getattr(pipe, name))}


@pytest.fixture
def pipe():
    return load()


@pytest.fixture
def reads(monkeypatch):
    """The models whose weights were read, in turn."""
    found, read = [], StoredWeights.read
    monkeypatch.setattr(StoredWeights, "read", lambda self, model: (found.append(type(model).__name__), read(self, model)))
    return found


@pytest.mark.parametrize("kind, compiled", [("pipeline_2b", False), ("pipeline_5b", False), ("pipeline_15", False),
                                            ("pipeline_2b", True)])
def test_videos_are_the_same_to_the_bit_call_after_call(kind, compiled):
    plain, low = CogVideoXPipeline.from_pretrained(GOLDENS / kind, device="cpu"), load(kind)
    for one in (plain, low):
        if compiled:
            one.compile()
        apply(one, "int8+fp16", fallback="exact")
    for prompt in ("a cat", "snow"):
        np.testing.assert_array_equal(low(prompt, **CALL).frames, plain(prompt, **CALL).frames)
    assert str(coverage(low)) == str(coverage(plain))


def test_one_large_part_at_a_time_and_none_between(pipe):
    seen = {}
    for name in ("text_encoder", "transformer"):
        getattr(pipe, name).register_forward_post_hook(lambda *_, name=name: seen.setdefault(name, parts_here(pipe)) and None)
    decode = pipe.vae.decode
    pipe.vae.decode = lambda *given, **named: (seen.update(decode=parts_here(pipe)), decode(*given, **named))[1]
    assert parts_here(pipe) == {"vae"}
    pipe("a cat", **CALL)
    assert seen == {"text_encoder": {"text_encoder", "vae"}, "transformer": {"transformer", "vae"}, "decode": {"vae"}}
    assert parts_here(pipe) == {"vae"}


def test_memory_is_given_back_and_reading_holds_nothing_twice(pipe):
    core = paddle.base.core
    sizes = {name: [t.size * 4 for t in getattr(pipe, name).state_dict().values()] for name in ("text_encoder", "transformer")}
    before = core.host_memory_stat_current_value(*ALLOCATED)
    for name, size in sizes.items():
        core.host_memory_stat_reset_peak_value(*ALLOCATED)
        with pipe._needed(name, now=True):
            held = core.host_memory_stat_current_value(*ALLOCATED) - before
            assert sum(size) <= held < 1.1 * sum(size) + 2**14
            assert core.host_memory_stat_peak_value(*ALLOCATED) - before < held + 4 * max(size)
        assert core.host_memory_stat_current_value(*ALLOCATED) - before < 2**14


def test_a_call_reads_each_part_once_and_none_that_it_does_not_need(pipe, reads):
    pipe("a cat", **CALL)  # two texts: the negative one is empty
    assert reads == ["T5EncoderModel", "CogVideoXTransformer3DModel"]
    reads.clear()
    embeds = pipe.encode_prompt("a cat")
    assert reads == ["T5EncoderModel"] and parts_here(pipe) == {"vae"}
    pipe(prompt_embeds=embeds, guidance_scale=1.0, **CALL)
    assert reads == ["T5EncoderModel", "CogVideoXTransformer3DModel"]


def test_encoding_from_a_callback_brings_the_transformer_back(pipe, reads):
    plain = CogVideoXPipeline.from_pretrained(GOLDENS / "pipeline_2b", device="cpu")
    reads.clear()
    change = lambda one, step, *_: {"prompt_embeds": paddle.concat([one.encode_prompt(""), one.encode_prompt("snow")])}
    call = dict(callback_on_step_end=change, callback_on_step_end_tensor_inputs=["prompt_embeds"], **{**CALL,
                                                                                                     "num_inference_steps": 3})
    np.testing.assert_array_equal(pipe("a cat", **call).frames, plain("a cat", **call).frames)
    assert reads.count("CogVideoXTransformer3DModel") == 3 and parts_here(pipe) == {"vae"}


def test_a_part_called_by_itself_gets_its_weights_and_a_failure_leaves_none(pipe):
    ids = paddle.to_tensor([[5, 1, 0]])
    want = CogVideoXPipeline.from_pretrained(GOLDENS / "pipeline_2b", device="cpu").text_encoder(ids)
    np.testing.assert_array_equal(pipe.text_encoder(ids).numpy(), want.numpy())
    assert parts_here(pipe) == {"text_encoder", "vae"}
    with pytest.raises(ZeroDivisionError):
        pipe("a cat", callback_on_step_end=lambda *_: 1 // 0, **CALL)
    assert parts_here(pipe) == {"vae"}


def test_threads_that_encode_and_denoise_wait_for_each_other(pipe):
    want, embeds = pipe("a cat", **CALL).frames, pipe.encode_prompt("snow").numpy()
    got = []
    other = threading.Thread(target=lambda: got.extend(pipe.encode_prompt("snow").numpy() for _ in range(8)))
    other.start()
    frames = [pipe("a cat", **CALL).frames for _ in range(2)]
    other.join(60)
    assert len(got) == 8 and all(np.array_equal(one, embeds) for one in got)
    assert all(np.array_equal(one, want) for one in frames)


def test_changed_weights_stay_and_are_used(pipe):
    with pipe._needed("transformer", now=True):
        bias = pipe.transformer.proj_out.bias
        bias.set_value(bias + 0.25)
        with pytest.warns(UserWarning, match="weights of the CogVideoXTransformer3DModel were changed.*save the changed model"):
            changed = pipe("a cat", output_type="latent", **CALL).frames
    assert parts_here(pipe) == {"transformer", "vae"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        again = pipe("a cat", output_type="latent", **CALL).frames
    np.testing.assert_array_equal(changed.numpy(), again.numpy())
    assert abs(again - load()("a cat", output_type="latent", **CALL).frames).max() > 0.1


def test_a_saved_pipeline_has_all_weights_and_given_parts_stay(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    plain = CogVideoXPipeline.from_pretrained(tmp_path, device="cpu")
    np.testing.assert_array_equal(pipe("a cat", **CALL).frames, plain("a cat", **CALL).frames)
    given = load(text_encoder=plain.text_encoder)
    np.testing.assert_array_equal(given("a cat", **CALL).frames, plain("a cat", **CALL).frames)
    assert parts_here(given) == {"text_encoder", "vae"}


def test_ranks_and_other_values_are_refused(pipe):
    with pytest.raises(UnsupportedError, match="low_memory=True.*load it without"):
        parallelize(pipe)
    with pytest.raises(TypeError, match="low_memory is 'yes'"):
        CogVideoXPipeline.from_pretrained(GOLDENS / "pipeline_2b", low_memory="yes")


def test_decoding_goes_by_what_is_free(pipe, monkeypatch):
    asked = []
    latents = paddle.to_tensor(np.random.default_rng(0).standard_normal((1, 1, 4, 6, 6), dtype=np.float32))
    pipe.vae.enable_tiling(24, 24)
    tiled = pipe.decode_latents(latents).numpy()
    pipe.vae.disable_tiling()
    whole = pipe.decode_latents(latents).numpy()
    pipe.vae.tiling_chosen = False
    assert abs(tiled - whole).max() > 1e-3
    for free, want in ((None, whole), (0, tiled), (2**40, whole)):
        monkeypatch.setattr(module, "free_bytes", lambda device, free=free: (asked.append(device), free)[1])
        np.testing.assert_allclose(pipe.decode_latents(latents).numpy(), want, atol=1e-5)
        assert not pipe.vae.use_tiling and not pipe.vae.use_slicing
    assert asked == ["cpu"] * 3


@pytest.mark.parametrize("layers, heads, batch, frames, text", [(2, 4, 2, 5, 16), (4, 8, 1, 5, 16), (2, 4, 2, 13, 64)])
def test_a_step_takes_what_is_reckoned_and_weights_as_many(monkeypatch, layers, heads, batch, frames, text):
    monkeypatch.setattr(paddle.nn.functional, "scaled_dot_product_attention", lambda q, k, v, *_, **__: paddle.zeros(q.shape))
    model = CogVideoXTransformer3DModel(
        num_layers=layers, num_attention_heads=heads, attention_head_dim=32, text_embed_dim=64, time_embed_dim=64,
        max_text_seq_length=text, sample_width=18, sample_height=12, sample_frames=4 * frames - 3)
    model.eval()
    sizes = Model("toy", layers, heads, 4 * frames - 3, 96, 144, head_dim=32, text_tokens=text, text_width=64, time_width=64)
    latents, texts, core = paddle.ones([batch, frames, 16, 12, 18]), paddle.ones([batch, text, 64]), paddle.base.core
    with paddle.no_grad():
        model(latents, texts, paddle.to_tensor([3] * batch))  # makes its tables
        before = core.host_memory_stat_current_value(*ALLOCATED)
        core.host_memory_stat_reset_peak_value(*ALLOCATED)
        model(latents, texts, paddle.to_tensor([3] * batch))
    taken = core.host_memory_stat_peak_value(*ALLOCATED) - before
    tokens = text + sizes.video_tokens(4 * frames - 3, 96, 144)
    assert taken == pytest.approx(step_bytes(batch, tokens, heads * 32, 4), rel=0.02)
    weights = sum(parameter.size for parameter in model.parameters())
    assert sizes.weights_gib * GIB / 2 == pytest.approx(weights, rel=0.04)  # without biases and norms


def test_what_each_way_needs_by_hand():
    model = Model("toy", 2, 4, 49, 480, 720, vae_gib=0.5, text_encoder_gib=3.0)
    step, whole = 13 * 2 * 17776 * 256 * 2 / GIB, decode_bytes(1, 13, 480, 720, 2) / GIB
    tiled = decode_bytes(1, 13, 240, 360, 2) / GIB
    assert step < tiled < 3 < whole
    assert needed_gib(model) == pytest.approx((0.5 + 1.5 + 3 + model.weights_gib + whole, 0.5 + 1.5 + 3))
    assert needed_gib(replace(model, text_encoder_gib=0.0))[1] == pytest.approx(2 + tiled)
    wide = replace(model, heads=48)
    assert needed_gib(wide)[1] == pytest.approx(2 + wide.weights_gib + 12 * step)


SIZE = (3, 13, 16, 20, 30)
ONE = decode_bytes(1, 13, 160, 240, 2, 4, (32, 64, 64, 128), 1)


@pytest.mark.parametrize("videos, choose, cut", [
    (3, (), (False, False)), (2.9, (), (True, False)), (1, (), (True, False)), (0.9, (), (True, True)),
    (2.9, ("disable_slicing",), (False, True)), (0, ("disable_slicing", "disable_tiling"), (False, False)),
    (9, ("enable_tiling", "enable_slicing"), (True, True))])
def test_videos_one_by_one_then_by_tiles_and_what_was_chosen_first(videos, choose, cut):
    vae = AutoencoderKLCogVideoX.from_config(dict(block_out_channels=(32, 64, 64, 128), layers_per_block=1))
    for name in choose:
        getattr(vae, name)()
    before = vae.use_slicing, vae.use_tiling
    with within(vae, SIZE, 2, int(videos * ONE / SHARE) + 1):
        assert (vae.use_slicing, vae.use_tiling) == cut
    assert (vae.use_slicing, vae.use_tiling) == before


def bare_convolution(self, x):
    """As large as what the convolution gives; without what a CPU's takes meanwhile."""
    kernel = self.weight.shape[2:]
    padding = self._padding if isinstance(self._padding, (list, tuple)) else [self._padding] * len(kernel)
    sizes = [size + 2 * pad - taps + 1 for size, pad, taps in zip(x.shape[2:], padding, kernel)]
    return paddle.zeros([x.shape[0], self.weight.shape[0], *sizes])


@pytest.mark.parametrize("channels, layers, latents", [
    ((32, 64, 64, 128), 3, (1, 3, 4, 5)), ((32, 64, 64, 128), 3, (2, 5, 3, 4)), ((32, 32, 64, 64), 1, (1, 13, 4, 5)),
    ((32, 64, 64, 128), 1, (1, 2, 12, 9)), ((32, 64), 1, (1, 3, 12, 18))])
def test_decoding_takes_what_is_reckoned(monkeypatch, channels, layers, latents):
    monkeypatch.setattr(vae_module, "on_cpu", lambda x: False)  # a GPU's way
    for kind in (paddle.nn.Conv2D, paddle.nn.Conv3D):
        monkeypatch.setattr(kind, "forward", bare_convolution)
    levels = len(channels)
    temporal = min(4, 2 ** (levels - 1))
    vae = AutoencoderKLCogVideoX(block_out_channels=channels, layers_per_block=layers, temporal_compression_ratio=temporal,
                                 down_block_types=["CogVideoXDownBlock3D"] * levels,
                                 up_block_types=["CogVideoXUpBlock3D"] * levels)
    batch, frames, height, width = latents
    z, core = paddle.ones([batch, 16, frames, height, width]), paddle.base.core
    before = core.host_memory_stat_current_value(*ALLOCATED)
    core.host_memory_stat_reset_peak_value(*ALLOCATED)
    vae.decode(z)
    taken = core.host_memory_stat_peak_value(*ALLOCATED) - before
    scale = 2 ** (levels - 1)
    reckoned = decode_bytes(batch, frames, height * scale, width * scale, 4, temporal, channels, layers)
    assert taken <= reckoned <= 1.25 * taken
