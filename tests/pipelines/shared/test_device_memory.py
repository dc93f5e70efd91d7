"""Peaks by stage, as a device that counts would tell them: one that only keeps a record stands in for a GPU."""
import paddle
import pytest

from lowbit_video.pipelines.shared import device_memory
from lowbit_video.pipelines.shared.pipeline import Pipeline

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
