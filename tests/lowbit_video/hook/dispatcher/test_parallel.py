"""diffusers' context parallelism on our backends, two processes over gloo: by heads (Ulysses) and in a ring, against one."""
import re
import types

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")
diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
from lowbit_video.hook.dispatcher.backend import _of_own_heads  # noqa: E402
from ranks import launch_torch  # noqa: E402

pytestmark = pytest.mark.parity

RAN = {"wan": {"int8+fp16 (reference-lowbit)": 4}, "flux": {"int8+fp16 (reference-lowbit)": 2},
       "ltx": {"int8+fp16 (reference-lowbit)": 2, "exact (masked)": 2}}
"""Calls of one prediction; in a ring of two a self attention is two."""

SCRIPT = '''
import itertools, json, os
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from dispatch_models import make, predict
from helpers import sqnr_db
from lowbit_video import UnsupportedError, coverage, register_diffusers

dist.init_process_group("gloo")
torch.accelerator.device_count = lambda: 1  # diffusers takes a rank modulo this, which is 0 without a GPU
register_diffusers()
found = {}
for name, how in itertools.product(("wan", "flux", "ltx"), ("ulysses", "ring")):
    model, inputs = make(name)
    exact = predict(model, inputs)
    model.set_attention_backend("lowbit_int8_fp16")
    alone = predict(model, inputs)
    register_diffusers(model)
    model.enable_parallelism(config=ContextParallelConfig(**{how + "_degree": 2}))
    row = found[f"{name} {how}"] = {"alone": sqnr_db(alone, exact)}
    try:
        shared = predict(model, inputs)
        row.update(exact=sqnr_db(shared, exact), same=sqnr_db(shared, alone), ran=coverage(model).variants())
    except UnsupportedError as error:
        row["refused"] = str(error)
    model.set_attention_backend("native")

from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
q = torch.randn(3, 1, 64, 2, 64, requires_grad=True)
parallel = model._parallel_config
try:
    dispatch_attention_fn(*q, backend=AttentionBackendName("lowbit_int8_fp16"), parallel_config=parallel)
except UnsupportedError as error:
    found["gradients"] = str(error)
json.dump(found, open(os.path.join(os.environ["RANK_OUT"], f"{dist.get_rank()}.json"), "w"))
dist.destroy_process_group()
'''


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "script.py").write_text(SCRIPT)
    return launch_torch(folder / "script.py", 2, folder)


@pytest.mark.parametrize("model", ["wan", "flux", "ltx"])
def test_heads_of_two_processes_are_one_process(ranks, model):
    for found in ranks:
        row = found[f"{model} ulysses"]
        assert row["same"] > 100 and 50 < row["exact"] < 100 and abs(row["exact"] - row["alone"]) < 0.5
        assert row["ran"] == RAN[model]


@pytest.mark.parametrize("model", ["wan", "flux"])
def test_a_ring_merges_by_lse(ranks, model):
    """Each process quantises its own keys, so it is not one process's to the bit; a LSE that is off would show by far:
    https://github.com/huggingface/diffusers/pull/12693."""
    for found in ranks:
        row = found[f"{model} ring"]
        assert row["exact"] > row["alone"] - 3 and 40 < row["same"] < 100
        assert row["ran"] == {what: 2 * calls if model == "flux" else calls + 2 for what, calls in RAN[model].items()}


def test_a_mask_in_a_ring_is_refused(ranks):
    for found in ranks:
        assert re.match(r"attn_mask of shape \[1, 2, 1, 12\] in a ring.*use ulysses_degree", found["ltx ring"]["refused"])


def test_a_mask_of_all_heads_is_cut_to_a_ranks_own():
    mask = torch.arange(8).reshape(1, 4, 1, 2)
    place = types.SimpleNamespace(context_parallel_config=types.SimpleNamespace(_ulysses_local_rank=1))
    assert _of_own_heads(mask, 2, place).tolist() == [[[[4, 5]], [[6, 7]]]]
    for whole in (None, mask, mask[:, :1], mask[:, 0, 0]):
        assert _of_own_heads(whole, 4, place) is whole


def test_gradients_are_refused_by_name(ranks):
    assert all("gradients are recorded, and low-bit attention on several ranks" in found["gradients"] for found in ranks)
