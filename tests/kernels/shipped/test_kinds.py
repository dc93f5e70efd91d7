"""Kinds of arguments, and which code does for which; test_launch.py and the build ask Triton for its own word of them."""
from types import SimpleNamespace

import pytest

from lowbit_video.kernels.buffers import Buffer
from lowbit_video.kernels.shipped.kinds import describe, does_for, kind_of, parameters
from lowbit_video.kernels.stand_in import NamedKernel, NVMMASharedLayout, TensorDescriptor


@pytest.mark.parametrize(("value", "kind", "general"), [
    (None, "none", "none"), (1, "=1", "i32"), (2, "i32", "i32"), (0, "i32/16", "i32"), (48, "i32/16", "i32"),
    (24, "i32", "i32"), (-7, "i32", "i32"), (2**31 - 1, "i32", "i32"), (2**31, "i64/16", "i64"), (2**31 + 1, "i64", "i64"),
    (-(2**31), "i32/16", "i32"), (0.5, "f32", "f32"),
    (Buffer(64, "float16"), "*float16/16", "*float16/16"), (Buffer(72, "int8"), "*int8", "*int8")])
def test_kind(value, kind, general):
    assert kind_of(value) == kind
    assert kind_of(value, specialised=False) == general


def test_a_descriptor_is_what_it_reads_and_to_which_layout():
    made = TensorDescriptor(Buffer(64, "int8"), [100, 64], [64, 1], [128, 64], NVMMASharedLayout(64, 8))
    assert kind_of(made) == "tma int8[128, 64] swizzled(64, 8, 2)"


def test_a_descriptor_whose_layout_the_compiler_chooses_is_of_no_shipped_kernel():
    """Such are the portable kernels', which are offered too."""
    pytest.importorskip("triton", reason="the descriptor is Triton's")
    from triton.tools.tensor_descriptor import TensorDescriptor

    assert kind_of(TensorDescriptor(Buffer(64, "int8"), [100, 64], [64, 1], [128, 64])) == "tma int8[128, 64]"


@pytest.mark.parametrize("value", [True, "x", 2**63, [1]])
def test_what_no_kernel_takes_is_refused(value):
    with pytest.raises(TypeError, match="argument"):
        kind_of(value)


@pytest.mark.parametrize(("built", "does", "does_not"), [
    ("i32", ("i32", "i32/16", "=1"), ("i64", "i64/16", "f32", "none")),
    ("i32/16", ("i32/16",), ("i32", "=1", "i64/16")),
    ("i64", ("i32", "i32/16", "=1", "i64", "i64/16"), ("none",)),
    ("i64/16", ("i64/16", "i32/16"), ("i64", "i32", "=1")),
    ("*int8", ("*int8", "*int8/16"), ("*int16/16", "none")),
    ("*int8/16", ("*int8/16",), ("*int8",)),
    ("none", ("none",), ("*int8", "=1")), ("=1", ("=1",), ("i32",))])
def test_code_does_for_what_it_assumes_no_more_of(built, does, does_not):
    assert all(does_for(built, one) for one in does)
    assert not any(does_for(built, one) for one in does_not)


def kernel(x, n, m, MORE: "tl.constexpr", build: "gl.constexpr"):  # noqa: F821
    """A kernel's function, as far as its parameters go."""


def test_a_launch_in_words():
    made = NamedKernel(kernel, ["n"])
    assert [one.constant for one in parameters(kernel)] == [False, False, False, True, True]
    build = SimpleNamespace(deep=3)
    told = describe(made, (Buffer(16, "int32"), 16, 16), dict(build=build, MORE=2.0, num_warps=8, maxnreg=None))
    assert told.constants == ("MORE=2.0", "build=namespace(deep=3)", "maxnreg=None", "num_warps=8")
    assert told.kinds == ("*int32/16", "i32", "i32/16") and told.name.endswith(":kernel")
    assert [type(one).__name__ for one in told.values] == ["Buffer", "int", "int"]
    by_name = describe(made, (Buffer(16, "int32"),), dict(m=16, n=16, build=build, MORE=2.0, num_warps=8, maxnreg=None))
    assert by_name.key == told.key


def test_a_kernel_that_only_has_a_name_is_not_launched():
    with pytest.raises(ImportError, match="Triton.*is not installed"):
        NamedKernel(kernel)[(1,)]
