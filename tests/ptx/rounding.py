"""Exact rounding of rational numbers to binary formats: the reference that floating-point tests compare with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Format:
    """A binary format: significand bits (the hidden one included) and exponent range."""

    precision: int
    emin: int
    emax: int

    @property
    def largest(self) -> Fraction:
        return (2 - Fraction(2) ** (1 - self.precision)) * Fraction(2) ** self.emax

    @property
    def smallest_normal(self) -> Fraction:
        return Fraction(2) ** self.emin


FORMATS = {
    "f16": Format(11, -14, 15),
    "bf16": Format(8, -126, 127),
    "tf32": Format(11, -126, 127),
    "f32": Format(24, -126, 127),
    "f64": Format(53, -1022, 1023),
    "e4m3": Format(4, -6, 8),
    "e5m2": Format(3, -14, 15),
}


def round_fraction(x: Fraction, fmt: Format, mode: str = "rn", saturate: bool = False) -> float:
    """x in the format, as a Python float. mode: rn, rz, rm, rp, rna."""
    if x == 0:
        return 0.0
    sign = -1 if x < 0 else 1
    a = abs(x)
    exponent = a.numerator.bit_length() - a.denominator.bit_length()
    if a < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, fmt.emin) - fmt.precision + 1)
    low = math.floor(a / unit)
    rest = a / unit - low
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and low % 2 == 1),
        "rna": rest >= Fraction(1, 2),
        "rz": False,
        "rm": sign < 0 and rest > 0,
        "rp": sign > 0 and rest > 0,
    }[mode]
    value = (low + up) * unit
    if value > fmt.largest:
        to_largest = saturate or mode == "rz" or (mode == "rm" and sign > 0) or (mode == "rp" and sign < 0)
        return sign * (float(fmt.largest) if to_largest else math.inf)
    if value == 0:
        return math.copysign(0.0, sign)
    return sign * float(value)
