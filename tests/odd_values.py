"""Values that no argument, or only another one, is meant to have."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import strategies as st

NUMBERS = (-1, 0, 1, 2, 3, 7, 1.0, 2.5, -0.0, 1e-300, 1e30, 1e308, 2**31, 2**63, 2**64, 10**400, math.nan, math.inf, -math.inf)
"""No number between ten and 2**31: a size of that order is a request for memory, not a mistake."""
NUMBERS_IN_ARRAYS = (
    np.int64(2),
    np.int8(-3),
    np.float16(1.5),
    np.float32(math.nan),
    np.array(2),
    np.array(0.5),
    np.array([2]),
    np.array([1, 2]),
    np.array([]),
    np.array([[0.5]]),
    np.bool_(True),
    np.uint64(2**63),
)
TEXTS = ("", "no", "2", "0.5", "a cat", "\ud800", "\0", "x" * 5000, "NaN", b"a cat", bytearray(b"x"))
OTHERS = (
    None,
    True,
    False,
    1j,
    (),
    [],
    {},
    set(),
    [None],
    [1, 2],
    ["a", 1],
    ["a"],
    {"a": 1},
    (3, 4),
    object(),
    object,
    len,
    Exception("x"),
    range(3),
    slice(1),
    ...,
    NotImplemented,
    np.dtype("float32"),
    np.zeros((2, 3), np.float32),
    np.full((2,), "a"),
)

odd_values = st.one_of(*map(st.sampled_from, (NUMBERS, NUMBERS_IN_ARRAYS, TEXTS, OTHERS)))
"""Of each kind about as often."""


def is_whole(value, least=1, most=math.inf):
    """Whether it is a whole number that an argument may take for one."""
    return (
        (
            isinstance(value, (int, np.integer))
            or isinstance(value, np.ndarray)
            and value.shape == ()
            and value.dtype.kind in "iu"
        )
        and not isinstance(value, bool)
        and least <= int(value) <= most
    )


def is_number(value):
    """Whether it is a finite number, or an array of one."""
    if isinstance(value, np.ndarray):
        return value.size == 1 and value.dtype.kind in "iuf" and bool(np.isfinite(value).all())
    if isinstance(value, (int, float, np.number)) and not isinstance(value, (bool, np.complexfloating)):
        try:
            return math.isfinite(value)
        except OverflowError:
            return False
    return False


def is_flag(value):
    """Whether it is a yes or no, or 1 or 0."""
    return isinstance(value, (bool, np.bool_, int)) and value in (0, 1)


def is_texts(value):
    """Whether it is a text or a list of some."""
    return (
        isinstance(value, str)
        or isinstance(value, (list, tuple))
        and len(value) > 0
        and all(isinstance(one, str) for one in value)
    )


NOTHING = object()


def odd_tensors(framework, array):
    """Tensors of the framework, and arrays, that are not quite like a float32 tensor of the array's values."""
    if framework.name == "paddle":
        import paddle

        plain = paddle.to_tensor(array)
        kinds = {
            "int64": plain.astype("int64"),
            "float64": plain.astype("float64"),
            "bool": plain > 0,
            "complex64": plain.astype("complex64"),
            "float16": plain.astype("float16"),
            "bfloat16": plain.astype("bfloat16"),
            "int8": plain.astype("int8"),
        }
        others = [plain.to_sparse_coo(2), paddle.to_tensor(array[..., :0]), paddle.to_tensor(array[:0])]
    else:
        import torch

        plain = torch.from_numpy(array.copy())
        kinds = {
            name: plain.to(getattr(torch, name))
            for name in ("int64", "float64", "bool", "complex64", "float16", "bfloat16", "int8")
        }
        others = [
            plain.to("meta"),
            plain.to_sparse(),
            torch.from_numpy(array[..., :0].copy()),
            torch.from_numpy(array[:0].copy()),
        ]
    spoilt = []
    for value in (math.nan, math.inf, -math.inf):
        one = array.copy()
        one.reshape(-1)[-1] = value
        spoilt.append(framework.tensor(one))
    shapes = [
        array[0],
        array[None],
        array[:, :-1],
        array[:, :, :-1],
        array[..., :-8],
        array[..., :24],
        array.repeat(3, 2),
        array.repeat(2, 0),
        array.repeat(9, 3),
        array.reshape(-1),
        array.reshape(-1)[0],
        array.transpose(0, 2, 1, 3),
    ]
    return st.sampled_from([*kinds.values(), *others, *spoilt, *map(framework.tensor, shapes), array, array.tolist(), plain])
