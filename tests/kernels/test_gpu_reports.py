"""The committed reports of the GPU tests were made with the kernels in the tree, as tests/kernels/ptx.json records them."""
import json

import pytest

from gpu import run_report

RESULTS = run_report.HERE.parents[1] / "eval" / "speed" / "results"


@pytest.mark.parametrize("framework", ["paddle", "torch"])
def test_the_numerics_were_run_on_a_gpu_with_these_kernels(framework):
    report = RESULTS / f"gpu_tests_{framework}.json"
    told = json.loads(report.read_text())
    assert told["kernels"] == run_report.kernels(), (
        f"{report.name} was made with other kernels: their numerics must be run again on a GPU, by "
        f"python tests/gpu/run_report.py --framework {framework} --jobs 12 --out {report.relative_to(RESULTS.parents[2])}")
    assert told["exit_status"] == told["failed"] == 0 and told["passed"] > 0


def test_kernels_that_wait_for_their_measurement_ask_for_a_new_run_once_calls_get_them(monkeypatch):
    [exact] = [variant for variant in run_report.VARIANTS if variant.name == "hopper-exact"]
    found = []
    for automatic in (False, True):
        monkeypatch.setitem(vars(exact), "automatic", automatic)
        found.append(run_report.kernels())
    assert found[0] != found[1]


def test_so_do_the_fused_prologue_and_its_two_pieces(monkeypatch):
    found = []
    for switches in ((False, False), (True, False), (True, True)):
        for name, on in zip(("FUSED_PROLOGUE", "TWO_PIECES"), switches):
            monkeypatch.setattr(run_report.prologue, name, on)
        found.append(run_report.kernels())
    assert len(set(found)) == 3
    monkeypatch.setattr(run_report.prologue, "FUSED_PROLOGUE", False)
    assert run_report.kernels() == found[0]
