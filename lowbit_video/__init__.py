"""Low-bit attention for video diffusion transformers, PaddlePaddle first.

    from lowbit_video import LowBitAttnProcessor
    from lowbit_video.pipelines import CogVideoXPipeline

    pipe = CogVideoXPipeline.from_pretrained("CogVideoX-2b")
    pipe.set_attn_processor(LowBitAttnProcessor("int8+fp8"))

Importing this package imports NumPy, but no framework and no Triton, and asks no device.
"""
from .api import attention, attention_varlen
from .codes import attention_of_codes, prequantize
from .cuda_graphs.forward import cuda_graph
from .distributed.context_parallel import cp_plan
from .distributed.parallelize import parallelize, unparallelize
from .engine.codes import AttentionCodes
from .errors import NonFiniteError, UnsupportedError
from .hook.apply import apply, remove
from .hook.dispatcher.register import register_diffusers, unregister_diffusers
from .hook.frames import declare_attention
from .hook.order import order_tokens
from .hook.processors import ExactAttnProcessor, LowBitAttnProcessor
from .hook.recipe.clock import denoising_step
from .hook.recipe.recipe import Recipe
from .hook.report import coverage
from .pooled import Pooled
from .precision import Precision
from .quantized import Quantized, dequantize, quantize
from .warming import warmup

__version__ = "0.1.0"
__all__ = ["AttentionCodes", "ExactAttnProcessor", "LowBitAttnProcessor", "NonFiniteError", "Pooled", "Precision", "Quantized",
           "Recipe", "UnsupportedError", "apply", "attention", "attention_of_codes", "attention_varlen", "coverage", "cp_plan",
           "cuda_graph", "declare_attention", "denoising_step", "dequantize", "order_tokens", "parallelize", "prequantize",
           "quantize", "register_diffusers", "remove", "unparallelize", "unregister_diffusers", "warmup"]
