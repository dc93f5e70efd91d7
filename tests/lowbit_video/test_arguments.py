"""Numbers and flags of any kind: taken as what they are, or refused by name."""
import numpy as np
import pytest

import lowbit_video as lv
from lowbit_video.arguments import flag, number, shown, whole

from helpers import qkv


def test_what_is_taken():
    assert whole("n", np.int64(3)) == 3 and whole("n", np.array(3), 3) == 3
    assert number("x", np.array([0.5])) == 0.5 and number("x", np.float16(2)) == 2.0 and number("x", 3) == 3.0
    assert flag("f", np.bool_(True)) is True and flag("f", 0) is False and flag("f", False) is False
    assert all(type(value) is kind for value, kind in ((whole("n", np.int8(1)), int), (number("x", 1), float)))


@pytest.mark.parametrize("check, value, error", [
    *[(whole, value, TypeError) for value in (True, 2.0, "3", None, [3], np.array([3, 4]), np.bool_(True))],
    (whole, 1, ValueError),
    *[(number, value, TypeError) for value in (True, "0.5", None, 1j, [1], np.array([1, 2]), object)],
    *[(number, value, ValueError) for value in (float("nan"), np.inf, 10**400)],
    *[(flag, value, TypeError) for value in ("no", None, 2, 1.0, [], np.array([1, 0]), np.array(1))]],
    ids=lambda one: getattr(one, "__name__", repr(one)))
def test_what_is_refused_by_name(check, value, error):
    with pytest.raises(error, match="^n is .*; give "):
        check(*("n", value, 2) if check is whole else ("n", value))


def test_a_whole_number_may_have_a_bound_above():
    assert whole("n", 5, 2, 5) == 5
    with pytest.raises(ValueError, match="^n is 6; give at most 5$"):
        whole("n", 6, 2, 5)


def test_a_value_that_fills_lines_is_named_by_its_type(framework):
    assert shown("no") == "'no'" and shown(framework.tensor(np.zeros((9, 99)))) == f"a {framework.name}.Tensor"
    with pytest.raises(TypeError, match=r"^x is .*; give a finite number$"):
        number("x", framework.tensor([0.5, 0.5]))
    assert number("x", framework.tensor(0.5)) == number("x", framework.tensor([0.5])) == 0.5


@pytest.mark.parametrize("name, value, error", [
    *[("scale", value, error) for value, error in ((np.nan, ValueError), (-np.inf, ValueError), (3e38, ValueError),
                                                   (True, TypeError), ("0.5", TypeError), (1j, TypeError))],
    *[(name, value, TypeError) for name in ("is_causal", "return_lse", "check_finite") for value in ("no", 2, 0.0, [])],
    ("tensor_layout", np.array(["NHD", "HND"]), ValueError), ("backend", {}, ValueError)], ids=repr)
def test_a_call_refuses_what_would_count_as_something_else(framework, name, value, error):
    tensors = [framework.tensor(x) for x in qkv(q_len=4)]
    with pytest.raises(error, match=f"^(unknown )?{name} "):
        lv.attention(*tensors, **{name: value})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_scale_that_is_a_tensor_is_checked_as_well(framework, value):
    tensors = [framework.tensor(x) for x in qkv(q_len=4)]
    with pytest.raises(ValueError, match="^scale is (nan|inf)"):
        lv.attention(*tensors, scale=framework.tensor(value))
    with pytest.raises(TypeError, match="^scale is "):
        lv.attention(*tensors, scale=framework.tensor([0.5, 0.5]))


@pytest.mark.parametrize("longest, error, words", [
    *[(value, TypeError, "give a whole number") for value in (None, 5.5, "5", np.nan, True, [5])],
    (0, ValueError, "at least 1"), (2**31, ValueError, "2147483647")], ids=str)
@pytest.mark.parametrize("name", ["max_seqlen_q", "max_seqlen_k"])
def test_a_longest_sequence_is_a_number_of_tokens(framework, name, longest, error, words):
    cu = framework.tensor([0, 4], "int32")
    choices = dict(max_seqlen_q=4, max_seqlen_k=4) | {name: longest}
    with pytest.raises(error, match=f"^{name} is .*{words}"):
        lv.attention_varlen(*(framework.tensor(x[0]) for x in qkv(q_len=4)), cu, cu, **choices)


@pytest.mark.parametrize("change, error", [
    (dict(smooth_k="no"), TypeError), (dict(smooth_q=2), TypeError), (dict(granularity=""), ValueError),
    (dict(granularity=[]), ValueError), (dict(spec=["int8+fp16"]), ValueError),
    (dict(spec="exact", granularity=""), ValueError)], ids=str)
def test_a_precision_takes_nothing_for_something_else(change, error):
    with pytest.raises(error, match="smooth_|granularity|unknown precision"):
        lv.Precision(**{"spec": "int8+fp16"} | change)


@pytest.mark.parametrize("choices", [dict(smooth="no"), dict(smooth=2), dict(check_finite="no")], ids=str)
def test_quantize_refuses_what_is_neither_yes_nor_no(framework, choices):
    with pytest.raises(TypeError, match="give True or False"):
        lv.quantize(framework.tensor(qkv(q_len=4)[0]), **choices)
