"""`lowbit-video`: the command line, where everything comes together, imported only when it is used.

Each subcommand lives in a module of its own that registers itself:

    def add_parsers(subparsers):                      # what argparse's add_subparsers() returned
        parser = subparsers.add_parser("kernels", help="...")
        parser.set_defaults(run=run)                  # run(args) -> exit status or None

`bench` and `eval` are groups: their modules get the subparsers below them. A caller's mistake
(ValueError, OSError, ImportError, ...) ends as one line and exit status 2; Ctrl-C as 130.
"""
from __future__ import annotations

import argparse
import importlib
import io
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ..distributed.watch import end_process

COMMANDS = {
    "generate": ("lowbit_video.app.generate", "make a video, optionally beside its full-precision twin"),
    "calibrate": ("lowbit_video.eval.calibrate.cli", "a recipe for a model: which bit width each layer and step needs"),
    "kernels": ("lowbit_video.app.kernel_table", "the table of kernels that exist"),
    "plan": ("lowbit_video.app.plan", "what a video costs on several GPUs, by every way to share it out"),
    "doctor": ("lowbit_video.app.doctor", "what this machine can run, and why not"),
}
"""Commands: module and one line of help."""
GROUPS = {
    "bench": ("lowbit_video.eval.speed.cli", "how fast: benchmarks and tuning"),
    "eval": ("lowbit_video.eval.cli", "how good: paired comparisons, layers, report"),
}
"""Groups of commands: the module registers what is below."""


class Parser(argparse.ArgumentParser):
    """A parser, also of commands, that says how a value is given that begins with a hyphen, and takes "--" as one."""

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """argparse before Python 3.13 takes the value of "--prompt=--" for the end of the options and gives an empty list."""
        if not action.option_strings or arg_strings != ["--"]:
            return super()._get_values(action, arg_strings)
        value = self._get_value(action, "--")
        self._check_value(action, value)
        return value if action.nargs in (None, argparse.OPTIONAL) else [value]

    def error(self, message: str) -> NoReturn:
        """Ends with the message."""
        if name := re.match(r"argument (?:\S*/)?(--[\w-]+)[^:]*: expected", message):
            message += f" (a value that begins with a hyphen needs an equals sign: {name[1]}=-...)"
        super().error(message)


def build_parser(chosen: str | None = None) -> argparse.ArgumentParser:
    """The parser; only the module of the chosen command is imported, the others are named.

    Raises ImportError where the chosen command's module is not there.
    """
    from .. import __version__

    parser = Parser(prog="lowbit-video", description="Low-bit attention for video diffusion transformers.")
    parser.add_argument("--version", action="version", version=f"lowbit_video {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command")
    for name, (module, text) in COMMANDS.items():
        if name == chosen:
            importlib.import_module(module).add_parsers(subparsers)
        else:
            subparsers.add_parser(name, help=text, add_help=False)
    for name, (module, text) in GROUPS.items():
        group = subparsers.add_parser(name, help=text, description=text.capitalize() + ".")
        if name == chosen:
            below = group.add_subparsers(dest=f"{name}_command", metavar="command", required=True)
            _import_group(name, module).add_parsers(below)
    return parser


def _import_group(name: str, module: str):
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name):
            raise ImportError(f"this installation has no `{name}` commands (module {module} is missing)") from None
        raise


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 2 for a caller's mistake, 130 for Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    return guarded(lambda: _run(argv, chosen), "lowbit-video")


def _run(argv: list[str], chosen: str | None) -> int:
    for word in argv:  # no shell can send it, but a program that calls main() can
        if "\0" in word:
            raise ValueError(f"{word!r} holds a NUL character, which no file's name and no prompt may have; leave it out")
    parser = build_parser(chosen)
    args = parser.parse_args(argv)
    if not hasattr(args, "run"):
        parser.print_help()
        return 0 if chosen is None else 2
    return args.run(args) or 0


def guarded(work: Callable[[], int], name: str) -> int:
    """Runs the work; a caller's mistake and Ctrl-C become one line on stderr and an exit status.

    A process that is one of several ranks ends here, with that status.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a prompt that a narrow terminal cannot show ends no work
    warnings.filterwarnings("ignore", message="No ccache found")  # Paddle says it on import; nothing here needs one
    status = _status_of(work, name)
    end_process(status)
    return status


def _status_of(work: Callable[[], int], name: str) -> int:
    try:
        return work()
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; no unfinished file was left", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 141
    except (ValueError, OSError, ImportError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
