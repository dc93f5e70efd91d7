"""Who may import whom, and what `import lowbit_video` may cost."""
import ast
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FOLDERS = {"kernels": "lowbit_video.kernels", "pipelines": "lowbit_video.pipelines", "eval": "lowbit_video.eval",
           "lowbit_video": "lowbit_video", "examples": "examples"}
ORDER = ["kernels", "lowbit_video", "pipelines", "eval", "lowbit_video/app", "examples"]
"""Each layer may import itself and those before it."""
FRAMEWORKS = {"paddle", "torch", "triton", "diffusers", "transformers"}


def layer_of(module: str) -> str | None:
    rooms = {"kernels": "lowbit_video.kernels", "pipelines": "lowbit_video.pipelines", "eval": "lowbit_video.eval",
             "lowbit_video/app": "lowbit_video.app"}
    for layer, room in rooms.items():
        if module == room or module.startswith(room + "."):
            return layer
    top = module.split(".")[0]
    return top if top in ("lowbit_video", "examples") else None


def sources():
    for folder in FOLDERS:
        yield from sorted((ROOT / folder).rglob("*.py"))


def imported(path: pathlib.Path):
    """(module, line, whether at module level) of each import, relative ones resolved."""
    tree = ast.parse(path.read_text())
    parts = path.relative_to(ROOT).with_suffix("").parts
    package = (FOLDERS[parts[0]].split(".") + list(parts[1:]))[: -1]
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            names = [module] + [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield name, node.lineno, id(node) in top


@pytest.mark.parametrize("path", list(sources()), ids=lambda p: str(p.relative_to(ROOT)))
def test_layers_import_downwards_only(path):
    relative = str(path.relative_to(ROOT))
    own = next(ORDER.index(layer) for layer in reversed(ORDER) if relative.startswith(f"{layer}/"))
    for module, line, _ in imported(path):
        layer = layer_of(module)
        assert layer is None or ORDER.index(layer) <= own, f"{relative}:{line} imports {module}, which lies above it"


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_know_no_framework(path):
    for module, line, _ in imported(path):
        assert module.split(".")[0] not in FRAMEWORKS - {"triton"}, f"{path.name}:{line} imports {module}"


ROOMS = [{"arguments"}, {"errors", "files", "pooled", "precision", "token_order"}, {"rung", "runtime"}, {"engine"}, {"graph"},
         {"api", "codes", "hook", "quantized"}, {"distributed"}, {"compat", "cuda_graphs", "warming"}, {"app"}]
"""Rooms and files of lowbit_video; each may import itself, and what stands in a set before its own."""


@pytest.mark.parametrize("path", sorted((ROOT / "lowbit_video").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_rooms_of_the_package_import_downwards_only(path):
    room = path.relative_to(ROOT / "lowbit_video").with_suffix("").parts[0]
    if room == "__init__":
        return
    rank = {name: number for number, names in enumerate(ROOMS) for name in names}
    for module, line, _ in imported(path):
        parts = module.split(".")
        if parts[0] == "lowbit_video" and len(parts) > 1 and parts[1] in rank:
            assert parts[1] == room or rank[parts[1]] < rank[room], f"{path.name}:{line} imports {module}"


def module_of(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    names = FOLDERS[parts[0]].split(".") + list(parts[1:])
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def test_no_module_imports_itself_by_way_of_others():
    """Imports inside functions and those for type checkers count; a package's __init__ is what `from package import name` reads
    unless that name is a module."""
    files = {module_of(path): path for path in sources()}
    graph = {}
    for module, path in files.items():
        named = {name for name, *_ in imported(path)}
        finer = {name.rpartition(".")[0] for name in named if name in files}
        graph[module] = {name for name in named if name in files and name != module} - (finer - files_with_names(path, files))

    seen, circles = set(), []

    def walk(module, above):
        if module in above:
            circles.append(" -> ".join([*above[above.index(module):], module]))
        elif module not in seen:
            for other in sorted(graph[module]):
                walk(other, [*above, module])
            seen.add(module)

    for module in graph:
        walk(module, [])
    assert not circles, circles


def files_with_names(path: pathlib.Path, files: dict) -> set[str]:
    """Packages of whose own names a file imports one: `from package import name` where the name is no module."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    package = (FOLDERS[parts[0]].split(".") + list(parts[1:]))[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            if any(f"{module}.{alias.name}" not in files for alias in node.names):
                found.add(module)
    return found


def test_no_name_of_a_package_hides_its_module():
    """A function of a module's name, shown by the package, would make the module unreachable as an attribute."""
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("__init__.py")):
        modules = {p.stem for p in path.parent.glob("*.py")} | {p.parent.name for p in path.parent.glob("*/__init__.py")}
        shown = {alias.asname or alias.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)
                 for alias in node.names if not (node.module is None and node.level)}
        assert not modules & shown, f"{path.relative_to(ROOT)} hides {modules & shown}"


def test_functions_are_short():
    """Kernels are one function by nature, and the training's loops are told apart elsewhere."""
    for path in sources():
        if path.relative_to(ROOT).parts[:1] == ("kernels",) or "small_cogvideox" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= 100, f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {lines} lines"


def test_no_file_shadows_triton():
    assert not [p for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.stem in ("triton", "paddle", "torch")]


def test_importing_the_package_imports_no_framework():
    code = "import sys, json, lowbit_video; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    loaded = set(json.loads(done.stdout))
    assert not loaded & (FRAMEWORKS | {"matplotlib", "imageio", "skimage", "safetensors", "sentencepiece"})


def test_the_folder_kernels_is_not_a_package_of_its_own():
    done = subprocess.run([sys.executable, "-c", "from kernels import formats"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode and "lowbit_video.kernels" in done.stderr
