"""PyTorch's wire between processes that torchrun starts, over gloo: what is sent arrives, and attention is one rank's."""
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")
from lowbit_video.distributed import torch_wire  # noqa: E402
from ranks import launch_torch  # noqa: E402

pytestmark = pytest.mark.torch

SCRIPT = """
import json, os
import numpy as np
import torch
import torch.distributed as dist
from helpers import qkv
from lowbit_video import LowBitAttnProcessor
from lowbit_video.distributed.group import Group
from lowbit_video.distributed.ring import ring
from lowbit_video.distributed.torch_wire import TorchWire
from lowbit_video.distributed.ulysses import ulysses
from lowbit_video.hook.attend import exact_attend
from lowbit_video.runtime import torch_runtime as runtime

try:
    TorchWire()
    refused = ""
except RuntimeError as error:
    refused = str(error)
dist.init_process_group("gloo")
wire = TorchWire()
rank, size = wire.rank, wire.size

sizes = [[0, 3, 2], [1, 0, 0], [4, 0, 0]]  # what each sends to each; some send nothing
sent = torch.arange(sum(sizes[rank]), dtype=torch.uint8) + 100 * rank
received = torch.full((sum(row[rank] for row in sizes),), 255, dtype=torch.uint8)
wire.exchange(sent, sizes[rank], received, [row[rank] for row in sizes]).wait()
nothing = torch.empty(0, dtype=torch.uint8)
wire.exchange(nothing, [0] * size, nothing, [0] * size).wait()

mine, other = torch.arange(6).reshape(2, 3).to(torch.bfloat16) + 10 * rank, torch.empty(2, 3, dtype=torch.bfloat16)
works = [wire.send(mine, (rank + 1) % size), wire.receive(other, (rank - 1) % size)]
[work.wait() for work in works]
wire.barrier()
group = Group(wire, range(size))
gathered = [part.tolist() for part in group.all_gather_rows(torch.full((rank + 1, 2), rank), [1, 2, 3], runtime, "test")]

shares, begins = [256, 128, 66], [0, 256, 384]
arrays = [torch.from_numpy(x) for x in qkv(batch=2, heads=4, q_len=450, dim=32)]
cut = [x[:, begins[rank]:][:, :shares[rank]] for x in arrays]
for name, attend in (("exact", exact_attend), ("int8+fp8", LowBitAttnProcessor("int8+fp8").attend)):
    out, lse = attend(*arrays, True, None, True)
    results = {"alone": [x.numpy() for x in (out[:, begins[rank]:][:, :shares[rank]],
                                             lse[:, :, begins[rank]:][:, :, :shares[rank]])]}
    for around in (ulysses, ring):
        for told in (shares, None):
            results[f"{around.__name__} {told is not None}"] = [x.numpy() for x in around(attend, group, shares=told)(
                *cut, True, None, True)]
    results["int8"] = [x.numpy() for x in ulysses(attend, group, output="int8", shares=shares)(*cut, True, None, True)]
    np.savez(os.path.join(os.environ["RANK_OUT"], f"{name}{rank}.npz"),
             **{f"{key} {what}": x for key, pair in results.items() for what, x in zip(("out", "lse"), pair)})
with open(os.path.join(os.environ["RANK_OUT"], f"{rank}.json"), "w") as file:
    json.dump(dict(refused=refused, received=received.tolist(), other=other.tolist(), gathered=gathered,
                   sent=group.traffic.as_dict()["sent_total"]), file)
dist.destroy_process_group()
"""


def test_tensors_travel_as_the_bytes_that_they_are():
    tensor = torch.ones(2, 3, dtype=torch.bfloat16)
    sent = torch_wire._bytes(tensor)
    assert sent.dtype == torch.uint8 and sent.shape == (12,) and sent.data_ptr() == tensor.data_ptr()


def test_a_barrier_is_one(monkeypatch):
    met = []
    monkeypatch.setattr(torch_wire.dist, "barrier", lambda: met.append(1))
    torch_wire.TorchWire.barrier(None)
    assert met == [1]


def test_three_processes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    found = launch_torch(script, 3, tmp_path)
    assert all("start with torchrun, call init_process_group() first" in one["refused"] for one in found)
    assert [one["received"] for one in found] == [[100, 200, 201, 202, 203], [0, 1, 2], [3, 4]]
    for rank, one in enumerate(found):
        assert one["other"] == [[10 * ((rank - 1) % 3) + 3 * row + column for column in range(3)] for row in range(2)]
        assert one["gathered"] == [[[other] * 2] * (other + 1) for other in range(3)] and one["sent"] > 10_000
    for name, floors in (("exact", (1e-5, 1e-5)), ("int8+fp8", (1e-4, 0.05))):
        for rank in range(3):
            arrays = np.load(tmp_path / f"{name}{rank}.npz")
            for key in ("ulysses True", "ulysses False", "ring True", "ring False", "int8"):
                limit = max(floors[key.startswith("ring")], 0.05 if key == "int8" and name != "exact" else 0)
                wanted = arrays["alone out"]
                assert np.abs(arrays[f"{key} out"] - wanted).max() < limit * np.abs(wanted).max(), (name, rank, key)
                np.testing.assert_allclose(arrays[f"{key} lse"], arrays["alone lse"], atol=1e-2 if "+" in name else 1e-4)
