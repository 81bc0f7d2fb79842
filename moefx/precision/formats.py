"""Number formats of up to 8 bits: what their codes mean, and rounding to them, bit for bit alike on every device.

A format is described by its parameters (sign, exponent and mantissa bits, bias, special values), so that a new one
needs no new code. Those that torch knows as a dtype use torch's cast where it gives the same bits. Parameters: OCP
8-bit Floating Point (OFP8) 1.0 and OCP Microscaling (MX) 1.0; the FNUZ variant is that of AMD's gfx942.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from moefx.errors import InputError, RecipeError, nearest

Tensor = torch.Tensor
Special = Literal["fn", "fnuz", "ieee", "none"]
SPECIALS: tuple[Special, ...] = ("fn", "fnuz", "ieee", "none")
MIN_NORMAL = 2.0**-126  # of fp32


@dataclass(frozen=True)
class Format:
    """A number format of at most 8 bits.

    Args:
        name: lower-case letters and digits, as specs spell it.
        exponent_bits, mantissa_bits, bias: a code with exponent field e and mantissa field m is
            (1 + m / 2^mantissa_bits) * 2^(e - bias), and for e = 0 the subnormal m / 2^mantissa_bits * 2^(1 - bias).
        special: "fn": NaN is all ones, no infinity; "fnuz": NaN is the code of -0, no infinity; "ieee": the largest
            exponent field holds infinity and NaN; "none": every code is a number.
        dtype: the torch dtype of stored tensors, when torch has this very format; otherwise they are uint8.
        signed: False only for a scale format that is nothing but an exponent (E8M0): 2^(code - bias), no zero.

    Raises:
        RecipeError: parameters that make no format, or one whose numbers fp32 does not hold as normal numbers.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    special: Special = "none"
    dtype: torch.dtype | None = None
    signed: bool = True

    def __post_init__(self) -> None:
        def refuse(why: str) -> None:
            raise RecipeError(f"{self.name!r} is not a usable number format", why=why)

        if not re.fullmatch(r"[a-z][a-z0-9]*", self.name):
            refuse("a name is lower-case letters and digits")
        if self.special not in SPECIALS:
            refuse(f"special values {self.special!r}: {nearest(str(self.special), SPECIALS)}")
        if not self.signed:
            if (self.exponent_bits, self.mantissa_bits, self.bias, self.special) != (8, 0, 127, "fn"):
                refuse("the only unsigned format is the exponent of fp32: 8 exponent bits, no mantissa, bias 127, fn")
            return
        if self.exponent_bits < 1 or self.mantissa_bits < 0 or self.bits > 8:
            refuse(f"a sign, {self.exponent_bits} exponent and {self.mantissa_bits} mantissa bits; at most 8 together")
        if self.max_code >> self.mantissa_bits < 1 or (self.special == "ieee" and self.mantissa_bits < 1):
            refuse("no code is left for a normal number")
        if 1 - self.bias - self.mantissa_bits < -126 or self.emax > 126:
            refuse(f"bias {self.bias} puts numbers outside the normal numbers of fp32")
        if self.dtype is not None and self.bits != 8:
            refuse(f"{self.dtype} has 8 bits, the format {self.bits}")

    # -- derived parameters ------------------------------------------------------------------------------------------

    @property
    def bits(self) -> int:
        """Size of one code in bits."""
        return self.signed + self.exponent_bits + self.mantissa_bits

    @property
    def max_code(self) -> int:
        """Code of the largest finite number."""
        ones = (1 << (self.exponent_bits + self.mantissa_bits)) - 1
        if self.special == "ieee":
            return (((1 << self.exponent_bits) - 1) << self.mantissa_bits) - 1
        return ones - 1 if self.special == "fn" else ones

    @property
    def emax(self) -> int:
        """Exponent of the largest finite number."""
        return (self.max_code >> self.mantissa_bits) - self.bias

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal number."""
        return 1 - self.bias if self.signed else -self.bias

    @property
    def max(self) -> float:
        """Largest finite number."""
        fraction = self.max_code & ((1 << self.mantissa_bits) - 1)
        return math.ldexp((1 << self.mantissa_bits) + fraction, self.emax - self.mantissa_bits)

    @property
    def min_normal(self) -> float:
        """Smallest positive normal number."""
        return math.ldexp(1.0, self.emin)

    @property
    def quantum(self) -> float:
        """Smallest positive number, the step between subnormal numbers."""
        return math.ldexp(1.0, self.emin - self.mantissa_bits)

    @property
    def has_nan(self) -> bool:
        """Whether some code is NaN."""
        return self.special != "none"

    # -- storage -----------------------------------------------------------------------------------------------------

    @property
    def storage(self) -> torch.dtype:
        """dtype of stored tensors: torch's own for this format, or uint8."""
        return self.dtype or torch.uint8

    @property
    def per_byte(self) -> int:
        """Codes in one stored byte: two when they have at most 4 bits, else one."""
        return 2 if self.bits <= 4 else 1

    def stored_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the stored tensor for codes of `shape`: the last axis may be packed."""
        *front, width = shape
        return (*front, -(-width // self.per_byte))

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of the stored codes of a tensor of `shape`."""
        return math.prod(self.stored_shape(shape))

    def store(self, codes: Tensor) -> Tensor:
        """Codes (uint8, [..., N]) as they are kept: `storage` dtype, [..., N]; two 4-bit codes in a byte along the last
        axis, the even column in the low nibble, a zero nibble behind an odd width: [..., ceil(N/2)]."""
        if self.per_byte == 1:
            return codes.view(self.storage)
        if codes.shape[-1] % 2:
            codes = torch.nn.functional.pad(codes, (0, 1))
        return codes[..., ::2] | (codes[..., 1::2] << 4)

    def load(self, stored: Tensor, width: int | None = None) -> Tensor:
        """Codes (uint8, [..., width]) of a tensor made by `store`.

        A packed tensor does not say whether its width was odd: without `width`, it is taken as even.

        Raises:
            InputError: another dtype than `storage` (uint8 bytes are accepted too), or a width that does not fit.
        """
        if stored.dtype not in (self.storage, torch.uint8):
            raise InputError(f"{self.name} codes are stored as {self.storage}", why=f"got {stored.dtype}")
        limit = stored.shape[-1] * self.per_byte
        width = limit if width is None else width
        if not limit - self.per_byte < width <= limit:
            raise InputError(f"{self.name} codes {tuple(stored.shape)} cannot have a logical width of {width}")
        if self.per_byte == 1:
            return stored.view(torch.uint8)
        return torch.stack([stored & 15, stored >> 4], -1).flatten(-2)[..., :width]

    # -- conversion --------------------------------------------------------------------------------------------------

    def decode(self, codes: Tensor) -> Tensor:
        """fp32 numbers of codes (uint8, one per byte, any shape); exact, -0 and NaN included."""
        if self.dtype is not None and self.signed:
            return codes.view(self.dtype).to(torch.float32)
        table = self.decode_by_bits(torch.arange(256, dtype=torch.uint8, device=codes.device))
        return table.index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape)

    def decode_by_bits(self, codes: Tensor) -> Tensor:
        """`decode` from integer and fp32 arithmetic alone: what the format's parameters say."""
        c, M = codes.to(torch.int32), self.mantissa_bits
        if not self.signed:
            bits = torch.where(c == 0, 1 << 22, c << 23)  # 2^-127 is a subnormal number of fp32
            return torch.where(c == 255, 0x7FC00000, bits).view(torch.float32)
        mag = c & ((1 << (self.bits - 1)) - 1)
        normal = ((mag << (23 - M)) + ((127 - self.bias) << 23)).view(torch.float32)
        x = torch.where(mag >= 1 << M, normal, mag.to(torch.float32) * self.quantum)
        if self.special in ("fn", "ieee"):
            x = torch.where(mag > self.max_code, math.nan, x)
        if self.special == "ieee":
            x = torch.where(mag == self.max_code + 1, math.inf, x)
        negative = c >> (self.bits - 1) == 1
        x = torch.where(negative, -x, x)
        return torch.where(negative & (mag == 0), math.nan, x) if self.special == "fnuz" else x

    def encode(
        self,
        x: Tensor,
        *,
        saturate: bool = True,
        round: Literal["rne", "sr"] = "rne",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Codes (uint8, same shape) of the numbers nearest to fp32 `x`.

        Ties go to the even code ("rne"); "sr" rounds up with the probability of the remainder, to 2^-24, drawn from
        `generator`. The sign of zero is kept where the format has a -0. Too large magnitudes become the largest number
        with their sign when `saturate`, infinities as well (the saturating mode of OFP8); otherwise they become
        infinity or, in formats without one, NaN. NaN stays NaN. In a format without NaN it becomes zero: whoever
        scales blocks says NaN in the scale. E8M0 has neither sign nor zero: negative numbers become NaN, zero 2^-127.

        Raises:
            InputError: `x` is not fp32, or `saturate=False` for a format that has nothing beyond its largest number.
        """
        if x.dtype != torch.float32:
            raise InputError(f"{self.name} codes are made from fp32", why=f"got {x.dtype}")
        if not saturate and not self.has_nan:
            raise InputError(f"{self.name} can only saturate: it has neither infinity nor NaN")
        if round == "rne" and saturate and self.dtype is not None and self.signed:
            return x.clamp(-self.max, self.max).to(self.dtype).view(torch.uint8)
        if round == "rne" and self.signed and x.numel() > 4 << (11 + self.mantissa_bits):
            return self._encode_by_table(x, saturate)
        return self.encode_by_bits(x, saturate=saturate, round=round, generator=generator)

    def encode_by_bits(
        self,
        x: Tensor,
        *,
        saturate: bool = True,
        round: Literal["rne", "sr"] = "rne",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """`encode` from integer and fp32 arithmetic alone."""
        if not self.signed:
            return _encode_exponent(x, saturate)
        M = self.mantissa_bits
        # One binade beyond the largest number is enough to see an overflow.
        a = x.abs().clamp(max=self.max if saturate else math.ldexp(1.0, self.emax + 1))
        e = ((a.view(torch.int32) >> 23) - 127).clamp(self.emin, self.emax + 1)
        steps = a * ((127 + M - e) << 23).view(torch.float32)  # in units of the last place; exact, below 2^(M+1)
        if round == "rne":
            n = steps.round()  # torch rounds halves to even, and an odd code has an odd number of steps
            if M == 0:  # unless the exponent field is all of the code: then halfway behind an even one stays there
                n = torch.where(((e - self.emin) % 2 == 1) & (steps == 1.5), 1.0, n)
        else:
            n = steps.floor()
            n = n + (torch.rand(x.shape, generator=generator, device=x.device) < steps - n)
        # A carry into the next binade carries into the exponent field by itself.
        mag = ((e - self.emin) << M) + n.to(torch.int32)
        nan = x.isnan()
        mag = torch.where(nan, 0, mag)
        sign = (x.view(torch.int32) < 0).to(torch.int32) << (self.bits - 1)
        ones = (1 << (self.bits - 1)) - 1
        if self.special == "fnuz":
            code = torch.where(nan | (mag > self.max_code), ones + 1, torch.where(mag == 0, 0, mag | sign))
        else:
            over = self.max_code + 1 if self.special == "ieee" else ones  # infinity or NaN
            if not saturate:
                mag = torch.where(mag > self.max_code, over, mag)
            code = (torch.where(nan, ones, mag) if self.has_nan else mag) | sign
            if not self.has_nan:
                code = torch.where(nan, 0, code)
        return code.to(torch.uint8)

    def _encode_by_table(self, x: Tensor, saturate: bool) -> Tensor:
        """`encode` for many numbers: codes are looked up by sign, exponent, one mantissa bit more than the format keeps
        and whether anything follows, all that rounding to nearest depends on. For 2^22 numbers to E2M1, 6 instead of
        33 ms of one thread."""
        cut = 21 - self.mantissa_bits
        low = (1 << cut) - 1
        keys = 1 << (32 - cut)
        all_keys = torch.arange(keys, dtype=torch.int64, device=x.device) << cut
        table = self.encode_by_bits(all_keys.to(torch.int32).view(torch.float32), saturate=saturate)
        u = x.view(torch.int32)
        # Adding `low` to the bits cut off carries into the last bit kept exactly if one of them is set.
        key = ((u & low) + low).bitwise_or_(u).bitwise_right_shift_(cut).bitwise_and_(keys - 1)
        return table.index_select(0, key.reshape(-1)).view(x.shape)

    def is_special(self, codes: Tensor) -> Tensor:
        """Mask of the codes (uint8) that are NaN or infinity."""
        if self.special == "none":
            return torch.zeros_like(codes, dtype=torch.bool)
        if self.special == "fnuz":
            return codes == 1 << (self.bits - 1)
        return (codes & ((1 << (self.bits - self.signed)) - 1)) > self.max_code


def _encode_exponent(x: Tensor, saturate: bool) -> Tensor:
    """E8M0 codes: the nearest power of two, ties to the even code."""
    u = x.view(torch.int32)
    field, fraction = u >> 23, u & 0x7FFFFF
    half = 1 << 22
    up = (fraction > half) | ((fraction == half) & (field % 2 == 1))
    code = torch.where(field == 0, (fraction > half + (half >> 1)).to(torch.int32), field + up)
    code = torch.where(u < 0, 255, code.clamp(max=254 if saturate else 255))  # a negative sign bit: NaN
    code = torch.where(x == 0, 0, code)
    return torch.where(x.isnan(), 255, code).to(torch.uint8)


E4M3 = Format("e4m3", 4, 3, 7, "fn", torch.float8_e4m3fn)
E4M3FNUZ = Format("e4m3fnuz", 4, 3, 8, "fnuz", torch.float8_e4m3fnuz)
E5M2 = Format("e5m2", 5, 2, 15, "ieee", torch.float8_e5m2)
E2M1 = Format("e2m1", 2, 1, 1, "none")
E8M0 = Format("e8m0", 8, 0, 127, "fn", torch.float8_e8m0fnu, signed=False)

_FORMATS = {f.name: f for f in (E4M3, E4M3FNUZ, E5M2, E2M1, E8M0)}


def format_names() -> list[str]:
    """Names that specs accept."""
    return list(_FORMATS)


def get_format(name: str) -> Format:
    """A format by name; raises `RecipeError` with the nearest name otherwise."""
    if name not in list(_FORMATS):  # also one that cannot be hashed
        raise RecipeError(f"unknown number format {name!r}", todo=nearest(name, _FORMATS))
    return _FORMATS[name]


def register_format(fmt: Format) -> Format:
    """Make `fmt` known to specs by its name; the same format may be registered again.

    Raises:
        RecipeError: the name is taken by a format with other parameters, or `fmt.dtype` means other numbers.
    """
    known = _FORMATS.get(fmt.name)
    if known is not None and known != fmt:
        raise RecipeError(f"number format {fmt.name!r} exists with other parameters", why=f"{known} is not {fmt}")
    if known is None:
        codes = torch.arange(256, dtype=torch.uint8, device="cpu")
        same = fmt.dtype is None or torch.equal(
            fmt.decode(codes).nan_to_num(-1.0, -2.0, -3.0), fmt.decode_by_bits(codes).nan_to_num(-1.0, -2.0, -3.0)
        )
        if not same:
            raise RecipeError(f"the codes of {fmt.name!r} mean other numbers than {fmt.dtype}")
        _FORMATS[fmt.name] = fmt
    return fmt
