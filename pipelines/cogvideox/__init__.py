"""CogVideoX in PaddlePaddle; names are imported when used, so that this alone needs no Paddle."""
from __future__ import annotations

import importlib
from typing import Any

_MODULE_OF = {
    "AutoencoderKLCogVideoX": "vae",
    "CogVideoXDDIMScheduler": "scheduler",
    "CogVideoXDPMScheduler": "scheduler_dpm",
    "CogVideoXPipeline": "pipeline",
    "CogVideoXTransformer3DModel": "transformer",
    "PipelineOutput": "pipeline",
    "T5EncoderModel": "text_encoder",
    "T5Tokenizer": "tokenizer",
    "check_writable": "export",
    "export_to_video": "export",
    "make_random_pipeline": "random_model",
    "read_video": "export",
    "side_by_side": "export",
}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
