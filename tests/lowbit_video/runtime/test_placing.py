"""Launches go to shipped kernels where these may serve, on the tensor's device and stream, and otherwise as ever."""
import contextlib
import types

import pytest

from lowbit_video.kernels import launch
from lowbit_video.kernels.shipped.choice import Choice
from lowbit_video.runtime import cuda_driver, placing

BOTH, SHIPPED, COMPILED = Choice(True, True, ""), Choice(True, False, ""), Choice(False, True, "")


@pytest.fixture
def driver(monkeypatch):
    """What is done to contexts, in order."""
    done = []
    monkeypatch.setattr(cuda_driver, "push_device", lambda ordinal: done.append(("push", ordinal)) or ordinal > 0)
    monkeypatch.setattr(cuda_driver, "pop_device", lambda: done.append("pop"))
    monkeypatch.setattr(cuda_driver, "capability", lambda ordinal: (8, 9) if ordinal == 7 else (9, 0))
    return done


@pytest.mark.parametrize(("choice", "ordinal", "there"), [
    (BOTH, 0, True), (SHIPPED, 2, True), (COMPILED, 0, False), (BOTH, 7, False)])
def test_a_place_is_where_shipped_kernels_may_serve(monkeypatch, driver, choice, ordinal, there):
    monkeypatch.setattr(placing, "chosen", lambda: choice)
    place = placing.place(ordinal, lambda: 5)
    assert (place is not None) == there
    assert not there or (place.ordinal, place.stream(), place.driver) == (ordinal, 5, cuda_driver)


def test_launches_of_this_thread_go_to_the_place_and_the_context_is_put_back(driver):
    class Place:
        def __init__(self, ordinal):
            self.ordinal, self.taken = ordinal, []

        def launch(self, *what):
            self.taken.append(what)
            return True

    first, second = Place(1), Place(0)
    with placing.on(None), placing.on(first):
        launch.launch("kernel", (3,), 1, 2, named=3)
        with pytest.raises(ZeroDivisionError), placing.on(second):
            launch.launch("other", (4,))
            raise ZeroDivisionError
        launch.launch("kernel", (5,))
    assert first.taken == [("kernel", (3,), (1, 2), dict(named=3)), ("kernel", (5,), (), {})]
    assert second.taken == [("other", (4,), (), {})]
    assert driver == [("push", 1), ("push", 0), "pop"]  # device 0 was current already


@pytest.mark.parametrize(("choice", "by_triton", "by_us"), [(COMPILED, 1, 0), (BOTH, 1, 1), (SHIPPED, 0, 1)])
def test_paddle_asks_triton_for_nothing_where_only_shipped_kernels_serve(monkeypatch, choice, by_triton, by_us):
    paddle_runtime = pytest.importorskip("lowbit_video.runtime.paddle_runtime", reason="needs Paddle")
    done = []

    @contextlib.contextmanager
    def noting(what):
        done.append(what)
        yield

    monkeypatch.setattr(paddle_runtime, "device_index", lambda t: 1)
    monkeypatch.setattr(paddle_runtime, "chosen", lambda: choice)
    monkeypatch.setattr(paddle_runtime, "_driver", lambda ordinal: f"driver {ordinal}")
    monkeypatch.setattr(paddle_runtime, "_place", lambda ordinal: f"place {ordinal}")
    monkeypatch.setattr(paddle_runtime.triton_driver, "active", noting)
    monkeypatch.setattr(paddle_runtime.placing, "on", noting)
    with paddle_runtime.launch_guard(None):
        pass
    assert done == ["driver 1"] * by_triton + ["place 1"] * by_us


@pytest.mark.torch
@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("index", [0, 1])
def test_torchs_device_is_the_drivers_too(monkeypatch, driver, placed, index):
    """A thread that never used CUDA has no context, and the driver launches nothing without one."""
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    from lowbit_video.runtime import torch_runtime

    entered = []
    place = types.SimpleNamespace(ordinal=index)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device.index) or contextlib.nullcontext())
    monkeypatch.setattr(torch_runtime, "_place", lambda index: place if placed else None)
    with torch_runtime.launch_guard(types.SimpleNamespace(is_cuda=True, device=types.SimpleNamespace(index=index))):
        assert driver == [("push", index)] and getattr(launch._STATE, "place", None) is (place if placed else None)
    assert driver == [("push", index)] + ["pop"] * index and entered == [1] * index  # device 0 was current already
