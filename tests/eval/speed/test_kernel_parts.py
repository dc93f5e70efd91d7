"""Where the device's time goes by kernel: names, what launched them, shares, bars; profilers and their traces are doubles."""
import json
import re
from pathlib import Path

import pytest

from lowbit_video import kernels as own_kernels
from lowbit_video.eval.speed.step import kernel_parts, measure, paddle_side, part_table, run, table
from lowbit_video.eval.speed.step.kernel_parts import ATTENTION, COPIES, IDLE, OTHER, PRODUCTS, PROLOGUE

NAMES = {
    ATTENTION: ["attn_fwd_kernel", "pooled_part_kernel", "_attn_fwd",
                "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 128, 128, 4>, false>",
                "void pytorch_flash::flash_fwd_splitkv_kernel<pytorch_flash::Flash_fwd_kernel_traits<128, 64, 128, 4>>",
                "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>::Params)",
                "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0",
                "kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90_object_at__tensorptrbf16gmem_0"],
    PROLOGUE: ["prologue_stats_kernel", "prologue_apart_kernel", "quant_qk_kernel", "token_stats_kernel", "fold_stats_kernel",
               "q_kernel_per_block_int8", "k_kernel_per_block_int8", "quant_per_block_int8_kernel"],
    PRODUCTS: ["nvjet_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNT", "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64",
               "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_tn_align8>(T1::Params)",
               "ampere_bf16_s16816gemm_bf16_256x128_ldg8_f2f_stages_32x3_nn", "triton_tem_fused_addmm_view_3",
               "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>", "void gemv2T_kernel_val<int, int>",
               "void implicit_convolve_sgemm<float, float, 128, 5, 5>"],
    OTHER: ["void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>, std::array<char*>>",
            "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float, false>",
            "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl(at::TensorIteratorBase&)>",
            "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float, float>>>",
            "triton_red_fused_native_layer_norm_view_3", "triton_poi_fused__scaled_dot_product_flash_attention_clone_7",
            "triton_per_fused_lowbit_video_attention_quantise_2", "triton_poi_fused_cat_gelu_9"],
    COPIES: ["void at::native::(anonymous namespace)::CatArrayBatchedCopy_aligned16_contig<at::native::OpaqueType<2u>, 3, 64>",
             "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl<at::native::direct_copy_kernel_cuda>>",
             "void at::native::unrolled_elementwise_kernel<at::native::bfloat16tofloat32_copy_kernel_cuda(at::Tensor&)>",
             "void cudnn::engines_precompiled::nchwToNhwcKernel<__nv_bfloat16, float>"],
}
NORM, ADD, MEAN = NAMES[OTHER][1], NAMES[OTHER][0], NAMES[OTHER][3]
CAT, COPY = NAMES[COPIES][:2]
GEMM = NAMES[PRODUCTS][0]
FLASH = NAMES[ATTENTION][3]
SOFTMAX = "void (anonymous namespace)::softmax_warp_forward<float, at::native::..."


class Trace:
    """A step's events as a profiler tells them: the host launches one kernel an us, the device is 1000 us behind."""

    def __init__(self):
        self.events = [dict(ph="M", name="process_name", args=dict(name="python")),
                       dict(ph="X", cat="gpu_user_annotation", name=kernel_parts.RANGE, ts=0, dur=1e6, args={})]
        self.at = 0.0

    def launch(self, name, ms=1.0, category="kernel", by="cuda_runtime"):
        self.at += 1
        args = dict(correlation=len(self.events))
        if by:
            self.events.append(dict(ph="X", cat=by, name="cudaLaunchKernel", ts=self.at, dur=0.5, args=args))
        self.events.append(dict(ph="X", cat=category, name=name, ts=self.at + 1000, dur=ms * 1e3, args=args))
        return self

    def within(self, category, name, *launches):
        begin = self.at = self.at + 1
        for one in launches:
            one() if callable(one) else self.launch(*one if isinstance(one, tuple) else (one,))
        self.at += 1
        self.events.append(dict(ph="X", cat=category, name=name, ts=begin, dur=self.at - begin, args={}))
        return self

    def module(self, *launches):
        return self.within("user_annotation", kernel_parts.RANGE, *launches)

    def operator(self, name, *launches):
        return lambda: self.within("cpu_op", name, *launches)

    def found(self, step_ms=1000.0, eager=True):
        parts = kernel_parts.found(self.events, step_ms, eager)
        return {part: ms for part, ms in parts["parts_ms"].items() if ms and part != IDLE}, parts


@pytest.mark.parametrize("part", NAMES)
def test_a_kernels_name_tells_its_part(part):
    assert {name: kernel_parts.part_of(name) for name in NAMES[part]} == dict.fromkeys(NAMES[part], part)


def test_every_kernel_of_this_project_is_attention_or_before_it():
    """But those that several GPUs exchange with, of which no step here has any."""
    folder = Path(own_kernels.__file__).parent
    found = {name for file in folder.rglob("*.py") if "exchange" not in file.parts
             for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.M)}
    assert {"attn_fwd_kernel", "prologue_quant_kernel", "score_kernel", "quant_rotated_kernel"} <= found
    told = {name: kernel_parts.part_of(name) for name in found}
    assert {name for name, part in told.items() if part == ATTENTION} == {"attn_fwd_kernel", "pooled_part_kernel"}
    assert set(told.values()) == {ATTENTION, PROLOGUE}


def test_what_stands_between_the_projections_and_attention_is_the_prologue():
    trace = Trace().launch(NORM, 2.0).launch(ADD, 4.0)
    trace.module((CAT, 8.0), (GEMM, 16.0), (NORM, 32.0), (COPY, 64.0), (GEMM, 128.0), (CAT, 256.0),
                 trace.operator("aten::scaled_dot_product_attention", (FLASH, 512.0)), (COPY, 1024.0), (GEMM, 2048.0),
                 (ADD, 4096.0))
    trace.launch(ADD, 8192.0).launch(GEMM, 16384.0)
    parts, _ = trace.found()
    assert parts == {OTHER: 2.0 + 4 + 4096 + 8192, COPIES: 8.0 + 1024, PRODUCTS: 16.0 + 128 + 2048 + 16384,
                     PROLOGUE: 32.0 + 64 + 256, ATTENTION: 512.0}


def test_each_module_has_its_own_projections_and_attention():
    trace = Trace()
    trace.module(GEMM, NORM, FLASH, COPY)
    trace.launch(NORM, 5.0)
    trace.module((NORM, 7.0), GEMM, (ADD, 3.0), FLASH)
    assert trace.found()[0] == {PRODUCTS: 2.0, PROLOGUE: 1.0 + 3, ATTENTION: 2.0, COPIES: 1.0, OTHER: 5.0 + 7}
    trace, sdpa = Trace(), "aten::scaled_dot_product_attention"  # one that goes through its samples
    trace.module(GEMM, trace.operator(sdpa, FLASH, (COPY, 2.0)), (CAT, 4.0), trace.operator(sdpa, FLASH, (COPY, 8.0)))
    assert trace.found()[0] == {PRODUCTS: 1.0, ATTENTION: 2.0, COPIES: 2.0 + 8, PROLOGUE: 4.0}


def test_without_attention_its_operator_ends_the_prologue():
    trace = Trace()
    for _ in range(2):
        trace.module(GEMM, (NORM, 2.0), trace.operator("lowbit_video_bench::nothing", (COPY, 4.0)), (ADD, 8.0))
    assert trace.found()[0] == {PRODUCTS: 2.0, PROLOGUE: 4.0, COPIES: 8.0, OTHER: 16.0}


def test_an_operator_of_attention_tells_what_names_do_not():
    trace = Trace()
    trace.operator("lowbit_video_bench::sage", (MEAN, 2.0), (ADD, 4.0), ("q_kernel_per_block_int8", 8.0), ("_attn_fwd", 16.0),
                   (COPY, 32.0))()
    assert trace.found()[0] == {PROLOGUE: 2.0 + 4 + 8, ATTENTION: 16.0, COPIES: 32.0}
    trace = Trace()
    inner = trace.operator("aten::_scaled_dot_product_attention_math", (GEMM, 2.0), (SOFTMAX, 4.0), (GEMM, 8.0))
    trace.operator("aten::scaled_dot_product_attention", inner, ("unheard of", 16.0))()
    trace.launch("unheard of", 32.0).launch(GEMM, 64.0)
    assert trace.found()[0] == {ATTENTION: 2.0 + 4 + 8 + 16, OTHER: 32.0, PRODUCTS: 64.0}


def test_transfers_are_copies_and_a_launch_that_is_not_told_is_where_the_one_before_was():
    trace = Trace().launch("Memcpy HtoD (Pinned -> Device)", 2.0, "gpu_memcpy").launch("Memset (Device)", 4.0, "gpu_memset")
    trace.module(GEMM, lambda: trace.launch(NORM, 8.0, by=None), lambda: trace.launch("attn_fwd_kernel", by="cuda_driver"))
    trace.operator("lowbit_video_bench::flash_4", lambda: trace.launch("unheard of", 16.0, by="cuda_driver"))()
    assert trace.found()[0] == {COPIES: 6.0, PRODUCTS: 1.0, PROLOGUE: 8.0, ATTENTION: 1.0 + 16}


def test_compiled_norms_are_not_told_apart_but_where_they_are_fused_with_quantisation():
    def compiled(*names):
        trace = Trace()
        for name in names:
            trace.launch(name)
        return trace.found(10.0, eager=False)

    parts, more = compiled(GEMM, "triton_red_fused_native_layer_norm_1", FLASH)
    assert parts == {PRODUCTS: 1.0, OTHER: 1.0, ATTENTION: 1.0} and not more["prologue_whole"]
    _, more = compiled(GEMM, "triton_red_fused_native_layer_norm_1", "quant_qk_kernel", "attn_fwd_kernel")
    assert more["prologue_share"] == pytest.approx(0.1) and not more["prologue_whole"]
    for fused in ("prologue_quant_kernel", "prologue_apart_kernel"):
        assert compiled(GEMM, "prologue_stats_kernel", fused, "attn_fwd_kernel")[1]["prologue_whole"]
        assert not compiled(GEMM, fused, "attn_fwd_kernel", "attn_fwd_kernel")[1]["prologue_whole"]
    # below 4096 keys our processors' exact attention is another library's, behind our kernel for norms and positions
    assert compiled("prologue_apart_kernel", FLASH)[1]["prologue_whole"]
    assert not compiled("prologue_apart_kernel", FLASH, FLASH)[1]["prologue_whole"]
    assert compiled("prologue_quant_kernel", "pooled_part_kernel", "attn_fwd_kernel", "merge_kernel")[1]["prologue_whole"]


def test_what_is_left_of_the_step_is_idle():
    trace = Trace().launch(GEMM, 6.0).launch("quant_qk_kernel", 2.0)
    for step_ms, idle_ms, share in ((10.0, 2.0, 0.2), (7.9, 0.0, 0.25)):
        found = kernel_parts.found(trace.events, step_ms, True)
        assert found["parts_ms"][IDLE] == pytest.approx(idle_ms) and found["prologue_share"] == pytest.approx(share)
        assert list(found["parts_ms"]) == list(kernel_parts.PARTS)
    with pytest.raises(ValueError, match="no kernel"):
        kernel_parts.found(Trace().within("cpu_op", "aten::mm").events, 1.0, True)


class Traced(paddle_side.PaddleSide):
    """A side whose steps have kernels."""

    no_kernels = ""

    def __init__(self):
        super().__init__()
        self.asked = []

    def trace(self, step, modules):
        step()
        self.asked.append(len(modules))
        return Trace().launch(GEMM, 3e-6).launch("prologue_quant_kernel", 1e-6).events


def measured(side, methods=("exact", "none"), **more):
    saved = []
    result = measure.measure(side, "cogvideox-2b", list(methods), ["eager"], True, 1.0, lambda text: None,
                             lambda result: saved.append(sum("parts_ms" in row for row in result["rows"])), **more)
    return result, saved


def test_each_method_that_is_timed_has_its_parts():
    side = Traced()
    result, saved = measured(side)
    assert not result["failed"] and side.asked == [2, 2] and saved[-4:] == [1, 2, 2, 2]
    for row in result["rows"]:
        assert row["parts_ms"][IDLE] == pytest.approx(row["median_ms"]) and row["prologue_whole"]
        assert row["parts_ms"][PRODUCTS] == pytest.approx(3e-6) and 0 < row["prologue_share"] < 1e-4
    result, _ = measured(paddle_side.PaddleSide())  # a CPU has none
    assert not any("parts_ms" in row for row in result["rows"]) and not result["left_out"]


def test_slow_steps_are_run_once_more_only_where_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(measure, "PARTS_MS", 0.0)
    side = Traced()
    result, _ = measured(side)
    assert side.asked == [] and result["left_out"] == {"parts by kernel": "of steps of more than 0 s with --parts only"}
    result, _ = measured(side, all_parts=True)
    assert side.asked == [2, 2] and not result["left_out"]


def test_an_earlier_calls_rows_have_their_parts_told_and_first_run():
    side, runs = Traced(), []
    known, _ = measured(paddle_side.PaddleSide(), ["exact"])
    own = side.step
    side.step = lambda model, given, way: lambda: runs.append(way.name) or own(model, given, way)()
    result, _ = measured(side, ["exact"], known=known)
    assert result["rows"][0]["median_ms"] == known["rows"][0]["median_ms"] and "parts_ms" in result["rows"][0]
    assert runs == ["exact"] * 3  # the first prediction, once before, once with a profiler
    runs.clear()
    measured(side, ["exact"], known=result)
    assert runs == ["exact"] and side.asked == [2]


def test_parts_that_cannot_be_told_are_told_of_and_the_times_stay(monkeypatch):
    side = Traced()
    side.trace = lambda step, modules: []
    result, _ = measured(side, ["exact"])
    assert result["failed"] == {"exact, parts by kernel, eager": "ValueError: the profiler told of no kernel"}
    assert result["rows"][0]["median_ms"] > 0 and "parts_ms" not in result["rows"][0]
    left = iter([9.0] * 3)  # of 3 turns; none of a profiled step
    result, _ = measured(Traced(), ["exact"], left_s=lambda: next(left, 0.0))
    assert "TimeoutError" in result["failed"]["exact, parts by kernel, eager"] and result["rows"][0]["runs"] == 3


def test_a_framework_that_does_not_tell_says_so_on_a_gpu(monkeypatch):
    side = paddle_side.PaddleSide()
    side.device = "gpu:0"
    monkeypatch.setattr(side, "make", lambda entry, tiny: 1 / 0)
    assert "--profile" in measured(side)[0]["left_out"]["parts by kernel"]


def rows_of(mode="eager", **parts):
    made = []
    titles = {"fa4": "FlashAttention-4", "int8+fp8": "int8+fp8", "none": "no attention"}
    for (method, title), ms in zip(titles.items(), (100.0, 80.0, 40.0)):
        own = {part: 0.0 for part in kernel_parts.PARTS} | {PRODUCTS: 30.0, PROLOGUE: ms / 20, IDLE: ms - 30 - ms / 20}
        made.append(dict(method=method, title=title, mode=mode, median_ms=ms, speedup_over_exact=1.0, attention_share=0.5,
                         sqnr_db=40.0, peak_gib=1.0, parts_ms=own, prologue_share=0.05, prologue_whole=True, **parts))
    return made


def result_of(rows):
    return dict(model="m", video_tokens=7, batch=2, dtype="bfloat16", rows=rows, left_out={}, failed={})


ABOUT = dict(gpu="G", versions={}, commit="c")


def test_the_table_has_the_prologues_share_and_all_parts():
    rows = rows_of()
    rows[0].update(prologue_whole=False)
    rows[2].update(prologue_whole=False, prologue_share=0.0)
    page = table.markdown(ABOUT, [result_of(rows)])
    assert "| attention | eager | attention | prologue | peak GiB | SQNR dB |\n| --- | --- | --- | --- | --- | --- |\n" in page
    assert "| FlashAttention-4 | 100.0 (1.00x) | 50% | >= 5% | 1.0 | 40.0 |" in page
    assert "| int8+fp8 | 80.0 (1.00x) | 50% | 5% | 1.0 | 40.0 |" in page
    assert "| no attention | 40.0 |  |  | 1.0 |  |" in page and " Prologue: " in page
    assert "| int8+fp8 | eager | 0.0 | 4.0 | 30.0 | 0.0 | 0.0 | 46.0 | 80.0 |" in page
    assert "# Where the device's time goes" in page and "## m\n" in page
    del rows[1]["parts_ms"], rows[1]["prologue_share"], rows[1]["prologue_whole"]
    assert "| int8+fp8 | 80.0 (1.00x) | 50% |  | 1.0 | 40.0 |" in table.markdown(ABOUT, [result_of(rows)])
    assert part_table.share({}) == ""


@pytest.mark.parametrize("name", ["step_fused", "step_large", "step_apart_kernel", "step_paddle", "step_paddle_compiled"])
def test_older_results_read_as_they_did(name):
    file = Path(run.__file__).parents[1] / f"results/{name}.json"
    written = json.loads(file.read_text())
    assert table.markdown(written["about"], written["models"]) == file.with_suffix(".md").read_text()


def test_bars_are_stacked_where_parts_were_told(monkeypatch, tmp_path):
    axes = pytest.importorskip("matplotlib.axes", reason="matplotlib is not installed")
    figures = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed")
    bars, legends = [], []
    monkeypatch.setattr(axes.Axes, "barh", lambda self, names, widths, left=0, **how: bars.append(
        (names, list(widths), left, how["color"])))
    monkeypatch.setattr(figures.Figure, "legend", lambda self, handles, labels, **how: legends.append(labels))
    both = [*rows_of("eager"), *rows_of("blocks")]
    table.plot(ABOUT, [result_of(both)], tmp_path / "step.png")
    names = ["FlashAttention-4", "int8+fp8", "no attention"]
    assert [one[0] for one in bars] == [names] * 6 and [one[3] for one in bars] == list(table.COLOURS.values())
    widths = dict(zip(kernel_parts.PARTS, (one[1] for one in bars)))
    assert widths[PRODUCTS] == [30.0] * 3 and widths[PROLOGUE] == [5.0, 4.0, 2.0] and widths[IDLE] == [65.0, 46.0, 8.0]
    lefts = dict(zip(kernel_parts.PARTS, (one[2] for one in bars)))
    assert lefts[PRODUCTS] == [5.0, 4.0, 2.0] and lefts[IDLE] == [35.0, 34.0, 32.0] and lefts[ATTENTION] == [0.0] * 3
    assert legends == [list(kernel_parts.PARTS)]
    bars.clear()
    rows = rows_of()
    del rows[1]["parts_ms"]
    table.plot(ABOUT, [result_of(rows), result_of([])], tmp_path / "step.png")
    assert bars[2][1] == [30.0, 0.0, 30.0] and bars[6][1] == [0.0, 80.0, 0.0] and bars[6][3] == "white"
    assert legends[1] == [*kernel_parts.PARTS, *table.TWO_COLOURS]
