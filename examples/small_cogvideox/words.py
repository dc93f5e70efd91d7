"""Teach the text encoder what captions mean before the transformer listens to it: heads that read every part off it.

The heads are thrown away afterwards; what stays is an encoder whose features hold the meaning in a form that a linear
layer can read.

    python examples/small_cogvideox/words.py --model examples/small_cogvideox/model

tells how much of it a folder's encoder holds.
"""
from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from models import build_text_encoder
from run import Run, save_state
from tokens import Tokens
from torch import nn

from lowbit_video.eval import world
from lowbit_video.pipelines.shared.generation import read_stored

COLOURS, SIZES = tuple(world.COLOURS), tuple(world.SIZES)
NO_LABEL = -100  # of a second or third thing that is not there
TRAIN_SEED, CHECK_SEED = 1002, 2000
COLLAPSED = 0.98  # swapped_likeness above which an encoder tells hardly more than which words there are


class Parts:
    """What a caption of a world says, part by part: their `names`, and of how many `classes` each is one."""

    def __init__(self, of: world.World = world.SMALL):
        self.world = of
        self.ground = [("texture", tuple(of.textures)), ("background", COLOURS)] + [("camera", of.cameras)] * bool(of.cameras)
        self.thing = [("shape", world.SHAPES), ("colour", COLOURS), ("size", SIZES), ("motion", of.motions)]
        things = range(1, of.most_things + 1)
        self.names = ("pair", *(name for name, _ in self.ground), *(f"{name} {i}" for i in things for name, _ in self.thing))
        self.classes = (of.most_things, *(len(words) for _, words in self.ground),
                        *of.most_things * tuple(len(words) for _, words in self.thing))

    def labels(self, meaning: world.Meaning) -> list[int]:
        """One class for each of `names`."""
        found = [len(meaning.things) - 1] + [words.index(getattr(meaning, name)) for name, words in self.ground]
        for thing in (*meaning.things, *self.world.most_things * (None,))[:self.world.most_things]:
            found += [NO_LABEL if thing is None else words.index(getattr(thing, name)) for name, words in self.thing]
        return found


def caption_set(tokens, count: int, seed: int, held: bool = False, of: world.World = world.SMALL):
    """Token ids `[count, L]` and labels `[count, parts]`, int16, of captions inside or outside the hold-out."""
    rng, parts = np.random.default_rng(seed), Parts(of)
    meanings = world.draw_meanings(count, seed, held, pair_share=0.4, world=of)
    ids = tokens([world.caption_of(meaning, rng) for meaning in meanings])
    return ids.astype(np.int16), np.array([parts.labels(m) for m in meanings], np.int16)


class Heads(nn.Module):
    """Two linear readings of every part: from the mean over the tokens, and from tokens picked by a query of its own."""

    def __init__(self, width: int, classes: tuple[int, ...]):
        super().__init__()
        parts, most = len(classes), max(classes)
        self.query = nn.Parameter(torch.randn(parts, width) / width**0.5)
        self.weight = nn.Parameter(torch.randn(2, parts, width, most) * 0.02)
        self.register_buffer("absent", torch.arange(most)[None] >= torch.tensor(classes)[:, None])

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """hidden `[B, L, D]`, ids `[B, L]` -> logits `[2, B, parts, classes]` (mean, picked)."""
        said = (ids != 0)[..., None]
        mean = (hidden * said).sum(1) / said.sum(1)
        picks = (hidden @ self.query.T).masked_fill(~said, -1e4).softmax(1)  # [B, L, parts]
        picked = picks.transpose(1, 2) @ hidden  # [B, parts, D]
        logits = torch.stack([torch.einsum("bd,pdc->bpc", mean, self.weight[0]),
                              torch.einsum("bpd,pdc->bpc", picked, self.weight[1])]).float()
        return logits.masked_fill(self.absent, -1e4)


def teach(encoder, ids, labels, seconds: float, batch: int, autocast, lr: float = 1e-3, most_steps: int = 0, note=None,
          classes: tuple[int, ...] = Parts().classes):
    """Train `encoder` with new heads for `seconds` (cosine to zero by the clock): the heads, the steps.

    `ids` `[N, L]` and `labels` `[N, parts]` lie on the encoder's device; `note(step, loss)` is called every 100 steps."""
    device = ids.device
    heads = Heads(encoder.config.d_model, classes).to(device)
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=device.type == "cuda")
    start, step = time.time(), 0
    while True:
        progress = max((time.time() - start) / seconds, step / most_steps if most_steps else 0.0)
        if progress >= 1:
            break
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * progress))
        rows = torch.randint(len(ids), (batch,), device=device)
        said, wanted = ids[rows].long(), labels[rows].long()
        with autocast():
            logits = heads(encoder(said)[0], said)
        loss = F.cross_entropy(logits.flatten(0, 2), wanted.expand(2, -1, -1).flatten(), ignore_index=NO_LABEL)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        step += 1
        if step % 100 == 0:
            value = loss.item()  # also keeps the host from running far ahead of the clock
            if not math.isfinite(value):
                raise FloatingPointError(f"the words' loss is {value} at step {step}")
            if note:
                note(step, value)
    return heads, step


@torch.no_grad()
def accuracy(encoder, heads, ids, labels, autocast) -> np.ndarray:
    """Share of captions read right, `[2, parts]`: from the mean, from the picked tokens."""
    right, counted = 0, 0
    for said, wanted in zip(ids.long().split(512), labels.long().split(512)):
        with autocast():
            guess = heads(encoder(said)[0], said).argmax(-1)
        there = wanted != NO_LABEL
        right = right + ((guess == wanted) & there).sum(1)
        counted = counted + there.sum(0)
    return (right / counted).cpu().numpy()


@torch.no_grad()
def swapped_likeness(encoder, tokens) -> float:
    """How alike captions are to the encoder whose two colours are exchanged; 1 means it has lost the order of words.

    One minus the distance between the two (means over the tokens), in units of the distance to a caption with another colour.
    Zero or less: as different as captions that differ in words."""
    count = len(COLOURS)
    said = "a {} circle moves left over a {} background".format
    pairs = [(i, j) for i in range(count) for j in range(count) if (j - i) % count in (1, 3)]
    captions = [said(COLOURS[i], COLOURS[j]) for i, j in pairs]
    captions += [said(COLOURS[j], COLOURS[i]) for i, j in pairs]
    captions += [said(COLOURS[i], COLOURS[(j + 1) % count]) for i, j in pairs]
    device = next(encoder.parameters()).device
    ids = torch.from_numpy(tokens(captions)).to(device)
    said_at = (ids != 0)[..., None]
    means = (encoder(ids)[0].float() * said_at).sum(1) / said_at.sum(1)
    plain, swapped, other = means.chunk(3)
    return 1 - float((plain - swapped).norm(dim=1).mean() / (plain - other).norm(dim=1).mean().clamp_min(1e-12))


@torch.no_grad()
def linear_readings(encoder, tokens, captions: int = 3000, of: world.World = world.SMALL) -> dict[str, float]:
    """Share of 500 held-out captions whose parts ridge regression reads off the mean over the tokens, by name."""
    device = next(encoder.parameters()).device

    def features(ids):
        found = []
        for part in torch.from_numpy(ids).long().to(device).split(256):
            said = (part != 0)[..., None]
            found.append((encoder(part)[0].float() * said).sum(1) / said.sum(1))
        return torch.cat(found).double().cpu()

    (ids, labels), (held_ids, wanted) = caption_set(tokens, captions, 1, of=of), caption_set(tokens, 500, 2, True, of)
    known, asked = features(ids), features(held_ids)
    mean, spread = known.mean(0), known.std(0) + 1e-6
    known, asked = (F.pad((x - mean) / spread, (0, 1), value=1.0) for x in (known, asked))
    shares = {}
    for column, (name, classes) in enumerate(zip(Parts(of).names, Parts(of).classes)):
        rows, held = labels[:, column] != NO_LABEL, wanted[:, column] != NO_LABEL
        x, y = known[rows], F.one_hot(torch.from_numpy(labels[rows, column]).long(), classes).double()
        weight = torch.linalg.solve(x.T @ x + 3 * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
        shares[name] = float(((asked[held] @ weight).argmax(1).numpy() == wanted[held, column]).mean())
    return shares


def train_words(run: Run) -> None:
    """Put the captions' meaning into a text encoder's features, by itself; `words.pt` keeps it for the diffusion stage."""
    args, log = run.args, run.log
    path = run.state / "words.pt"
    started = args.init and "text_encoder" in args.init_parts
    if path.exists() or (run.state / "diffusion.pt").exists() or args.words_seconds <= 0 or started:
        log.say("words are learned already, or not asked for")
        return
    sets = run.word_sets.get() if run.word_sets else word_sets(run.tokenizer, args.word_captions, run.sizes.world)
    (ids, labels), (held_ids, held_labels) = [[torch.from_numpy(part).to(run.device) for part in one] for one in sets]
    encoder, parts = build_text_encoder(run.sizes, run.vocabulary).to(run.device), Parts(run.sizes.of_world)
    start = time.time()

    def note(step: int, loss: float) -> None:
        log.row("words", step, (time.time() - start) / 60, loss=loss)

    batch = 64 if run.device.type == "cpu" else args.word_batch
    heads, step = teach(
        encoder, ids, labels, args.words_seconds, batch, run.autocast, args.words_lr, args.max_steps, note,
        parts.classes)
    found = accuracy(encoder, heads, held_ids, held_labels, run.autocast)
    worst = {kind: f"{parts.names[row.argmin()]} {100 * row.min():.1f} %" for kind, row in zip(("mean", "picked"), found)}
    log.say(f"words: {step} steps of {batch} in {time.time() - start:.1f} s; held-out captions read right "
            f"{100 * found.mean():.2f} %, worst {worst}")
    log.row("words", step, (time.time() - start) / 60, held_out_mean=found[0].mean(), held_out_picked=found[1].mean())
    say_swapped(run, encoder, step, (time.time() - start) / 60)
    save_state(path, {"model": encoder.state_dict()})


def say_swapped(run: Run, encoder, step: int, minutes: float) -> None:
    """Log how alike captions with their two colours exchanged are to the encoder: at 1 no colour can find its thing."""
    alike = swapped_likeness(encoder, Tokens(run.tokenizer))
    run.log.row("words", step, minutes, swapped_likeness=alike)
    run.log.say(f"captions with colours exchanged are alike to {alike:.5f} for the text encoder"
                + (": IT HAS LOST THE ORDER OF WORDS" if alike > COLLAPSED else ""))


def word_sets(tokenizer: Path, count: int, name: str = "shapes"):
    """Captions with labels to learn from, and held-out ones to check with: a worker's task while the autoencoder trains."""
    tokens, of = Tokens(tokenizer), world.WORLDS[name]
    return caption_set(tokens, count, TRAIN_SEED, of=of), caption_set(tokens, min(count, 2000), CHECK_SEED, True, of)


def main(argv=None) -> int:
    from transformers import T5EncoderModel

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(Path(__file__).parent / "model"))
    args = parser.parse_args(argv)
    encoder = T5EncoderModel.from_pretrained(args.model, subfolder="text_encoder").float().eval()
    tokens = Tokens(Path(args.model) / "tokenizer")
    alike = swapped_likeness(encoder, tokens)
    verdict = " (the order of words is lost)" if alike > COLLAPSED else ""
    print(f"captions with colours exchanged are alike to {alike:.4f}{verdict}")
    of = world.WORLDS[read_stored(args.model).get("world", "shapes")]
    for name, share in linear_readings(encoder, tokens, of=of).items():
        print(f"{name:12} {100 * share:5.1f} % of held-out captions read right")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
