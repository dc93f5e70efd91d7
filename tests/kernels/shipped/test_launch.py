"""A shipped kernel gets from us what Triton's own launcher would give it, byte for byte; a driver that writes down says so."""
from pathlib import Path

from lowbit_video.kernels.shipped import cases

HERE = Path(__file__).parent


def test_every_launch_is_what_tritons_launcher_makes_of_it(over_fake_cuda, builder):
    told = over_fake_cuda(HERE / "launched_twice.py")
    assert len(told) == len(cases.samples()) + 2  # two whose V has strides of 64 bits
    for one in told:
        kernel = one["key"][0].partition(":")[2]
        assert one["ours"].splitlines()[-1].startswith(f"{kernel} of ") and " on device 1 stream 0x5555 grid " in one["ours"]
        assert one["ours"] == one["theirs"], one["key"]
        # three repetitions: where it was, further on, there again
        assert one["again"] == one["there"], one["key"]
        assert one["there"][0] != one["there"][1]
    shared = [one for one in told if "attribute 8 of" in one["ours"]]
    assert 0 < len(shared) < len(told), "none asked for much shared memory, or all"


def test_calls_without_triton(over_fake_cuda):
    """Whole calls by the engine where no Triton is: what is launched, on which device, and the same again from a plan."""
    told = over_fake_cuda(HERE / "called_without_triton.py")
    assert told["triton"] is None and told["contexts"] == "as before"
    for name, launches in told["calls"].items():
        first, again = launches
        assert first and first == again, name
        assert {line["device"] for line in first} == {1 if name.endswith("on 1") else 0}, name
    names = [line["name"] for line in told["calls"]["int8+fp8 on 0"][0]]
    assert names == ["token_stats_kernel", "fold_stats_kernel", "quant_v_kernel", "quant_qk_kernel", "quant_qk_kernel",
                     "attn_fwd_kernel"]
    assert [line["name"] for line in told["calls"]["exact on 0"][0]] == ["attn_fwd_kernel"]
    assert told["offered"] == {name: [len(first), 0] for name, (first, _) in told["calls"].items()}, "not all from a plan"
    assert "triton-int-fp16: it is not shipped compiled, and nothing is compiled: Triton is not installed" in told["refused"]
    assert told["loaded"] == {"0": 14, "1": 14}  # of 17 launches: V's quantiser, K's in INT8, statistics of K and V twice
