"""Cycles that a scheduler spends on one warp instruction of the softmax, and on its whole mix: the bound that no overlap beats.

    python -m lowbit_video.eval.speed.experiments.rates_hopper

Needs CuPy and a GPU. One block on every multiprocessor; 1, 2 and 3 warps on each of its four schedulers.
"""
from __future__ import annotations

OPERATIONS = {  # name -> PTX on x[i], y[i] (float), s[i], u[i] (int); instructions in it
    "ex2": ('asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(x[i]));', 1),
    "int to float": ('asm volatile("cvt.rn.f32.s32 %0, %1;" : "=f"(x[i]) : "r"(s[i]));', 1),
    "fma": ('asm volatile("fma.rn.f32 %0, %0, %1, %1;" : "+f"(x[i]) : "f"(y[i]));', 1),
    "max of 3 ints": ('asm volatile("{.reg .s32 t; max.s32 t, %0, %1; max.s32 %0, t, %2;}" : "+r"(u[i]) : "r"(s[i]), '
                      '"r"(s[(i + 1) % 16]));', 1),
    "4 floats to e4m3": ('asm volatile("{.reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f32 a, %1, %2; cvt.rn.satfinite.e4m3x2.f32 b, '
                         '%3, %4; mov.b32 %0, {a, b};}" : "=r"(u[i]) : "f"(x[i]), "f"(x[(i + 1) % 16]), "f"(x[(i + 2) % 16]), '
                         '"f"(x[(i + 3) % 16]));', 2),
    "2 floats to f16": ('asm volatile("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(u[i]) : "f"(x[i]), "f"(x[(i + 1) % 16]));', 1),
}
MIX = """
asm volatile("cvt.rn.f32.s32 %0, %1;" : "=f"(x[i]) : "r"(s[i]));
asm volatile("fma.rn.f32 %0, %0, %1, %1;" : "+f"(x[i]) : "f"(y[0]));
asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(x[i]));
if (i % 2) asm volatile("{.reg .s32 t; max.s32 t, %0, %1; max.s32 %0, t, %2;}" : "+r"(m) : "r"(s[i]), "r"(s[i - 1]));
if (i % 4 == 3) asm volatile("{.reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f32 a, %1, %2; "
                             "cvt.rn.satfinite.e4m3x2.f32 b, %3, %4; mov.b32 %0, {a, b};}"
                             : "=r"(u[i]) : "f"(x[i]), "f"(x[i - 1]), "f"(x[i - 2]), "f"(x[i - 3]));
"""
"""Per element: conversion, fma, ex2; a maximum for every two and two e4m3 packs for every four."""
SOURCE = """
extern "C" __global__ void %s(long long* clocks, int turns, int* out, float f) {
  float x[16], y[16]; int s[16], u[16], m = 0;
  for (int i = 0; i < 16; i++) { x[i] = f * i; y[i] = f + i; s[i] = threadIdx.x + i * turns; u[i] = s[i] * 3; }
  __syncthreads(); long long begin = clock64();
  for (int t = 0; t < turns; t++) {
    #pragma unroll
    for (int i = 0; i < 16; i++) { %s }
    #pragma unroll
    for (int i = 0; i < 16; i++) s[i] += u[i] & 1;
  }
  __syncthreads(); long long end = clock64();
  for (int i = 0; i < 16; i++) m += u[i] + s[i] + __float_as_int(x[i]);
  out[blockIdx.x * blockDim.x + threadIdx.x] = m;
  if (threadIdx.x == 0) clocks[blockIdx.x] = end - begin;
}
"""
TURNS = 200


def main() -> None:
    import cupy as cp

    pieces = {f"k{i}": (name, text) for i, (name, (text, _)) in enumerate(OPERATIONS.items())}
    pieces["mix"] = ("mix, per element", MIX)
    code = "".join(SOURCE % (kernel, text) for kernel, (_, text) in pieces.items())
    module = cp.RawModule(code=code, options=("-arch=sm_90a",), backend="nvrtc")
    clocks, out = cp.zeros(132, dtype=cp.int64), cp.zeros(132 * 384, dtype=cp.int32)
    print("cycles of a scheduler for each warp's operation, with 1, 2, 3 warps on it")
    for kernel, (name, _) in pieces.items():
        function, rates = module.get_function(kernel), []
        for warps in (1, 2, 3):
            for _ in range(2):
                function((132,), (128 * warps,), (clocks, cp.int32(TURNS), out, cp.float32(0.001)))
            rates.append(float(clocks.get().mean()) / TURNS / 16 / warps)
        print(f"  {name:20s}", *(f"{rate:6.2f}" for rate in rates))


if __name__ == "__main__":
    main()
