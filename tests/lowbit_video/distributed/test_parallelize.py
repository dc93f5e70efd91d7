"""One video on several ranks: the same as on one, whatever is shared; what cannot be shared is refused by name."""
import copy
import functools
import importlib
import threading
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

paddle = pytest.importorskip("paddle", reason="paddlepaddle is not installed")
from lowbit_video import (  # noqa: E402
    ExactAttnProcessor,
    LowBitAttnProcessor,
    UnsupportedError,
    apply,
    coverage,
    parallelize,
    remove,
    unparallelize,
)
from lowbit_video.app.ranks import describe  # noqa: E402
from lowbit_video.distributed.mesh import Degrees, Mesh  # noqa: E402
from lowbit_video.pipelines import CogVideoXPipeline, make_random_pipeline  # noqa: E402
from lowbit_video.runtime import paddle_runtime  # noqa: E402
from ranks import run_threads  # noqa: E402

import toy_model  # noqa: E402
from helpers import sqnr_db  # noqa: E402

CALL = dict(num_inference_steps=2, num_frames=9, height=48, width=80, seed=3, progress=False, output_type="latent")
"""90 video tokens and 24 text tokens: one block of K's scales, so shares are even."""
FLOAT32_DB = 90.0
"""What float32 keeps of a sum taken in another order."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: make_random_pipeline(tmp_path_factory.mktemp(kind), kind=kind) for kind in ("2b", "5b", "1.5")}


loaded = functools.cache(functools.partial(CogVideoXPipeline.from_pretrained, device="cpu"))


def load(folder):
    """A pipeline of its own, but for the VAE's layers: to make them is most of the work, and nothing here changes them."""
    pipe = copy.copy(loaded(folder))
    for name in ("transformer", "text_encoder", "scheduler"):
        setattr(pipe, name, copy.deepcopy(getattr(pipe, name)))
    pipe.vae = copy.copy(pipe.vae)
    return pipe


def on_ranks(folder, size, precision="exact", prompt="a cat", call=CALL, **degrees):
    """(latents of each rank, its report)."""
    def work(wire):
        pipe = load(folder)
        apply(pipe, precision)
        handle = parallelize(pipe, wire=wire, **degrees)
        return pipe(prompt, **call).frames.numpy(), handle.report()

    return run_threads(size, work)


def alone(folder, precision="exact", prompt="a cat", call=CALL):
    pipe = load(folder)
    apply(pipe, precision)
    return pipe(prompt, **call).frames.numpy()


@pytest.mark.parametrize("kind, size, degrees", [
    ("2b", 2, dict(ulysses=2, cfg=1)), ("5b", 2, dict(ring=2, cfg=1)), ("5b", 2, dict(cfg=2)), ("1.5", 4, dict(ulysses=2)),
    ("5b", 4, dict(ulysses=2, ring=2, cfg=1)), ("2b", 3, dict(ring=3)), ("5b", 2, {})],
    ids=lambda value: "-".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else str(value))
def test_exact_attention_gives_the_same_video_on_any_number_of_ranks(folders, kind, size, degrees):
    wanted = alone(folders[kind])
    made = on_ranks(folders[kind], size, **degrees)
    for got, report in made:
        assert sqnr_db(got, wanted) > FLOAT32_DB
        assert np.array_equal(got, made[0][0]), "ranks ended with different latents"
        assert report["ranks"] == size and not report["coverage_differs"] and report["devices"] == ["cpu"] * size
    chosen = made[0][1]["degrees"]
    assert all(chosen[name] == degree for name, degree in degrees.items())
    assert chosen["cfg"] * chosen["ulysses"] * chosen["ring"] == size


@pytest.mark.parametrize("degrees", [dict(ulysses=2, cfg=1), dict(ring=2, cfg=1), dict(cfg=2)], ids=str)
def test_low_bit_costs_on_several_ranks_what_it_costs_on_one(folders, degrees):
    exact, low = alone(folders["5b"]), alone(folders["5b"], "int8+fp8")
    made, report = on_ranks(folders["5b"], 2, "int8+fp8", **degrees)[0]
    assert sqnr_db(made, exact) > sqnr_db(low, exact) - 3 and not np.array_equal(made, exact)
    sent = report["traffic"][1]["sent"]
    assert ("guidance" in sent) == (degrees["cfg"] == 2) and sum(sent.values()) > 1000


def test_noise_embeddings_and_seeds_are_those_of_rank_0(folders):
    """DPM draws noise in every step; what other ranks hold does not matter."""
    normal = np.random.default_rng(5).standard_normal
    noise, text = normal((2, 4, 8, 6, 10)).astype(np.float32), normal((1, 24, 32)).astype(np.float32)
    given = {"embeddings": lambda rank: dict(prompt=None, prompt_embeds=text + rank),
             "seed": lambda rank: dict(seed=None if rank else [7, 9]),
             "generator": lambda rank: dict(seed=None, generator=np.random.default_rng(rank)),
             "latents": lambda rank: dict(seed=rank, latents=noise + rank)}
    for name, of_rank in given.items():
        call = {**CALL, "num_videos_per_prompt": 2, "prompt": "a cat"}
        single = load(folders["1.5"])(**{**call, **of_rank(0)})

        def work(wire, of_rank=of_rank, call=call):
            pipe = load(folders["1.5"])
            parallelize(pipe, cfg=1, wire=wire)
            return pipe(**{**call, **of_rank(wire.rank)})

        for made in run_threads(2, work):
            assert made.seeds == single.seeds, name
            assert sqnr_db(made.frames.numpy(), single.frames.numpy()) > FLOAT32_DB, name


def test_processors_may_be_set_applied_and_removed_before_and_after(folders):
    exact, low = alone(folders["2b"]), alone(folders["2b"], "int4+fp8")

    def work(wire):
        pipe, seen = load(folders["2b"]), []
        make = lambda: seen.append(pipe("a cat", **CALL).frames.numpy())
        apply(pipe, "int4+fp8")
        with parallelize(pipe, cfg=1, wire=wire):
            make()
            remove(pipe)
            make()
            pipe.set_attn_processor(LowBitAttnProcessor("int4+fp8"))
            make()
            counted = [module.calls for module in coverage(pipe).modules]
        assert pipe.parallel is None and pipe.transformer.split is None and not unparallelize(pipe)
        make()
        return seen, counted

    for (first, second, third, after), counted in run_threads(2, work):
        assert sqnr_db(second, exact) > FLOAT32_DB and np.array_equal(after, low)
        for got in (first, third):
            assert np.array_equal(got, first) and abs(sqnr_db(got, exact) - sqnr_db(low, exact)) < 3
        assert min(counted) >= 2


def test_a_forward_that_is_compiled_whole_is_refused(folders):
    first, second = load(folders["2b"]), load(folders["2b"])
    paddle.jit.to_static(first.transformer, full_graph=True)
    with pytest.raises(UnsupportedError, match=r"compile with pipe.compile\(\)"):
        parallelize(first, wire=Alone())
    parallelize(second, wire=Alone())
    whole = paddle.jit.to_static(second.transformer, full_graph=True)
    with pytest.raises(UnsupportedError, match=r"compile with pipe.compile\(\)"):
        whole(paddle.zeros([1, 3, 8, 6, 10]), paddle.zeros([1, 24, 32]), paddle.to_tensor([1]))


def test_an_interrupt_on_one_rank_stops_all_after_the_same_step(folders):
    def work(wire):
        pipe, steps = load(folders["2b"]), []

        def callback(pipe, step, timestep, tensors):
            steps.append(step)
            pipe.interrupt = wire.rank == 1 and step == 1

        parallelize(pipe, cfg=1, wire=wire)
        pipe("a cat", **{**CALL, "num_inference_steps": 5}, callback_on_step_end=callback)
        return steps, pipe.interrupt

    assert run_threads(2, work) == [([0, 1], True)] * 2


def test_every_rank_has_the_video_however_many_decode(folders):
    call = {**CALL, "output_type": "np", "num_frames": 17, "num_inference_steps": 1}  # the VAE makes two pieces of 17 frames
    wanted = load(folders["2b"])("a cat", **call).frames

    def work(wire):
        pipe = load(folders["2b"])
        videos, sent = [], []
        for vae in (1, 2):
            with parallelize(pipe, cfg=2, vae=vae, wire=wire) as handle:
                videos.append(pipe("a cat", **call).frames)
                sent.append("decode" in handle.report()["traffic"][0]["sent"])
        assert pipe.vae.group is None
        return videos, sent

    for videos, sent in run_threads(2, work):
        assert all(np.abs(video - wanted).max() < 1e-4 for video in videos) and sent == [False, True]


def test_a_batch_without_halves_is_computed_by_both_groups_with_one_warning(folders):
    call = {**CALL, "guidance_scale": 1.0}
    wanted = alone(folders["5b"], call=call)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = on_ranks(folders["5b"], 2, call=call, cfg=2)
    assert all(np.array_equal(got, wanted) for got, _ in made)
    assert sum("cfg 2 gains nothing here: a batch of 1" in str(one.message) for one in caught) == 2, "one a rank"
    two = {**call, "num_videos_per_prompt": 2}
    assert sqnr_db(on_ranks(folders["5b"], 2, call=two, cfg=2)[1][0], alone(folders["5b"], call=two)) > FLOAT32_DB


def test_other_arguments_on_another_rank_are_named_on_every_rank(folders):
    def work(wire):
        pipe = load(folders["2b"])
        parallelize(pipe, wire=wire)
        with pytest.raises(ValueError, match="ranks 0 and 1 gave the pipeline different settings .num_inference_steps: 2 and"):
            pipe("a cat", **{**CALL, "num_inference_steps": 2 + wire.rank})
        unparallelize(pipe)
        with pytest.raises(ValueError, match="ranks 0 and 1 gave parallelize different settings .exchange: 'auto' and 'int8'"):
            parallelize(pipe, wire=wire, exchange=("auto", "int8")[wire.rank])

    run_threads(2, work)


def test_what_would_attend_within_a_share_alone_is_refused(folders):
    def foreign(attn, *tokens):
        return ExactAttnProcessor()(attn, *tokens)

    def work(wire):
        pipe = load(folders["2b"])
        parallelize(pipe, cfg=1, wire=wire)
        attn = pipe.transformer.transformer_blocks[1].attn1
        mask = paddle.zeros([1, 12])
        with pytest.raises(UnsupportedError, match=r"shape \[1, 12\] was given, and the tokens are shared"):
            attn(paddle.zeros([1, 8, 128]), paddle.zeros([1, 4, 128]), attention_mask=mask)
        attn.set_processor(foreign)
        with pytest.raises(UnsupportedError, match="transformer_blocks.1.attn1 has the processor function"):
            pipe("a cat", **CALL)
        unparallelize(pipe)
        pipe("a cat", **CALL)
        parallelize(pipe, cfg=2, wire=wire)  # whole tokens on every rank
        return pipe("a cat", **CALL).frames.numpy()

    for made in run_threads(2, work):
        assert sqnr_db(made, alone(folders["2b"])) > FLOAT32_DB


def test_unequal_memory_is_said_once_and_other_attention_is_reported(folders, monkeypatch):
    ranks = {}
    monkeypatch.setattr(paddle_runtime, "memory_gib", lambda like: (79.2, 39.6)[ranks[threading.get_ident()]])

    def work(wire):
        ranks[threading.get_ident()] = wire.rank
        pipe = load(folders["2b"])
        apply(pipe, ("int8+fp16", "int8+fp8")[wire.rank])
        handle = parallelize(pipe, cfg=2, wire=wire)
        pipe("a cat", **CALL)
        return handle.report()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reports = run_threads(2, work)
    said = [str(one.message) for one in caught if "memory" in str(one.message)]
    assert said == ["the GPUs have unequal memory (79 GiB on rank 0, 40 GiB on rank 1); the smallest one limits what fits"]
    assert reports[0] == reports[1] and reports[0]["memory_gib"] == [79.2, 39.6]
    assert list(reports[0]["coverage_differs"]) == ["1"]
    (run,) = reports[0]["coverage_differs"]["1"]["transformer.transformer_blocks.0.attn1"]
    assert run[0].startswith("int8+fp8") and run[1:] == [2, ""]
    assert "rank 1 ran other attention than rank 0: {'transformer.transformer_blocks.0.attn1'" in describe(reports[0])


def test_a_copy_of_a_shared_model_computes_alone(folders):
    def work(wire):
        pipe = load(folders["2b"])
        given = paddle.ones([2, 3, 8, 6, 10]), paddle.ones([2, 24, 32]), paddle.to_tensor([500, 500])
        with paddle.no_grad():
            wanted = pipe.transformer(*given).numpy()
            parallelize(pipe, cfg=1, wire=wire)
            return np.abs(copy.deepcopy(pipe.transformer)(*given).numpy() - wanted).max() if wire.rank == 0 else 0.0

    assert run_threads(2, work) == [0.0, 0.0]


@pytest.mark.parametrize("degrees", [(2, 3), (3, 2), (6, 1), (1, 6)], ids=str)
def test_each_wrapper_gets_its_choices_group_and_shares(degrees, monkeypatch):
    """Ulysses' ranks are neighbours, of which the ring has every n-th; a part of the keys is what neighbours have together."""
    module = importlib.import_module("lowbit_video.distributed.parallelize")
    heads_by, ring_of = degrees
    for name in ("ulysses", "ring"):
        monkeypatch.setattr(module, name, lambda *given, name=name: (name, *given))
    shares = [10, 11, 12, 13, 14, 15]
    for rank in range(6):
        wire = SimpleNamespace(rank=rank, size=6)
        mesh = Mesh(wire, Degrees(ulysses=heads_by, ring=ring_of))
        wanted, first = "attend", rank // heads_by * heads_by
        if ring_of > 1:
            parts = [sum(shares[begin:begin + heads_by]) for begin in range(0, 6, heads_by)]
            wanted = ("ring", wanted, mesh.ring, "int8", parts)
            assert mesh.ring.ranks == tuple(range(rank % heads_by, 6, heads_by))
        if heads_by > 1:
            wanted = ("ulysses", wanted, mesh.ulysses, "int8", "int4", shares[first:first + heads_by])
            assert mesh.ulysses.ranks == tuple(range(first, first + heads_by))
        assert module._around(mesh, SimpleNamespace(shares=shares), "int8", "int4")("attend") == wanted


class Alone:
    """A wire of one rank."""

    rank, size = 0, 1


@pytest.mark.parametrize("options, words", [
    (dict(exchange="int2"), "unknown exchange 'int2'; there are: auto, 16bit, int8, int4"),
    (dict(output="int4"), "unknown output 'int4'; there are: 16bit, int8"),
    (dict(ulysses=2), "do not make 1 ranks")], ids=str)
def test_options_that_cannot_be_meant_are_refused(folders, options, words):
    with pytest.raises(ValueError, match=words):
        parallelize(load(folders["2b"]), wire=Alone(), **options)


def test_models_and_calls_that_cannot_share_are_refused(folders, monkeypatch):
    with pytest.raises(UnsupportedError, match="Model cannot share its tokens"):
        parallelize(toy_model.model(), wire=Alone())
    with pytest.raises(ValueError, match="no attention module"):
        parallelize(paddle.nn.Linear(2, 2), wire=Alone())
    pipe = load(folders["2b"])
    monkeypatch.delenv("PADDLE_TRAINERS_NUM", raising=False)
    with pytest.raises(RuntimeError, match="only one process runs: start several with `python -m paddle.distributed.launch"):
        parallelize(pipe)
    assert pipe.parallel is None
    parallelize(pipe.transformer, wire=Alone())
    with pytest.raises(ValueError, match="is parallel already; call unparallelize first"):
        parallelize(pipe, wire=Alone())
    assert unparallelize(pipe) and not unparallelize(pipe)
