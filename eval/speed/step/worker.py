"""The process of one framework in `bench step`: FRAMEWORK, the command's arguments as JSON, and the file to write."""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .run import measure_all


def main(argv: list[str]) -> int:
    """Measures; 2, with a message, for what cannot be measured here."""
    framework, given, file = argv
    try:
        measure_all(framework, argparse.Namespace(**json.loads(given)), Path(file))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
