"""The experiment that checks and times the fused prologue: its check passes on small shapes and fails where one is wrong."""
import json
import os
import subprocess
import sys

import pytest

from interpreted_run import ENVIRONMENT

pytest.importorskip("triton")

SCRIPT = """
import json, sys, types
import quick_interpreter
from lowbit_video.eval.speed import timing
from lowbit_video.eval.speed.experiments import prologue
from lowbit_video.runtime import detect

sys.argv[1:] = ["--tiny", "--framework", "paddle", "--out", sys.argv[1]]
assert prologue.main() == 0
made = prologue.Made(prologue.TINY["layer"], detect.anchor("paddle", "cpu"))
whole = made.steps
found = {}
made.fused = made.call(made.q, made.k, made.v, steps=whole._replace(rotary=None))
found["not turned"] = prologue.check(made)
made.fused = made.call(made.q, made.k, made.k, steps=whole)
found["other values"] = prologue.check(made)
made.fused = made.call(made.q, made.k, made.v, steps=whole._replace(k_norm=whole.q_norm))
found["other weights"] = prologue.check(made)
pieces = prologue.prologue_pieces.Pieces(made)
timing.time_together = lambda timer, calls, **more: {  # each runs once
    name: (call(), types.SimpleNamespace(median_ms=number, host_us=2))[1] for number, (name, call) in enumerate(calls.items())}
timed = prologue.prologue_pieces.times(pieces, None, 1)
assert len(timed["ms"]) == 9 and timed["saved_ms"] == -1, timed
made.steps, made.call = whole._replace(rotary=None), lambda *given, steps: type(made).call(
    made, *given, steps=whole._replace(rest=steps.rest) if steps.rest else steps)
found["a piece turned otherwise"] = prologue.prologue_pieces.check(pieces)
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
    assert set(wrong["a piece turned otherwise"]["differ"]) > {"q_codes", "k_codes", "q_codes of copies"}
    assert len(wrong) == 4 and not any(found["good"] for found in wrong.values())
    assert wrong["not turned"]["worst_row"] > 1 and wrong["not turned"]["ties"] > 0.1 and wrong["not turned"]["v_wrong"] == 0
    assert wrong["other values"]["v_wrong"] > 0 and wrong["other weights"]["ties"] > 0.1
    cases = json.loads(out.read_text())["cases"]
    assert list(cases) == ["layer", "layer, two pieces", "rms", "rms, two pieces"]
    assert all(found["check"]["good"] and "ms" not in found for found in cases.values())
