"""Number formats, quantization of tensors, conversions between quantized tensors, and recipes.

formats     what the codes of a format of up to 8 bits mean, and rounding to them
spec        `QuantSpec`: element, block, scale and rule, as a line of text
scaling     scales from the largest magnitude of a block
quantize    tensors to codes and scales and back
convert     codes and scales of one spec to those of another, without the tensor
keys        which operand of which product a spec of a recipe is about
recipe      names for pipelines of passes
backends    what the scaled products of libraries take
te          recipes of TransformerEngine, and its layout of block-wise quantized matrices
"""

from .convert import Exactness, convert, exactness, transpose_scaled
from .formats import Format, format_names, get_format, register_format
from .quantize import TwoLevel, dequantize, quality, quantize
from .scaling import scales_from_amax
from .spec import QuantSpec

__all__ = [
    "Exactness",
    "Format",
    "QuantSpec",
    "TwoLevel",
    "convert",
    "dequantize",
    "exactness",
    "format_names",
    "get_format",
    "quality",
    "quantize",
    "register_format",
    "scales_from_amax",
    "transpose_scaled",
]
