"""What quantization must compute, in exact rational arithmetic, one element at a time.

Nothing here is shared with the product: numbers of a format come from its definition in fractions, the nearest one is
found by searching their sorted list, scales by comparing fractions with powers of two.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch

from moefx.precision import Format, register_format

Tensor = torch.Tensor
NAN = "nan"
INF = "inf"


@dataclass(frozen=True)
class Grid:
    """The numbers of a format with a sign."""

    e: int
    m: int
    bias: int
    special: str

    @property
    def sign(self) -> int:
        return 1 << (self.e + self.m)

    def number(self, code: int) -> Fraction | str:
        """Magnitude of a code, "nan" or "inf"."""
        if self.special == "fnuz" and code == self.sign:
            return NAN
        magnitude = code % self.sign
        field, fraction = divmod(magnitude, 1 << self.m)
        if self.special == "fn" and magnitude == self.sign - 1:
            return NAN
        if self.special == "ieee" and field == (1 << self.e) - 1:
            return NAN if fraction else INF
        if field == 0:
            return Fraction(fraction, 1 << self.m) * power(1 - self.bias)
        return (1 + Fraction(fraction, 1 << self.m)) * power(field - self.bias)

    @cached_property
    def positive(self) -> list[Fraction]:
        """Numbers from zero upwards; the index is the code."""
        found = [self.number(code) for code in range(self.sign)]
        return [v for v in found if isinstance(v, Fraction)]

    @property
    def max(self) -> Fraction:
        return self.positive[-1]

    def nearest(self, x: float | Fraction) -> int:
        """Code of the nearest number, ties to the even code, saturating."""
        negative = math.copysign(1, x) < 0
        a = abs(Fraction(x))
        above = bisect_left(self.positive, a)
        if above == len(self.positive):
            code = above - 1
        elif self.positive[above] == a:
            code = above
        else:
            up, down = self.positive[above] - a, a - self.positive[above - 1]
            code = above if up < down or (up == down and above % 2 == 0) else above - 1
        if self.special == "fnuz" and code == 0:
            return 0
        return code | self.sign if negative else code

    def value(self, code: int) -> float:
        """The number of a code as a float."""
        v = self.number(code)
        a = float(v)
        return a if v == NAN or code < self.sign else -a


GRIDS = {
    "e4m3": Grid(4, 3, 7, "fn"),
    "e4m3fnuz": Grid(4, 3, 8, "fnuz"),
    "e5m2": Grid(5, 2, 15, "ieee"),
    "e2m1": Grid(2, 1, 1, "none"),
    "e3m2": Grid(3, 2, 3, "none"),
    "e2m3": Grid(2, 3, 1, "none"),
    "e3m3ieee": Grid(3, 3, 3, "ieee"),
    "e2m2fn": Grid(2, 2, 1, "fn"),
    "e2m1small": Grid(2, 1, 5, "none"),  # every number is below 1
    "e3m0": Grid(3, 0, 3, "none"),  # powers of two: halfway is between an even and an odd exponent field
    "e5m0fn": Grid(5, 0, 15, "fn"),
    "e4m0fnuz": Grid(4, 0, 8, "fnuz"),
}
for _name in ("e3m2", "e2m3", "e3m3ieee", "e2m2fn", "e2m1small", "e3m0", "e5m0fn", "e4m0fnuz"):
    _g = GRIDS[_name]
    register_format(Format(_name, _g.e, _g.m, _g.bias, _g.special))


def power(n: int) -> Fraction:
    return Fraction(2) ** n


def floor_log2(x: Fraction) -> int:
    n = x.numerator.bit_length() - x.denominator.bit_length()
    return n if power(n) <= x else n - 1


def exponent(amax: Fraction, grid: Grid, rule: str) -> int:
    """T of the power-of-two scale 2^T for a positive amax, without limits."""
    emax = floor_log2(grid.max)
    if rule == "rceil":
        T = floor_log2(amax / grid.max)
        return T if amax <= grid.max * power(T) else T + 1
    if rule == "floor":
        return floor_log2(amax) - emax
    if rule == "ceil":
        n = floor_log2(amax)
        return (n if amax == power(n) else n + 1) - emax
    assert rule == "even"
    n = floor_log2(amax)
    mantissa = amax / power(n) * (1 << grid.m)
    rounded = round(mantissa)  # Python rounds halves of a Fraction to even
    return floor_log2(rounded * power(n - grid.m)) - emax


def scale(amax: float, elem: str, kind: str, rule: str, eps: float = 0.0) -> float:
    """The scale of a block with largest magnitude `amax`."""
    grid = GRIDS[elem]
    least = -127 if kind == "e8m0" else -126
    if not math.isfinite(amax):
        return math.nan
    amax = max(amax, float(np.float32(eps)))
    if kind == "f32":
        return float(max(np.float32(amax) / np.float32(float(grid.max)), np.float32(2.0**-126)))
    if amax == 0:
        return 2.0**least
    return 2.0 ** min(max(exponent(Fraction(amax), grid, rule), least), 127)


def ranges(M: int, br: int, bounds: Sequence[int] | None) -> Iterator[tuple[int, int]]:
    """Row ranges of blocks, expert by expert."""
    pieces = [(0, M)] if bounds is None else list(pairwise(bounds))
    for start, end in pieces:
        for r in range(start, end, br):
            yield r, min(r + br, end)


def quantize(
    x: Tensor, elem: str, br: int, bc: int, kind: str, rule: str, bounds: Sequence[int] | None = None, eps: float = 0.0
) -> tuple[list[list[int]], list[list[float]]]:
    """Codes [M][N] and scales, one list per row of blocks. Codes in a block with NaN or infinity are -1."""
    M, N = x.shape
    grid = GRIDS[elem]
    rows = x.to(torch.float32).tolist()
    codes, scales = [[0] * N for _ in range(M)], []
    for top, bottom in ranges(M, br, bounds):
        line = []
        for left in range(0, N, bc):
            cells = [(r, c) for r in range(top, bottom) for c in range(left, min(left + bc, N))]
            values = [rows[r][c] for r, c in cells]
            finite = all(math.isfinite(v) for v in values)
            s = scale(max(abs(v) for v in values) if finite else math.nan, elem, kind, rule, eps)
            line.append(s)
            for (r, c), v in zip(cells, values, strict=True):
                if not finite:
                    codes[r][c] = -1
                elif kind == "f32":
                    codes[r][c] = grid.nearest(float(np.float32(v) / np.float32(s)))
                else:
                    scaled = Fraction(v) / Fraction(s)
                    codes[r][c] = grid.nearest(scaled if scaled else math.copysign(0.0, v))
                    if scaled and v < 0 and codes[r][c] == 0 and grid.special != "fnuz":
                        codes[r][c] = grid.sign
        scales.append(line)
    return codes, scales


def bits(t: Tensor) -> Tensor:
    """Bytes or integers of a tensor, for comparing bit by bit."""
    if t.dtype.itemsize == 1:
        return t.view(torch.uint8)
    return t.view(torch.int32) if t.dtype == torch.float32 else t


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in dtype, shape and bits."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a.contiguous()), bits(b.contiguous()))


def spread_rows(M: int, N: int, binades: int, seed: int = 0) -> Tensor:
    """Normal numbers that bf16 holds, rows scaled log-uniformly over `binades` binades."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(M, N, generator=g) * torch.exp2(torch.rand(M, 1, generator=g) * binades)
    return x.bfloat16().float()
