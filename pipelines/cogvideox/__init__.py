"""CogVideoX in PaddlePaddle; names are imported when used, so that this alone needs no Paddle."""
from __future__ import annotations

import importlib
from typing import Any

_MODULE_OF = {
    "AutoencoderKLCogVideoX": ".vae",
    "CogVideoXDDIMScheduler": ".scheduler",
    "CogVideoXDPMScheduler": ".scheduler_dpm",
    "CogVideoXPipeline": ".pipeline",
    "CogVideoXTransformer3DModel": ".transformer",
    "PipelineOutput": "..shared.output",
    "T5EncoderModel": "..shared.t5",
    "T5Tokenizer": "..shared.t5_tokenizer",
    "check_writable": "..shared.video_files",
    "export_to_video": "..shared.video_files",
    "make_random_pipeline": ".random_model",
    "read_video": "..shared.video_files",
    "side_by_side": "..shared.video_files",
}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_MODULE_OF[name], __name__), name)
