"""Train the small CogVideoX on captioned clips of the procedural world: VAE, latents, words, diffusion, evaluation.

    python examples/small_cogvideox/train.py --minutes 9 --state /tmp/small --out outputs/small

Each run keeps to its `--minutes` of wall clock and goes on from what `--state` holds, so that several short runs make one
training. `torchrun --standalone --nproc_per_node 2 examples/small_cogvideox/train.py ...` uses two GPUs: each encodes clips of
its own and takes `--batch` of them a step. `--tiny` runs every stage at toy sizes on a CPU, to see that it works.
`--config long` trains the model of 49 frames of 384 x 512, in a world with textures and a camera.

The stages: autoencoder.py, latents.py, words.py, diffusion.py (with curriculum.py, graphs.py, optimisers.py), evaluation.py.
"""
from __future__ import annotations

import argparse
import os
import sys
import traceback

import torch
from accelerate import Accelerator
from autoencoder import TRAIN_SEED, VAE_CLIPS, train_vae
from clips import ClipPool
from curriculum import curriculum
from diffusion import train_diffusion
from evaluation import evaluate
from latents import files_of, make_latents, more_of, plan_ahead, planned, shrinks_of
from models import CONFIGURATIONS
from outputs import pack, plot
from run import Run, device_name
from sampling import Judges
from tokens import Tokens, build_vocabulary
from words import train_words, word_sets

STAGES = ("vae", "latents", "words", "diffusion", "evaluate")
# What the long configuration does otherwise than the small one unless told: a tenth of the clips, each of which is twelve times
# as large; single frames first, then whole clips of a quarter and half the height.
LONG_DEFAULTS = dict(
    curriculum="1/4:0.06:512,{most}/4:0.3:192,{most}/2:0.3:64,{most}:0.34:8", clips=24_000, batch=8, refresh_clips=8,
    latent_seconds=60.0, vae_batch=4, vae_lr=8e-4, words_seconds=40.0, warmup=150)
CURRICULUM = "1:0.13,{most}:0.87"
# What --tiny does in half a minute of a CPU unless told otherwise.
TINY_DEFAULTS = dict(vae_minutes=0.1, words_seconds=2.0, diffusion_minutes=0.1, evaluate_seconds=5.0)
LONG_TINY_CURRICULUM = "1/2:0.2,{most}/2:0.4,{most}:0.4"  # a quarter of a toy's height is no whole number of patches


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is, and each option's default where it has one, that of the configuration that is asked for."""

    def _get_help_string(self, action):
        return action.help if isinstance(action.default, (bool, type(None))) else super()._get_help_string(action)


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument("--config", choices=list(CONFIGURATIONS), default="small", help="which model")
    parser.add_argument("--stages", default=",".join(STAGES), help="which to run, of " + ",".join(STAGES))
    parser.add_argument("--minutes", type=float, default=9.0, help="wall clock of this run")
    parser.add_argument("--vae-minutes", type=float, default=3.0, help="of the autoencoder, over all runs")
    parser.add_argument("--diffusion-minutes", type=float, default=11.0, help="of text encoder and transformer, over all runs")
    parser.add_argument("--evaluate-seconds", type=float, default=60.0, help="kept back at the end of the run")
    parser.add_argument("--latent-seconds", type=float, default=50.0, help="at most, for encoding clips")
    parser.add_argument("--state", default="outputs/small_state", help="folder of checkpoints")
    parser.add_argument("--out", default="outputs/small", help="folder of results")
    parser.add_argument("--init", help="model folder to go on from where the state folder is empty")
    parser.add_argument("--init-parts", default="vae,transformer", help="what to take from it, of vae, transformer, "
                        "text_encoder; the rest is trained from nothing")
    parser.add_argument("--curriculum", default=CURRICULUM, help="latent frames and shares of the diffusion time, the last of "
                        "them a whole clip's, {most}; 9/2 are clips of half the height and width, 9/4 of a quarter; 9:0.5:64 "
                        "takes 64 clips a step")
    parser.add_argument("--text-rate", type=float, default=0.0, help="the text encoder's learning rate beside the transformer, "
                        "as a share of --lr (0: it stays as the words stage left it)")
    parser.add_argument("--refresh-every", type=int, default=20, help="steps after which new clips are encoded (0: never)")
    parser.add_argument("--refresh-clips", type=int, default=32, help="how many each time; four times as many "
                        "single frames, and twice as many of half the size")
    parser.add_argument("--more-spin", type=float, default=0.0, metavar="P", help="probability that a thing of a training clip "
                        "spins, beside the world's own one in 18 (--config long)")
    parser.add_argument("--more-small", type=float, default=0.0, metavar="P", help="likewise that it is small, beside one in "
                        "three")
    parser.add_argument("--unfinished", action="store_true",
                        help="more runs follow: the learning rate falls over all of --diffusion-minutes, not this run's share")
    parser.add_argument("--words-seconds", type=float, default=14.0, help="of the text encoder alone (0: none)")
    parser.add_argument("--words-lr", type=float, default=2e-3, help="the rate of that")
    parser.add_argument("--word-captions", type=int, default=120_000, help="to teach it on")
    parser.add_argument("--word-batch", type=int, default=1024, help="captions a step")
    parser.add_argument("--clips", type=int, default=40_000, help="at most, at hand at once, of all processes")
    parser.add_argument("--fresh-clips", action="store_true", help="encode other clips than the run before")
    parser.add_argument("--batch", type=int, default=128, help="clips a step and process where the curriculum says none")
    parser.add_argument("--lr", type=float, default=5e-4, help="learning rate of the transformer, after the warm-up")
    parser.add_argument("--no-muon", dest="muon", action="store_false", help="AdamW for the transformer's inner matrices too")
    parser.add_argument("--no-graphs", dest="graphs", action="store_false", help="launch every kernel by itself")
    parser.add_argument("--shape-weight", type=float, default=3.0, help="weight of the latents on shapes where noise is little")
    parser.add_argument("--time-shift", type=float, default=1.0, help="above 1, more training steps at much noise: SD3's shift "
                        "of the time, for large frames, whose layout shows through more noise; 1: all times alike")
    parser.add_argument("--warmup", type=int, default=300, help="steps, in each part of the curriculum")
    parser.add_argument("--average", type=float, default=0.999, help="decay of the weight average")
    parser.add_argument("--vae-goes-on", action="store_true", help="train the autoencoder of --init further, for --vae-minutes")
    parser.add_argument("--vae-batch", type=int, default=32, help="clips a step of the autoencoder")
    parser.add_argument("--vae-lr", type=float, default=1.5e-3, help="its learning rate")
    parser.add_argument("--kl-weight", type=float, default=2e-4, help="of its KL term")
    parser.add_argument("--check-seconds", type=float, default=140.0, help="between quick looks at what the model makes")
    parser.add_argument("--save-seconds", type=float, default=180.0, help="between saves")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.5, 2.5, 4.0, 6.0], help="of the evaluation, which "
                        "chooses")
    parser.add_argument("--sampling-steps", type=int, nargs="+", help="of the evaluation; several "
                        "are swept with the guidance (default: the model's own)")
    parser.add_argument("--sweep-captions", type=int, default=64, help="to choose on")
    parser.add_argument("--test-captions", type=int, default=200, help="to measure on")
    parser.add_argument("--max-steps", type=int, default=0, help="of each training stage in this run (0: time decides)")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--pack", action="store_true", help="leave the results as a few files of under 16 MB")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that everything runs")
    which = argparse.ArgumentParser(add_help=False)  # so that --help tells the defaults of --config and --tiny
    which.add_argument("--config")
    which.add_argument("--tiny", action="store_true")
    known = which.parse_known_args(argv)[0]
    if known.config == "long":
        parser.set_defaults(**LONG_DEFAULTS)
    if known.tiny:
        parser.set_defaults(**TINY_DEFAULTS)
    args = parser.parse_args(argv)
    args.stages = args.stages.split(",")
    if unknown := set(args.stages) - set(STAGES):
        parser.error(f"unknown stages {sorted(unknown)}; there are {', '.join(STAGES)}")
    args.init_parts = args.init_parts.split(",")
    if unknown := set(args.init_parts) - {"vae", "transformer", "text_encoder"}:
        parser.error(f"unknown --init-parts {sorted(unknown)}; there are vae, transformer, text_encoder")
    if args.words_seconds <= 0 and args.text_rate <= 0 and "text_encoder" not in args.init_parts:
        parser.error("--words-seconds 0 leaves the text encoder untrained: give --text-rate, say 0.1")
    if args.tiny and args.curriculum == LONG_DEFAULTS["curriculum"]:
        args.curriculum = LONG_TINY_CURRICULUM
    most = CONFIGURATIONS[args.config][args.tiny].latent_frames
    args.curriculum = args.curriculum.replace("{most}", str(most))
    try:
        curriculum(args.curriculum, most)
    except ValueError as error:
        parser.error(str(error))
    try:
        more = more_of(args)
    except ValueError as error:
        parser.error(f"--more-spin {args.more_spin}, --more-small {args.more_small}: {error}")
    if more and args.config != "long":
        parser.error("--more-spin and --more-small are of the long model's world; add --config long")
    if args.tiny:
        args.clips, args.word_captions = min(args.clips, 96), min(args.word_captions, 500)
    return args


def prepare(run: Run) -> None:
    """Write the vocabulary, and set workers to what the stages will ask for."""
    args, workers = run.args, run.judges.pool
    run.tokenizer = run.state / "model" / "tokenizer"
    with run.accelerator.main_process_first():
        build_vocabulary(run.tokenizer, run.sizes.of_world, run.sizes.text_tokens)
    run.vocabulary = len(Tokens(run.tokenizer))
    if workers and "vae" in args.stages and not (run.state / "vae.pt").exists() and (args.vae_goes_on or not args.init):
        run.vae_pool = workers.apply_async(ClipPool, (VAE_CLIPS[run.sizes.world], TRAIN_SEED, "cpu", False, run.sizes.world))
    if workers and run.first and "words" in args.stages and not (run.state / "diffusion.pt").exists():
        run.word_sets = workers.apply_async(word_sets, (run.tokenizer, args.word_captions, run.sizes.world))
    if workers and ("latents" in args.stages or "diffusion" in args.stages):
        for shrink in shrinks_of(run):
            if args.fresh_clips or not all(path.exists() for path in files_of(run, shrink)):
                run.ahead[shrink] = [workers.apply_async(plan_ahead, task) for task in planned(run, shrink)]


def stages(run: Run) -> None:
    """Everything that was asked for, in order. One process trains autoencoder and words, all of them the transformer."""
    asked, accelerator = set(run.args.stages), run.accelerator
    if {"vae", "latents", "diffusion"} & asked:
        with accelerator.main_process_first():
            train_vae(run)
    if {"latents", "diffusion"} & asked:
        make_latents(run)
    if "words" in asked:
        with accelerator.main_process_first():
            train_words(run)
    if "diffusion" in asked:
        train_diffusion(run)
        run.encoded = {}
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
    accelerator.wait_for_everyone()
    if "evaluate" in asked:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        evaluate(run)


def main(argv=None) -> int:
    args = arguments(argv)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    judges = Judges(1 if args.tiny else max(2, min(16, (os.cpu_count() or 1) // processes)))  # forked before CUDA starts
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    run = Run(args, accelerator, judges)
    run.log.say(f"{run.ranks} x {device_name(run.device)}, torch {torch.__version__}, {args.minutes:g} minutes")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    code = 0
    try:
        prepare(run)
        stages(run)
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        code = 1
    finally:
        for last in ((plot, pack) if args.pack else (plot,)) if run.first else ():
            try:
                last(run)
            except Exception:
                traceback.print_exc()
                code = code or 1
        for writer in run.writers:
            writer.join()
        judges.close()
    run.log.say(f"finished with {code}")
    if code == 0:
        accelerator.end_training()
    return code


if __name__ == "__main__":
    raise SystemExit(main())
