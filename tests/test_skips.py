"""Skipped tests are told by what is missing and by the command that runs them; the list of what may be missing is closed."""
import ast
from pathlib import Path
from types import SimpleNamespace

import pytest

from skips import kind_of, skip_lines

TESTS = Path(__file__).parent
pytest_plugins = ["pytester"]


def report(reason, *marks, when="setup"):
    return SimpleNamespace(longrepr=("file.py", 3, f"Skipped: {reason}"), keywords=dict.fromkeys(marks), when=when)


def test_a_line_for_each_kind_and_for_each_other_reason():
    given = [report("needs an NVIDIA GPU (torch finds none)", "gpu")] * 3 + [report("an edge of another type", "gpu")]
    given += [report("torch is not installed", "torch")] * 2 + [report("PyTorch is not installed", when="collect")]
    given += [report("Chromium and chromedriver are not installed", when="collect"), report("the moon is full")]
    given += [report("ppdiffusers is not installed (make interop)", "interop", when="collect")]
    assert skip_lines(given) == ([
        "4 tests skipped of those for NVIDIA GPUs; `make gpu-test` with one, under each framework, runs them",
        "2 tests skipped without PyTorch, diffusers or transformers; `make parity` runs them",
        "1 files skipped without PyTorch, diffusers or transformers; `make parity` runs them",
        "1 files skipped without a browser; `apt-get install chromium chromium-driver`, then `make test` runs them",
        "1 files skipped without ppdiffusers; `make interop` runs them"],
        ["1 tests skipped for a reason that tests/skips.py does not know: the moon is full"])
    assert skip_lines([]) == ([], [])


def text_of(node):
    """The words of a string, those of an f-string that stand in the source."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return " ".join(part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str))


def reasons_in(source):
    """(line, reason) of every skip that a source holds; of a package without a reason, its name."""
    for node in ast.walk(ast.parse(source)):
        name = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else None
        if name in ("skip", "skipif", "importorskip"):
            given = [keyword.value for keyword in node.keywords if keyword.arg == "reason"]
            given += [] if name == "skipif" else node.args[:1]
            yield node.lineno, text_of(given[0]) if given else ""


def test_every_reason_is_on_the_list():
    """But for those below gpu/, which are of what a GPU lacks."""
    files = [path for path in sorted(TESTS.rglob("*.py")) if "gpu" not in path.relative_to(TESTS).parts]
    unknown = [f"{path.relative_to(TESTS)}:{line}: {reason!r}" for path in files
               for line, reason in reasons_in(path.read_text()) if kind_of(reason) is None]
    assert not unknown, "what a CPU can run may not skip; if these need more, say so in tests/skips.py"


@pytest.mark.parametrize("source, found", [
    ("pytest.skip(f'no {x} moon')", [(1, "no   moon")]), ("pytest.importorskip('torch')", [(1, "torch")]),
    ("pytest.mark.skipif(True, reason='why')", [(1, "why")]), ("pytest.mark.skip()", [(1, "")]),
    ("pytest.importorskip('torch', reason='because')", [(1, "because")]), ("skip = 3", [])])
def test_reasons_are_found(source, found):
    assert list(reasons_in(source)) == found


@pytest.mark.parametrize("reason, failed", [("the moon is full", 1), ("needs an NVIDIA GPU", 0)])
def test_a_run_that_skips_for_another_reason_fails(pytester, reason, failed, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makeconftest((TESTS / "conftest.py").read_text())
    beside = {name: (TESTS / f"{name}.py").read_text() for name in ("crashes", "skips", "quick_start/sitecustomize")}
    pytester.makepyfile(**beside, test_it=f"""
        import pytest

        def test_that_passes():
            pass

        def test_that_skips():
            pytest.skip({reason!r})
    """)
    done = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    assert done.ret == failed
    assert ("does not know: the moon is full" in done.stdout.str()) == bool(failed)
