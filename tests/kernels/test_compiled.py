"""What Triton compiled is repeated as Triton's own launcher launched it, byte for byte, under the Triton at hand."""
import os
import types
from collections import Counter
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="it is Triton's launches that are repeated")

from lowbit_video.kernels import compiled  # noqa: E402
from lowbit_video.kernels.buffers import Buffer  # noqa: E402
from lowbit_video.kernels.launch import Launch  # noqa: E402
from lowbit_video.kernels.parameters import POINTER, Argument, TensorMap  # noqa: E402

SCRIPT = Path(__file__).with_name("launched_again.py")
TMA = 2 * 128
"""Digits of a tensor map."""


def check(told, kernels, descriptors):
    """kernels: how many launches of each there are at least. descriptors: whether attention reads through TMA."""
    assert told["triton"] == triton.__version__
    found = Counter(line.split()[0] for one in told["cases"] for line in one["theirs"])
    assert all(found[name] >= count for name, count in kernels.items()), found
    maps = 0
    for one in told["cases"]:
        case = f"{one['case']} {one['begin']}"
        assert one["theirs"] and all(" on device 1 stream 0x5555 grid " in line for line in one["theirs"]), case
        assert one["again"][0] == one["theirs"], case
        assert one["again"][1] == one["again"][2] == one["there"], f"{case}, further on"
        assert all(a != b for a, b in zip(one["theirs"], one["there"])), case
        assert one["alive"] == [True] * len(one["theirs"]), f"{case}: what launches again does not keep its kernel loaded"
        maps += any(len(word) == TMA for line in one["theirs"] for word in line.split(" |"))
    assert maps == descriptors, "cases with tensor maps"


EVERY = os.environ.get("LOWBIT_TEST_LAUNCHES") == "all"
"""As `make triton-matrix` asks; else some."""
EXCHANGE = {"copy_parts_kernel": 2, "merge_kernel": 2, "dequant_rows_kernel": 1, "combine_stats_kernel": 1}
SMALL = {"quant_qk_kernel": 6, "quant_v_kernel": 2, "token_stats_kernel": 2, "fold_stats_kernel": 2}
NO_FP8 = {"quant_qk_kernel": 5, "token_stats_kernel": 2, "fold_stats_kernel": 2}


ATTENTION = {"90": 9, "89": 7, "80": 5} if EVERY else {"90": 2}
"""Launches of the portable attention kernel and Hopper's, by arch."""


@pytest.mark.parametrize("arch", ATTENTION)
def test_every_launch_is_repeated_as_tritons_launcher_made_it(over_fake_cuda, arch):
    told = over_fake_cuda(SCRIPT, "all" if EVERY else "some", FAKE_CUDA_ARCH=arch)
    check(told, {"attn_fwd_kernel": ATTENTION[arch], **EXCHANGE, **({} if not EVERY else SMALL if arch > "80" else NO_FP8)},
          descriptors=0 if arch < "90" else 8 if EVERY else 2)


PLAIN = dict(num_ctas=1, global_scratch_size=0, profile_scratch_size=0, launch_cooperative_grid=False, launch_pdl=False,
             instrumentation_mode="", tensordesc_meta=None)
X = Buffer(1 << 30, "float16")


def kernel(signature, shared=100, **more):
    """What Triton would have compiled."""
    return types.SimpleNamespace(name="some_kernel", function=77, packed_metadata=(8, 1, shared),
                                 src=types.SimpleNamespace(signature=signature), metadata=types.SimpleNamespace(**PLAIN | more))


def test_what_the_driver_is_told_of_a_launch():
    one = kernel({"x": "*fp16", "n": "i32", "one": "constexpr", "far": "i64", "scale": "fp32"})
    found = compiled.driver_launch(one, (3, 2), (X, 5, 1, 2**40, 0.5))
    assert (found.name, found.function, found.grid, found.warps, found.shared) == ("some_kernel", 77, (3, 2, 1), 8, 100)
    assert found.arguments == (Argument(POINTER, X), Argument("i32", 5), Argument("i64", 2**40), Argument("f32", 0.5))
    assert found.owner is one


@pytest.mark.parametrize("version, mended", [("3.6.0", False), ("3.7.1", True), ("3.8.0", True), ("3.9.0", True)])
def test_maps_of_small_tensors_are_mended_where_triton_does(monkeypatch, version, mended):
    monkeypatch.setattr(triton, "__version__", version)
    maps = [dict(swizzle=swizzle, elem_size=2, elem_type=6, block_size=[1, 64], fp4_padded=False) for swizzle in (2, 3)]
    one = kernel({"x": "tensordesc<fp16[1, 64]>", "y": "tensordesc<fp16[1, 64]>"}, tensordesc_meta=maps)
    found = compiled.driver_launch(one, (1,), ("x", "y"))
    assert found.arguments == tuple(Argument(TensorMap(swizzle, 2, 6, [1, 64], mended), name)
                                    for swizzle, name in ((2, "x"), (3, "y")))


MAP = dict(swizzle=2, elem_size=1, elem_type=0, block_size=[64, 64], fp4_padded=False)


@pytest.mark.parametrize("signature, more, why", [
    ({}, dict(num_ctas=2), "num_ctas is 2"), ({}, dict(global_scratch_size=128), "global_scratch_size is 128"),
    ({}, dict(profile_scratch_size=64), "profile_scratch_size is 64"), ({}, dict(launch_pdl=True), "launch_pdl is True"),
    ({}, dict(launch_cooperative_grid=True), "launch_cooperative_grid is True"),
    ({}, dict(instrumentation_mode="gsan"), "instrumentation_mode is 'gsan'"),
    ({}, dict(shared=228 * 1024 + 1), "it takes 233473 bytes of shared memory"),
    ({"flag": "u1"}, {}, "flag is a u1"), ({"pair": ("i32", "i32")}, {}, "pair is a ('i32', 'i32')"),
    ({"x": "tensordesc<i8[64, 64]>"}, {}, "x is a tensordesc<i8[64, 64]>"),
    ({"x": "tensordesc<i8[64, 64]>"}, dict(tensordesc_meta=[MAP | {"fp4_padded": True}]), "x is a tensordesc"),
    ({"x": "tensordesc<i8[64, 64]>"}, dict(tensordesc_meta=[MAP | {"is_im2col": True}]), "x is a tensordesc")],
    ids=lambda value: value if isinstance(value, str) else "")
def test_what_needs_tritons_own_launcher_says_why(signature, more, why):
    launch = Launch(kernel(signature, **more), (1,), (X,) * len(signature))
    assert launch.replay(None, {}).startswith(f"some_kernel: {why}")


def test_a_triton_that_is_not_known_launches_itself(monkeypatch):
    for version in ("3.10.0", "3.60.0", "4.0.0", "2.3.6"):
        monkeypatch.setattr(triton, "__version__", version)
        assert Launch(kernel({}), (1,), ()).replay(None, {}) == f"some_kernel: the launcher of Triton {version} is not known"


def test_what_the_interpreter_ran_is_not_repeated():
    assert Launch(None, (1,), ()).replay(None, {}) == "Triton's interpreter ran it"


def test_memory_of_no_tensor_is_not_repeated():
    launch = Launch(kernel({"x": "*fp16"}), (1,), (X,))
    assert launch.replay(None, {}) == "some_kernel: it reads or writes memory that is none of the call's tensors"
