"""The hook on a real GPU: a small random pipeline in Paddle, eager and compiled."""
import numpy as np
import pytest

from helpers import naive_attention, qkv, sqnr_db

pytestmark = pytest.mark.gpu
CALL = dict(num_inference_steps=2, num_frames=9, height=48, width=80, seed=3, progress=False)


@pytest.fixture(scope="module")
def pipe(gpu, tmp_path_factory):
    if gpu.name != "paddle":
        pytest.skip("the pipeline runs on Paddle; set LOWBIT_TEST_FRAMEWORK=paddle")
    from lowbit_video.pipelines import CogVideoXPipeline, make_random_pipeline
    from lowbit_video.runtime.detect import default_paddle_device

    folder = make_random_pipeline(tmp_path_factory.mktemp("model") / "random", seed=0)
    made = CogVideoXPipeline.from_pretrained(folder, dtype="float16", device=default_paddle_device())
    yield made


def video(pipe):
    frames = pipe("a cat", **CALL).frames[0]
    assert np.isfinite(frames).all()
    return frames


@pytest.mark.parametrize("precision", ["int8+fp16", "int8+fp8", "int8/int4+fp16", "int4+fp8", "fp8+fp8"])
def test_a_gpu_kernel_runs_in_every_module_and_remove_restores(pipe, precision):
    from lowbit_video import apply, coverage, remove
    from lowbit_video.eval.metrics.psnr import psnr

    exact = video(pipe)
    apply(pipe, precision)
    low, report = video(pipe), coverage(pipe)
    remove(pipe)
    for module in report.modules:
        (name, calls, reason), = module.runs
        assert calls == 2 and not reason and ("triton" in name or "hopper" in name)
    assert not np.array_equal(low, exact) and psnr(low, exact).min() > 25
    assert psnr(video(pipe), exact).min() > 60


def test_a_recipe_runs_each_step_at_its_rung(pipe):
    from lowbit_video import Recipe, apply, coverage, remove

    apply(pipe, Recipe([{"rung": "int8+fp8"}, {"steps": "0-0.5", "rung": "int8+fp16"}, {"heads": [0], "rung": "exact"}]))
    video(pipe)
    runs = [{variant.partition(" (")[0]: calls for variant, calls, _ in module.runs} for module in coverage(pipe).modules]
    remove(pipe)
    assert all(run == {"steps 0-0.5, heads 0: exact": 1, "steps 0-0.5, heads 1: int8+fp16": 1, "steps 0.5-1, heads 0: exact": 1,
                       "steps 0.5-1, heads 1: int8+fp8": 1} for run in runs), runs


@pytest.mark.parametrize("rungs", [("int8+fp8", "exact", "exact", "int8+fp8"),
                                   ("int8+fp16", "int8+fp16", "int4+fp16", "exact")])
def test_heads_of_several_rungs_are_those_computed_alone(gpu, rungs):
    from lowbit_video import LowBitAttnProcessor
    from lowbit_video.hook.recipe.clock import StepClock
    from lowbit_video.hook.recipe.processor import RecipeAttnProcessor
    from lowbit_video.hook.recipe.table import LayerPlan, Span

    q, k, v = (gpu.tensor(a) for a in qkv(2, 4, q_len=1000, dim=64))
    processor = RecipeAttnProcessor(LayerPlan((Span(0.0, 1.0, rungs),)), StepClock())
    for _ in range(2):  # recorded, then replayed
        out = gpu.numpy(processor.attend(q, k, v))
        for head, rung in enumerate(rungs):
            cut = slice(head, head + 1)
            alone = gpu.numpy(LowBitAttnProcessor(rung).attend(*(gpu.tensor(gpu.numpy(t)[:, :, cut]) for t in (q, k, v))))
            assert sqnr_db(out[:, :, cut], alone) > 60


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype, floor_db", [("float16", 50), ("bfloat16", 40)])
def test_exact_attention_by_the_kernel_is_the_frameworks_own(gpu, monkeypatch, dtype, floor_db, head_dim):
    """Whether calls get the kernel without asking for it or not."""
    from lowbit_video.hook import attend

    if gpu.arch != (9, 0):
        pytest.skip("needs an sm_90 GPU")
    given = [gpu.tensor(a, dtype) for a in qkv(2, 4, q_len=1000, kv_len=attend.FASTER_FROM, dim=head_dim)]
    run, ran, outs = attend.run, [], []
    monkeypatch.setattr(attend, "run", lambda *call: ran.append(run(*call)) or ran[-1])
    for automatic in (False, True):
        monkeypatch.setitem(vars(attend.FASTER), "automatic", automatic)
        outs.append(gpu.numpy(attend.exact_attend(*given)))
        assert [variant.name for _, _, variant in ran] == ["hopper-exact"] * automatic
    assert sqnr_db(outs[1], outs[0]) > floor_db


def test_a_compiled_transformer_equals_the_eager_one(pipe):
    from lowbit_video import apply, coverage, remove

    apply(pipe, "int8+fp16")
    eager = video(pipe)
    pipe.compile()
    compiled = video(pipe)
    assert all(module.calls == 4 for module in coverage(pipe).modules)
    remove(pipe)
    assert np.abs(eager - compiled).max() <= 4 / 255


@pytest.mark.parametrize("lengths", [(1200, 700), (700, 700)], ids=str)
def test_a_mask_of_padding_is_served_by_lengths(gpu, lengths):
    """Each sample is what it is alone, with the keys that it sees; a mask in 16 bits hides as well."""
    from lowbit_video.hook.processors import LowBitAttnProcessor

    q, k, v = qkv(batch=2, q_len=1000, kv_len=1200)
    k[1, lengths[1]:] += 50  # a hidden key that counted would change all
    mask = np.where(np.arange(1200) < np.array(lengths)[:, None], 0.0, -10000.0)[:, None]
    low = LowBitAttnProcessor("int8+fp16")
    for dtype in ("float16", "float32"):
        out = gpu.numpy(low.attend_masked(*map(gpu.tensor, (q, k, v)), gpu.tensor(mask, dtype)))
        for sample, length in enumerate(lengths):
            exact, _ = naive_attention(q[sample:sample + 1], k[sample:sample + 1, :length], v[sample:sample + 1, :length])
            assert sqnr_db(out[sample], exact[0]) > 30
