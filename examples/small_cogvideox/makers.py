"""One video at a time, by diffusers or by the Paddle pipeline: given noise, attention as a run asks, seconds of denoising; its
decoding apart, for when nothing is timed.

A run is a `Candidate` of `lowbit_video.eval.compare`. EXACT is the pipeline as it comes, the reference of all others; FLOOR is
this project's own exact kernel, so that what both differ by is what any two exact kernels of that type differ by.
"""
from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from models import load_pipeline
from torch.nn.attention import SDPBackend, sdpa_kernel

from lowbit_video.cuda_graphs.forward import cuda_graph
from lowbit_video.eval.compare.candidates import EXACT, FLOOR, Candidate, applied, as_candidate
from lowbit_video.eval.compare.paired import coverage_note
from lowbit_video.eval.speed.baselines import BASELINES
from lowbit_video.hook.apply import apply
from lowbit_video.hook.processors import ExactAttnProcessor, LowBitAttnProcessor
from lowbit_video.pipelines.shared.generation import GENERATION_NAME, read_stored

MODEL = Path(__file__).parent / "model"
GENERATED = ("num_inference_steps", "guidance_scale", "num_frames", "height", "width", "fps")
"""What a model's folder must say of how its videos are made."""
DTYPES = ("float16", "bfloat16", "float32")
OTHER_EXACT = "exact ({})"
OTHERS = ("cuDNN", "FlashAttention-4")
REFERENCES = {"torch": "PyTorch's FlashAttention-2", "torch, as it chooses": "PyTorch's attention, the kernel of its choice",
              "paddle": "Paddle's scaled_dot_product_attention"}


class OtherExactProcessor(ExactAttnProcessor):
    """Exact attention by a kernel of a name: `call(q, k, v, scale)` takes and gives [B, N, H, D]."""

    def __init__(self, name: str, call: Callable):
        super().__init__()
        self.name, self.call = name, call

    def attend(self, q, k, v, is_causal=False, scale=None, return_lse=False):
        """By the kernel; what it is not asked for in these models (a causal mask, an LSE) by the framework's own."""
        if is_causal or return_lse:
            return super().attend(q, k, v, is_causal, scale, return_lse)
        self.note(f"exact ({self.name})")
        return self.call(q, k, v, scale)


def by_sdpa(backend: SDPBackend, q, k, v, scale=None):
    """torch's attention by one of its kernels, [B, N, H, D]."""
    with sdpa_kernel(backend):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def by_flash_4(q, k, v, scale=None):
    """FlashAttention-4, [B, N, H, D]."""
    from flash_attn.cute import flash_attn_func

    return flash_attn_func(q, k, v, softmax_scale=scale)[0]


class TorchMaker:
    """diffusers' pipeline: `apply()` hooks its transformer; in 16 bit on a GPU its own attention is FlashAttention-2."""

    framework = "torch"

    def __init__(self, folder, dtype: str, device: str, generation: dict):
        self.pipe = load_pipeline(folder, device, getattr(torch, dtype))
        self.cuda, self.half, self.generation = device.startswith("cuda"), dtype != "float32", generation
        self.device_name = torch.cuda.get_device_name(device) if self.cuda else "cpu"
        self.reference = REFERENCES["torch" if self.cuda and self.half else "torch, as it chooses"]

    def exact(self) -> contextlib.AbstractContextManager:
        """The reference: diffusers' pipeline as it comes."""
        return contextlib.nullcontext()

    def other_exact(self) -> tuple[list[Candidate], dict[str, str]]:
        """Further exact kernels of 16-bit tensors on a GPU, and why the others cannot run here."""
        calls = dict(zip(OTHERS, (partial(by_sdpa, SDPBackend.CUDNN_ATTENTION), by_flash_4), strict=True))
        why_not = {b.name: b.why_not() or (None if self.half else "it takes no float32") for b in BASELINES if b.name in calls}
        found = [Candidate(OTHER_EXACT.format(name), partial(OtherExactProcessor, name, call))
                 for name, call in calls.items() if why_not[name] is None]
        return found, {name: reason for name, reason in why_not.items() if reason}

    @torch.no_grad()
    def make(self, caption: str, noise: torch.Tensor, steps: int | None = None) -> tuple[torch.Tensor, float]:
        """Latents of a video, for `decode`, from noise [1, f, C, h, w], and the seconds of the denoising alone.

        With `steps` only so many of them, to warm up what is compiled or planned at the first call."""
        pipe, asked = self.pipe, self.generation
        texts = pipe.encode_prompt(caption, "", max_sequence_length=asked["max_sequence_length"], device=pipe.device)
        pinned = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if self.cuda and self.half else contextlib.nullcontext()
        self._wait()
        begun = time.perf_counter()
        with pinned:
            latents = pipe(
                prompt_embeds=texts[0], negative_prompt_embeds=texts[1], latents=noise.to(pipe.device, pipe.transformer.dtype),
                guidance_scale=asked["guidance_scale"], num_inference_steps=steps or asked["num_inference_steps"],
                num_frames=asked["num_frames"], height=asked["height"], width=asked["width"],
                max_sequence_length=asked["max_sequence_length"], output_type="latent").frames
        self._wait()
        return latents, time.perf_counter() - begun

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """The video of latents, float32 [F, H, W, 3] in 0..1."""
        video = self.pipe.video_processor.postprocess_video(video=self.pipe.decode_latents(latents), output_type="pt")[0]
        return video.float().permute(0, 2, 3, 1).contiguous().cpu().numpy()  # as "np", but turned on the GPU

    @contextlib.contextmanager
    def compiled(self, wanted: bool) -> Iterator[None]:
        """With the transformer's blocks compiled for what is hooked now, if that is wanted."""
        if not wanted:
            yield
            return
        blocks = self.pipe.transformer.transformer_blocks
        for block in blocks:
            block.compile(dynamic=False)
        try:
            yield
        finally:
            for block in blocks:
                block._compiled_call_impl = None
            torch.compiler.reset()

    def graphed(self, wanted: bool) -> contextlib.AbstractContextManager:
        """With the transformer's forward as CUDA graphs, if that is wanted."""
        return cuda_graph(self.pipe) if wanted else contextlib.nullcontext()

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


class PaddleMaker:
    """The Paddle pipeline, on whatever device Paddle has."""

    framework = "paddle"
    reference = REFERENCES["paddle"]

    def __init__(self, folder, dtype: str, device: str, generation: dict):
        from lowbit_video.pipelines import CogVideoXPipeline

        self.pipe = CogVideoXPipeline.from_pretrained(folder, dtype=dtype, device=device)
        self.device_name, self.generation = self.pipe.device, generation

    def exact(self) -> contextlib.AbstractContextManager:
        """The reference: Paddle's own attention, for the pipeline's may take this project's exact kernel, the floor's."""
        from lowbit_video.eval.speed.step.paddle_methods import PaddleAttention

        return apply(self.pipe, PaddleAttention())

    def other_exact(self) -> tuple[list[Candidate], dict[str, str]]:
        """None beside Paddle's own and this project's."""
        return [], {name: "it takes PyTorch tensors" for name in OTHERS}

    @contextlib.contextmanager
    def compiled(self, wanted: bool) -> Iterator[None]:
        """As it is: what Paddle compiles it would have to compile anew for each run, by to_static."""
        if wanted:
            raise ValueError("--compile compiles diffusers' blocks; leave it out with --framework paddle")
        yield

    @contextlib.contextmanager
    def graphed(self, wanted: bool) -> Iterator[None]:
        """As it is: CUDA graphs are PyTorch's here."""
        if wanted:
            raise ValueError("--cuda-graph captures diffusers' transformer; leave it out with --framework paddle")
        yield

    def make(self, caption: str, noise: torch.Tensor, steps: int | None = None):
        """As `TorchMaker.make`."""
        asked = self.generation
        done = self.pipe(
            caption, latents=noise.numpy(), guidance_scale=asked["guidance_scale"],
            num_inference_steps=steps or asked["num_inference_steps"], num_frames=asked["num_frames"], height=asked["height"],
            width=asked["width"], max_sequence_length=asked["max_sequence_length"], output_type="latent", progress=False)
        return done.frames, done.timings["denoise"]

    def decode(self, latents) -> np.ndarray:
        """As `TorchMaker.decode`. Raises BadFramesError for values that are NaN or infinite."""
        import paddle

        from lowbit_video.pipelines.shared.output import postprocess
        from lowbit_video.pipelines.shared.pipeline import on_device

        with on_device(self.pipe.device), paddle.no_grad():
            return postprocess(self.pipe.decode_latents(latents), "np")[0]


def latent_shape(maker) -> tuple[int, int, int, int]:
    """[frames, channels, height, width] of a video's latents, of the size that a maker makes."""
    asked = maker.generation
    return ((asked["num_frames"] - 1) // 4 + 1, maker.pipe.transformer.config.in_channels, asked["height"] // 8,
            asked["width"] // 8)


def runs_of(maker, precisions: list[str], others_asked=OTHERS) -> tuple[list[Candidate], dict[str, str]]:
    """Every run: the reference, this project's exact kernel, the other exact kernels that are asked for, precisions; and which
    of these kernels do not run, why."""
    others, lacking = maker.other_exact()
    left_out = {name: "not asked for" for name in OTHERS if name not in others_asked}
    others = [run for run in others if run.label not in map(OTHER_EXACT.format, left_out)]
    lacking |= left_out
    ours = Candidate(FLOOR, lambda: LowBitAttnProcessor("exact"))
    return [Candidate(EXACT, lambda: None), ours, *others, *map(as_candidate, precisions)], lacking


def check_request(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program with the parser's message where nothing can be made of captions, rounds, steps, precisions or the model.

    args.steps may be None, for the model's own; args.rounds may be absent."""
    for name in ("captions", "rounds", "steps"):
        if (count := getattr(args, name, None)) is not None and count < 1:
            parser.error(f"--{name} {count}: at least one is needed")
    for precision in args.precisions:
        try:
            as_candidate(precision)
        except ValueError as error:
            parser.error(f"--precisions {precision}: {error}")
    try:
        stored = read_stored(args.model)
    except ValueError as error:
        parser.error(f"--model {args.model}: {error}")
    if lacking := [name for name in GENERATED if name not in stored]:
        parser.error(f"--model {args.model}: no {GENERATION_NAME} there with {', '.join(lacking)}; give the folder of a model "
                     f"as train.py writes it, such as {MODEL}")


@contextlib.contextmanager
def hooked(maker, run: Candidate, backend: str) -> Iterator[Callable[[], dict]]:
    """The run's attention in the maker's pipeline; gives a function that says what it ran."""
    if run.label == EXACT:
        with maker.exact():
            yield dict
        return
    with applied(maker.pipe, run, backend=backend):
        yield lambda: coverage_note(maker.pipe)
