"""Every Python line of docs/ppdiffusers.md runs, on small models in place of the ones that it names."""
import pathlib
import re

import numpy as np
import pytest

pytestmark = pytest.mark.interop
pytest.importorskip("paddle", reason="paddlepaddle is not installed")
pytest.importorskip("ppdiffusers", reason="ppdiffusers is not installed (make interop)")
import ppdiffusers  # noqa: E402

import lowbit_video  # noqa: E402
from lowbit_video.hook import frames  # noqa: E402
from lowbit_video.pipelines import make_random_pipeline  # noqa: E402

import ppdiffusers_doubles as doubles  # noqa: E402
import ppdiffusers_models as models  # noqa: E402

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "ppdiffusers.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def run(snippet, **names):
    exec(snippet, names)
    return names


def test_the_page_has_the_snippets_that_are_run_here():
    assert len(SNIPPETS) == 5


def test_a_pipeline_in_four_lines_and_its_modules_by_name(monkeypatch, capsys):
    pipe = models.dit_pipeline()
    monkeypatch.setattr(ppdiffusers.DiTPipeline, "from_pretrained", lambda name: pipe)
    got = run(SNIPPETS[0].replace("25", "1"))
    assert got["image"].size == (32, 32)
    assert "2 of 2 attention modules ran at low bit in every call" in capsys.readouterr().out
    assert lowbit_video.remove(pipe)
    run(SNIPPETS[1], pipe=pipe, lowbit_video=lowbit_video)
    assert [module.hooked for module in lowbit_video.coverage(pipe).modules] == [False, True]


def test_the_librarys_own_setters():
    unet = models.made("UNet2DConditionModel")
    got = run(SNIPPETS[2], unet=unet, lowbit_video=lowbit_video)
    assert set(unet.attn_processors.values()) == {got["processor"]}


def test_a_block_is_declared(monkeypatch):
    monkeypatch.setattr(frames, "_declared", dict(frames._declared))
    block = type("YourBlock", (), {})
    run(SNIPPETS[3], YourBlock=block, lowbit_video=lowbit_video)
    assert frames._declared[block] == "one_stream"


def test_folders_go_both_ways(monkeypatch, tmp_path):
    doubles.release(monkeypatch)
    monkeypatch.setattr(ppdiffusers, "CogVideoXPipeline", doubles.Theirs, raising=False)
    paths = {name: str(tmp_path / name) for name in ("folder", "other", "theirs")}
    make_random_pipeline(paths["folder"])
    got = run(SNIPPETS[4], ppdiffusers=ppdiffusers, **paths)
    assert isinstance(got["again"], doubles.Theirs)
    weights = lambda pipe: pipe.transformer.proj_out.weight.numpy()
    np.testing.assert_array_equal(weights(got["pipe"]), weights(got["again"]))
