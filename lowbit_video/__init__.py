"""Low-bit attention for video diffusion transformers, PaddlePaddle first.

    from lowbit_video import LowBitAttnProcessor
    from lowbit_video.pipelines import CogVideoXPipeline

    pipe = CogVideoXPipeline.from_pretrained("CogVideoX-2b")
    pipe.set_attn_processor(LowBitAttnProcessor("int8+fp8"))

Importing this package imports NumPy, but no framework and no Triton, and asks no device.
"""
from lowbit_video.attention import attention
from lowbit_video.errors import NonFiniteError, UnsupportedError
from lowbit_video.precision import Precision
from lowbit_video.processors import ExactAttnProcessor, LowBitAttnProcessor, apply, coverage, remove
from lowbit_video.quantize import Quantized, dequantize, quantize
from lowbit_video.varlen import attention_varlen
from lowbit_video.warmup import warmup

__version__ = "0.1.0"
__all__ = ["ExactAttnProcessor", "LowBitAttnProcessor", "NonFiniteError", "Precision", "Quantized", "UnsupportedError", "apply",
           "attention", "attention_varlen", "coverage", "dequantize", "quantize", "remove", "warmup"]
