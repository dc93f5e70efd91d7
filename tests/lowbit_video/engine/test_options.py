"""The options of a call: one value, checked when built, the same object for the same choices, and text in a graph."""
import dataclasses
import gc
import weakref

import numpy as np
import pytest

import lowbit_video as lv
from lowbit_video.engine.options import AttentionOptions, of_text, options_of, text_of
from lowbit_video.errors import UnsupportedError

CHOICES = [("int8+fp16", "NHD", False, None, False, "auto", None), ("int8/int4+fp8", "HND", True, 0.125, True, "triton", False),
           (lv.Precision("int4+fp8", granularity="block", smooth_k=False, smooth_q=False), "NHD", True, 2, False, "auto", True),
           ("exact", "NHD", False, 0.1, True, "reference", None),
           (lv.Precision("fp8+fp8"), "HND", False, 1e-3, False, "auto", None)]


@pytest.mark.parametrize("choices", CHOICES, ids=lambda choices: str(choices[0]))
def test_text_holds_every_choice(choices):
    options = options_of(*choices)
    assert of_text(text_of(*choices)) == options == AttentionOptions(*choices)
    assert options_of(*choices) is options and hash(AttentionOptions(*choices)) == hash(options)
    for name, other in dict(precision="int2+fp8", tensor_layout="HND" if options.tensor_layout == "NHD" else "NHD",
                            is_causal=not options.is_causal, scale=0.7, return_lse=not options.return_lse, backend="hopper",
                            check_finite=not options.check_finite, only_if_faster=True, pooled=lv.Pooled(0.3)).items():
        assert dataclasses.replace(options, **{name: other}) != options, name
        assert hash(dataclasses.replace(options, **{name: other})) != hash(options), name


def test_every_field_is_in_the_text():
    """A field that the text leaves out would silently be its default in every compiled graph."""
    changed = [field.name for field in dataclasses.fields(AttentionOptions)]
    pooled = lv.Pooled((0.25, 1 / 3), 226)
    text = text_of("int4+fp8", "HND", True, 0.5, True, "triton", False, True, pooled)
    options = of_text(text)
    assert tuple(getattr(options, name) for name in changed[1:]) == ("HND", True, 0.5, True, "triton", False, True, pooled)
    assert len(changed) == 9


def test_the_scale_becomes_a_number():
    assert AttentionOptions("int8+fp16").scaled(64).scale == 0.125
    scale = AttentionOptions("int8+fp16", scale=np.float32(0.5)).scaled(64).scale
    assert scale == 0.5 and type(scale) is float
    assert options_of("int8+fp16", "NHD", False, np.array(0.5), False, "auto", None) == AttentionOptions("int8+fp16", scale=0.5)


class OneElement:
    """A tensor of one element, as a scale; its value may change between calls."""

    def __init__(self, value):
        self.value = value

    def data_ptr(self):
        return 1

    def __float__(self):
        return self.value


def test_a_tensor_for_a_scale_is_read_at_every_call(framework):
    """Were its options kept, the second call would take the first one's value."""
    q = framework.tensor(np.random.default_rng(0).standard_normal((1, 20, 2, 64)))
    scale = OneElement(0.125)
    outs = []
    for scale.value in (0.125, 0.5):
        outs.append(framework.numpy(lv.attention(q, q, q, "exact", scale=scale)))
        np.testing.assert_array_equal(outs[-1], framework.numpy(lv.attention(q, q, q, "exact", scale=scale.value)))
    assert not np.array_equal(*outs)


def test_a_tensor_for_a_scale_is_not_kept_alive():
    scale = OneElement(0.5)
    gone = weakref.ref(scale)
    options_of("int8+fp16", "NHD", False, scale, False, "auto", None)
    del scale
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("change, message", [
    (dict(precision="int5"), "unknown precision"), (dict(tensor_layout=["NHD"]), "unknown tensor_layout"),
    (dict(backend="cuda"), "unknown backend 'cuda'; there are: auto, hopper, triton, reference")])
def test_what_does_not_exist_is_refused_when_built(change, message):
    with pytest.raises(ValueError, match=message):
        AttentionOptions(**{"precision": "int8+fp16"} | change)
    with pytest.raises(TypeError, match="not list"):
        options_of(["int8+fp16"], "NHD", False, None, False, "auto", None)
    assert issubclass(UnsupportedError, ValueError)
