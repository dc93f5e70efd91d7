"""The NumPy reference runs on one BLAS thread, and leaves the number as it was."""
import numpy as np
import pytest

from lowbit_video.kernels import blas_threads
from lowbit_video.kernels.attention import reference


@pytest.fixture
def controls():
    found = blas_threads._controls()
    if found is None:
        pytest.skip("this NumPy brings no OpenBLAS of its own")
    before = found[0]()
    found[1](2)
    if found[0]() != 2:
        pytest.skip("this OpenBLAS has no second thread")
    yield found
    found[1](before)


def test_one_thread_inside_and_as_before_after(controls):
    get, _ = controls
    with blas_threads.one_blas_thread():
        assert get() == 1
    assert get() == 2
    with pytest.raises(KeyError), blas_threads.one_blas_thread():
        raise KeyError
    assert get() == 2


def test_the_reference_uses_it(controls, monkeypatch):
    seen = []
    monkeypatch.setattr(reference, "round_significand", lambda x, *args: seen.append(controls[0]()) or x)
    x = np.ones((1, 1, 4, 8), np.float32)
    reference.attn_fwd(x, x, x, scale=1.0, p_format="fp16")
    assert seen == [1] and controls[0]() == 2


def test_another_blas_is_left_alone(monkeypatch):
    monkeypatch.setattr(blas_threads, "_controls", lambda: None)
    with blas_threads.one_blas_thread():
        assert (np.eye(3) @ np.eye(3) == np.eye(3)).all()
