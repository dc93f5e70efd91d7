"""Every variant, compiled ahead of time by the Triton at hand for every arch it declares: what the assembler says of each.

    make triton-matrix

does so under each Triton that the package promises to run beside and writes tritons.json. Alone, it only compiles:

    PYTHONPATH=.tritons/3.9.0:tests python tests/kernels/triton_matrix.py
"""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import triton

from lowbit_video.kernels.formats import EXACT_FORMATS
from lowbit_video.kernels.variants import VARIANTS
from lowbit_video.precision import Precision

from offline import Attention, Hopper, Quantisers, build

RECORD = Path(__file__).with_name("tritons.json")
ARCHS = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
"""Of what the variants' "and later" means today."""


def cases() -> list[Attention | Hopper | Quantisers]:
    """Both head dims of each Hopper variant; of the portable ones every precision and every arch, in turn."""
    found: list[Attention | Hopper | Quantisers] = []
    for variant in (one for one in VARIANTS if one.backend == "hopper"):
        found += [Hopper(head_dim, pv, qk=q, dtype="bfloat16" if q == "bf16" else "float16") for q, _ in variant.qk
                  for pv in variant.pv for head_dim in variant.head_dims if q not in EXACT_FORMATS or pv == q]
    for variant in (one for one in VARIANTS if one.backend == "triton"):
        archs = [arch for arch in ARCHS if arch >= variant.min_arch]
        for number in range(max(len(archs), len(variant.specs))):
            arch, spec = archs[number % len(archs)], variant.specs[number % len(variant.specs)]
            precision = Precision(spec)
            q, k, pv = (spec, spec, "fp16") if precision.exact else (precision.q, precision.k, precision.pv)
            dtype = {"bf16": "bfloat16", "fp32": "float32"}.get(spec, "float16")
            found.append(Attention(arch, q, k, pv, (64, 128)[number % 2], dtype, precision.granularity or "block",
                                   precision.smooth_q))
    return list(dict.fromkeys(found + [Quantisers(arch) for arch in ARCHS]))


def told(number: int) -> str:
    """Registers of a thread and bytes of stack of a case's kernels, in the order of its launches; or what went wrong.

    In a process of its own, for a compiler may abort.
    """
    done = subprocess.run([sys.executable, __file__, "--one", str(number)], capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if "rror" in line]
    return done.stdout.splitlines()[-1] if done.returncode == 0 else (lines or [f"exit status {done.returncode}"])[-1][:200]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--record", action="store_true", help=f"write what was found into {RECORD.name}")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    wanted = cases()
    if args.one is not None:
        print(", ".join(f"{one.registers}/{one.stack}" for one in build(wanted[args.one])))
        sys.exit()
    with ThreadPoolExecutor(2) as pool:
        found = {str(case): one for case, one in zip(wanted, pool.map(told, range(len(wanted))))}
    if args.record:
        record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        RECORD.write_text(json.dumps(dict(sorted({**record, triton.__version__: found}.items())), indent=1) + "\n")
    failed = {case: one for case, one in found.items() if not one[:1].isdigit()}
    print(f"Triton {triton.__version__}: {len(found) - len(failed)} of {len(found)} builds compile")
    sys.exit("\n".join(f"{case}: {one}" for case, one in failed.items()) or None)
