"""The command line: what it prints, what it refuses, what it imports."""
import json
import pathlib
import re
import subprocess
import sys
import types
import warnings

import pytest

from lowbit_video.app import cli, kernel_table
from lowbit_video.kernels.variants import VARIANTS


def test_kernels_lists_every_variant(capsys):
    assert cli.main(["kernels"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:2 + len(VARIANTS)]] == [variant.name for variant in VARIANTS]


def test_kernels_as_markdown_and_json(capsys):
    assert cli.main(["kernels", "--markdown"]) == 0
    rows = capsys.readouterr().out.strip().splitlines()
    assert len(rows) == len(VARIANTS) + 2 and len({row.count("|") for row in rows}) == 1
    assert cli.main(["kernels", "--json"]) == 0
    assert [row["kernel"] for row in json.loads(capsys.readouterr().out)] == [variant.name for variant in VARIANTS]


def test_kernels_writes_and_checks_a_readme(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"# before\n{kernel_table.BEGIN}\nold\n{kernel_table.END}\nafter\n", encoding="utf-8")
    assert cli.main(["kernels", "--check", str(readme)]) == 1
    assert "out of date" in capsys.readouterr().out
    assert cli.main(["kernels", "--write", str(readme)]) == 0
    assert cli.main(["kernels", "--check", str(readme)]) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("# before\n") and text.endswith("\nafter\n") and "old" not in text
    readme.write_text(text.replace(VARIANTS[0].name, "other"), encoding="utf-8")
    assert cli.main(["kernels", "--check", str(readme)]) == 1


def test_the_readmes_table_is_the_generated_one():
    readme = pathlib.Path(__file__).parents[3] / "README.md"
    if kernel_table.BEGIN not in readme.read_text(encoding="utf-8"):
        pytest.skip(f"README.md has no {kernel_table.BEGIN} block")
    assert kernel_table.check(readme), "run: lowbit-video kernels --write README.md"


def test_a_readme_without_the_block_is_named(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("no table", encoding="utf-8")
    assert cli.main(["kernels", "--check", str(readme)]) == 2
    assert "has no block for the table" in capsys.readouterr().err
    assert cli.main(["kernels", "--check", str(tmp_path / "none.md")]) == 2


@pytest.mark.parametrize("argv, name", [
    (["generate", "--prompt", "--cat"], "--prompt"), (["generate", "--negative-prompt", "-x"], "--negative-prompt"),
    (["eval", "compare", "--model", "m", "--prompts", "-p.txt"], "--prompts")])
def test_a_value_that_begins_with_a_hyphen_is_told_its_equals_sign(argv, name, capsys):
    with pytest.raises(SystemExit):
        cli.main(argv)
    assert f"begins with a hyphen needs an equals sign: {name}=-...)" in capsys.readouterr().err


@pytest.mark.parametrize("nargs, wanted", [(None, "--"), ("?", "--"), ("*", ["--"]), ("+", ["--"]), (1, ["--"])])
def test_two_hyphens_behind_an_equals_sign_are_a_value(nargs, wanted):
    parser = cli.Parser()
    parser.add_argument("--prompt", nargs=nargs)
    parser.add_argument("rest", nargs="*")
    assert vars(parser.parse_args(["--prompt=--"])) == {"prompt": wanted, "rest": []}
    assert vars(parser.parse_args(["--prompt=-x", "--", "-a"])) == {
        "prompt": ["-x"] if isinstance(wanted, list) else "-x", "rest": ["-a"]}


def test_two_hyphens_are_checked_as_any_value(capsys):
    args = cli.build_parser("generate").parse_args(["generate", "--prompt=--", "--out=--"])
    assert (args.prompt, args.out) == ("--", "--")
    for option, words in (("--steps", "invalid .* value: '--'"), ("--backend", "invalid choice: '--'")):
        with pytest.raises(SystemExit) as end:
            cli.build_parser("generate").parse_args(["generate", f"{option}=--"])
        assert end.value.code == 2 and re.search(f"argument {option}: {words}", capsys.readouterr().err)


@pytest.mark.parametrize("argv", [["kernels", "--check", "a\0b"], ["kernels", "--check=\0"], ["eval", "report", "\0"]])
def test_a_nul_character_is_named(argv, capsys):
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert "\\x00" in error and "holds a NUL character" in error and error.count("\n") == 1


@pytest.mark.parametrize("argv", [["nonsense"], ["kernels", "--nope"], ["kernels", "--json", "--markdown"], ["bench"]])
def test_wrong_arguments_end_with_status_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        sys.exit(cli.main(argv))
    assert stop.value.code == 2


def test_no_arguments_show_the_commands(capsys):
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in (*cli.COMMANDS, *cli.GROUPS))


def test_version(capsys):
    import lowbit_video

    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and lowbit_video.__version__ in capsys.readouterr().out


def register(monkeypatch, run):
    """A command `probe` that runs the given function."""
    module = types.ModuleType("probe_command")
    module.add_parsers = lambda subparsers: subparsers.add_parser("probe").set_defaults(run=run)
    monkeypatch.setitem(sys.modules, "probe_command", module)
    monkeypatch.setitem(cli.COMMANDS, "probe", ("probe_command", "a probe"))
    monkeypatch.setitem(cli.GROUPS, "probes", ("probe_command", "a group of probes"))
    monkeypatch.setitem(cli.GROUPS, "absent", ("lowbit_video.no_such_module", "not installed"))


def raises(error):
    def run(args):
        raise error
    return run


@pytest.mark.parametrize("error, status", [(ValueError("bad steps"), 2), (FileNotFoundError("no folder"), 2),
                                           (PermissionError("not writable"), 2), (KeyboardInterrupt(), 130)])
def test_mistakes_are_one_line_and_a_status(monkeypatch, capsys, error, status):
    register(monkeypatch, raises(error))
    assert cli.main(["probe"]) == status
    err = capsys.readouterr().err
    assert "Traceback" not in err and (str(error) in err)


def test_only_paddles_word_about_ccache_is_held_back():
    def work():
        for text in ("No ccache found. Please be aware", "another"):
            warnings.warn(text, stacklevel=1)
        return 0

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert cli.guarded(work, "probe") == 0
    assert [str(warning.message) for warning in seen] == ["another"]


def test_a_bug_is_not_hidden(monkeypatch):
    register(monkeypatch, raises(AttributeError("ours")))
    with pytest.raises(AttributeError):
        cli.main(["probe"])


def test_groups_register_below_their_name(monkeypatch, capsys):
    register(monkeypatch, lambda args: print("ran"))
    assert cli.main(["probes", "probe"]) == 0
    assert capsys.readouterr().out == "ran\n"
    assert cli.main(["absent", "x"]) == 2
    assert "has no `absent` commands" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["kernels", "--help"])
def test_light_commands_import_no_framework(command):
    code = (f"import sys, lowbit_video.app.cli as c\ntry: c.main([{command!r}])\nexcept SystemExit: pass\n"
            "bad = {'paddle', 'torch', 'triton', 'matplotlib'} & set(sys.modules)\nassert not bad, bad")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
