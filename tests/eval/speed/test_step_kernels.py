"""Parts by kernel of PyTorch's steps: true traces of small models on a CPU, whose operators stand for kernels of a GPU."""
import json
from collections import Counter

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")
pytest.importorskip("diffusers", reason="needs diffusers")

from lowbit_video.app.cli import main  # noqa: E402
from lowbit_video.eval.speed.step import kernel_parts, measure, torch_side  # noqa: E402
from lowbit_video.eval.speed.step.kernel_parts import ATTENTION, COPIES, OTHER, PRODUCTS, PROLOGUE  # noqa: E402
from lowbit_video.hook.report import attention_modules  # noqa: E402

pytestmark = pytest.mark.parity

VIEWS = ("view", "empty", "as_strided", "slice", "unsqueeze", "transpose", "resolve_conj", "narrow", "t", "expand", "select",
         "empty_strided", "empty_like", "_unsafe_view", "_reshape_alias", "unbind", "chunk", "split", "split_with_sizes",
         "as_strided_", "permute", "resize_", "detach", "alias", "reshape", "flatten", "unflatten", "squeeze", "item", "to",
         "_local_scalar_dense", "is_nonzero", "contiguous", "dropout", "scalar_tensor")
NORM = "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float>"
KERNELS = {"addmm": "nvjet_tst_128x128_64x4_1x1_v_bz_TNT", "mm": "nvjet_tst_128x128_64x4_1x1_v_bz_TNT",
           "bmm": "nvjet_tst_64x64_64x4_1x1_v_bz_TNT", "mkldnn_convolution": "void implicit_convolve_sgemm<float>",
           "slow_conv3d_forward": "void implicit_convolve_sgemm<float>",
           "_scaled_dot_product_flash_attention_for_cpu": "void pytorch_flash::flash_fwd_kernel<64>",
           "native_layer_norm": NORM, "cat": "void at::native::(anonymous namespace)::CatArrayBatchedCopy<3>",
           "copy_": "void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda>"}


def on_a_gpu(events):
    """The events, and of each operator that KERNELS has or that has none within it a launch and a kernel of 1 ms, later."""
    ops = sorted((event for event in events if event.get("cat") == "cpu_op"), key=lambda event: (event["ts"], -event["dur"]))
    made, end = list(events), 0.0
    for number, (op, after) in enumerate(zip(ops, [*ops[1:], dict(ts=float("inf"))])):
        name = op["name"].removeprefix("aten::")
        if op["ts"] < end or name not in KERNELS and (name in VIEWS or after["ts"] < op["ts"] + op["dur"]):
            continue
        end = op["ts"] + op["dur"]
        kernel = KERNELS.get(name, f"void at::native::vectorized_elementwise_kernel<4, {name}>")
        made += [dict(ph="X", cat="cuda_runtime", name="cudaLaunchKernel", ts=op["ts"], dur=0.0, args=dict(correlation=number)),
                 dict(ph="X", cat="kernel", name=kernel, ts=op["ts"] + 1e4, dur=1e3, args=dict(correlation=number))]
    return made


@pytest.fixture
def gpu(monkeypatch):
    """Sides tell kernels as if the CPU's operators were; the list gets the events of each step that is traced."""
    traced, trace, init = [], torch_side.TorchSide.trace, torch_side.TorchSide.__init__

    def told(self):
        init(self)
        self.no_kernels = ""

    monkeypatch.setattr(torch_side.TorchSide, "__init__", told)
    monkeypatch.setattr(torch_side.TorchSide, "trace",
                        lambda self, step, modules: traced.append(on_a_gpu(trace(self, step, modules))) or traced[-1])
    return traced


def parts_of(name, method):
    side = torch_side.TorchSide()
    entry = side.entry(name)
    model, given = side.make(entry, tiny=True)
    modules = list(attention_modules(model).values())
    hooks = lambda: [[*module._forward_hooks, *module._forward_pre_hooks] for module in modules]
    with side.methods_of(model, entry, [method], None) as ways:
        step = side.step(model, given, ways[method])
        step()
        before = hooks()
        events = side.trace(step, modules)
        assert hooks() == before
    assert sum(event.get("name") == kernel_parts.RANGE for event in events) == len(modules)
    return kernel_parts.found(events, 1e4, True)["parts_ms"], kernel_parts.kernels_of(events), len(modules)


@pytest.mark.parametrize("name", ["cogvideox-2b", "cogvideox-5b", "wan2.1-1.3b", "ltx", "hunyuanvideo", "mochi", "flux"])
def test_norms_and_positions_before_attention_are_the_prologues_in_any_model(gpu, name):
    parts, kernels, modules = parts_of(name, "pytorch")
    assert parts[ATTENTION] >= modules and parts[PRODUCTS] >= 4 * modules - 1 and parts[PROLOGUE] >= 6 * modules
    assert all(parts[part] for part in (OTHER, COPIES)) and sum(parts.values()) == 1e4
    none, *_ = parts_of(name, "none")
    assert none[ATTENTION] == 0 and all(none[part] == parts[part] for part in (PROLOGUE, PRODUCTS, OTHER))


def test_the_prologue_has_the_norms_of_q_and_k_and_the_model_the_others(gpu):
    _, kernels, modules = parts_of("cogvideox-2b", "pytorch")
    norms = Counter(kernel.part for kernel in kernels if kernel.name == NORM)
    assert norms == {PROLOGUE: 2 * modules, OTHER: 4 * modules + 2}  # before attention, feed-forward, text and video; last ones
    _, kernels, _ = parts_of("cogvideox-2b", "int8+fp8")  # on a CPU NumPy computes norms, positions and attention
    assert Counter(kernel.part for kernel in kernels if kernel.name == NORM) == {OTHER: 4 * modules + 2}


def test_every_mode_has_its_parts_and_compiled_ones_say_what_they_cannot_tell(gpu, tmp_path, capsys):
    assert main(["bench", "step", "--tiny", "--models", "cogvideox-2b", "--methods", "pytorch", "none", "--parts", "--modes",
                 "eager", "blocks", "--rounds", "1", "--out", str(tmp_path)]) == 0
    result, = json.loads((tmp_path / "step.json").read_text())["models"]
    rows = {(row["method"], row["mode"]): row for row in result["rows"]}
    assert len(gpu) == len(rows) == 4
    for (method, mode), row in rows.items():
        assert set(row["parts_ms"]) == set(kernel_parts.PARTS) and row["prologue_whole"] is (mode == "eager")
        assert bool(row["parts_ms"][PROLOGUE]) is (mode == "eager") and bool(row["parts_ms"][ATTENTION]) is (method != "none")
    assert rows["pytorch", "blocks"]["parts_ms"][OTHER] >= rows["pytorch", "eager"]["parts_ms"][OTHER]
    page = (tmp_path / "step.md").read_text()
    assert page in capsys.readouterr().out and "| prologue |" in page and "| PyTorch | blocks compiled | 2.0 | 0.0 |" in page
    assert (tmp_path / "step.png").stat().st_size > 5000


def test_a_cpus_step_has_no_parts():
    result = measure.measure(torch_side.TorchSide(), "cogvideox-2b", ["pytorch"], ["eager"], True, 1.0, lambda text: None,
                             lambda result: None, all_parts=True)
    assert not any("parts_ms" in row for row in result["rows"]) and not result["failed"] and not result["left_out"]
