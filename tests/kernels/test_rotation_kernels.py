"""The rotating quantisers: they compile for every arch and fit it, and give the oracle's codes in Triton's interpreter."""
from __future__ import annotations

from pathlib import Path

import pytest

from interpreted_run import pass_in_the_interpreter

triton = pytest.importorskip("triton")


def test_rotation_in_the_interpreter():
    pass_in_the_interpreter(Path(__file__).with_name("interpreted_rotation.py"))


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing compiles")
@pytest.mark.parametrize("arch, shared_kib, head_dim, format", [
    ((9, 0), 227, 128, "int8"), ((9, 0), 227, 64, "int4"), ((8, 6), 99, 128, "int8")])
def test_it_compiles_fits_and_multiplies_on_tensor_cores(arch, shared_kib, head_dim, format):
    from lowbit_video.kernels.operands import codes_of
    from lowbit_video.kernels.quant.channel_tops import launch_channel_tops
    from lowbit_video.kernels.quant.quant_rotated import Tops, launch_quant_rotated

    from offline import buffer, compiling, operand, packed, resources

    x, float32 = operand((2, 4, 17776, head_dim), "bfloat16"), buffer("float32")
    block = 128 if format in ("int8", "fp8") else None
    with compiling(arch) as kernels:
        launch_channel_tops(float32, x, x, q_top=float32, k_top=float32, q_mean=float32, k_mean=float32, v=x, v_scale=float32,
                            packed=packed())
        launch_channel_tops(float32, x, x, q_top=float32, k_top=float32)
        launch_quant_rotated(x, codes_of(x, format, buffer("uint8"), float32, block), tops=Tops(float32, float32), of="k",
                             mean=float32, bias=float32, q_mean=float32, group=2)
    names = [kernel.metadata.name for kernel in kernels]
    assert names == ["channel_ranges_kernel", "fold_ranges_kernel"] * 2 + ["quant_rotated_kernel"]
    for name, used in zip(names, map(resources, kernels)):
        assert used["shared"] <= 1024 * shared_kib and used["stack"] <= (64 if arch < (9, 0) else 0), (name, used)
    assert ("wgmma.mma_async" if arch == (9, 0) else "mma.sync") in kernels[-1].asm["ptx"]
