"""What to make: a job's settings, their checks, what a model's folder adds, and how the command line says it."""
from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lowbit_video.eval.world.folder import world_of
from lowbit_video.kernels.variants import BACKENDS
from lowbit_video.pipelines.shared.generation import read_generation

from ..distributed.exchange import EXCHANGES, OUTPUTS
from ..hook.recipe.recipe import Recipe
from ..precision import PRESETS, precision_specs
from ..rung import as_rung
from ..token_order import ORDERS, check_order

RANDOM_MODEL = "random"
"""The model that is made anew with random weights, unless a folder has that name."""
SMALL_PROMPT = "a small red circle moves left over a blue background"
LONG_PROMPT = "a large red circle enters from the left and a white star spins over a striped blue background"
PROMPTS = {"shapes": SMALL_PROMPT, "scenes": LONG_PROMPT}
"""A prompt of each world that a trained model here knows."""
OTHER_PROMPT = "a panda plays the guitar"
DEFAULT_FPS = 8
DEFAULT_PRECISION = "int8+fp16"
DEFAULT_OUT = "outputs/cogvideo"
EXACT = ("exact", "fp16", "bf16", "fp32")
"""Precisions under which the pipeline runs as it is, without a hook."""


@dataclass
class Job:
    """What to make; None leaves a setting to the model's generation.json, then to the pipeline.

    model: folder, hub id or RANDOM_MODEL; None takes the small trained model, which a checkout has.
    precision: "int8+fp16", ...; "exact" runs without a hook. recipe: a recipe's file or a preset's name, in its place. modules:
        name patterns to precisions, on top of either.
    order: of the video's tokens in attention, as `order_tokens` takes it. height, width: pixels. fps: frames a second.
    device, dtype: "auto" or as Paddle names them.
    ulysses_degree, ring_degree, cfg_degree, vae_degree, exchange, exchange_output: of several ranks, as in `parallelize`.
    Raises ValueError when built with a value that cannot be meant.
    """

    model: str | None = None
    prompt: str | None = None
    negative_prompt: str | None = None
    precision: str = DEFAULT_PRECISION
    recipe: str | None = None
    modules: dict[str, str] = field(default_factory=dict)
    fallback: str | None = None
    backend: str = "auto"
    order: str = "raster"
    steps: int | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    seed: int = 0
    guidance: float | None = None
    device: str = "auto"
    dtype: str = "auto"
    compile: bool = False
    low_memory: bool = False
    compare: bool = False
    ulysses_degree: int | None = None
    ring_degree: int | None = None
    cfg_degree: int | None = None
    vae_degree: int | None = None
    exchange: str = "auto"
    exchange_output: str = "16bit"
    out: str = DEFAULT_OUT

    def __post_init__(self) -> None:
        as_rung(self.precision)
        if self.recipe is not None:
            Recipe.load(self.recipe)
        for pattern, precision in self.modules.items():
            try:
                as_rung(precision)
            except ValueError as error:
                raise ValueError(f"--modules {pattern}={precision}: {error}") from None
        check_order(self.order)
        if self.backend not in BACKENDS:
            raise ValueError(f"unknown backend {self.backend!r}; there are: {', '.join(BACKENDS)}")
        for name, known in (("exchange", EXCHANGES), ("exchange_output", OUTPUTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; there are: {', '.join(known)}")
        for name in ("steps", "frames", "height", "width", "fps", "ulysses_degree", "ring_degree", "cfg_degree", "vae_degree"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 2**31:
                raise ValueError(f"{name} is {value}; it must be positive and less than {2**31}")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise ValueError(f"guidance is {self.guidance}; it must be a finite number (1 or less leaves guidance out)")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; it must be from 0 to {2**32 - 1}")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("the prompt is empty; say what the video should show")
        if self.dtype not in ("auto", "float32", "float16", "bfloat16"):
            raise ValueError(f"unknown dtype {self.dtype!r}; there are: auto, float32, float16, bfloat16")

    @property
    def random(self) -> bool:
        """Whether the model is to be made with random weights."""
        return self.model == RANDOM_MODEL and not Path(RANDOM_MODEL).is_dir()

    @property
    def hooked(self) -> bool:
        """Whether any attention module is to run through the hook."""
        return self.recipe is not None or self.precision not in EXACT or bool(self.modules)

    @property
    def attention(self) -> str:
        """How attention runs, in words."""
        return self.precision if self.recipe is None else f"recipe {Path(self.recipe).stem}"


def fill(job: Job, folder: str | Path) -> Job:
    """The job with what it left open taken from the model's folder."""
    values = asdict(job)
    for name, value in read_generation(folder).items():
        if name in values and values[name] is None:
            values[name] = value
    if values["fps"] is None:
        values["fps"] = DEFAULT_FPS
    if values["prompt"] is None:
        values["prompt"] = PROMPTS.get(world_of(folder), OTHER_PROMPT)
    return Job(**{**values, "model": str(folder)})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The job's arguments, for `lowbit-video generate` and examples/cogvideo.py."""
    parser.add_argument("--model", metavar="DIR", help=f"diffusers folder, Hugging Face Hub id, or {RANDOM_MODEL!r}: a small "
                        "one that makes noise (default: the small trained model of the checkout)")
    parser.add_argument("--prompt", help="what the video shows")
    parser.add_argument("--negative-prompt", help="what it should not show")
    parser.add_argument("--precision", help=f"of attention: {', '.join(precision_specs())} (default: {DEFAULT_PRECISION}); "
                        "or a low-bit one that keeps a share of the keys and pools the rest: 'int8+fp8 pooled 0.3 always 226'")
    parser.add_argument("--recipe", metavar="FILE", help="precisions by layer, head and step in place of one: a recipe's "
                        f"file, or {' or '.join(PRESETS)} (docs/recipes.md)")
    parser.add_argument("--modules", action="append", default=[], metavar="PATTERN=PRECISION",
                        help="another precision for the attention modules of that name, e.g. 'transformer_blocks.0.*=exact'; "
                        "may be given several times, the last match wins")
    parser.add_argument("--fallback", choices=["exact"], help="run exact attention where no kernel serves (default: an error)")
    parser.add_argument("--backend", default="auto", choices=BACKENDS, help="default: %(default)s")
    parser.add_argument("--order", default="raster", choices=ORDERS, help="of the video's tokens in attention (default: "
                        "%(default)s)")
    parser.add_argument("--steps", type=int, help="denoising steps")
    parser.add_argument("--frames", type=int, help="frames of the video")
    parser.add_argument("--height", type=int, help="pixels")
    parser.add_argument("--width", type=int, help="pixels")
    parser.add_argument("--fps", type=float, help="frames a second of the mp4 (default: the model's, else 8)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--guidance", type=float, help="weight of the prompt")
    parser.add_argument("--device", default="auto", help="auto, cpu, gpu:0, ... (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="of the weights: float32, float16, bfloat16 (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="run the transformer through paddle.jit.to_static")
    parser.add_argument("--low-memory", action="store_true", help="text encoder and transformer on the device one at a time, "
                        "read from their files each time; the VAE decodes by tiles where there is no room for whole frames")
    parser.add_argument("--compare", action="store_true", help="also run full precision with the same seed: side-by-side mp4, "
                        "PSNR and SSIM per frame")
    ranks = parser.add_argument_group("several GPUs", "one video on the processes that `python -m paddle.distributed.launch "
                                      "--devices 0,1 ...` started (CPU: --nproc_per_node 2); what is not given is chosen")
    ranks.add_argument("--ulysses-degree", type=int, metavar="N", help="ranks that share the heads of attention")
    ranks.add_argument("--ring-degree", type=int, metavar="N", help="parts of keys that go round a ring of ranks")
    ranks.add_argument("--cfg-degree", type=int, metavar="N", choices=[1, 2], help="2: the two halves of guidance apart")
    ranks.add_argument("--vae-degree", type=int, metavar="N", help="ranks that decode (default: all)")
    ranks.add_argument("--exchange", default="auto", choices=EXCHANGES, help="how queries and keys travel between ranks "
                       "(default: %(default)s, as the precision of attention takes them)")
    ranks.add_argument("--exchange-output", default="16bit", choices=OUTPUTS, help="how the output of attention travels "
                       "(default: %(default)s)")
    parser.add_argument("--out", default=DEFAULT_OUT, metavar="DIR", help="output folder (default: %(default)s)")


def job_of(args: argparse.Namespace) -> Job:
    """The job that the arguments describe."""
    values = {name: getattr(args, name) for name in Job.__dataclass_fields__}
    if args.recipe is not None and args.precision is not None:
        raise ValueError(f"--precision {args.precision} and --recipe {args.recipe} are both given; give one of them (another "
                         "precision for some modules: --modules PATTERN=PRECISION)")
    values["precision"] = DEFAULT_PRECISION if args.precision is None else args.precision
    return Job(**{**values, "modules": parse_modules(args.modules)})


def parse_modules(given: list[str]) -> dict[str, str]:
    """["pattern=precision", ...] as a dict. ValueError for one without "="."""
    pairs = {}
    for text in given:
        pattern, equals, precision = text.partition("=")
        if not (pattern and equals and precision):
            raise ValueError(f"--modules {text!r}: write PATTERN=PRECISION, such as 'transformer_blocks.0.*=exact'")
        pairs.pop(pattern, None)
        pairs[pattern] = precision
    return pairs
