"""Peaks by stage, as a device that counts would tell them: one that only keeps a record stands in for a GPU."""
from types import SimpleNamespace

import paddle
import pytest

from lowbit_video.pipelines import T5EncoderModel
from lowbit_video.pipelines.shared import device_memory
from lowbit_video.pipelines.shared.on_demand import OnDemand
from lowbit_video.pipelines.shared.pipeline import Pipeline
from lowbit_video.pipelines.shared.weights import StoredWeights

from golden_cases import GOLDENS

GIB = 2**30


class Counter:
    """Counts what a test says it allocates on one device."""

    def __init__(self, monkeypatch, device):
        self.device, self.now, self.most, self.asked = device, 0, 0, []
        monkeypatch.setattr(paddle.device.cuda, "reset_max_memory_allocated", self.reset)
        monkeypatch.setattr(paddle.device.cuda, "max_memory_allocated", self.peak)
        monkeypatch.setattr(paddle.device, "synchronize", lambda device: self.asked.append(("synchronize", device)))

    def allocate(self, gib):
        self.now += int(gib * GIB)
        self.most = max(self.most, self.now)

    def reset(self, device):
        assert device == self.device
        self.most = self.now

    def peak(self, device):
        self.asked.append(("peak", device))
        return self.most


@pytest.mark.parametrize("device", ["gpu:1", "cudev:0"])
def test_each_stage_has_its_own_peak(monkeypatch, device):
    counter, seconds, memory = Counter(monkeypatch, device), {}, {}
    pipe = Pipeline(device)
    counter.allocate(30)
    counter.allocate(-28)
    with pipe._stage("text_encode", seconds, memory):
        counter.allocate(9)
        counter.allocate(-10)
    with pipe._stage("denoise", seconds, memory):
        counter.allocate(0.5)
    assert memory == {"text_encode": 11, "denoise": 1.5} and set(seconds) == set(memory)
    assert counter.asked == [("synchronize", device), ("peak", device)] * 2  # what still runs allocates


def test_a_cpu_is_not_asked(monkeypatch):
    counter, seconds, memory = Counter(monkeypatch, "gpu:0"), {}, {}
    with Pipeline("cpu")._stage("decode", seconds, memory):
        pass
    assert set(seconds) == {"decode"} and memory == {} and counter.asked == []
    assert device_memory.peak_gib("cpu") is None


@pytest.mark.parametrize("refusal", [ValueError, RuntimeError])
def test_a_device_without_counters_makes_its_videos_all_the_same(monkeypatch, refusal):
    def refused(device):
        raise refusal("not supported")

    Counter(monkeypatch, "cudev:0")
    for name in ("reset_max_memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(paddle.device.cuda, name, refused)
    seconds, memory = {}, {}
    with Pipeline("cudev:0")._stage("decode", seconds, memory):
        pass
    assert set(seconds) == {"decode"} and memory == {} and device_memory.peak_gib("cudev:0") is None


@pytest.mark.parametrize("current, counted", [("gpu:3", "gpu:3"), ("cpu", "gpu:0")])
def test_a_gpu_without_a_number_is_the_current_one(monkeypatch, current, counted):
    monkeypatch.setattr(paddle, "get_device", lambda: current)
    counter = Counter(monkeypatch, counted)
    device_memory.restart_peak("gpu")
    device_memory.peak_gib("gpu")
    assert counter.asked == [("peak", counted)]


def test_what_is_free_is_what_no_tensor_of_this_process_takes(monkeypatch):
    total = {"gpu:1": 80 * GIB}
    monkeypatch.setattr(paddle.device.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=total[device]))
    monkeypatch.setattr(paddle.device.cuda, "memory_allocated", lambda device: {"gpu:1": 13 * GIB}[device])
    assert device_memory.free_bytes("gpu:1") == 67 * GIB
    assert device_memory.free_bytes("cpu") is device_memory.free_bytes("cudev:0") is None


def test_weights_go_to_the_device_and_its_cache_is_emptied_when_they_leave(monkeypatch):
    """A GPU that only keeps a record of what it is told."""
    told, current = [], ["cpu"]
    model = T5EncoderModel.from_pretrained(GOLDENS / "t5_gated", read=False)
    on_demand = OnDemand("gpu:1", [model])
    monkeypatch.setattr(paddle, "get_device", lambda: current[0])
    monkeypatch.setattr(paddle, "set_device", lambda device: (told.append(device), current.__setitem__(0, device)))
    read = StoredWeights.read
    monkeypatch.setattr(StoredWeights, "read", lambda self, one: (told.append("read"), read(self, one)))
    monkeypatch.setattr(paddle.device.cuda, "empty_cache", lambda: told.append(model.shared.weight._is_initialized()))
    with on_demand.needed(model, now=True):
        assert told == ["gpu:1", "read", "cpu"] and model.shared.weight._is_initialized()
    assert told[3:] == [False]  # emptied, of what has been freed
    monkeypatch.setattr(StoredWeights, "read", lambda self, one: 1 // 0)
    with pytest.raises(ZeroDivisionError), on_demand.needed(model, now=True):
        pass
    assert current == ["cpu"]
