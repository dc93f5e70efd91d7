"""A diffusers transformer as CUDA graphs on GPUs: what the plain forward gives, counts, and what is recorded anew."""
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

import lowbit_video as lv  # noqa: E402
from ranks import launch_torch  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::lowbit_video.errors.SlowerThanExactWarning")]

RECIPE = lv.Recipe([{"rung": "int8+fp8"}, {"steps": "0-0.5", "rung": "int8+fp16"}])


@pytest.fixture
def device(gpu):
    if gpu.name != "torch":
        pytest.skip("needs PyTorch on the GPU; LOWBIT_TEST_FRAMEWORK names another framework")
    return gpu.like.device


def make(device, rotary=False):
    """CogVideoX of 1570 tokens, or 5b's way with positions."""
    torch.manual_seed(0)
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=64, in_channels=16, out_channels=16, time_embed_dim=64, text_embed_dim=32,
        num_layers=3, sample_width=32, sample_height=24, sample_frames=25, max_text_seq_length=226,
        use_rotary_positional_embeddings=rotary).eval().to(device, torch.float16)


def inputs(device, seed=1, rotary=False, timestep=500):
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator).to(device, torch.float16)
    given = dict(hidden_states=normal(2, 7, 16, 24, 32), encoder_hidden_states=normal(2, 226, 32),
                 timestep=torch.full((2,), timestep, device=device))
    if rotary:
        angle = torch.randn(7 * 12 * 16, 32, generator=generator).to(device).repeat_interleave(2, 1)
        given["image_rotary_emb"] = (angle.cos(), angle.sin())
    return given


def predict(model, given):
    with torch.no_grad():
        return model(**given, return_dict=False)[0]


def same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("spec", ["int8+fp8", "int8+fp16", "int4+fp16", "exact"])
def test_a_graph_gives_what_the_forward_gives(device, spec, rotary):
    model = make(device, rotary)
    lv.apply(model, spec)
    given = [inputs(device, seed, rotary=rotary) for seed in (1, 2)]
    wanted = [predict(model, one).clone() for one in given]
    half = {name: value if name == "image_rotary_emb" else value[:1] for name, value in given[0].items()}
    wanted_half = predict(model, half)
    before = [module.calls for module in lv.coverage(model).modules]
    with lv.cuda_graph(model):
        found = [predict(model, given[number]) for number in (0, 1, 0, 1)]
        graph = model.forward._graphed
        for number, out in enumerate(found):
            same(out, wanted[number % 2])
        assert len(graph.kinds) == 1 and len({out.data_ptr() for out in found}) == 4, "outputs are the caller's own"
        assert [module.calls for module in lv.coverage(model).modules] == [calls + 4 for calls in before]
        same(predict(model, half), wanted_half)
        assert len(graph.kinds) == 2
    same(predict(model, given[1]), wanted[1])


def test_other_processors_weights_and_orders_record_anew(device):
    model, given = make(device, rotary=True), inputs(device, rotary=True)
    lv.apply(model, "int8+fp16")
    model.proj_out.bias.data.zero_()
    with lv.cuda_graph(model):
        predict(model, given)
        graph = model.forward._graphed
        for change in (lambda: lv.apply(model, "int4+fp16"), lambda: model.set_attn_processor(lv.ExactAttnProcessor()),
                       lambda: setattr(model.proj_out.weight, "data", model.proj_out.weight.data * 2),
                       lambda: lv.order_tokens(model, "hilbert")):
            before = list(graph.kinds.values())
            change()
            made = [predict(model, given) for _ in range(2)]
            assert len(graph.kinds) == 1 and list(graph.kinds.values())[0] is not before[0]
            same(*made)
        model.proj_out.weight.data.mul_(2)  # in place: the graph reads it
        same(predict(model, given), 2 * made[1])
        assert list(graph.kinds.values())[0] is not before[0] and len(graph.kinds) == 1


def test_steps_of_a_recipe_have_graphs_of_their_own(device):
    model, twin = make(device), make(device)
    for one in (model, twin):
        lv.apply(one, RECIPE)
    with lv.cuda_graph(model):
        for timestep in (999, 100, 800, 300):
            given = inputs(device, timestep=timestep)
            same(predict(model, given), predict(twin, given))
        assert len(model.forward._graphed.kinds) == 2
    runs = lambda model: [module.runs for module in lv.coverage(model).modules]
    assert runs(model) == runs(twin)


def test_compiled_blocks_are_held(device):
    model, given = make(device), [inputs(device, seed) for seed in (1, 2)]
    lv.apply(model, "int8+fp8")
    torch._dynamo.reset()
    for block in model.transformer_blocks:
        block.compile(dynamic=False)
    wanted = [predict(model, one).clone() for one in given]
    with lv.cuda_graph(model):
        for number in (0, 1, 0, 1):
            same(predict(model, given[number]), wanted[number])


def test_autocast_keeps_no_cast_of_the_weights(device):
    model, given = make(device).float(), inputs(device)
    lv.apply(model, "int8+fp16")
    model.requires_grad_()  # of these autocast keeps casts
    with lv.cuda_graph(model), torch.no_grad(), torch.autocast("cuda", torch.float16):
        predict(model, given)
        model.proj_out.weight.mul_(3)
        with_graph = predict(model, given)
        assert len(model.forward._graphed.kinds) == 1
    with torch.no_grad(), torch.autocast("cuda", torch.float16):
        same(with_graph, predict(model, given))


def test_what_waits_for_the_gpu_is_refused_and_the_model_goes_on(device):
    model, given = make(device), inputs(device)
    lv.apply(model, "int8+fp8")
    waits = model.transformer_blocks[1].register_forward_hook(
        lambda module, args, out: (out[0] * float(out[0].abs().max()), out[1]))
    with lv.cuda_graph(model):
        with pytest.raises(lv.UnsupportedError, match="no CUDA graph can hold this forward"):
            predict(model, given)
        waits.remove()
        wanted = predict(model, given)
        same(predict(model, given), wanted)
    with pytest.raises(lv.UnsupportedError, match="are on cpu"):
        lv.cuda_graph(make("cpu"))


SCRIPT = '''
import json, os, sys
import torch
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import lowbit_video as lv
import test_cuda_graph as one

torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
dist.init_process_group("nccl", device_id=device)
for degrees in (dict(cfg=1, ulysses=2), dict(cfg=1, ring=2), dict(cfg=2)):
    for first in ("parallelize", "cuda_graph"):
        model = one.make(device)
        lv.apply(model, "int8+fp8")
        given = [one.inputs(device, seed) for seed in (1, 2)]
        with lv.parallelize(model, **degrees) as handle:
            wanted = [one.predict(model, x).clone() for x in given]
            sent = handle.mesh.traffic.as_dict()
        graph = lv.cuda_graph(model) if first == "cuda_graph" else None
        with lv.parallelize(model, **degrees) as handle:
            graph = graph or lv.cuda_graph(model)
            for number, x in enumerate(given):
                one.same(one.predict(model, x), wanted[number])
            assert handle.mesh.traffic.as_dict() == sent, (handle.mesh.traffic.as_dict(), sent)
            for number in (0, 1):
                one.same(one.predict(model, given[number]), wanted[number])
            assert handle.report()["coverage_differs"] == {}
        graph.undo()
json.dump("done", open(os.path.join(os.environ["RANK_OUT"], os.environ["RANK"] + ".json"), "w"))
dist.barrier()
sys.stdout.flush()
os._exit(0)
'''


def test_ranks_that_share_a_step_record_their_exchange(device, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second NVIDIA GPU")
    script = tmp_path / "shared.py"
    script.write_text(SCRIPT)
    assert launch_torch(script, 2, tmp_path, Path(__file__).parent) == ["done"] * 2
