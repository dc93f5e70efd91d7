"""The 3D causal VAE of CogVideoX: video in, 16-channel latents out, and back.

A clip is worked on a few frames at a time. Each causal convolution hands what the next frames need of the past to the
following call (its cache), so the pieces join without a seam and memory does not grow with the length of the clip.

On the CPU two exact reformulations replace the literal convolutions, which Paddle's CPU kernels run at half speed:
a 3x3x3 convolution is one 2D convolution over frames with all three time taps as output channels, summed with a shift
(no frame is convolved twice, as the cache holds partial sums, not frames); and "repeat pixels twice, then convolve 3x3"
is one 2x2 convolution at the low resolution. Measured on 2 cores, 32 channels, 8 x 128 x 192: 499 ms becomes 225 ms.

Source: CogVideoX (arXiv 2408.06072) section 2.1 and diffusers' AutoencoderKLCogVideoX, whose folders this reads and
writes; the number of frames per piece, the tiles and their blending are the same.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from lowbit_video.distributed.group import Group
from lowbit_video.distributed.wavefront import Wavefront

from ..shared.config import MAX_EPSILON, Config, ConfigError, check_between, keep_config
from ..shared.weights import Model
from .vae_pieces import FRAME, HEIGHT, WIDTH, Caches, Job, by_pieces, by_tiles, pieces_of

NORM_EPS = 1e-6  # of every norm outside the residual blocks; those take it from the config
LOGVAR_RANGE = (-30.0, 20.0)
DOWN_BLOCK, UP_BLOCK = "CogVideoXDownBlock3D", "CogVideoXUpBlock3D"  # the only block types that a config may name
# Row p adds up the three taps that, at output phase p of a doubled axis, meet the same one of two pixels.
UPSAMPLE_FOLDS = ([[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]])


@dataclass(frozen=True)
class DiagonalGaussian:
    """The posterior of `encode`.

    Args:
        mean: [B, latent_channels, T, H, W].
        logvar: the same shape, natural log, already clipped to LOGVAR_RANGE.
    """

    mean: paddle.Tensor
    logvar: paddle.Tensor

    def mode(self) -> paddle.Tensor:
        return self.mean

    def sample(self, generator: np.random.Generator | int | None = None) -> paddle.Tensor:
        """One draw; the noise comes from NumPy, so the same seed gives the same draw on every device."""
        generator = np.random.default_rng(generator)
        noise = paddle.to_tensor(generator.standard_normal(self.mean.shape, dtype=np.float32), place=self.mean.place)
        return self.mean + paddle.exp(0.5 * self.logvar) * noise.astype(self.mean.dtype)

    def kl(self) -> paddle.Tensor:
        """KL divergence from the standard normal, summed over all but the batch: [B], nats."""
        terms = self.mean.square() + self.logvar.exp() - 1.0 - self.logvar
        return 0.5 * terms.sum(axis=[1, 2, 3, 4])


def on_cpu(x: paddle.Tensor) -> bool:
    return x.place.is_cpu_place()


def frames_first(x: paddle.Tensor) -> paddle.Tensor:
    """[B, C, T, H, W] -> [B*T, C, H, W]."""
    batch, channels, frames, height, width = x.shape
    return x.transpose([0, 2, 1, 3, 4]).reshape([batch * frames, channels, height, width])


def channels_first(x: paddle.Tensor, batch: int) -> paddle.Tensor:
    """[B*T, C, H, W] -> [B, C, T, H, W]."""
    _, channels, height, width = x.shape
    return x.reshape([batch, -1, channels, height, width]).transpose([0, 2, 1, 3, 4])


def repeat_frames(x: paddle.Tensor, times: int) -> paddle.Tensor:
    """Each frame of [B, C, T, H, W] `times` times in a row."""
    if times == 1:
        return x
    batch, channels, frames, height, width = x.shape
    x = x.unsqueeze(3).expand([batch, channels, frames, times, height, width])
    return x.reshape([batch, channels, frames * times, height, width])


def repeat_pixels(x: paddle.Tensor, times: int) -> paddle.Tensor:
    """Nearest upsampling of the last two axes (expand is 4x faster on the CPU than `F.interpolate`)."""
    if times == 1:
        return x
    *lead, height, width = x.shape
    x = x.reshape([-1, height, 1, width, 1]).expand([math.prod(lead), height, times, width, times])
    return x.reshape([*lead, height * times, width * times])


class CausalConv3D(nn.Layer):
    """A convolution over space and past frames; before the first frame it sees copies of the first frame."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3):
        super().__init__()
        self.kernel_size = kernel_size
        pad = (kernel_size - 1) // 2
        self.conv = nn.Conv3D(in_channels, out_channels, kernel_size, padding=[0, pad, pad])

    def forward(self, x: paddle.Tensor, caches: Caches | Wavefront) -> paddle.Tensor:
        """[B, I, T, H, W] -> [B, O, T, H, W]. Its cache: past frames on a GPU, products of past frames on the CPU."""
        if on_cpu(x):
            return self._by_partial_sums(x, caches)
        past = caches.take(self)
        past = past[0] if past else repeat_frames(x[:, :, :1], self.kernel_size - 1)
        x = paddle.concat([past, x], axis=FRAME)
        caches.keep(self, [x[:, :, 1 - self.kernel_size :].clone()])
        return self.conv(x)

    def cache_shapes(self, x: paddle.Tensor, height: int, width: int) -> list[tuple[int, ...]]:
        """Of what it keeps of an input of that height and width, of the batch and device of x."""
        batch, past = x.shape[0], self.kernel_size - 1
        out_channels, in_channels = self.conv.weight.shape[:2]
        if on_cpu(x):
            return [(batch, past - tap, out_channels, height, width) for tap in range(past)]
        return [(batch, in_channels, past, height, width)]

    def _by_partial_sums(self, x, caches):
        """The same by one 2D convolution; here the cache holds, per tap, the products that coming frames will add up."""
        taps, pad = self.kernel_size, (self.kernel_size - 1) // 2
        batch, _, frames, height, width = x.shape
        out_channels, in_channels = self.conv.weight.shape[:2]
        # [O, I, taps, h, w] -> [taps * O, I, h, w]
        weight = self.conv.weight.transpose([2, 0, 1, 3, 4]).reshape([taps * out_channels, in_channels, taps, taps])
        products = F.conv2d(frames_first(x), weight, padding=pad)
        products = [p.reshape([batch, frames, -1, height, width]) for p in paddle.split(products, taps, axis=1)]
        cache, out, kept = caches.take(self), products.pop(), []
        for tap, product in enumerate(products):  # tap 0 looks farthest back
            past = cache[tap] if cache else product[:, :1].expand([-1, taps - 1 - tap, -1, -1, -1])
            past = paddle.concat([past, product], axis=1)
            out = out + past[:, :frames]
            kept.append(past[:, frames:].clone())
        caches.keep(self, kept)
        return out.transpose([0, 2, 1, 3, 4]) + self.conv.bias.reshape([1, -1, 1, 1, 1])


class PointwiseConv(nn.Layer):
    """A 1x1x1 convolution under the name that the checkpoints give it (`conv_y.conv`)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv3D(in_channels, out_channels, 1)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.conv(x)


class SpatialNorm3D(nn.Layer):
    """Group norm whose scale and shift are read from the latents at each place.

    The 1x1x1 convolutions run at the latents' own resolution and are repeated afterwards: the same values as the other
    way round, for a fraction of the work.
    """

    def __init__(self, channels: int, latent_channels: int, groups: int):
        super().__init__()
        self.norm_layer = nn.GroupNorm(groups, channels, epsilon=NORM_EPS)
        self.conv_y = PointwiseConv(latent_channels, channels)
        self.conv_b = PointwiseConv(latent_channels, channels)

    def forward(self, x: paddle.Tensor, latents: paddle.Tensor) -> paddle.Tensor:
        scale = _repeat_to(self.conv_y(latents), x)
        shift = _repeat_to(self.conv_b(latents), x)
        return self.norm_layer(x) * scale + shift


def _repeat_to(latents: paddle.Tensor, x: paddle.Tensor) -> paddle.Tensor:
    """Repeats latents [B, C, t, h, w] to the frames and size of x; an odd count of frames leaves the first one single."""
    frames, low_frames = x.shape[FRAME], latents.shape[FRAME]
    if frames > 1 and frames % 2 == 1:
        first, rest = latents[:, :, :1], latents[:, :, 1:]
        latents = paddle.concat([first, repeat_frames(rest, (frames - 1) // (low_frames - 1))], axis=FRAME)
    else:
        latents = repeat_frames(latents, frames // low_frames)
    return repeat_pixels(latents, x.shape[HEIGHT] // latents.shape[HEIGHT])


class ResnetBlock3D(nn.Layer):
    """norm, silu, conv, twice, beside a shortcut; the norms are spatial in the decoder (`latent_channels` given)."""

    def __init__(self, in_channels: int, out_channels: int, config: Config, latent_channels: int | None):
        super().__init__()
        self.is_spatial = latent_channels is not None
        if self.is_spatial:
            self.norm1 = SpatialNorm3D(in_channels, latent_channels, config.norm_num_groups)
            self.norm2 = SpatialNorm3D(out_channels, latent_channels, config.norm_num_groups)
        else:
            self.norm1 = nn.GroupNorm(config.norm_num_groups, in_channels, epsilon=config.norm_eps)
            self.norm2 = nn.GroupNorm(config.norm_num_groups, out_channels, epsilon=config.norm_eps)
        self.conv1 = CausalConv3D(in_channels, out_channels)
        self.conv2 = CausalConv3D(out_channels, out_channels)
        self.conv_shortcut = nn.Conv3D(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: paddle.Tensor, latents: paddle.Tensor | None, caches: Caches | Wavefront) -> paddle.Tensor:
        condition = (latents,) if self.is_spatial else ()
        hidden = self.conv1(F.silu(self.norm1(x, *condition)), caches)
        hidden = self.conv2(F.silu(self.norm2(hidden, *condition)), caches)
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return x + hidden


class Downsample3D(nn.Layer):
    """Half the height and width, by a strided convolution; half the frames first where asked, by their mean."""

    def __init__(self, channels: int, compress_time: bool):
        super().__init__()
        self.conv = nn.Conv2D(channels, channels, 3, stride=2)
        self.compress_time = compress_time

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        if self.compress_time and x.shape[FRAME] > 1:
            odd = x.shape[FRAME] % 2
            pairs = 0.5 * (x[:, :, odd::2] + x[:, :, odd + 1 :: 2])
            x = paddle.concat([x[:, :, :1], pairs], axis=FRAME) if odd else pairs
        batch = x.shape[0]
        return channels_first(self.conv(F.pad(frames_first(x), [0, 1, 0, 1])), batch)


class Upsample3D(nn.Layer):
    """Twice the height and width, and twice the frames where asked (all but the first one of an odd count).

    The convolution has no taps in time, so it runs before the frames are repeated.
    """

    def __init__(self, channels: int, compress_time: bool):
        super().__init__()
        self.conv = nn.Conv2D(channels, channels, 3, padding=1)
        self.compress_time = compress_time

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        batch, frames = x.shape[0], x.shape[FRAME]
        x = frames_first(x)
        x = self._at_low_resolution(x) if on_cpu(x) else self.conv(repeat_pixels(x, 2))
        x = channels_first(x, batch)
        if not self.compress_time or frames == 1:
            return x
        if frames % 2 == 1:
            return paddle.concat([x[:, :, :1], repeat_frames(x[:, :, 1:], 2)], axis=FRAME)
        return repeat_frames(x, 2)

    def _at_low_resolution(self, x):
        """Taps of the 3x3 kernel that meet the same low-resolution pixel are added up: 2x2 for each of 4 output phases."""
        batch, _, height, width = x.shape
        out_channels = self.conv.weight.shape[0]
        folds = [paddle.to_tensor(fold, dtype=x.dtype) for fold in UPSAMPLE_FOLDS]
        weight = paddle.concat([rows @ self.conv.weight @ columns.t() for rows in folds for columns in folds])
        y = F.conv2d(x, weight, padding=1).reshape([batch, 2, 2, out_channels, height + 1, width + 1])
        rows = []
        for i in (0, 1):
            pair = [y[:, i, j, :, i : i + height, j : j + width] for j in (0, 1)]
            rows.append(paddle.stack(pair, axis=-1).reshape([batch, out_channels, height, 2 * width]))
        y = paddle.stack(rows, axis=3).reshape([batch, out_channels, 2 * height, 2 * width])
        return y + self.conv.bias.reshape([1, -1, 1, 1])


class Encoder3D(nn.Layer):
    """Video [B, 3, T, H, W] to the posterior's mean and logvar, stacked along the channels."""

    def __init__(self, config: Config):
        super().__init__()
        channels = config.block_out_channels
        self.conv_in = CausalConv3D(config.in_channels, channels[0])
        self.down_blocks = nn.LayerList()
        for i, out_channels in enumerate(channels):
            block = nn.Layer()
            block.resnets = nn.LayerList(
                ResnetBlock3D(channels[max(i - 1, 0)] if layer == 0 else out_channels, out_channels, config, None)
                for layer in range(config.layers_per_block)
            )
            is_last = i == len(channels) - 1
            samplers = [] if is_last else [Downsample3D(out_channels, compress_time=i < _temporal_levels(config))]
            block.downsamplers = nn.LayerList(samplers)
            self.down_blocks.append(block)
        self.mid_block = nn.Layer()
        self.mid_block.resnets = nn.LayerList(ResnetBlock3D(channels[-1], channels[-1], config, None) for _ in range(2))
        self.norm_out = nn.GroupNorm(config.norm_num_groups, channels[-1], epsilon=NORM_EPS)
        self.conv_out = CausalConv3D(channels[-1], 2 * config.latent_channels)

    def forward(self, x: paddle.Tensor, caches: Caches | Wavefront) -> paddle.Tensor:
        x = self.conv_in(x, caches)
        for block in self.down_blocks:
            for layer in block.resnets:
                x = layer(x, None, caches)
            for sampler in block.downsamplers:
                x = sampler(x)
        for layer in self.mid_block.resnets:
            x = layer(x, None, caches)
        return self.conv_out(F.silu(self.norm_out(x)), caches)


class Decoder3D(nn.Layer):
    """Latents [B, C, t, h, w] to video [B, 3, T, H, W]; the latents also steer every norm."""

    def __init__(self, config: Config):
        super().__init__()
        channels, latent_channels = config.block_out_channels[::-1], config.latent_channels
        self.conv_in = CausalConv3D(latent_channels, channels[0])
        self.mid_block = nn.Layer()
        self.mid_block.resnets = nn.LayerList(
            ResnetBlock3D(channels[0], channels[0], config, latent_channels) for _ in range(2)
        )
        self.up_blocks = nn.LayerList()
        for i, out_channels in enumerate(channels):
            block = nn.Layer()
            block.resnets = nn.LayerList(
                ResnetBlock3D(channels[max(i - 1, 0)] if layer == 0 else out_channels, out_channels, config, latent_channels)
                for layer in range(config.layers_per_block + 1)
            )
            is_last = i == len(channels) - 1
            samplers = [] if is_last else [Upsample3D(out_channels, compress_time=i < _temporal_levels(config))]
            block.upsamplers = nn.LayerList(samplers)
            self.up_blocks.append(block)
        self.norm_out = SpatialNorm3D(channels[-1], latent_channels, config.norm_num_groups)
        self.conv_out = CausalConv3D(channels[-1], config.out_channels)

    def forward(self, latents: paddle.Tensor, caches: Caches | Wavefront) -> paddle.Tensor:
        x = self.conv_in(latents, caches)
        for layer in self.mid_block.resnets:
            x = layer(x, latents, caches)
        for block in self.up_blocks:
            for layer in block.resnets:
                x = layer(x, latents, caches)
            for sampler in block.upsamplers:
                x = sampler(x)
        return self.conv_out(F.silu(self.norm_out(x, latents)), caches)


def _caches_of(network: Encoder3D | Decoder3D, x: paddle.Tensor) -> list[tuple[CausalConv3D, list[tuple[int, ...]]]]:
    """The network's causal convolutions, in the order of work, with the shapes of what each keeps of an input like x."""
    caches, (height, width) = [], x.shape[HEIGHT:]
    for layer in network.sublayers():  # registered in that order
        if isinstance(layer, CausalConv3D):
            caches.append((layer, layer.cache_shapes(x, height, width)))
        elif isinstance(layer, Upsample3D):
            height, width = 2 * height, 2 * width
        elif isinstance(layer, Downsample3D):
            height, width = height // 2, width // 2
    return caches


def _temporal_levels(config: Config) -> int:
    """How many of the resolution steps also halve the frames."""
    return int(math.log2(config.temporal_compression_ratio))


MAX_COUNT = 2**20
"""Of each of a configuration's counts."""


def _check_config(config: Config) -> None:
    steps = len(config.block_out_channels)
    counts = ("in_channels", "out_channels", "latent_channels", "norm_num_groups", "sample_height", "sample_width")
    check_between(config, counts, 1, MAX_COUNT)
    check_between(config, ("layers_per_block",), 0, MAX_COUNT)
    check_between(config, ("norm_eps",), 0.0, MAX_EPSILON)
    if not steps or min(config.block_out_channels) < 1 or max(config.block_out_channels) > MAX_COUNT:
        raise ConfigError(f"VAE config: block_out_channels is {list(config.block_out_channels)}; give those of each block")
    if not config.scaling_factor:
        raise ConfigError("VAE config: scaling_factor is 0; latents are divided by it")
    for key, supported in (("down_block_types", DOWN_BLOCK), ("up_block_types", UP_BLOCK)):
        if any(block != supported for block in config[key]) or len(config[key]) != steps:
            raise ConfigError(
                f"VAE config: {key} is {list(config[key])}; supported is {supported!r}, once for each of the {steps} "
                f"block_out_channels"
            )
    if config.act_fn not in ("silu", "swish"):
        raise ConfigError(f"VAE config: act_fn is {config.act_fn!r}; supported is 'silu'")
    if any(channels % config.norm_num_groups for channels in config.block_out_channels):
        raise ConfigError(
            f"VAE config: norm_num_groups {config.norm_num_groups} does not divide every one of block_out_channels "
            f"{list(config.block_out_channels)}"
        )
    if config.temporal_compression_ratio not in [2**level for level in range(steps)]:
        raise ConfigError(
            f"VAE config: temporal_compression_ratio is {config.temporal_compression_ratio}; with {steps} blocks it must be "
            f"one of {[2**level for level in range(steps)]}"
        )


class AutoencoderKLCogVideoX(Model):
    """The whole VAE: `encode`, `decode`, the switches that bound memory, and the ranks that share the work (`group`).

    The arguments are the keys of `vae/config.json`, named and defaulted as in diffusers 0.42.

    Raises:
        ConfigError: a config that asks for what is not built.
    """

    repeated = {"layers_per_block": r"^encoder\.down_blocks\.\d+\.resnets\.(\d+)\."}

    @keep_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: Sequence[str] = (DOWN_BLOCK,) * 4,
        up_block_types: Sequence[str] = (UP_BLOCK,) * 4,
        block_out_channels: Sequence[int] = (128, 256, 256, 512),
        latent_channels: int = 16,
        layers_per_block: int = 3,
        act_fn: str = "silu",
        norm_eps: float = 1e-6,
        norm_num_groups: int = 32,
        temporal_compression_ratio: float = 4,
        sample_height: int = 480,
        sample_width: int = 720,
        scaling_factor: float = 1.15258426,
        shift_factor: float | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        force_upcast: float = True,
        use_quant_conv: bool = False,
        use_post_quant_conv: bool = False,
        invert_scale_latents: bool = False,
    ):
        super().__init__()
        config = self.config
        _check_config(config)
        self.spatial_compression_ratio = 2 ** (len(block_out_channels) - 1)
        self.encoder = Encoder3D(config)
        self.decoder = Decoder3D(config)
        # Sized by out_channels, as in the code that wrote the checkpoints; none that is published has either.
        out = config.out_channels
        self.quant_conv = nn.Conv3D(2 * out, 2 * out, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv3D(out, out, 1) if config.use_post_quant_conv else None
        self.use_slicing = self.use_tiling = False
        self.slicing_chosen = self.tiling_chosen = False  # whether a caller has said, on or off
        self.on_decoded: Callable[[int], object] | None = None  # told how many latent frames each piece of work had
        # Ranks that call encode and decode together, with the same input, and all get the result; the first `degree` of them
        # do the work (None: all).
        self.group: Group | None = None
        self.degree: int | None = None
        # The model was trained on pieces of 2 latent frames; other sizes work and look worse.
        self.num_latent_frames_batch_size = 2
        self.num_sample_frames_batch_size = 8
        self.tile_overlap_factor_height = 1 / 6
        self.tile_overlap_factor_width = 1 / 5
        self._set_tile_size(config.sample_height // 2, config.sample_width // 2)

    def enable_slicing(self) -> None:
        """Work on the videos of a batch one after the other."""
        self.use_slicing = self.slicing_chosen = True

    def disable_slicing(self) -> None:
        self.use_slicing, self.slicing_chosen = False, True

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_overlap_factor_height: float | None = None,
        tile_overlap_factor_width: float | None = None,
    ) -> None:
        """Work on overlapping tiles, blended where they overlap: less memory, slightly different pixels near the seams.

        Args:
            tile_sample_min_height, tile_sample_min_width: the tile's size in pixels; half the training size by default.
            tile_overlap_factor_height, tile_overlap_factor_width: the part of a tile shared with the next, in [0, 1).
        Raises:
            ValueError: a tile smaller than one latent, or an overlap outside [0, 1).
        """
        height = tile_sample_min_height or self.tile_sample_min_height
        width = tile_sample_min_width or self.tile_sample_min_width
        given = (tile_overlap_factor_height, tile_overlap_factor_width)
        present = (self.tile_overlap_factor_height, self.tile_overlap_factor_width)
        factors = [kept if factor is None else factor for factor, kept in zip(given, present)]
        for factor in factors:
            if not 0 <= factor < 1:
                raise ValueError(f"tile overlap factor is {factor}; it must be in [0, 1)")
        ratio = self.spatial_compression_ratio
        if min(height, width) < ratio:
            raise ValueError(f"tiles of {height}x{width} pixels are smaller than one latent; give at least {ratio}x{ratio}")
        self._set_tile_size(height, width)
        self.tile_overlap_factor_height, self.tile_overlap_factor_width = factors
        self.use_tiling = self.tiling_chosen = True

    def disable_tiling(self) -> None:
        self.use_tiling, self.tiling_chosen = False, True

    def _set_tile_size(self, height: int, width: int) -> None:
        ratio = self.spatial_compression_ratio
        self.tile_sample_min_height, self.tile_sample_min_width = height, width
        self.tile_latent_min_height, self.tile_latent_min_width = height // ratio, width // ratio

    def num_decoded_frames(self, latent_frames: int) -> int:
        """How many video frames `decode` makes: an odd first piece keeps its first frame single."""
        bounds = pieces_of(latent_frames, self.num_latent_frames_batch_size)
        return sum(self._decoded_frames(stop - start) for start, stop in bounds)

    def _decoded_frames(self, piece: int) -> int:
        ratio = int(self.config.temporal_compression_ratio)
        return ratio * (piece - 1) + 1 if piece % 2 else ratio * piece

    def _encoded_frames(self, piece: int) -> int:
        for _ in range(_temporal_levels(self.config)):
            piece = (piece + 1) // 2
        return piece

    @paddle.no_grad()
    def encode(self, x: paddle.Tensor) -> DiagonalGaussian:
        """The posterior of videos.

        Args:
            x: [B, in_channels, T, H, W] in [-1, 1]; H and W multiples of the spatial compression (8).
        Returns:
            DiagonalGaussian over [B, latent_channels, t, H/8, W/8]; t is (T - 1) / 4 + 1 for T = 8n + 1, T / 4 for T = 8n.
        """
        self._check(x, self.config.in_channels, "video", self.spatial_compression_ratio)
        moments = self._by_slices(self._encode, x)
        mean, logvar = paddle.chunk(moments, 2, axis=1)
        return DiagonalGaussian(mean, paddle.clip(logvar, *LOGVAR_RANGE))

    @paddle.no_grad()
    def decode(self, z: paddle.Tensor, on_decoded: Callable[[int], object] | None = None) -> paddle.Tensor:
        """Videos of latents.

        Args:
            z: [B, latent_channels, t, h, w], already divided by `config.scaling_factor`.
            on_decoded: told how many latent frames each piece of work had; None: the attribute of that name is told.
        Returns:
            [B, out_channels, T, 8h, 8w] about [-1, 1], not clipped; T as `num_decoded_frames(t)` says.
        """
        self._check(z, self.config.latent_channels, "latents", 1)
        return self._by_slices(partial(self._decode, on_done=on_decoded or self.on_decoded), z)

    def forward(
        self, x: paddle.Tensor, sample_posterior: bool = False, generator: np.random.Generator | int | None = None
    ) -> paddle.Tensor:
        """Encode, take the mode or a sample, decode."""
        posterior = self.encode(x)
        return self.decode(posterior.sample(generator) if sample_posterior else posterior.mode())

    def _check(self, x, channels: int, what: str, multiple: int) -> None:
        shape = list(x.shape)
        if len(shape) != 5 or shape[1] != channels or 0 in shape or shape[HEIGHT] % multiple or shape[WIDTH] % multiple:
            raise ValueError(
                f"the VAE was given {what} of shape {shape}; supported is [batch, {channels}, frames, height, width], none "
                f"of them zero" + (f", height and width multiples of {multiple}" if multiple > 1 else "")
            )

    def _by_slices(self, work, x):
        if self.use_slicing and x.shape[0] > 1:
            return paddle.concat([work(x[i : i + 1]) for i in range(x.shape[0])])
        return work(x)

    def _encode(self, x):
        def run(piece, caches):
            y = self.encoder(piece, caches)
            return y if self.quant_conv is None else self.quant_conv(y)

        job = Job("encode", run, partial(_caches_of, self.encoder), self.num_sample_frames_batch_size,
                  2 * self.config.latent_channels, self._encoded_frames, self.spatial_compression_ratio, 1)
        return self._work(job, x)

    def _decode(self, z, on_done):
        def run(piece, caches):
            return self.decoder(piece if self.post_quant_conv is None else self.post_quant_conv(piece), caches)

        job = Job("decode", run, partial(_caches_of, self.decoder), self.num_latent_frames_batch_size,
                  self.config.out_channels, self._decoded_frames, 1, self.spatial_compression_ratio, on_done=on_done)
        return self._work(job, z)

    def _work(self, job: Job, x: paddle.Tensor) -> paddle.Tensor:
        degree = self.degree or (self.group.size if self.group else 1)
        if degree > 1:
            job = replace(job, group=self.group, degree=degree, ahead=not on_cpu(x))
        if not self.use_tiling:
            return by_pieces(job, x)
        tile = self.tile_latent_min_height, self.tile_latent_min_width
        return by_tiles(job, x, tile, (self.tile_overlap_factor_height, self.tile_overlap_factor_width))
