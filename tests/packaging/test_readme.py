"""What the README tells one to type can be pasted: commands parse, scripts, targets and files are there, no blanks are left."""
import re
import shlex
from pathlib import Path

import pytest

from lowbit_video.app.cli import build_parser

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
SNIPPETS = [line for block in BLOCKS for line in block.splitlines() if line.strip()]
INLINE = [" ".join(text.split()) for text in re.findall(r"`((?:lowbit-video|python|make|pip) [^`]+)`", README)]
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def files_of(words):
    """The words that are meant as files of the checkout."""
    return [word for word in words if re.fullmatch(r"[\w*./-]+\.(py|json|txt|md|toml)", word)]


def test_there_are_snippets_of_every_kind():
    first = {shlex.split(line, comments=True)[0] for line in SNIPPETS}
    assert {"lowbit-video", "make", "pip", "python"} <= first and len(INLINE) > 8


@pytest.mark.parametrize("line", [*SNIPPETS, *INLINE])
def test_it_can_be_pasted(line, capsys):
    program, *words = shlex.split(line, comments=True)
    left = [word for word in words if word in ("|", "...", "…") or re.fullmatch(r"[A-Z]{2,}(\.\w+)?(\.\.\.)?|.*-folder", word)]
    assert not left, f"something is left to fill in: {left}"
    if program == "lowbit-video":
        try:
            args = build_parser(words[0]).parse_args(words)
        except SystemExit:
            pytest.fail(f"{line}: {capsys.readouterr().err}")
        assert callable(args.run)
    elif program == "make":
        assert words[0] in TARGETS
    for name in files_of(words):
        assert list(ROOT.glob(name)), f"no such file: {name}"
