"""Whether an error is this project's own: raised by a statement of its source, not from inside a framework or NumPy."""
from __future__ import annotations

import ast
import functools
import pathlib
import traceback
import warnings

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = tuple(ROOT / name for name in ("kernels", "lowbit_video", "pipelines", "eval"))
KINDS = (ValueError, TypeError, FileNotFoundError)
"""What the public API raises for what it is given; UnsupportedError, NonFiniteError, ConfigError and so on are ValueErrors."""


@functools.cache
def _raises(path: str) -> list[tuple[int, int]]:
    """First and last line of every `raise` with a value in a file."""
    tree = ast.parse(pathlib.Path(path).read_text())
    return [(node.lineno, node.end_lineno) for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None]


def why_not_own(error: BaseException) -> str | None:
    """None for an error of ours with a message; else what is wrong with it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{type(error).__name__} from {last.filename}:{last.lineno}: {error}"
    if not isinstance(error, KINDS):
        return f"no kind of error that the API promises: {where}"
    if not any(pathlib.Path(last.filename).is_relative_to(folder) for folder in FOLDERS):
        return f"an error of somebody else: {where}"
    if not any(first <= last.lineno <= end for first, end in _raises(last.filename)):
        return f"no statement raises it: {where}"
    return None if len(str(error)) > 10 else f"it says nothing: {where}"


def result_or_refusal(call):
    """(result, None), or (None, the error) where it is one of ours. AssertionError for any other error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call(), None
    except Exception as error:
        reason = why_not_own(error)
        if reason is not None:
            raise AssertionError(reason) from error
        return None, error


def result_of(call):
    """What a valid call returns; whatever it raises is a fault."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


def taken_if(fits, call, name):
    """What a call with a value returns, or None where it is refused by name; AssertionError unless just what fits is taken."""
    result, error = result_or_refusal(call)
    assert error is not None or fits, f"{name} was taken"
    assert error is None or not fits, f"{name} was refused: {error}"
    assert error is None or name in str(error), f"which argument it is is not said: {error}"
    return result
