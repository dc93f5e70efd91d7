"""Runs the GPU tests for one framework and writes a small JSON report.

    python tests/gpu/run_report.py --framework paddle --jobs 12 --out eval/speed/results/gpu_tests_paddle.json

It names the kernels that it was made for; tests/kernels/test_gpu_reports.py fails once those are others.
"""
from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

from lowbit_video.hook import prologue
from lowbit_video.kernels.variants import VARIANTS

HERE = Path(__file__).resolve().parent
RECORD = HERE.parent / "kernels" / "ptx.json"
"""The compiled kernels; test_ptx.py holds it to the code."""


def kernels() -> str:
    """What tells the recorded kernels, by their PTX, from others; those that no call gets without asking for them left out."""
    waiting = tuple(f"{variant.backend} {qk}+" for variant in VARIANTS if not variant.automatic for qk, _ in variant.qk)
    fused, pieces = prologue.FUSED_PROLOGUE, prologue.FUSED_PROLOGUE and prologue.TWO_PIECES
    builds = {name: found for name, found in json.loads(RECORD.read_text())["builds"].items()
              if not name.startswith(waiting) and
              (" prologue " not in name or (pieces if name.endswith(" in two pieces") else fused))}
    return hashlib.sha256(json.dumps(builds, sort_keys=True).encode()).hexdigest()[:16]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--framework", choices=("paddle", "torch"), required=True)
    parser.add_argument("--jobs", type=int, default=1, help="processes (needs pytest-xdist); kernels compile side by side")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--select", default="", help="pytest -k expression")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-rf", "--tb=short",
                   "--maxfail=60", f"--junitxml={xml}", str(HERE)]
        if args.select:
            command += ["-k", args.select]
        if args.jobs > 1:
            if importlib.util.find_spec("xdist") is None:
                parser.error("--jobs needs pytest-xdist")
            command += ["-n", str(args.jobs), "--dist", "worksteal"]
        begin = time.time()
        status = subprocess.run(command, env=os.environ | {"LOWBIT_TEST_FRAMEWORK": args.framework}).returncode
        seconds = time.time() - begin
        if not xml.exists():
            print("pytest wrote no report", file=sys.stderr)
            return status or 1
        report = summary(ET.parse(xml).getroot())
    from lowbit_video.eval.speed.bench import environment

    report = dict(about=environment(args.framework), kernels=kernels(), seconds=round(seconds, 1), exit_status=status) | report
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print({name: report[name] for name in ("passed", "failed", "skipped", "seconds")}, args.out)
    return status


def summary(root: ET.Element) -> dict:
    """Counts, counts by test function, failures with the end of their message, and why tests were skipped."""
    outcome, by_test, failures, skips = Counter(), {}, [], Counter()
    for case in root.iter("testcase"):
        name = case.get("name", "")
        kind = "passed"
        for child in case:
            if child.tag in ("failure", "error"):
                kind = "failed"
                failures.append(dict(test=name, message=(child.get("message") or child.text or "")[-500:]))
            elif child.tag == "skipped":
                kind = "skipped"
                skips[(child.get("message") or "")[:200]] += 1
        outcome[kind] += 1
        by_test.setdefault(name.split("[")[0], Counter())[kind] += 1
    return dict(passed=outcome["passed"], failed=outcome["failed"], skipped=outcome["skipped"],
                tests={name: dict(counts) for name, counts in sorted(by_test.items())}, failures=failures,
                skip_reasons=dict(skips.most_common()))


if __name__ == "__main__":
    sys.exit(main())
