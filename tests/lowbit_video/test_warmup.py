"""warmup() without a GPU: nothing to compile, and says so."""
from dataclasses import replace

import pytest

from lowbit_video import Pooled, Recipe
from lowbit_video import warming as module
from lowbit_video.engine.options import options_of
from lowbit_video.errors import UnsupportedError
from lowbit_video.warming import warmup


def test_a_cpu_compiles_nothing(framework):
    shapes = [(1, 17776, 30, 64), (2, 45106, 48, 64), ((17776, 226), 30, 64)]
    assert warmup(shapes, "int8+fp8", framework=framework.name, device="cpu") == dict.fromkeys(shapes, 0.0)


def test_every_shape_runs_twice_and_the_difference_is_reported(framework, monkeypatch):
    """On a GPU the first call compiles; here the calls are recorded and the clock is ours."""
    seen, walls = [], iter((905.0, 5.0, 3.0, 4.0))
    like = module.detect.anchor(framework.name, "cpu")
    runtime = module.detect.runtime_of(like)
    monkeypatch.setattr(runtime, "is_cpu", lambda t: False)

    def wall_ms(call, stream):
        q, k, v = call.args
        assert call.func is module.run and call.keywords["options"].precision.spec == "int8+fp8"
        seen.append((runtime.shape(q), runtime.shape(k)))
        return next(walls)

    monkeypatch.setattr(runtime, "stream", lambda t: 0)

    monkeypatch.setattr(module, "_wall_ms", wall_ms)
    taken = warmup([(1, 10, 4, 64), (1, 12, 4, 64)], "int8+fp8", framework=framework.name, device="cpu", kv_heads=2)
    assert taken == {(1, 10, 4, 64): 900.0, (1, 12, 4, 64): 0.0}
    assert seen == [((1, 10, 4, 64), (1, 10, 2, 64))] * 2 + [((1, 12, 4, 64), (1, 12, 2, 64))] * 2


def test_pooled_calls_are_made_as_they_are_asked_for(framework, monkeypatch):
    like = module.detect.anchor(framework.name, "cpu")
    runtime = module.detect.runtime_of(like)
    seen = []
    monkeypatch.setattr(runtime, "is_cpu", lambda t: False)
    monkeypatch.setattr(runtime, "stream", lambda t: 0)
    monkeypatch.setattr(module, "_wall_ms", lambda call, stream: seen.append(call.keywords["options"]) or 1.0)
    where = dict(framework=framework.name, device="cpu")
    warmup([(1, 10, 4, 64)], "int8+fp8", pooled=Pooled(0.3, 226), **where)
    warmup([(1, 10, 4, 64)], "int8+fp8 pooled 0.3 always 226", **where)
    assert len(seen) == 4 and set(seen) == {options_of("int8+fp8", "NHD", False, None, False, "auto", None, False,
                                                       Pooled(0.3, 226))}
    with pytest.raises(UnsupportedError, match="packed sequences; warm those up without pooled"):
        warmup([(1, 10, 4, 64), ((10, 3), 4, 64)], "int8+fp8", pooled=Pooled(0.3), **where)
    with pytest.raises(ValueError, match="2 shares, and q has 4 heads"):
        warmup([(1, 10, 2, 64), (1, 10, 4, 64)], "int8+fp8", pooled=Pooled((0.3, 0.5)), **where)
    with pytest.raises(ValueError, match="does too; give one of them"):
        warmup([], "int8+fp8 pooled 0.3", pooled=Pooled(0.3), **where)
    assert len(seen) == 4


def test_of_a_recipe_every_rung_is_warmed_once_at_every_shape(framework, monkeypatch):
    like = module.detect.anchor(framework.name, "cpu")
    runtime = module.detect.runtime_of(like)
    seen, walls = [], iter(range(100, 0, -1))
    monkeypatch.setattr(runtime, "is_cpu", lambda t: False)
    monkeypatch.setattr(runtime, "stream", lambda t: 0)
    monkeypatch.setattr(module, "_wall_ms", lambda call, stream: seen.append(call.keywords["options"]) or next(walls) ** 2)
    recipe = Recipe([{"rung": "int8+fp8 pooled 0.3"}, {"heads": [1], "rung": "exact"}, {"steps": "0-0.2", "rung": "int8+fp16"},
                     {"layers": "b.*", "rung": "exact"}], source="mine.toml")
    where = dict(framework=framework.name, device="cpu")
    shapes = [(1, 10, 4, 64), (1, 12, 4, 64)]
    assert warmup(shapes, recipe, **where) == {shapes[0]: 199 + 195 + 191, shapes[1]: 187 + 183 + 179}
    options = lambda precision, *pooled: options_of(precision, "NHD", False, None, False, "auto", None, False, *pooled)
    each = [options("int8+fp8", Pooled(0.3)), options("exact"), options("int8+fp16")]
    assert seen[::2] == seen[1::2] == each * 2
    with pytest.raises(UnsupportedError, match="packed sequences; warm those up without pooled"):
        warmup([((10, 3), 4, 64)], recipe, **where)
    with pytest.raises(ValueError, match=r"mine.toml \(4 rules\) says how keys are pooled, and pooled=pooled 0.5 does too"):
        warmup(shapes, recipe, pooled=Pooled(0.5), **where)
    with pytest.raises(ValueError, match="'safe' is a recipe, .*Recipe.load.* and into warmup"):
        warmup(shapes, "safe", **where)
    assert len(seen) == 12


def test_packed_sequences_are_called_as_a_model_calls_them(framework, monkeypatch):
    """The calls run here through the reference, so that they are known to be valid ones."""
    like = module.detect.anchor(framework.name, "cpu")
    runtime = module.detect.runtime_of(like)
    seen = []

    def wall_ms(call, stream):
        q, k, _ = call.args
        options, packing = call.keywords["options"], call.keywords["packing"]
        beginnings = runtime.to_numpy(packing.cu_q).tolist()
        seen.append((runtime.shape(q), runtime.shape(k), beginnings, packing.max_q, packing.max_k))
        with monkeypatch.context() as undo:
            undo.setattr(runtime, "is_cpu", is_cpu)
            out, lse, variant = call.func(*call.args, replace(options, check_finite=False), packing)
        assert runtime.shape(out) == runtime.shape(q) and lse is not None and variant.backend == "reference"
        return 7.0 / len(seen)

    is_cpu = runtime.is_cpu
    monkeypatch.setattr(runtime, "is_cpu", lambda t: False)
    monkeypatch.setattr(runtime, "stream", lambda t: 0)
    monkeypatch.setattr(module, "_wall_ms", wall_ms)
    taken = warmup([((10, 3, 0), 4, 64)], "int8+fp16", framework=framework.name, device="cpu", kv_heads=2, return_lse=True)
    assert taken == {((10, 3, 0), 4, 64): 3.5}
    assert seen == [((13, 4, 64), (13, 2, 64), [0, 10, 13, 13], 10, 10)] * 2


@pytest.mark.parametrize("shape", [(17776, 30, 64), ((), 30, 64), (1, 2, 3, 4, 5)], ids=str)
def test_a_shape_of_neither_form_is_refused(framework, shape):
    with pytest.raises(ValueError, match=r"\(lengths, heads, head_dim\)"):
        warmup([shape], framework=framework.name, device="cpu")


def test_unknown_framework_is_named():
    with pytest.raises(ValueError, match="there are: paddle, torch"):
        warmup([(1, 8, 1, 64)], framework="jax")
    assert issubclass(UnsupportedError, ValueError)


@pytest.mark.parametrize("choices, words", [
    (dict(precision="int8"), "unknown precision"), (dict(dtype="float64"), "unknown dtype 'float64'"),
    (dict(dtype=[]), "unknown dtype"), (dict(framework=""), "unknown framework ''"), (dict(framework=[]), "unknown framework"),
    (dict(device="no such"), "device is 'no"),
    (dict(device=3), "device is 3"), (dict(is_causal="no"), "is_causal is 'no'"), (dict(kv_heads=3), "kv_heads is 3; heads"),
    (dict(kv_heads=2.0), "kv_heads is 2.0"), (dict(backend="cpu"), "unknown backend"), (dict(shapes=3), "shapes is 3"),
    (dict(shapes=[3]), "a shape is"), (dict(shapes=["abcd"]), "a shape is"), (dict(shapes=[(1, 2.5, 3, 64)]), "shape is 2.5"),
    (dict(shapes=[(1, 0, 3, 64)]), "shape is 0"), (dict(shapes=[((0,), 3, 64)]), "a shape is"),
    (dict(shapes=[((5, -1), 3, 64)]), "length of a shape is -1")], ids=str)
def test_choices_that_do_not_exist_are_refused_on_a_cpu_too(framework, choices, words):
    with pytest.raises((ValueError, TypeError), match=words):
        warmup(**{"shapes": [(1, 8, 2, 64)], "framework": framework.name, "device": "cpu"} | choices)
