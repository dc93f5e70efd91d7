"""The list of planted faults fits the code, and planting tells what is noticed from what is not."""
import subprocess

import pytest

from mutants import plant
from mutants.entry import ROOT, Mutant, faults
from mutants.listed import BESIDE_TORCH, MUTANTS

ALL = MUTANTS + BESIDE_TORCH


@pytest.mark.parametrize("file", sorted({mutant.file for mutant in ALL}))
def test_every_fault_can_be_planted_and_names_a_test(file):
    for mutant in ALL:
        if mutant.file == file:
            mutant.planted((ROOT / file).read_text())
            where, _, name = mutant.test.partition("::")
            assert not name or f"def {name.partition('[')[0].rpartition('::')[2]}(" in (ROOT / where).read_text(), mutant


def test_no_fault_is_listed_twice():
    assert len({mutant[:3] for mutant in ALL}) == len(ALL)


@pytest.fixture
def tree(tmp_path):
    """A checkout with one function and its tests."""
    tests = "".join(f"\n\ndef test_{name}():\n    assert twice({x}) == {wanted}\n"
                    for name, x, wanted in (("of_two", 2, 4), ("of_three", 3, 6), ("wrong", 1, 3)))
    files = {"lowbit_video/__init__.py": "", "lowbit_video/twice.py": "def twice(x):\n    return x + x\n",
             "test_twice.py": "from lowbit_video.twice import twice\n" + tests}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def planted(tree, capsys, *pairs, test="test_of_two", arguments=("--jobs", "1")):
    status = plant.main(arguments, faults("lowbit_video/twice.py", f"test_twice.py::{test}", *pairs), tree)
    assert (tree / "lowbit_video" / "twice.py").read_text().endswith("return x + x\n")  # the tree itself is never touched
    return status, capsys.readouterr().out


def test_what_a_test_notices_is_told_from_what_it_does_not(tree, capsys):
    status, said = planted(tree, capsys, ("x + x", "x + 1"), ("x + x", "x * x"), ("x - x", "x"), ("x + x", "x", "not planted"))
    assert status == 1 and "1 of 3 planted faults were noticed" in said
    assert "'x + x' -> 'x * x'\n  by test_twice.py::test_of_two: survived" in said and "found 0 times" in said
    assert planted(tree, capsys, ("x + x", "x * x"), test="test_of_three")[0] == 0


def test_a_crash_is_noticed_and_an_end_by_other_means_is_not(tree, capsys):
    status, said = planted(tree, capsys, ("x + x", "__import__('os').abort()"), ("x + x", "__import__('os').kill("
                           "__import__('os').getpid(), 9)"), ("x + x", "__import__('os')._exit(3)"))
    assert status == 1 and "1 of 3 planted faults were noticed" in said
    assert "could not run (pytest returned -9)" in said and "could not run (pytest returned 3)" in said


@pytest.mark.parametrize("test", ["test_wrong", "test_gone"])
def test_a_test_that_fails_without_a_fault_proves_nothing(tree, capsys, test):
    status, said = planted(tree, capsys, ("x + x", "x"), test=test)
    assert status == 1 and "do not pass without any fault" in said


@pytest.mark.parametrize("old, new, word", [("y", "z", "found 0"), ("x", "y", "found 2"), ("x +", "x +", "nothing")])
def test_a_fault_that_is_none_is_refused(old, new, word):
    with pytest.raises(ValueError, match=word):
        Mutant("f", old, new, "t").planted("x + x")


def test_every_fault_has_its_day():
    listed = [Mutant("f", str(number), "", "t") for number in range(23)]
    for parts, given in ((10, ()), (7, (7,))):
        days = [plant.chosen(listed, "", True, day, *given) for day in range(100, 100 + parts)]
        assert sorted(one for day in days for one in day) == sorted(listed)
        assert max(map(len, days)) - min(map(len, days)) <= 1
    assert plant.chosen(listed, "f: '2'", False, 0) == [listed[2]]


def test_a_name_that_nothing_has_is_an_error(tree, capsys):
    with pytest.raises(SystemExit):
        planted(tree, capsys, ("x + x", "x"), arguments=("--match", "kernels"))


@pytest.mark.parametrize("arguments, listed", [((), MUTANTS), (("--beside-torch",), BESIDE_TORCH)], ids=["without", "torch"])
def test_faults_are_of_the_environment_that_is_asked_for(capsys, arguments, listed):
    with pytest.raises(SystemExit):
        plant.main([*arguments, "--match", "nothing has this"])
    assert f"there are {len(listed)}" in capsys.readouterr().err
    assert not {mutant[:3] for mutant in MUTANTS} & {mutant[:3] for mutant in BESIDE_TORCH}
