"""What to install is said in one way, of extras that there are: the package is published nowhere yet."""
import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from lowbit_video import register_diffusers
from lowbit_video.hook.dispatcher import registry
from lowbit_video.hook.recipe.toml import read_toml
from lowbit_video.installing import pip_install
from lowbit_video.runtime import detect

ROOT = Path(__file__).parents[2]
SOURCES = {path: path.read_text(encoding="utf-8") for top in ("lowbit_video", "eval", "pipelines", "examples", "kernels")
           for path in (ROOT / top).rglob("*.py")}


def test_every_hint_is_of_an_extra_that_there_is():
    extras = read_toml(ROOT / "pyproject.toml")["project"]["optional-dependencies"]
    named = [name for text in SOURCES.values() for name in re.findall(r"pip_install\(['\"](\w+)['\"]\)", text)]
    assert len(named) >= 10 and set(named) <= set(extras)
    assert pip_install("torch") == "pip install '.[torch]' from the checkout"
    assert "pip install '.[cpu" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_none_names_a_package_that_is_not_published():
    said = re.compile(r"pip install ['\"]?lowbit[_-]video|pip install '\.\[")
    assert [str(path) for path, text in SOURCES.items() if said.search(text)] == [str(ROOT / "lowbit_video" / "installing.py")]


def test_without_a_framework_both_are_named(monkeypatch):
    monkeypatch.setattr(detect, "sys", SimpleNamespace(modules={}))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install '\.\[cpu\]' from the checkout, .* pip install '\.\[torch\]' from the "):
        detect.default_framework()


def test_without_diffusers_its_extra_is_named(monkeypatch):
    monkeypatch.setattr(registry, "sys", SimpleNamespace(modules={}))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"_diffusers needs diffusers, .*: pip install '\.\[diffusers\]' from the checkout"):
        register_diffusers()
