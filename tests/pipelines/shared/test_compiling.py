"""`pipe.compile()`: the same video as before, processors still take effect, errors are as clear as in eager mode."""
import numpy as np
import pytest

from lowbit_video import UnsupportedError, apply, coverage, remove
from lowbit_video.pipelines import load, make_random_pipeline

CALL = dict(num_inference_steps=2, num_frames=9, height=32, width=48, seed=3, progress=False)


def test_processors_set_before_and_after_run_and_fail_as_themselves(tmp_path):
    pipe = load(make_random_pipeline(tmp_path), device="cpu")
    exact = pipe("snow", **CALL).frames
    pipe.compile()
    np.testing.assert_allclose(pipe("snow", **CALL).frames, exact, atol=1e-5)
    apply(pipe, "int8+fp16")
    low = pipe("snow", **CALL).frames
    assert np.abs(low - exact).max() > 1e-4 and all(module.calls == 2 for module in coverage(pipe).modules)
    apply(pipe, "int8+fp16", backend="triton")
    with pytest.raises(UnsupportedError, match="it needs an NVIDIA GPU"):
        pipe("snow", **CALL)
    assert remove(pipe) and remove(pipe)
    np.testing.assert_allclose(pipe("snow", **CALL).frames, exact, atol=1e-5)
