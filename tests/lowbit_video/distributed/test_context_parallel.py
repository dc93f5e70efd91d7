"""diffusers' enable_parallelism on a hooked CogVideoX by `cp_plan`, two processes over gloo, against one."""
import types

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")
diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
import torch.distributed as dist  # noqa: E402
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput  # noqa: E402

import lowbit_video as lv  # noqa: E402
from lowbit_video.distributed import context_parallel, torch_wire  # noqa: E402
from lowbit_video.hook.frames.own import own_attention  # noqa: E402
from lowbit_video.hook.report import attention_modules  # noqa: E402
from ranks import launch_torch  # noqa: E402

import diffusers_models  # noqa: E402

pytestmark = pytest.mark.parity

SCRIPT = '''
import copy, json, os
import torch
import torch.distributed as dist
import diffusers_models
from diffusers import ContextParallelConfig
from helpers import sqnr_db
from lowbit_video import UnsupportedError, apply, coverage, cp_plan, order_tokens, parallelize, remove

dist.init_process_group("gloo")
torch.accelerator.device_count = lambda: 1  # diffusers takes a rank modulo this, which is 0 without a GPU
found = {}


def predict(model, given):
    with torch.no_grad():
        return model(**copy.deepcopy(given), return_dict=False)[0]


for name, precision, config in (
        ("ulysses", "int8+fp16", dict(ulysses_degree=2)), ("ring", "int8+fp16", dict(ring_degree=2)),
        ("ulysses exact", "exact", dict(ulysses_degree=2)), ("ring exact", "exact", dict(ring_degree=2)),
        ("ulysses ordered", "exact", dict(ulysses_degree=2)), ("ring ordered", "exact", dict(ring_degree=2)),
        ("ulysses uneven", "exact", dict(ulysses_degree=2, ulysses_anything=True)),
        ("ring uneven", "exact", dict(ring_degree=2, ring_anything=True))):
    model, given = diffusers_models.make("cogvideox")
    if "uneven" in name:  # of the text alone: to join uneven video tokens diffusers needs NCCL
        given["encoder_hidden_states"] = given["encoder_hidden_states"][:, :5]
    exact = predict(model, given)
    apply(model, precision)
    if "ordered" in name:
        order_tokens(model, "hilbert")
    alone = predict(model, given)
    model.enable_parallelism(config=ContextParallelConfig(**config), cp_plan=cp_plan(model))
    shared = predict(model, given)
    row = found[name] = dict(alone=sqnr_db(alone, exact), exact=sqnr_db(shared, exact), same=sqnr_db(shared, alone),
                             calls=[module.calls for module in coverage(model).modules])
    try:
        remove(model)
    except UnsupportedError as error:
        row["late"] = str(error)

model, given = diffusers_models.make("cogvideox")
apply(model, "exact")
parallelize(model, ulysses=2, cfg=1)
try:
    cp_plan(model)
except UnsupportedError as error:
    found["twice"] = str(error)
json.dump(found, open(os.path.join(os.environ["RANK_OUT"], f"{dist.get_rank()}.json"), "w"))
dist.destroy_process_group()
os._exit(0)
'''


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "script.py").write_text(SCRIPT)
    return launch_torch(folder / "script.py", 2, folder)


@pytest.mark.parametrize("how", ["ulysses", "ring"])
def test_two_processes_are_one(ranks, how):
    for found in ranks:
        for name in (f"{how} exact", f"{how} ordered", f"{how} uneven"):
            assert found[name]["exact"] > 100, name
        row = found[how]
        assert 50 < row["exact"] < 110 and abs(row["exact"] - row["alone"]) < 3 and row["same"] > 50
        assert row["calls"] == [2, 2] if how == "ulysses" else [3, 3]  # alone, then one, or one for each rank's keys
        assert "apply first" in row["late"]


def test_what_is_parallel_already_is_refused(ranks):
    assert all("is parallel already; call unparallelize first" in found["twice"] for found in ranks)


def test_a_plan_is_only_of_hooked_cogvideox():
    model, _ = diffusers_models.make("cogvideox")
    with pytest.raises(lv.UnsupportedError, match=r"transformer_blocks.0.attn1 of .* has no processor of lowbit_video"):
        lv.cp_plan(model)
    with lv.apply(model, "int8+fp16", {"transformer_blocks.1.*": None}):
        with pytest.raises(lv.UnsupportedError, match="transformer_blocks.1.attn1"):
            lv.cp_plan(model)
    with lv.apply(model, "int8+fp16"):
        with pytest.raises(ValueError, match="exchange"):
            lv.cp_plan(model, exchange="15bit")
        tokens, angles = ContextParallelInput(1, 3), ContextParallelInput(0, 2)
        assert lv.cp_plan(model) == {
            "transformer_blocks.0": {"hidden_states": tokens, "encoder_hidden_states": tokens},
            "transformer_blocks.*": {"image_rotary_emb": [angles, angles]}, "proj_out": ContextParallelOutput(1, 3)}
        slot = model.transformer_blocks[1].attn1.attention_slot
        for part, said in (("around", "is parallel already"), ("frame", "is not CogVideoX's joint attention")):
            before = getattr(slot, part)
            setattr(slot, part, own_attention)
            with pytest.raises(lv.UnsupportedError, match=said):
                lv.cp_plan(model)
            setattr(slot, part, before)
    other, _ = diffusers_models.make("sd3")
    lv.apply(other, "int8+fp16")
    with pytest.raises(lv.UnsupportedError, match="SD3Transformer2DModel cannot share its tokens"):
        lv.cp_plan(other)


@pytest.mark.parametrize("uneven", [{}, {"ulysses_anything": True}, {"ring_anything": True}], ids=str)
def test_what_is_wrapped_around_every_attention_follows_the_config(monkeypatch, uneven):
    """Keys are shared in the ring's group and heads in Ulysses'; lengths that may differ are asked for, not assumed."""
    asked = []

    def shared(*around):
        return lambda *call: asked.append((around, call)) or "out"

    mesh = lambda *ranks: types.SimpleNamespace(get_group=lambda: ranks)
    monkeypatch.setattr(dist, "get_process_group_ranks", list)
    monkeypatch.setattr(torch_wire, "TorchWire", lambda: types.SimpleNamespace(rank=1, size=6))
    monkeypatch.setattr(context_parallel, "shared", shared)
    config = dict(_ring_mesh=mesh(1, 3, 5), _ulysses_mesh=mesh(0, 1), ulysses_anything=False, ring_anything=False) | uneven
    config = types.SimpleNamespace(context_parallel_config=types.SimpleNamespace(**config))
    model, _ = diffusers_models.make("cogvideox")
    lv.apply(model, "int8+fp16")
    lv.cp_plan(model, exchange="16bit", output="int8")
    slots = [module.attention_slot for module in attention_modules(model).values()]
    made = []
    for _ in slots:  # diffusers says it to the processor of each
        model.transformer_blocks[0].attn1.processor._parallel_config = config
        made.append([slot.around for slot in slots])
    assert None not in made[0] and made[0] == made[1]
    q = torch.zeros(2, 7, 4, 32)
    assert made[0][0]("attend")(q, "k", "v", True, 0.3, True) == "out"
    (((attend, keys, heads, *how), call),) = asked
    assert (attend, keys.size, heads.size) == ("attend", 3, 2) and call == (q, "k", "v", True, 0.3, True)
    assert how == ["16bit", "int8", None if uneven else [7] * 6]
