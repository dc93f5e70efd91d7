"""The experiment that checks and times the fused prologue: its check passes on small shapes and fails where one is wrong."""
import json
import os
import subprocess
import sys

import pytest

from interpreted_run import ENVIRONMENT

pytest.importorskip("triton")

SCRIPT = """
import json, sys
import quick_interpreter
from lowbit_video.eval.speed.experiments import prologue
from lowbit_video.runtime import detect

sys.argv[1:] = ["--tiny", "--framework", "paddle", "--out", sys.argv[1]]
assert prologue.main() == 0
made = prologue.Made(prologue.TINY["layer"], detect.anchor("paddle", "cpu"))
whole = made.steps
found = {}
made.fused = made._call(made.q, made.k, made.v, steps=whole._replace(rotary=None))
found["not turned"] = prologue.check(made)
made.fused = made._call(made.q, made.k, made.k, steps=whole)
found["other values"] = prologue.check(made)
made.fused = made._call(made.q, made.k, made.v, steps=whole._replace(k_norm=whole.q_norm))
found["other weights"] = prologue.check(made)
print(json.dumps(found))
"""


def test_checks(tmp_path):
    out = tmp_path / "found.json"
    tests = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(
        filter(None, (tests, os.environ.get("PYTHONPATH"))))}
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(out)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    wrong = json.loads(done.stdout.splitlines()[-1])
    assert len(wrong) == 3 and not any(found["good"] for found in wrong.values())
    assert wrong["not turned"]["worst_row"] > 1 and wrong["not turned"]["ties"] > 0.1 and wrong["not turned"]["v_wrong"] == 0
    assert wrong["other values"]["v_wrong"] > 0 and wrong["other weights"]["ties"] > 0.1
    cases = json.loads(out.read_text())["cases"]
    assert list(cases) == ["layer", "rms"] and all(found["check"]["good"] and "ms" not in found for found in cases.values())
