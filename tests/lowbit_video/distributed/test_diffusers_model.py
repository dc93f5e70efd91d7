"""A diffusers transformer on several ranks: what it predicts on one, and nothing left of it afterwards."""
import pathlib

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")
diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
from lowbit_video import ExactAttnProcessor, UnsupportedError, apply, parallelize, unparallelize  # noqa: E402
from ranks import launch_torch, run_threads  # noqa: E402

import diffusers_models  # noqa: E402
from helpers import sqnr_db  # noqa: E402

pytestmark = pytest.mark.parity

KINDS = {"2b": {}, "5b": dict(use_rotary_positional_embeddings=True),
         "1.5": dict(use_rotary_positional_embeddings=True, patch_size_t=2)}


def make(kind):
    torch.manual_seed(0)
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=3, attention_head_dim=32, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=10,
        num_layers=2, sample_width=16, sample_height=16, sample_frames=13, max_text_seq_length=9, **KINDS[kind])
    return model.eval()


def predict(model, batch, positional=False, **more):
    generator = torch.Generator().manual_seed(1)
    given = dict(hidden_states=torch.randn(batch, 4, 4, 16, 16, generator=generator),
                 encoder_hidden_states=torch.randn(batch, 9, 10, generator=generator),
                 timestep=torch.arange(batch) * 100 + 7)
    if model.config.use_rotary_positional_embeddings:
        tokens = 4 // (model.config.patch_size_t or 1) * 64
        angle = torch.randn(tokens, 16, generator=generator).repeat_interleave(2, dim=1)
        more["image_rotary_emb"] = (angle.cos(), angle.sin())
    with torch.no_grad():
        return (model(*given.values(), **more)[0] if positional else model(**given, **more).sample).numpy()


@pytest.mark.parametrize("kind, size, degrees, batch", [
    ("2b", 2, dict(ulysses=2, cfg=1), 2), ("5b", 3, dict(ring=3), 1), ("1.5", 2, dict(cfg=2), 4),
    ("5b", 4, dict(ulysses=2), 2), ("5b", 8, dict(cfg=2, ulysses=2, ring=2), 2)])
def test_a_diffusers_model_predicts_the_same_on_several_ranks(kind, size, degrees, batch):
    wanted = predict(make(kind), batch)
    models = [make(kind) for _ in range(size)]  # here: threads share one generator

    def work(wire):
        model = models[wire.rank]
        apply(model, ExactAttnProcessor())
        with parallelize(model, wire=wire, **degrees) as handle:
            made = [predict(model, batch), predict(model, batch, positional=True, return_dict=False)]
            sent = handle.report()["traffic"]
        assert not unparallelize(model)
        count = lambda: sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
        assert count() == 0
        return made, predict(model, batch), sent

    for made, after, sent in run_threads(size, work):
        assert all(sqnr_db(one, wanted) > 90 for one in made)
        assert sqnr_db(after, wanted) > 90 and all(one["sent_total"] > 0 for one in sent)


def test_diffusers_own_processors_are_refused_while_tokens_are_shared():
    def work(wire):
        model = make("2b")
        parallelize(model, wire=wire, cfg=1)
        with pytest.raises(UnsupportedError, match="has the processor CogVideoXAttnProcessor2_0, which is not one of"):
            predict(model, 2)

    run_threads(2, work)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="no attention module"):
        parallelize(torch.nn.Linear(2, 2), wire=None)
    assert np.isfinite(predict(make("2b"), 1)).all()


@pytest.mark.parametrize("name, named", [("mochi", "encoder_attention_mask"), ("consisid", "id_cond, id_vit_hidden"),
                                         ("sd3", "pooled_projections")])
def test_models_whose_work_is_not_known_are_not_shared_among_ranks(name, named):
    model, _ = diffusers_models.make(name)
    with pytest.raises(UnsupportedError, match=f"cannot share its tokens: its forward takes .*{named}.*enable_parallelism"):
        parallelize(model)


COMPILED = """
import json, os, sys
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from helpers import sqnr_db
from lowbit_video import apply, parallelize
sys.path.insert(0, sys.argv[1])
from test_diffusers_model import make, predict

dist.init_process_group("gloo")
told = {}
for degrees in (dict(ring=2, cfg=1), dict(ulysses=2, cfg=1), dict(cfg=2)):
    torch._dynamo.reset()
    counters.clear()
    model = make("5b")
    apply(model, "int8+fp8")
    with parallelize(model, **degrees) as handle:
        wanted = predict(model, 2)
        sent = handle.report()["traffic"]
        for block in model.transformer_blocks:
            block.compile(backend="aot_eager", dynamic=False)
        made, graphs = [], []
        for _ in range(2):
            made.append(sqnr_db(predict(model, 2), wanted))
            graphs.append(counters["stats"]["unique_graphs"])
        told[" ".join(degrees)] = dict(
            made=[min(one, 1e3) for one in made], graphs=graphs, breaks=dict(counters["graph_break"]),
            sent=[[one["sent_total"] for one in counted] for counted in (sent, handle.report()["traffic"])])
json.dump(told, open(os.path.join(os.environ["RANK_OUT"], f"{dist.get_rank()}.json"), "w"))
dist.destroy_process_group()
"""


def test_blocks_may_be_compiled_one_by_one(tmp_path):
    """The exchange runs inside attention's operator: no graph breaks there, and the second step needs no other graph."""
    script = tmp_path / "compiled.py"
    script.write_text(COMPILED)
    for told in launch_torch(script, 2, tmp_path, pathlib.Path(__file__).parent):
        assert list(told) == ["ring cfg", "ulysses cfg", "cfg"]
        for degrees, one in told.items():
            assert min(one["made"]) > 60 and min(one["sent"][0]) > 0 and not one["breaks"], (degrees, one)
            assert one["graphs"][0] == one["graphs"][1] > 0, (degrees, one)
            assert [round(after / before) for before, after in zip(*one["sent"])] == [3, 3], "after three steps for one"
