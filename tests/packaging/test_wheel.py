"""The wheel holds the package, all of it but the experiments and nothing else."""
import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(names in the wheel, what building it said)."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True,
                           check=True)
    for name in files.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith(("tests/", "examples/")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    build = subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(copy)],
                           check=True, capture_output=True, text=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return set(wheel.namelist()), build.stdout + build.stderr


@pytest.fixture(scope="module")
def names(built):
    return built[0]


def test_setuptools_warns_of_no_package(built):
    warnings = [line for line in built[1].splitlines() if "warning" in line.lower() and "byte-compiling" not in line]
    assert not warnings and "would be ignored" not in built[1] and "Deprecat" not in built[1]


def test_every_module_is_in(names):
    for folder, package in (("lowbit_video", "lowbit_video"), ("kernels", "lowbit_video/kernels"),
                            ("pipelines", "lowbit_video/pipelines"), ("eval", "lowbit_video/eval")):
        for path in (ROOT / folder).rglob("*.py"):
            name = f"{package}/{path.relative_to(ROOT / folder)}"
            assert (name in names) == ("experiments" not in path.parts), name


def test_what_the_report_is_made_from_is_in(names):
    assets = {path.name for path in (ROOT / "eval" / "report" / "assets").iterdir()}
    assert {"page.html", "page.css", "page.js"} <= assets
    assert assets == {name.rpartition("/")[2] for name in names if name.startswith("lowbit_video/eval/report/assets/")}


def test_the_figures_of_the_model_of_cost_are_in(names):
    assert "lowbit_video/distributed/cost/measured.json" in names


def test_the_recipes_that_need_no_calibration_are_in(names):
    assert {f"lowbit_video/hook/recipe/{name}.toml" for name in ("safe", "fast")} <= names


def test_the_kernels_that_are_shipped_compiled_are_in(names):
    assert {"lowbit_video/kernels/shipped/manifest.json", "lowbit_video/kernels/shipped/images.zip"} <= names


def test_nothing_else_is_in(names):
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"lowbit_video"}
    assert not [name for name in names if "tests" in name or name.endswith((".npz", ".mp4", ".safetensors"))]


def test_the_command_is_declared(names):
    assert any(name.endswith("entry_points.txt") for name in names)
