"""Low-bit attention for video diffusion transformers, PaddlePaddle first.

    from lowbit_video import LowBitAttnProcessor
    from lowbit_video.pipelines import CogVideoXPipeline

    pipe = CogVideoXPipeline.from_pretrained("CogVideoX-2b")
    pipe.set_attn_processor(LowBitAttnProcessor("int8+fp8"))

Importing this package imports NumPy, but no framework and no Triton, and asks no device.
"""
from .api import attention
from .errors import NonFiniteError, UnsupportedError
from .hook.processors import ExactAttnProcessor, LowBitAttnProcessor, apply, coverage, remove
from .precision import Precision
from .quantized import Quantized, dequantize, quantize
from .varlen import attention_varlen
from .warming import warmup

__version__ = "0.1.0"
__all__ = ["ExactAttnProcessor", "LowBitAttnProcessor", "NonFiniteError", "Precision", "Quantized", "UnsupportedError", "apply",
           "attention", "attention_varlen", "coverage", "dequantize", "quantize", "remove", "warmup"]
