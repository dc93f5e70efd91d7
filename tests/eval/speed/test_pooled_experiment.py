"""The experiment that checks and times pooled attention: its check passes on a small shape, and fails where all is not well."""
import json
import os
import subprocess
import sys

import pytest

from interpreted_run import ENVIRONMENT

pytest.importorskip("triton")

SCRIPT = """
import json, sys
import numpy as np
from lowbit_video.eval.speed.experiments import pooled
from lowbit_video.runtime import detect

sys.argv[1:] = ["--tiny", "--framework", "paddle", "--out", sys.argv[1]]
assert pooled.main() == 0
case = pooled.Case((1, 1, 200, 64), detect.anchor("paddle", "cpu"))
by_lists = pooled.by_lists
pooled.by_lists = lambda q, k, v, stats, chosen: by_lists(q, k, v, stats, ~chosen)
print(json.dumps(pooled.check(case, "int8+fp8", 0.3, 0, "triton")))
"""


def test_checks(tmp_path):
    out = tmp_path / "found.json"
    environment = os.environ | ENVIRONMENT
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(out)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    wrong = json.loads(done.stdout.splitlines()[-1])
    assert not wrong["good"] and wrong["wrong_lists"] == 0 and wrong["l1"] > 0.05
    report = json.loads(out.read_text())
    assert len(report["checks"]) == 1 and all(check["good"] for check in report["checks"]) and report["times"] == []
