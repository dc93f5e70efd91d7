"""The small model's scripts as modules, those that train it and those that make videos of it with PyTorch, and a toy model of
random weights."""
import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "small_cogvideox"


@contextlib.contextmanager
def scripts():
    """In it the example's modules are found as its scripts find them, beside each other, and PyTorch has one thread: toy sizes
    gain nothing from more. After it they are gone."""
    import torch

    before, threads = set(sys.modules), torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield
    torch.set_num_threads(threads)
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def toy_model(models, folder):
    """`folder`, with a toy model of random weights in it, by the module `models`."""
    import torch

    torch.manual_seed(0)
    models.build_vocabulary(folder / "tokenizer")
    words = models.build_text_encoder(models.TINY, len(models.Tokens(folder / "tokenizer")))
    models.save(folder, models.build_vae(models.TINY), words, models.build_transformer(models.TINY), models.TINY,
                models.generation_defaults(models.TINY))
    return folder


@pytest.fixture(scope="module")
def code():
    """The modules of the scripts that make videos, by name."""
    with scripts():
        import evaluate_precisions
        import graphs
        import makers
        import models
        import precision_curve
        import precision_table
        import scoring
        import time_precisions

        yield SimpleNamespace(main=evaluate_precisions.main, evaluate=evaluate_precisions, makers=makers, models=models,
                              table=precision_table, curve=precision_curve, graphs=graphs, scoring=scoring,
                              timing=time_precisions)


@pytest.fixture(scope="module")
def model(code, tmp_path_factory):
    """A toy model of random weights."""
    return toy_model(code.models, tmp_path_factory.mktemp("toy") / "model")


@pytest.fixture
def training():
    """The modules of the training by name, fresh for each test."""
    with scripts():
        import train  # imports its neighbours

        yield SimpleNamespace(train=train, **{path.stem: sys.modules[path.stem] for path in FOLDER.glob("*.py")
                                              if path.stem in sys.modules and path.stem != "train"})


@pytest.fixture
def folder(training, tmp_path):
    """A toy model of random weights, by the training's modules."""
    return toy_model(training.models, tmp_path / "model")
