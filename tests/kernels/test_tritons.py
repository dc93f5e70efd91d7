"""What `make triton-matrix` recorded: every variant compiles under every Triton that the package promises to run beside."""
from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("triton")

spec = importlib.util.spec_from_file_location("triton_matrix", Path(__file__).with_name("triton_matrix.py"))
triton_matrix = importlib.util.module_from_spec(spec)
spec.loader.exec_module(triton_matrix)
MAKEFILE = Path(__file__).resolve().parents[2] / "Makefile"


def test_every_variant_compiles_under_every_triton():
    oldest = re.search(r"^TRITON \?= (\S+)$", MAKEFILE.read_text(), re.MULTILINE)[1]
    versions = re.search(r"^TRITONS \?= (.+)$", MAKEFILE.read_text(), re.MULTILINE)[1].replace("$(TRITON)", oldest).split()
    record = json.loads(triton_matrix.RECORD.read_text())
    assert len(versions) >= 4 and list(record) == versions
    wanted = {str(case) for case in triton_matrix.cases()}
    for version, builds in record.items():
        assert builds.keys() == wanted, version
        failed = {case: said for case, said in builds.items() if not re.fullmatch(r"\d+/\d+(, \d+/\d+)*", said)}
        assert not failed, (version, failed)
