"""Who serves: by the environment, by the Triton at hand."""
import dataclasses
import warnings

import pytest

from lowbit_video.engine.select import select
from lowbit_video.errors import UnsupportedError
from lowbit_video.kernels.shipped import choice
from lowbit_video.kernels.variants import Request

REQUEST = Request("cuda", (9, 0), "int8", "int8", "fp8", "block", "float16", 64, 17776, 17776, heads=30, kv_heads=30)


@pytest.fixture
def world(monkeypatch):
    """`world(value, version)`: LOWBIT_VIDEO_KERNELS and the Triton that is installed; gives what is chosen."""
    def make(value, version):
        monkeypatch.setattr(choice, "triton_version", lambda: version)
        monkeypatch.setenv(choice.ENVIRONMENT, value)
        choice.chosen.cache_clear()
        choice.warn_of_speed.cache_clear()
        return choice.chosen()

    yield make
    choice.chosen.cache_clear()
    choice.warn_of_speed.cache_clear()


@pytest.mark.parametrize(("value", "version", "shipped", "compiled"), [
    ("auto", "3.6.0", False, True), ("", "3.6.1", False, True), ("auto", "3.9.0", True, True), ("auto", "3.60.0", True, True),
    ("auto", None, True, False), ("shipped", "3.6.0", True, False), ("shipped", None, True, False),
    ("compiled", "3.6.0", False, True), ("compiled", "3.9.0", False, True), ("compiled", None, False, False)])
def test_choice(world, value, version, shipped, compiled):
    assert world(value, version)[:2] == (shipped, compiled)


def test_an_unknown_choice_lists_those_there_are(world):
    with pytest.raises(ValueError, match="'fast'.*auto, shipped, compiled"):
        world("fast", "3.6.0")


@pytest.mark.parametrize(("value", "version"), [("auto", "3.6.0"), ("auto", "3.9.0"), ("auto", None), ("shipped", "3.9.0")])
def test_hopper_is_served_everywhere(world, value, version):
    world(value, version)
    assert select(REQUEST).name == "hopper-int8"


def test_without_triton_what_is_not_shipped_is_refused_by_name(world):
    world("auto", None)
    for change in (dict(arch=(8, 9)), dict(q="int4", k="int4", granularity="token"), dict(varlen=True), dict(head_dim=96),
                   dict(lse=True, kv_heads=10)):
        with pytest.raises(UnsupportedError, match="Triton is not installed"):
            select(dataclasses.replace(REQUEST, **change))
    assert select(dataclasses.replace(REQUEST, lse=True, heads=32, kv_heads=8)).name == "hopper-int8"
    assert select(dataclasses.replace(REQUEST, heads=30, kv_heads=10)).name == "hopper-int8"
    world("auto", "3.9.0")  # compiles the rest
    assert select(dataclasses.replace(REQUEST, lse=True, kv_heads=10)).name == "hopper-int8"
    assert select(dataclasses.replace(REQUEST, arch=(8, 9))).name == "triton-int-fp8"


def test_without_triton_exact_attention_is_served_with_an_lse_for_any_group(world):
    world("auto", None)
    exact = dataclasses.replace(REQUEST, q="bf16", k="bf16", pv="bf16", dtype="bfloat16", head_dim=128, lse=True)
    for kv_heads in (30, 10, 1):
        assert select(dataclasses.replace(exact, kv_heads=kv_heads), "hopper").name == "hopper-exact"
    for change in (dict(arch=(8, 9)), dict(varlen=True), dict(dtype="float32", q="fp32", k="fp32", pv="fp32")):
        with pytest.raises(UnsupportedError, match="hopper-exact: "):
            select(dataclasses.replace(exact, **change), "hopper")


@pytest.mark.parametrize(("arch", "lse", "group", "reason"), [
    ((9, 0), True, 1, None), ((9, 0), True, 8, None), ((9, 0), False, 3, None), ((9, 0), True, 3, "1, 2, 4, 8 query heads"),
    ((9, 0), True, 16, "1, 2, 4, 8 query heads"), ((8, 9), False, 1, "for sm_90 only"), ((10, 0), False, 1, "for sm_90 only"),
    ((12, 0), True, 3, "for sm_90 only"), (None, False, 1, "for sm_90 only")])
def test_what_kernels_are_shipped_for(arch, lse, group, reason):
    why = choice.why_not_shipped(arch=arch, lse=lse, group=group)
    assert why is None if reason is None else reason in why


def test_compiled_without_triton_says_so(world):
    world("compiled", None)
    with pytest.raises(UnsupportedError, match="hopper-int8: nothing is compiled: Triton is not installed"):
        select(REQUEST)


def test_another_triton_is_told_once(world):
    world("auto", "3.9.0")
    with pytest.warns(UserWarning, match="Triton 3.9.0 compiles kernels here; their speed was measured under 3.6"):
        choice.warn_of_speed()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice.warn_of_speed()
        for version in ("3.6.0", None):
            world("auto", version)
            choice.warn_of_speed()
