"""A metric is one new file and nothing else: one is added, measured by `compare` and shown by the report."""
import json
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("paddle", reason="PaddlePaddle is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")
sys.path.insert(0, str(Path(__file__).parents[1]))

from planted import SwapHeads  # noqa: E402
from toy_pipeline import ToyPipeline  # noqa: E402

from lowbit_video.app.cli import main  # noqa: E402
from lowbit_video.eval import metrics  # noqa: E402
from lowbit_video.eval.compare.candidates import Candidate  # noqa: E402
from lowbit_video.eval.compare.layers import measure_layers  # noqa: E402
from lowbit_video.eval.compare.paired import compare  # noqa: E402
from lowbit_video.eval.compare.settings import Settings  # noqa: E402
from lowbit_video.eval.metrics import registry  # noqa: E402
from lowbit_video.eval.report.write import write_report  # noqa: E402

WORST_PIXEL = '''"""The largest difference of a pixel."""
import numpy as np

from ..video import as_pair

NAME = "worst_pixel"
LABEL = "worst pixel"
UNIT = "‰"
DIGITS = 5
HIGHER_IS_BETTER = False
KIND = "paired"
PERFECT = 0.0


def measure(video, reference=None, context=None):
    return float(1000 * np.abs(np.subtract(*as_pair(video, reference))).max())
'''
BIAS = '''"""The mean error of an attention output."""
NAME = "bias"
LABEL = "mean error"
UNIT = ""
DIGITS = 4
HIGHER_IS_BETTER = None
KIND = "tensor"


def measure(output, reference):
    return (output - reference).mean()
'''
QUIET = lambda line: None  # noqa: E731


@pytest.fixture
def add(tmp_path, monkeypatch):
    """Adds a file to the folder of metrics until the test ends."""
    folder, names = tmp_path / "metrics", []
    folder.mkdir()
    monkeypatch.setattr(metrics, "__path__", [*metrics.__path__, str(folder)])

    def write(name, text):
        names.append(name)
        (folder / f"{name}.py").write_text(text)
        registry.metrics.cache_clear()

    yield write
    registry.metrics.cache_clear()
    for name in names:
        sys.modules.pop(f"{metrics.__name__}.{name}", None)
        vars(metrics).pop(name, None)


def test_a_metric_is_one_file_and_nothing_else(add, tmp_path, capsys):
    add("worst_pixel", WORST_PIXEL)
    add("bias", BIAS)
    pipe, settings = ToyPipeline(), Settings("toy", steps=2)
    compare(pipe, ["a red ball", "a blue square"], [Candidate("swap", SwapHeads)], tmp_path, settings=settings,
            metrics=["psnr", "flicker", "worst_pixel"], say=QUIET)
    table = measure_layers(pipe, "a red ball", ["int8+fp16"], settings=settings, measured_shares=False, say=QUIET)
    table.save(tmp_path / "layers.npz")
    paths = write_report(tmp_path, films=False, say=QUIET)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    values = [line["figures"]["worst_pixel"] for line in lines if line.get("run") == "swap"]
    assert len(values) == 2 and min(values) > 1
    mean = f"{sum(values) / 2:.5f}"
    page, text = paths["html"].read_text(), paths["markdown"].read_text()
    assert re.search(r'worst pixel <span class="unit">‰</span><div class="interval">lower is better</div>', page)
    assert f'<span class="value">{mean}</span>' in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S).group(1))
    assert list(data["figures"]) == ["psnr", "flicker", "worst_pixel"]  # without a place it stands last
    assert data["figures"]["worst_pixel"] == {"label": "worst pixel", "unit": "‰", "digits": 5, "higher_is_better": False,
                                              "per_prompt": True}
    assert data["layers"]["figures"]["bias"]["label"] == "mean error"
    assert "| worst pixel (‰) |" in text and f"| {mean} [" in text
    assert main(["eval", "metrics"]) == 0
    assert re.search(r"worst_pixel +paired +‰ +lower is better +ready", capsys.readouterr().out)


def test_a_file_that_says_too_little_is_named(add):
    add("half", BIAS.replace("LABEL", "TITLE"))
    with pytest.raises(AttributeError, match="half.*LABEL"):
        registry.metrics()
