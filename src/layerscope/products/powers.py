"""Powers of two for compiled loops."""

from __future__ import annotations

import numpy as np

from layerscope.products.compiling import compiled

# 2 ** f for |f| <= 1/2: relative error 2e-9 before rounding (fitted for the least largest error).
_E1, _E2, _E3 = np.float32(6.93147206e-1), np.float32(2.40226469e-1), np.float32(5.55032878e-2)
_E4, _E5, _E6 = np.float32(9.61848896e-3), np.float32(1.33999312e-3), np.float32(1.53458104e-4)
_LOWEST = np.float32(-126.0)  # below it, powers of two are not normal numbers
_ROUNDER = np.float32(1.5 * 2.0**23)  # added to a small number, it leaves its integer part
_ROUNDER_BITS, _EXPONENT_BITS, _BIAS = np.int32(0x4B400000), np.int32(23), np.int32(127)
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@compiled(fastmath={"contract"}, inline=True)
def exp2(x: np.float32) -> np.float32:
    """Return 2 ** x: 0 below -126, as accurate as float32 up to 126, NaN or infinity for these."""
    rounded = x + _ROUNDER
    whole = np.float32(rounded).view(np.int32) - _ROUNDER_BITS
    f = x - np.float32(whole)
    power = ((((((_E6 * f + _E5) * f + _E4) * f + _E3) * f + _E2) * f + _E1) * f) + _ONE
    scale = np.int32((whole + _BIAS) << _EXPONENT_BITS).view(np.float32)
    return _ZERO if x < _LOWEST else power * scale
