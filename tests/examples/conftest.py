"""The small model's scripts as modules, those that train it and those that make videos of it with PyTorch, and a toy model of
random weights."""
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "small_cogvideox"


@pytest.fixture(scope="module")
def code():
    """The modules of the example by name; they are found as its scripts find them, beside each other."""
    import torch

    sys.path.insert(0, str(FOLDER))
    before = set(sys.modules)
    import evaluate_precisions
    import graphs
    import makers
    import models
    import precision_curve
    import precision_table
    import scoring
    import time_precisions

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield SimpleNamespace(main=evaluate_precisions.main, evaluate=evaluate_precisions, makers=makers, models=models,
                          table=precision_table, curve=precision_curve, graphs=graphs, scoring=scoring, timing=time_precisions)
    torch.set_num_threads(threads)
    sys.path.remove(str(FOLDER))
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture(scope="module")
def model(code, tmp_path_factory):
    """A toy model of random weights."""
    import torch

    folder, models = tmp_path_factory.mktemp("toy") / "model", code.models
    torch.manual_seed(0)
    models.build_vocabulary(folder / "tokenizer")
    words = models.build_text_encoder(models.TINY, len(models.Tokens(folder / "tokenizer")))
    models.save(folder, models.build_vae(models.TINY), words, models.build_transformer(models.TINY), models.TINY,
                models.generation_defaults(models.TINY))
    return folder


@pytest.fixture
def training(monkeypatch):
    """The modules of the training by name, fresh for each test; found as its scripts find them, beside each other."""
    import torch

    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    import train  # imports its neighbours

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # toy sizes gain nothing from more
    yield SimpleNamespace(train=train, **{path.stem: sys.modules[path.stem] for path in FOLDER.glob("*.py")
                                          if path.stem in sys.modules and path.stem != "train"})
    torch.set_num_threads(threads)
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
