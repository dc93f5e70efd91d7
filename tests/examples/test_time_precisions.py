"""`time_precisions.py`: every run in turns, on a toy model; ratios of pairs, by hand."""
import json
from types import SimpleNamespace

import pytest

from lowbit_video.hook.order import order_of

pytest.importorskip("torch", reason="the model is made of PyTorch's modules")
pytest.importorskip("diffusers", reason="the model is made of diffusers' classes")
pytest.importorskip("transformers", reason="the text encoder is transformers' T5EncoderModel")
pytest.importorskip("skimage", reason="SSIM is scikit-image's")
pytestmark = pytest.mark.torch
RUNS = ["exact", "floor", "int8+fp8", "int4+fp16"]


@pytest.fixture(scope="module")
def timing(code):
    return code.timing


def test_every_run_is_timed_in_turns_by_its_own_transformer(timing, model, tmp_path, monkeypatch, capsys):
    seen, noises = [], set()
    make = timing.TorchMaker.make

    def watched(self, caption, noise, steps=None):
        latents, seconds = make(self, caption, noise, steps)
        processor = str(self.pipe.transformer.transformer_blocks[0].attn1.processor)
        assert order_of(self.pipe.transformer) == "hilbert"
        noises.add((caption, noise.double().sum().item()))
        seen.append((id(self.pipe.transformer), caption, processor, latents.double().sum().item()))
        return latents, seconds

    monkeypatch.setattr(timing.TorchMaker, "make", watched)
    out = tmp_path / "new" / "seconds.json"
    assert timing.main(["--model", str(model), "--device", "cpu", "--captions", "2", "--rounds", "3", "--steps", "2", "--order",
                        "hilbert", "--precisions", "int8+fp8", "int4+fp16", "--out", str(out)]) == 0
    warm, timed = seen[:timing.WARM * 4], seen[timing.WARM * 4:]
    order = [one[0] for one in warm[::timing.WARM]]
    assert len(set(order)) == 4 and [one[0] for one in timed] == [
        *order * 2, *order[::-1] * 2, *order * 2], "each caption by all, every other round backwards"
    assert {one[1] for one in warm} == {timed[0][1]} != {timed[4][1]}
    assert [[name in one[2] for name in RUNS[2:]] for one in timed[:4]] == [[False] * 2] * 2 + [[True, False], [False, True]]
    assert len(noises) == len({noise for _, noise in noises}) == 2, "each caption its own noise, for all runs"
    assert len({one[3] for one in timed}) == 8, "two captions by four attentions, the same in every round"
    record = json.loads(out.read_text())
    assert list(record["rows"]) == RUNS and [len(row["timed"]) for row in record["rows"].values()] == [3] * 4
    assert (record["steps"], record["order"], record["rounds"], record["captions"]) == (2, "hilbert", 3, 2)
    assert record["compiled"] is record["cuda_graph"] is False and record["environment"]["device"] == "cpu"
    assert out.with_suffix(".md").read_text() in capsys.readouterr().out


def test_a_speed_up_is_of_pairs_over_the_fastest_exact_attention(timing):
    seconds = {"exact": [[8.0, 4.0], [8.0, 4.0]], "floor": [[2.0, 4.0], [6.0, 2.0]], "int8+fp8": [[1.0, 4.0], [2.0, 0.5]],
               "int4+fp16": [[4.0, 8.0], [12.0, 4.0]]}
    rows, best = timing.rows_of(seconds)
    assert best == "floor" and rows["floor"]["speed_up"]["value"] == 1.0
    assert rows["int8+fp8"]["speed_up"]["value"] == 2.5 and rows["int4+fp16"]["speed_up"]["value"] == 0.5
    assert rows["int4+fp16"]["speed_up"]["low"] == rows["int4+fp16"]["speed_up"]["high"] == 0.5
    assert rows["int8+fp8"]["seconds"]["value"] == 1.5 and rows["int8+fp8"]["timed"] == seconds["int8+fp8"]
    record = {"steps": 25, "dtype": "float16", "compiled": True, "cuda_graph": True, "captions": 2, "rounds": 2, "rows": rows,
              "best_exact": best, "environment": {"device": "H100", "commit": "abc"}}
    text = timing.markdown(record)
    assert "blocks compiled, as CUDA graphs" in text and "speed-up: over floor, in pairs" in text
    assert "| int4+fp16 | 6.0000 (" in text and "| 0.500 (0.500..0.500)x |" in text


@pytest.mark.parametrize("argv, says", [
    (["--captions", "0"], "--captions 0: at least one is needed"), (["--steps", "0"], "--steps 0: at least one is needed"),
    (["--precisions", "int8+fp8", "int8+fp9"], "--precisions int8+fp9: unknown precision 'int8+fp9'; there are: fp16"),
    (["--precisions", "exact"], "--precisions exact: 'exact' always runs"),
    (["--model", "/nonexistent"], "--model /nonexistent: no generation.json there with num_inference_steps, guidance_scale")])
@pytest.mark.parametrize("script", ["timing", "evaluate"])
def test_what_cannot_be_meant_is_refused_by_the_parser(code, script, argv, says, capsys):
    with pytest.raises(SystemExit):
        getattr(code, script).arguments(argv)
    assert says in " ".join(capsys.readouterr().err.split())


def test_neither_can_no_rounds_or_a_torn_model(timing, tmp_path, capsys):
    (tmp_path / "generation.json").write_text("{")
    for argv, says in ((["--rounds", "0"], "--rounds 0: at least one is needed"),
                       (["--model", str(tmp_path)], "correct it or remove it")):
        with pytest.raises(SystemExit):
            timing.arguments(argv)
        assert says in capsys.readouterr().err


def test_tables_need_no_model(code, tmp_path):
    assert code.evaluate.arguments(["--tables", "--model", "/nonexistent", "--out", str(tmp_path)]).tables


def test_a_maker_of_its_own_shares_all_but_the_transformer(timing):
    class Pipe:
        def __init__(self, **components):
            self.components = components

    maker = SimpleNamespace(pipe=Pipe(transformer=[1], vae=object()))
    one = timing.own(maker)
    ours, theirs = one.pipe.components, maker.pipe.components
    assert ours["vae"] is theirs["vae"] and one is not maker
    assert ours["transformer"] == [1] and ours["transformer"] is not theirs["transformer"]
