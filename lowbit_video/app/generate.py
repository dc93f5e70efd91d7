"""`lowbit-video generate`: one video of a prompt with low-bit attention, and on request its full-precision twin.

The job behind `examples/cogvideo.py` too. Everything that can be wrong with the request is found before
the long work; what was made, how long each stage took, what every attention module ran and how near the
twin is, is printed and written to report.json.
"""
from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import time
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

SMALL_MODEL = Path("examples", "small_cogvideox", "model")
"""The trained small model, below the checkout."""
SMALL_PROMPT = "a small red circle moves left over a blue background"
OTHER_PROMPT = "a panda plays the guitar"
DEFAULT_OUT = "outputs/cogvideo"
RANDOM_STEPS = 10
"""Denoising steps of a random model, unless told otherwise: more do not make it better."""
GENERATION_FILE = "generation.json"
STORED_NAMES = {"steps": "num_inference_steps", "guidance": "guidance_scale", "frames": "num_frames", "height": "height",
                "width": "width", "fps": "fps", "prompt": "prompt"}
"""A job's settings, and what a model folder's generation.json calls them."""
EXACT = ("exact", "fp16", "bf16", "fp32")
"""Precisions under which the pipeline runs as it is, without a hook."""


@dataclass
class Job:
    """What to make; None leaves a setting to the model's generation.json, then to the pipeline.

    model: folder or hub id; None takes the small trained model if it is there, else makes a random one.
    precision: "int8+fp16", ...; "exact" runs without a hook. modules: name patterns to precisions.
    height, width: pixels. fps: frames a second. device, dtype: "auto" or as Paddle names them.
    Raises ValueError when built with a value that cannot be meant.
    """

    model: str | None = None
    prompt: str | None = None
    negative_prompt: str | None = None
    precision: str = "int8+fp16"
    modules: dict[str, str] = field(default_factory=dict)
    fallback: str | None = None
    backend: str = "auto"
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
    compare: bool = False
    out: str = DEFAULT_OUT

    def __post_init__(self) -> None:
        from lowbit_video.kernels.variants import BACKENDS

        from ..precision import as_precision

        as_precision(self.precision)
        for pattern, precision in self.modules.items():
            try:
                as_precision(precision)
            except ValueError as error:
                raise ValueError(f"--modules {pattern}={precision}: {error}") from None
        if self.backend not in BACKENDS:
            raise ValueError(f"unknown backend {self.backend!r}; there are: {', '.join(BACKENDS)}")
        for name in ("steps", "frames", "height", "width", "fps"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}; it must be positive")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise ValueError(f"guidance is {self.guidance}; it must be a finite number (1 or less leaves guidance out)")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; it must be from 0 to {2**32 - 1}")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("the prompt is empty; say what the video should show")
        if self.dtype not in ("auto", "float32", "float16", "bfloat16"):
            raise ValueError(f"unknown dtype {self.dtype!r}; there are: auto, float32, float16, bfloat16")

    @property
    def hooked(self) -> bool:
        """Whether any attention module is to run through the hook."""
        return self.precision not in EXACT or bool(self.modules)


def small_model() -> Path | None:
    """The trained small model of this checkout, or of the working directory; None where there is none."""
    for root in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (root / SMALL_MODEL / "model_index.json").is_file():
            return root / SMALL_MODEL
    return None


def is_small_model(folder: str | Path) -> bool:
    """Whether a folder is the small trained model, whose videos the scorer can judge."""
    return Path(folder).resolve().parts[-3:] == SMALL_MODEL.parts


def stored_settings(folder: str | Path) -> dict[str, Any]:
    """A model folder's own settings, by our names. ValueError for a file that is not a JSON object."""
    path = Path(folder) / GENERATION_FILE
    if not path.is_file():
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}; correct it or remove it") from None
    if not isinstance(stored, dict):
        raise ValueError(f"{path} is not a JSON object; correct it or remove it")
    return {name: stored[key] for name, key in STORED_NAMES.items() if stored.get(key) is not None}


def fill(job: Job, folder: str | Path) -> Job:
    """The job with what it left open taken from the model's folder."""
    values = asdict(job)
    for name, value in stored_settings(folder).items():
        if values[name] is None:
            values[name] = value
    if values["fps"] is None:
        values["fps"] = 8
    if values["prompt"] is None:
        values["prompt"] = SMALL_PROMPT if is_small_model(folder) else OTHER_PROMPT
    return Job(**{**values, "model": str(folder)})


def check_before(job: Job) -> None:
    """Everything that can fail late and can be known now: the output folder, packages, the device.

    Raises ImportError naming the package to install, ValueError for a device that is not there, OSError
    for a folder that cannot be written.
    """
    from lowbit_video.pipelines.shared.video_files import check_writable

    if importlib.util.find_spec("paddle") is None:
        raise ImportError("the pipeline needs PaddlePaddle: pip install 'lowbit_video[cpu]', or paddlepaddle-gpu from Paddle's "
                          "own index")
    if job.compare and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--compare draws a plot and needs matplotlib: pip install 'lowbit_video[eval]', or leave out "
                          "--compare")
    check_writable(Path(job.out) / "video.mp4")
    if job.model is not None and Path(job.model).is_dir():
        stored_settings(job.model)


def resolve_device(name: str) -> str:
    """Paddle's name of the device, made the current one. ValueError lists what there is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No ccache found")
        import paddle

    from ..runtime.detect import default_paddle_device

    name = default_paddle_device() if name == "auto" else name
    try:
        paddle.set_device(name)
    except Exception as error:
        there = ["cpu", *paddle.device.get_available_device()]
        raise ValueError(f"device {name!r} is not available to this Paddle; there are: {', '.join(dict.fromkeys(there))}; "
                         "`lowbit-video doctor` says why") from error
    return paddle.get_device()


def resolve_dtype(name: str, device: str, folder: str) -> str:
    """The weights' dtype: float32 on a CPU; else as published, bfloat16 with rotary positions and float16 without."""
    if name != "auto":
        return name
    if device == "cpu":
        return "float32"
    config = Path(folder) / "transformer" / "config.json"
    rotary = config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("use_rotary_positional_embeddings")
    return "bfloat16" if rotary else "float16"


@dataclass
class Run:
    """One run of the pipeline: video float32 [F, H, W, 3] in [0, 1], seconds by stage, the coverage report."""

    video: np.ndarray
    seconds: dict[str, float]
    coverage: Any


def run_pipeline(pipe: Any, job: Job, progress: bool = True) -> Run:
    """Runs the job's prompt, through the hook if `pipe` is hooked.

    Raises ValueError for sizes that the model does not make (before the work) and for a video with NaN.
    """
    import numpy as np

    from ..hook.processors import coverage

    wanted = {"negative_prompt": job.negative_prompt, "num_inference_steps": job.steps, "guidance_scale": job.guidance,
              "num_frames": job.frames, "height": job.height, "width": job.width}
    result = pipe(job.prompt, seed=job.seed, output_type="np", progress=progress,
                  **{name: value for name, value in wanted.items() if value is not None})
    video = result.frames[0]
    broken = int(video.size - np.count_nonzero(np.isfinite(video)))
    if broken:
        raise ValueError(f"the video has {broken} NaN or infinite values of {video.size}; try --dtype float32, or "
                         "--precision exact to see whether attention is the cause")
    return Run(video, dict(result.timings), coverage(pipe))


def make(job: Job, say: Any = print) -> dict[str, Any]:
    """Does the job: writes video.mp4, report.json and, with compare, the twin, both side by side and the figures.

    returns: the report. Raises ValueError, OSError or ImportError for what cannot be done, as early as it
    can be known.
    """
    check_before(job)
    out = Path(job.out)
    device = resolve_device(job.device)
    folder = job.model or small_model()
    random = folder is None
    if random:
        folder = _random_model(out, say)
        job = replace(job, steps=job.steps or RANDOM_STEPS)
    job = fill(job, folder)
    dtype = resolve_dtype(job.dtype, device, job.model)
    say(f"model {job.model}, {dtype} on {device}; attention {job.precision if job.hooked else 'exact'}"
        + (", compiled" if job.compile else ""))
    say(f"prompt: {job.prompt}")
    pipe, load_s = _load(job, dtype, device)
    from lowbit_video.pipelines.shared.video_files import export_to_video

    from ..hook.processors import apply, remove

    if job.hooked:
        apply(pipe, None if job.precision in EXACT else job.precision, job.modules, fallback=job.fallback, backend=job.backend)
    run = run_pipeline(pipe, job)
    files = {"video": out / "video.mp4"}
    run.seconds["mp4"] = _timed(export_to_video, run.video, files["video"], job.fps)
    say(_seconds({"load": load_s, **run.seconds}, job.steps))
    say(f"\n{run.coverage}")
    frames, height, width = run.video.shape[:3]
    report = {"job": asdict(job), "device": device, "dtype": dtype, "random_model": random,
              "video": {"frames": frames, "height": height, "width": width, "fps": job.fps},
              "seconds": {"load": load_s, **run.seconds}, "coverage": run.coverage.as_dict()}
    if is_small_model(job.model):
        report["adherence"] = _verdict(run.video, job.prompt, say)
    _write_report(report, files, out)
    if job.compare:
        remove(pipe)
        report["comparison"] = _compare(pipe, job, run.video, out, files, say)
        _write_report(report, files, out)
    say("")
    for name, path in files.items():
        say(f"{name.replace('_', ' ')}: {path}")
    say(f"report: {out / 'report.json'}")
    if random:
        say("The model is random: the video is noise, and only shows that everything runs.")
    return report


def _write_report(report: dict[str, Any], files: dict[str, Path], out: Path) -> None:
    report["files"] = {name: str(path) for name, path in files.items()}
    _write_json(out / "report.json", report)


def _random_model(out: Path, say: Any) -> Path:
    from lowbit_video.pipelines.cogvideox.random_model import make_random_pipeline

    folder = out / "random_model"
    say(f"no --model given and no trained model at {SMALL_MODEL}: making a small random one in {folder}")
    make_random_pipeline(folder, seed=0)
    return folder


def _load(job: Job, dtype: str, device: str) -> tuple[Any, float]:
    from lowbit_video.pipelines import load

    start = time.perf_counter()
    pipe = load(job.model, dtype=dtype, device=device)
    if job.compile:
        pipe.compile()
    return pipe, time.perf_counter() - start


def _compare(pipe: Any, job: Job, video: np.ndarray, out: Path, files: dict[str, Path], say: Any) -> dict[str, Any]:
    """The full-precision twin of the same seed, both side by side, and per-frame figures."""
    from lowbit_video.eval.metrics.psnr import psnr
    from lowbit_video.eval.metrics.ssim import ssim
    from lowbit_video.pipelines.shared.video_files import export_to_video, side_by_side

    say("\nfull precision, the same seed:")
    twin = run_pipeline(pipe, job)
    files["full_precision"] = out / "full_precision.mp4"
    files["side_by_side"] = out / "side_by_side.mp4"
    twin.seconds["mp4"] = _timed(export_to_video, twin.video, files["full_precision"], job.fps)
    joined = side_by_side([video, twin.video], [job.precision, "full precision"])
    export_to_video(joined, files["side_by_side"], job.fps)
    say(_seconds(twin.seconds, job.steps))
    figures = {"psnr_db": [float(x) for x in psnr(video, twin.video)], "ssim": [float(x) for x in ssim(video, twin.video)]}
    files["quality"], files["quality_plot"] = out / "quality.json", out / "quality.png"
    _write_json(files["quality"], {"precision": job.precision, "seed": job.seed, "prompt": job.prompt, **figures})
    plot_quality(files["quality_plot"], figures, f"{job.precision} against full precision, seed {job.seed}")
    means = {f"mean_{name}": sum(values) / len(values) for name, values in figures.items()}
    say(f"against full precision: PSNR {means['mean_psnr_db']:.2f} dB (worst frame {min(figures['psnr_db']):.2f}), "
        f"SSIM {means['mean_ssim']:.4f} (worst frame {min(figures['ssim']):.4f})")
    return {"seconds": twin.seconds, **means, **figures}


def plot_quality(path: Path, figures: dict[str, list[float]], title: str) -> None:
    """PSNR and SSIM over the frames, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    frames = range(len(figures["ssim"]))
    upper.plot(frames, figures["psnr_db"], marker="o", markersize=3)
    upper.set_ylabel("PSNR (dB)")
    upper.set_title(title)
    lower.plot(frames, figures["ssim"], marker="o", markersize=3, color="tab:orange")
    lower.set_ylabel("SSIM")
    lower.set_xlabel("frame")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        axes.ticklabel_format(axis="y", useOffset=False)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(path)


def _verdict(video: np.ndarray, prompt: str, say: Any) -> dict[str, Any]:
    """What the scorer of the small model's world sees in the video, printed and returned."""
    import numpy as np

    from lowbit_video.eval import world
    from lowbit_video.eval.world import judge

    frames = (np.clip(video, 0, 1) * 255).round().astype(np.uint8)
    verdict = judge.score(frames, prompt)
    meaning = verdict.meaning
    stated = {"background": meaning.background or meaning.texture,
              **{part: any(getattr(thing, part) for thing in meaning.things) for part in ("colour", "shape", "motion")}}
    parts = {part: bool(getattr(verdict, part)) if stated[part] else None for part in judge.PARTS}
    words = {True: "yes", False: "NO", None: "not asked for"}
    say("\nscorer: " + ", ".join(f"{part} {words[right]}" for part, right in parts.items()) + f"; it sees: {verdict.scene}")
    hint = world.hint(prompt)
    if hint:
        say(f"hint: {hint}")
    return {**parts, "sees": str(verdict.scene), "hint": hint}


def _timed(function: Any, *args: Any) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def _seconds(seconds: dict[str, float], steps: int | None) -> str:
    text = ", ".join(f"{stage.replace('_', ' ')} {value:.2f}" for stage, value in seconds.items())
    if steps and seconds.get("denoise"):
        text += f" ({seconds['denoise'] / steps:.2f} a step)"
    return f"seconds: {text}"


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The job's arguments, for `lowbit-video generate` and examples/cogvideo.py."""
    from lowbit_video.kernels.variants import BACKENDS

    from ..precision import precision_specs

    parser.add_argument("--model", metavar="DIR", help="diffusers folder or Hugging Face Hub id (default: the small trained "
                        "model of the checkout, else a small random one)")
    parser.add_argument("--prompt", help="what the video shows")
    parser.add_argument("--negative-prompt", help="what it should not show")
    parser.add_argument("--precision", default="int8+fp16", help=f"of attention: {', '.join(precision_specs())} "
                        "(default: %(default)s)")
    parser.add_argument("--modules", action="append", default=[], metavar="PATTERN=PRECISION",
                        help="another precision for the attention modules of that name, e.g. 'transformer_blocks.0.*=exact'; "
                        "may be given several times, the last match wins")
    parser.add_argument("--fallback", choices=["exact"], help="run exact attention where no kernel serves (default: an error)")
    parser.add_argument("--backend", default="auto", choices=BACKENDS, help="default: %(default)s")
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
    parser.add_argument("--compare", action="store_true", help="also run full precision with the same seed: side-by-side mp4, "
                        "PSNR and SSIM per frame")
    parser.add_argument("--out", default=DEFAULT_OUT, metavar="DIR", help="output folder (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Does the job that the arguments describe."""
    os.environ.setdefault("GLOG_minloglevel", "2")  # Paddle's notes would run through the progress bar; errors still show
    values = {name: getattr(args, name) for name in Job.__dataclass_fields__}
    values["modules"] = parse_modules(args.modules)
    make(Job(**values))
    return 0


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


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    """Registers `lowbit-video generate`."""
    parser = subparsers.add_parser("generate", help="make a video, optionally beside its full-precision twin",
                                   description="Make a video of a prompt with low-bit attention.")
    add_arguments(parser)
    parser.set_defaults(run=run)
