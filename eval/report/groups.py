"""The same figures by group of prompts: of lines that say to which "group" their prompt belongs, such as its background."""
from __future__ import annotations

from collections.abc import Sequence

from .summary import Summary, summarise


def by_group(videos: Sequence[dict], order: Sequence[str] = ()) -> dict[str, Summary]:
    """A summary of each group that has a prompt with all its videos, the groups as they come first; none without groups.

    Args:
        videos, order: as `summarise` takes them.
    """
    runs = {line["run"] for line in videos}
    found = {}
    for group in dict.fromkeys(line["group"] for line in videos if "group" in line):
        own = [line for line in videos if line.get("group") == group]
        made = {}
        for line in own:
            made.setdefault((line["prompt"], line["seed"]), set()).add(line["run"])
        if any(there == runs for there in made.values()):
            found[group] = summarise([line for line in own if made[line["prompt"], line["seed"]] == runs], order)
    return found
