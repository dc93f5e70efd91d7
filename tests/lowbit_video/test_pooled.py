"""`Pooled`: what it takes, what it refuses, what it is as text."""
import numpy as np
import pytest

import lowbit_video as lv


def test_shares_are_numbers_or_one_a_head():
    assert lv.Pooled(0.3) == lv.Pooled(np.float64(0.3)) and hash(lv.Pooled(0.3)) == hash(lv.Pooled(0.3))
    assert lv.Pooled([0.25, 1]).keep == (0.25, 1.0) and lv.Pooled(0.3).of_heads(2) == (0.3, 0.3)
    assert lv.Pooled(0.3, 1) != lv.Pooled(0.3) != lv.Pooled(0.4) and lv.Pooled((0.3,)).of_heads(1) == (0.3,)
    assert str(lv.Pooled(0.3)) == "pooled 0.3" and str(lv.Pooled((0.5, 0.25))) == "pooled 0.25-0.5"
    assert [lv.Pooled(keep).all_kept for keep in (1, 0.999, (1, 1), (1, 0.5))] == [True, False, True, False]


@pytest.mark.parametrize("given, error, message", [
    (dict(keep=1.01), ValueError, "keep is 1.01"), (dict(keep=-0.1), ValueError, "0 to 1"),
    (dict(keep="0.3"), TypeError, "keep"), (dict(keep=()), ValueError, "empty"), (dict(keep=(0.3, None)), TypeError, "keep"),
    (dict(keep=float("nan")), ValueError, "nan"),
    (dict(keep=0.3, always=-1), ValueError, "always"), (dict(keep=0.3, always=2.5), TypeError, "always"),
    (dict(keep=True), TypeError, "keep")])
def test_refuses_by_name(given, error, message):
    with pytest.raises(error, match=message):
        lv.Pooled(**given)
