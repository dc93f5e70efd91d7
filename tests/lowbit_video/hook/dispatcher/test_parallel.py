"""diffusers' context parallelism on our backends, two processes over gloo: by heads (Ulysses) and in a ring, against one."""
import re
import types

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")
diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
from lowbit_video import UnsupportedError, attention  # noqa: E402
from lowbit_video.hook.dispatcher import backend  # noqa: E402
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


def config(rank=0, ring_degree=1):
    """What our backends read of diffusers' ParallelConfig."""
    degrees = types.SimpleNamespace(_ulysses_local_rank=rank, ring_degree=ring_degree)
    return types.SimpleNamespace(context_parallel_config=degrees)


@pytest.fixture
def template(monkeypatch):
    """What diffusers' template is handed, in place of its work."""
    handed = []
    monkeypatch.setattr(backend, "_templated_context_parallel_attention",
                        lambda *given, **named: handed.append((given, named)) or "shared")
    return handed


def test_diffusers_template_gets_the_call_as_it_was(template):
    q, k, v = torch.randn(3, 1, 64, 2, 64)
    place, mask = config(), torch.ones(1, 64, dtype=torch.bool)
    function = backend.backend_function("lowbit_int8_fp16")
    assert function(q, k, v, mask, 0.0, False, 0.3, True, True, _parallel_config=place) == "shared"
    assert function(q, k, v, None, 0.0, True, _parallel_config=config(ring_degree=2)) == "shared"
    (first, named), (second, _) = template
    assert all(got is given for got, given in zip(first, (q, k, v, mask))) and first[4:] == (0.0, False, 0.3, True, True)
    assert named["_parallel_config"] is place and named["backward_op"] is None
    assert second[3:] == (None, 0.0, True, None, False, False)


def test_what_a_rank_computes_is_attention_of_its_own_heads(template):
    q, k, v = torch.randn(3, 1, 64, 2, 64)
    function = backend.backend_function("lowbit_int8_fp16")
    function(q, k, v, _parallel_config=config())
    forward = template[0][1]["forward_op"]
    out, lse = forward(None, q, k, v, None, 0.0, True, 0.3, False, True, _parallel_config=config())
    wanted, wanted_lse = attention(q, k, v, "int8+fp16", is_causal=True, scale=0.3, return_lse=True)
    assert torch.equal(out, wanted) and torch.equal(lse, wanted_lse.permute(0, 2, 1)) and lse.is_contiguous()
    mask = torch.randn(1, 4, 1, 64)
    out = forward(None, q, k, v, mask, 0.0, False, 0.3, False, False, _parallel_config=config(rank=1))
    wanted = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), mask[:, 2:], scale=0.3)
    assert torch.equal(out, wanted.transpose(1, 2))


def test_masks_in_a_ring_and_gradients_are_refused_before_any_work(template):
    q, k, v = torch.randn(3, 1, 64, 2, 64)
    function = backend.backend_function("lowbit_int8_fp16")
    with pytest.raises(UnsupportedError, match=r"attn_mask of shape \[1, 64\] in a ring"):
        function(q, k, v, torch.ones(1, 64, dtype=torch.bool), _parallel_config=config(ring_degree=2))
    with pytest.raises(UnsupportedError, match="gradients are recorded"):
        function(q, k, v.requires_grad_(), _parallel_config=config())
    assert not template


def test_gradients_are_refused_by_name(ranks):
    assert all("gradients are recorded, and low-bit attention on several ranks" in found["gradients"] for found in ranks)
