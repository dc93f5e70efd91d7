"""warmup() without a GPU: nothing to compile, and says so."""
import pytest

from lowbit_video.errors import UnsupportedError
from lowbit_video.warmup import warmup


def test_a_cpu_compiles_nothing(framework):
    shapes = [(1, 17776, 30, 64), (2, 45106, 48, 64)]
    assert warmup(shapes, "int8+fp8", framework=framework.name, device="cpu") == dict.fromkeys(shapes, 0.0)


def test_every_shape_runs_twice_and_the_difference_is_reported(framework, monkeypatch):
    """On a GPU the first call compiles; here the calls are recorded and the clock is ours."""
    import sys

    module = sys.modules["lowbit_video.warmup"]
    seen, walls = [], iter((905.0, 5.0, 3.0, 4.0))
    like = module.detect.anchor(framework.name, "cpu")
    runtime = module.detect.runtime_of(like)
    monkeypatch.setattr(runtime, "is_cpu", lambda t: False)

    def wall_ms(runtime, q, k, v, *_):
        seen.append((runtime.shape(q), runtime.shape(k)))
        return next(walls)

    monkeypatch.setattr(module, "_wall_ms", wall_ms)
    taken = warmup([(1, 10, 4, 64), (1, 12, 4, 64)], "int8+fp8", framework=framework.name, device="cpu", kv_heads=2)
    assert taken == {(1, 10, 4, 64): 900.0, (1, 12, 4, 64): 0.0}
    assert seen == [((1, 10, 4, 64), (1, 10, 2, 64))] * 2 + [((1, 12, 4, 64), (1, 12, 2, 64))] * 2


def test_unknown_framework_is_named():
    with pytest.raises(ValueError, match="there are: paddle, torch"):
        warmup([(1, 8, 1, 64)], framework="jax")
    assert issubclass(UnsupportedError, ValueError)
