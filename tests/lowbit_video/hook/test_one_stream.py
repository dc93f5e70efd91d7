"""The frame of one stream against attention written out in NumPy: every part that a module may have, and every kind of mask."""
import numpy as np
import pytest

paddle = pytest.importorskip("paddle", reason="paddlepaddle is not installed")
from paddle import nn  # noqa: E402

import lowbit_video as lv  # noqa: E402

B, N, M, H, D, TEXT_WIDTH = 3, 12, 7, 2, 16, 24
WIDTH = H * D


class Scaled(nn.Linear):
    """A projection with a LoRA layer, whose part is weighed by the call's scale."""

    lora_layer = True

    def forward(self, x, scale=1.0):
        return super().forward(x) * (1 + scale)


class Module(nn.Layer):
    """One attention module, with the parts that are named."""

    def __init__(self, keys=WIDTH, scale=D**-0.5, group_norm=False, spatial_norm=False, norm_cross=False, residual=False,
                 rescale=1.0, linear=nn.Linear):
        super().__init__()
        self.heads, self.scale, self.residual_connection, self.rescale_output_factor = H, scale, residual, rescale
        self.to_q, self.to_k, self.to_v = linear(WIDTH, WIDTH), linear(keys, WIDTH), linear(keys, WIDTH)
        self.to_out = nn.LayerList([linear(WIDTH, WIDTH), nn.Dropout(0.0)])
        self.group_norm = nn.GroupNorm(4, WIDTH) if group_norm else None
        self.spatial_norm = (lambda x, temb: x * temb) if spatial_norm else None
        self.norm_cross = nn.LayerNorm(keys) if norm_cross else None
        self.set_processor(lv.ExactAttnProcessor())

    def set_processor(self, processor):
        object.__setattr__(self, "processor", processor)

    def norm_encoder_hidden_states(self, x):
        return self.norm_cross(x)

    def forward(self, *given, **named):
        return self.processor(self, *given, **named)


lv.declare_attention(Module, frame="one_stream")


def written_out(module, x, text=None, mask=None, temb=1.0, lora=None):
    """x: tokens [B, N, C] or an image. mask: added, [B, H, N, M]. lora: what projections multiply by."""
    value = lambda parameter: parameter.numpy().astype(np.float64)
    project = lambda layer, a: (a @ value(layer.weight) + value(layer.bias)) * (1.0 if lora is None else 1 + lora)
    tokens = x * temb
    if x.ndim == 4:
        tokens = tokens.reshape(B, WIDTH, -1).transpose(0, 2, 1)
    if module.group_norm is not None:
        groups = tokens.reshape(B, -1, 4, WIDTH // 4)
        groups = (groups - groups.mean((1, 3), keepdims=True)) / np.sqrt(groups.var((1, 3), keepdims=True) + 1e-5)
        tokens = groups.reshape(tokens.shape)
    keys = tokens if text is None else text
    if module.norm_cross is not None and text is not None:
        keys = (keys - keys.mean(-1, keepdims=True)) / np.sqrt(keys.var(-1, keepdims=True) + 1e-5)
    q, k, v = project(module.to_q, tokens), project(module.to_k, keys), project(module.to_v, keys)
    out = np.empty_like(q)
    for sample in range(B):
        for head in range(H):
            part = slice(head * D, (head + 1) * D)
            scores = q[sample, :, part] @ k[sample, :, part].T * module.scale + (0 if mask is None else mask[sample, head])
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[sample, :, part] = weights / weights.sum(-1, keepdims=True) @ v[sample, :, part]
    out = project(module.to_out[0], out)
    if x.ndim == 4:
        out = out.transpose(0, 2, 1).reshape(x.shape)
    return (out + x if module.residual_connection else out) / module.rescale_output_factor


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def assert_as_written_out(module, x, text=None, given_mask=None, temb=None, lora=None, **wanted):
    named = {} if lora is None else dict(scale=lora)
    named.update({} if temb is None else dict(temb=paddle.to_tensor(temb)))
    with paddle.no_grad():
        got = module(paddle.to_tensor(x), None if text is None else paddle.to_tensor(text),
                     None if given_mask is None else paddle.to_tensor(given_mask), **named)
    assert list(got.shape) == list(x.shape)
    expected = written_out(module, x, text, lora=lora, temb=1.0 if temb is None else temb, **wanted)
    np.testing.assert_allclose(got.numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("parts", [
    {}, dict(scale=0.1), dict(scale=D**-0.5 * 1.01), dict(scale=1.0), dict(group_norm=True), dict(residual=True),
    dict(rescale=2.5), dict(residual=True, rescale=2.5), dict(norm_cross=True),
    dict(scale=0.4, group_norm=True, residual=True, rescale=0.5)], ids=str)
@pytest.mark.parametrize("kind", ["tokens", "image", "text"])
def test_every_part_of_a_module(parts, kind):
    paddle.seed(1)
    module = Module(TEXT_WIDTH if kind == "text" else WIDTH, **parts)
    x = 2 * drawn(B, WIDTH, 3, 4) if kind == "image" else 2 * drawn(B, N, WIDTH)
    assert_as_written_out(module, x, 2 * drawn(B, M, TEXT_WIDTH, seed=1) + 1 if kind == "text" else None)


@pytest.mark.parametrize("scale", [0.25, 1.0, 0.0])
def test_a_scale_is_that_of_lora_layers(scale):
    module = Module(linear=Scaled)
    assert_as_written_out(module, drawn(B, N, WIDTH), lora=scale)


def test_a_scale_without_lora_layers_changes_nothing():
    module, x = Module(), paddle.to_tensor(drawn(B, N, WIDTH))
    np.testing.assert_array_equal(module(x, scale=0.25).numpy(), module(x).numpy())


def test_a_spatial_norm_gets_the_embedding_of_time():
    assert_as_written_out(Module(spatial_norm=True), drawn(B, WIDTH, 3, 4), temb=2 * drawn(B, WIDTH, 1, 1, seed=2))


@pytest.mark.parametrize("keys", [N, M], ids=["tokens", "text"])
@pytest.mark.parametrize("shape", ["B M", "B 1 M", "B N M", "BH N M", "BH 1 M", "B H N M", "1 1 N M"])
@pytest.mark.parametrize("boolean", [False, True], ids=["added", "boolean"])
def test_masks_of_every_shape(shape, keys, boolean):
    """A mask of samples and heads in one dimension has the heads of a sample together."""
    sizes = {"B": B, "H": H, "N": N, "M": keys, "BH": B * H, "1": 1}
    mask = drawn(*(sizes[name] for name in shape.split()), seed=5)
    if boolean:
        mask = mask > -0.5
        mask[..., 0] = True
    whole = {"B M": lambda x: x[:, None, None], "B 1 M": lambda x: x[:, None], "B N M": lambda x: x[:, None],
             "BH N M": lambda x: x.reshape(B, H, N, keys), "BH 1 M": lambda x: x.reshape(B, H, 1, keys)}.get(shape, lambda x: x)
    added = np.broadcast_to(whole(np.where(mask, 0.0, -np.inf) if boolean else mask), (B, H, N, keys))
    text = drawn(B, M, WIDTH, seed=1) if keys == M else None
    assert_as_written_out(Module(), drawn(B, N, WIDTH), text, mask, mask=added)
