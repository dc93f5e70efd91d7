"""How an extra of this package is installed, as every hint says it: it is published nowhere yet, so from a checkout."""
from __future__ import annotations


def pip_install(extra: str) -> str:
    """The command that installs an extra of pyproject.toml, and where it is run."""
    return f"pip install '.[{extra}]' from the checkout"
