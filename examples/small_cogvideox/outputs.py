"""What a training leaves in its out folder: curves, log, and the model in parts that can be carried."""
from __future__ import annotations

import csv
import tarfile

from run import Run

from lowbit_video.eval.world import judge

PART_BYTES = 15_500_000


def plot(run: Run) -> None:
    """Loss, autoencoder PSNR and adherence over the minutes, from the log."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves: dict[tuple[str, str], list] = {}
    with open(run.log.path, newline="") as file:
        for row in csv.DictReader(file):
            curves.setdefault((row["stage"], row["name"]), []).append((float(row["minutes"]), float(row["value"])))
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    panels = ((axes[0], "autoencoder, PSNR of training batches (dB)", [("vae", "psnr_db")]),
              (axes[1], "v-prediction loss", [("diffusion", "loss")]),
              (axes[2], "64 held-out captions, share met", [("check", p) for p in judge.PARTS]))
    for axis, title, names in panels:
        for name in names:
            if name in curves:
                x, y = zip(*curves[name])
                axis.plot(x, y, label=name[1], marker="o" if name[0] == "check" else None, linewidth=1)
        axis.set(title=title, xlabel="minutes")
        axis.grid(alpha=0.3)
    axes[1].set_yscale("log")
    if axes[2].lines:
        axes[2].legend()
    figure.savefig(run.out / "training.png", dpi=100)
    (run.out / "training_log.csv").write_text(run.log.path.read_text())


def pack_model(run: Run) -> None:
    """Put the model folder into `model.tar.NN` parts in the out folder (`cat model.tar.* | tar x` unpacks them)."""
    folder = run.state / "model"
    if folder.exists():
        whole = run.state / "model.tar"
        with tarfile.open(whole, "w") as archive:
            archive.add(folder, "model")
        data = whole.read_bytes()
        for old in run.out.glob("model.tar.*"):
            old.unlink()
        for number, start in enumerate(range(0, len(data), PART_BYTES)):
            (run.out / f"model.tar.{number:02d}").write_bytes(data[start:start + PART_BYTES])


def pack(run: Run) -> None:
    """The model's parts, and every small result in `results.tar`."""
    pack_model(run)
    small = [p for p in run.out.iterdir() if p.suffix in (".png", ".gif", ".json", ".csv", ".txt", ".md")]
    with tarfile.open(run.out / "results.tar", "w") as archive:
        for path in small:
            archive.add(path, path.name)
    for path in small:
        path.unlink()
    left = ", ".join(f"{p.name} {p.stat().st_size / 1e6:.1f} MB" for p in sorted(run.out.iterdir()))
    run.log.say(f"in the out folder: {left}")
