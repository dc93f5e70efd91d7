"""What is shipped is what the sources say: every launch of today has its build, and building again gives the same bytes."""
import importlib.metadata

import pytest

from lowbit_video.kernels.shipped import cases, store
from lowbit_video.kernels.shipped.choice import ARCH

MOST_MIB = 12
SHARED_MAX = 227 * 1024
SPILLS = {(64, True): 96, (64, False): 160}
"""Bytes of stack that the Hopper kernel may have at head dim 64, by whether P.V is in FP8; eval/speed/NOTES.md says where."""
EXACT_SPILLS = {(64, False): 8, (128, False): 40}
"""The same where Q and K are in 16 bits too."""


def test_every_launch_has_its_build_and_no_build_is_left_over():
    wanted = [sample.described.key for sample in cases.samples()]
    assert len(set(wanted)) == len(wanted)
    shipped = [(one.kernel, one.constants, one.kinds) for one in store.builds()]
    assert shipped == wanted, "launchers and what is shipped part: make shipped"


def test_the_archive_is_the_manifests_and_names_no_file_of_the_machine_that_built():
    for build in store.builds():
        image = store.image(build)
        assert image.startswith(b"\x7fELF") and build.function.encode() in image
        assert b".py" not in image and b"/home" not in image, build
    assert store.IMAGES.stat().st_size < MOST_MIB * 2**20


def test_the_manifest_says_what_compiled_and_what_came_of_it():
    told = store.manifest()
    assert told["compiler"] == "triton 3.6.0" and told["arch"] == f"sm_{ARCH[0]}{ARCH[1]}a" and told["ptxas"].startswith("12.8")
    assert told["options"]["enable_fp_fusion"] is True
    for build in store.builds():
        assert 16 <= build.registers <= 255 and build.shared <= SHARED_MAX and build.warps in (4, 8, 12, 16), build
        if build.kernel.startswith("attention.hopper"):
            head_dim = 64 if "head_dim=64" in build.constants[0] else 128
            spills = EXACT_SPILLS if build.kinds[0].startswith(("tma float16", "tma bfloat16")) else SPILLS
            assert build.stack <= spills.get((head_dim, "float8" in build.kinds[2]), 0), build


def test_an_archive_of_another_build_is_refused(monkeypatch):
    build = store.builds()[-1]
    monkeypatch.setattr(store, "image_name", lambda data: "other.cubin")
    with pytest.raises(RuntimeError, match="install again"):
        store.image(build)


@pytest.mark.parametrize("kernel", ["quant.quant_v:quant_v_kernel", "exchange.merge:merge_kernel"])
def test_building_again_gives_the_same_bytes(kernel, builder, tmp_path, monkeypatch):
    from lowbit_video.kernels.shipped import build as building

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    number = next(n for n, one in enumerate(cases.samples()) if one.described.name == kernel)
    entry, image = building.build(number)
    shipped = store.builds()[number]
    assert image == store.image(shipped)
    assert store.Build(**{**entry, "maps": tuple(store.TensorMap(*one) for one in entry["maps"])}) == shipped
    assert importlib.metadata.version("triton") == building.COMPILER
    assert any(tmp_path.rglob("*.cubin")), "nothing was compiled"


def test_the_build_asks_triton_for_its_word(builder):
    """A kind that Triton would see otherwise fails the build."""
    from lowbit_video.kernels.shipped import build as building

    sample = next(one for one in cases.samples() if one.described.name == "exchange.combine_stats:combine_stats_kernel")
    kernel = building.compiled(sample)
    building.check(sample.described, kernel)
    for place, kind in ((0, "*float32"), (0, "*float16/16"), (3, "i64"), (3, "i32/16"), (3, "=1")):
        kinds = list(sample.described.kinds)
        kinds[place] = kind
        with pytest.raises(AssertionError):
            building.check(sample.described._replace(kinds=tuple(kinds)), kernel)
