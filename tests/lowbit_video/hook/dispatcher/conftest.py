"""Every test leaves diffusers as it was, and this looks."""
import importlib.util

import pytest


@pytest.fixture(autouse=True)
def untouched():
    if importlib.util.find_spec("diffusers") is None:
        pytest.skip("diffusers is not installed")
    import dispatch_models
    from lowbit_video import unregister_diffusers

    before = dispatch_models.state()
    yield
    unregister_diffusers()
    assert dispatch_models.state() == before
