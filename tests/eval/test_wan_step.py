"""The step of Wan by backends, dry, on a small model: checked, timed, written, and diffusers as before."""
import json

import pytest

pytest.importorskip("torch", reason="needs PyTorch")
pytest.importorskip("diffusers", reason="needs diffusers")
import dispatch_models  # noqa: E402
from lowbit_video.eval.speed.experiments import wan_step  # noqa: E402

pytestmark = pytest.mark.parity


TINY = ["--tiny", "--backends", f"native,{wan_step.FA4},lowbit_int8_fp8"]


def test_a_dry_run_checks_times_and_writes(tmp_path):
    before = dispatch_models.state()
    report = wan_step.main([*TINY, "--out", str(tmp_path / "new")])
    assert json.loads((tmp_path / "new" / "wan_step.json").read_text()) == report and dispatch_models.state() == before
    rows = {(row["backend"], row["mode"]): row for row in report["rows"]}
    modes = ("eager", "compiled model")
    assert set(rows) == {(backend, mode) for backend in ("native", "lowbit_int8_fp8") for mode in modes}
    assert not report["failed"]
    assert all(row["median_ms"] > 0 and row["runs"] == 3 for row in rows.values())
    assert all(row["graphs"] == (row["mode"] != "eager") for row in rows.values())
    assert all(rows["native", mode]["speedup_over_exact"] == 1 for mode in modes)
    assert report["left_out"] == {wan_step.FA4: "needs an NVIDIA GPU"}
    assert report["ran"] == {"int8+fp8 (reference-lowbit)": 16}  # 2 modules, a check and 3 turns in each mode
    assert report["about"]["video_tokens"] == 192 and report["about"]["text_tokens"] == 512


def test_what_is_wrong_is_told_and_not_timed(monkeypatch, tmp_path):
    monkeypatch.setitem(wan_step.FLOOR_DB, "lowbit_int8_fp8", 200.0)
    report = wan_step.main([*TINY, "--out", str(tmp_path), "--compile", "none"])
    assert list(report["failed"]) == ["int8+fp8, eager"] and "dB" in report["failed"]["int8+fp8, eager"]
    assert [row["backend"] for row in report["rows"]] == ["native"]


def test_a_backend_that_does_not_exist_is_refused(capsys, tmp_path):
    with pytest.raises(SystemExit):
        wan_step.main(["--tiny", "--out", str(tmp_path), "--backends", "native,flash_9"])
    assert "no backend flash_9; there are native" in capsys.readouterr().err
