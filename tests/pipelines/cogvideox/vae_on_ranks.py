"""One of several processes: decodes and encodes with the others and by itself, and writes whether both are the same."""
import json
import os

import paddle

from lowbit_video.distributed.group import Group
from lowbit_video.distributed.paddle_wire import paddle_wire
from lowbit_video.pipelines.cogvideox.vae import AutoencoderKLCogVideoX

from golden_cases import GOLDENS

wire = paddle_wire()
vae = AutoencoderKLCogVideoX.from_pretrained(GOLDENS / "vae_small")
group = Group(wire, range(wire.size))
paddle.seed(5)
latents = paddle.randn([1, 4, 7, 4, 5])
video = vae.decode(latents)
same = {}
for degree, tile in ((3, None), (2, (24, 32))):  # pieces, whole tiles
    if tile is not None:
        vae.enable_tiling(*tile)
    results = []
    for vae.group, vae.degree in ((None, None), (group, degree)):
        results.append((vae.decode(latents), vae.encode(video).mean))
    same[f"degree {degree}, tiles {tile}"] = [bool((one == other).all()) for one, other in zip(*results)]
with open(os.path.join(os.environ["RANK_OUT"], f"{wire.rank}.json"), "w") as file:
    json.dump({"same": same, "sent": group.traffic.sent}, file)
