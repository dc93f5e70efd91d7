"""Compiles what `cases` lists and writes it beside this file: `make shipped`, with the one Triton that all figures are of."""
from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
from triton.backends.nvidia.compiler import get_ptxas_version
from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

from .cases import Sample, samples
from .choice import ARCH
from .kinds import ALIGNMENT, Described
from .offline import offline
from .source import digest
from .store import IMAGES, MANIFEST, image_name

COMPILER = "3.6.0"
"""The Triton that builds."""
OPTIONS = {"enable_fp_fusion": True, "ptx_options": "-suppress-debug-info"}
"""Beside each launch's own. Debug information would name files of the machine that built, and be most of the size; the code is
the same without it."""
TYPES = {"int8": "i8", "uint8": "u8", "int32": "i32", "int64": "i64", "float16": "fp16", "bfloat16": "bf16", "float32": "fp32",
         "float8_e4m3fn": "fp8e4nv"}
"""Triton's names of what pointers point at."""


def compiled(sample: Sample) -> Any:
    """What Triton makes of one launch."""
    with offline(ARCH):
        return sample.kernel.run(*sample.arguments, grid=sample.grid, warmup=True, **OPTIONS, **sample.constants)


def _type_of(kind: str) -> str:
    """How Triton's signature begins for a kind of argument."""
    if kind.startswith("tma "):
        dtype, _, block = kind[4:kind.index("]") + 1].partition("[")
        return f"tensordesc<{TYPES[dtype]}[{block}"
    if kind.startswith("*"):
        return f"*{TYPES[kind[1:].partition('/')[0]]}"
    return {"f32": "fp32", "none": "constexpr", "=1": "constexpr"}.get(kind, kind.partition("/")[0])


def check(described: Described, kernel: Any) -> None:
    """Raises AssertionError where Triton saw other arguments than `kinds` says, or made what `launch` cannot launch."""
    constant = {one.partition("=")[0] for one in described.constants}
    names = [name for name in kernel.src.signature if name not in constant]
    assert len(names) == len(described.kinds), (names, described)
    places = {name: place for place, name in enumerate(kernel.src.signature)}
    for name, kind in zip(names, described.kinds):
        seen = kernel.src.signature[name]
        assert seen.startswith(_type_of(kind)) and (seen == _type_of(kind) or kind.startswith("tma")), (name, kind, seen)
        even = ["tt.divisibility", ALIGNMENT] in kernel.src.attrs.get((places[name],), [])
        assert even == kind.endswith(f"/{ALIGNMENT}"), (name, kind, kernel.src.attrs)
    known = dict(global_scratch_size=0, profile_scratch_size=0, num_ctas=1, launch_cooperative_grid=False, launch_pdl=False)
    assert {name: getattr(kernel.metadata, name) for name in known} == known, kernel.metadata


def resources(image: bytes) -> dict[str, int]:
    """Registers of a thread and its stack in bytes, where spills go, as the assembler left them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(image)
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", report))
    return dict(registers=int(found["REG"]), stack=int(found["STACK"]))


def build(number: int) -> tuple[dict[str, Any], bytes]:
    """What the manifest says of the kernel of `samples()` with that number, and its code."""
    sample = samples()[number]
    kernel = compiled(sample)
    check(sample.described, kernel)
    metadata, image = kernel.metadata, kernel.asm["cubin"]
    maps = [[one["swizzle"], one["elem_size"], TMA_DTYPE_DEVICE_TO_HOST[one["elem_type"]], one["block_size"]]
            for one in metadata.tensordesc_meta or ()]
    assert not any(one["fp4_padded"] for one in metadata.tensordesc_meta or ()), metadata
    entry = dict(kernel=sample.described.name, constants=sample.described.constants, kinds=sample.described.kinds,
                 function=metadata.name, image=image_name(image), warps=metadata.num_warps, shared=metadata.shared,
                 maps=maps, **resources(image))
    return entry, image


def manifest(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest of the builds: what compiled them, from which sources."""
    return dict(compiler=f"triton {triton.__version__}", ptxas=re.search(r"V([\d.]+)", get_ptxas_version(90))[1],
                arch=f"sm_{ARCH[0]}{ARCH[1]}a", options=OPTIONS,
                sources={name: digest(name) for name in sorted({entry["kernel"] for entry in entries})}, builds=entries)


def write(entries: list[dict[str, Any]], images: list[bytes]) -> None:
    """Writes the manifest, a build a line, and the code, each file compressed by itself and nothing of the day in it."""
    told = manifest(entries)
    lines = ",\n".join(json.dumps(entry) for entry in told.pop("builds"))
    MANIFEST.write_text(f'{json.dumps(told, indent=1)[:-2]},\n "builds": [\n{lines}\n]}}\n')
    with zipfile.ZipFile(IMAGES, "w", zipfile.ZIP_LZMA) as archive:
        for name, image in sorted({image_name(image): image for image in images}.items()):
            archive.writestr(zipfile.ZipInfo(name), image, zipfile.ZIP_LZMA)


def main() -> None:
    """`python -m lowbit_video.kernels.shipped.build`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    args = parser.parse_args()
    if triton.__version__ != COMPILER:
        sys.exit(f"Triton {COMPILER} builds what is shipped, not {triton.__version__}; pip install triton=={COMPILER}")
    with ProcessPoolExecutor(args.jobs) as pool:
        done = list(pool.map(build, range(len(samples()))))
    write([entry for entry, _ in done], [image for _, image in done])
    size = sum(len(image) for _, image in done)
    print(f"{len(done)} kernels, {size / 2**20:.1f} MiB, compressed {IMAGES.stat().st_size / 2**20:.1f} MiB, "
          f"manifest {MANIFEST.stat().st_size / 2**10:.0f} KiB")


if __name__ == "__main__":
    main()
