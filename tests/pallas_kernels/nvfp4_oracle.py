"""NVFP4 once more, in numpy and element by element where that is clearest, from the formulas alone.

numpy's float32 has subnormals and correctly rounded division, so nothing here needs a trick.
"""

import ml_dtypes
import numpy as np

F = np.float32
FLT_MAX = np.finfo(F).max
GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def e4m3(values):
    return np.clip(values, -448, 448).astype(ml_dtypes.float8_e4m3fn)


def nearest_codes(values):
    """By distance in float64; between two equally near, the even code."""
    values = np.asarray(values, np.float64)
    size = np.minimum(np.abs(values), 6)
    distance = np.abs(size[..., None] - GRID)
    best = distance.min(-1, keepdims=True)
    near = distance == best
    even = near & (np.arange(8) % 2 == 0)
    codes = np.where(even.any(-1), even.argmax(-1), near.argmax(-1))
    return np.where(np.isnan(values), 0, codes + 8 * (values < 0)).astype(np.uint8)


def stochastic_value(value, random):
    """Between the neighbours low <= |value| < high: up when frac + random / 256 >= 1."""
    size = abs(float(value))
    if np.isnan(size) or size >= 6:
        return np.copysign(6.0, value)
    low, high = max(g for g in GRID if g <= size), min(g for g in GRID if g > size)
    # float32, because the sum of the size and the random part is rounded to it
    reached = F(size) + F(random / 256 * (high - low))
    return np.copysign(high if reached >= high else low, value)


def sylvester():
    return np.array([[(-1) ** bin(i & j).count("1") for j in range(16)] for i in range(16)], np.float64)


SIGNS = np.array([1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1], np.float64)


def hadamard(x):
    """[..., n]: x_j -> 1/4 sum_i x_i SIGNS_i H_ij, in float64, rounded to x's dtype."""
    blocks = np.asarray(x, np.float64).reshape(*x.shape[:-1], -1, 16)
    return (np.einsum("...i,ij->...j", blocks * SIGNS, sylvester()) / 4).reshape(x.shape).astype(x.dtype)


def block_amax(x, block):
    amax = np.abs(x.reshape(*x.shape[:-1], -1, 16)).max(-1)
    if block == "16x16":
        for start in range(0, amax.shape[-2], 16):
            amax[..., start : start + 16, :] = amax[..., start : start + 16, :].max(-2, keepdims=True)
    return amax


def encode_scale(amax, bound):
    with np.errstate(all="ignore"):
        encode = np.minimum(F(6 * bound) / F(amax), FLT_MAX, dtype=F)
    return F(1) if amax == 0 or encode == 0 else encode


def quantize(x, block="1x16", bits=None, amax=None, bound=448, error=None):
    """x [m, n] -> (codes [m, n] unpacked, scales e4m3 [m, n/16], amax)."""
    x = np.asarray(x).astype(F)
    amax = np.abs(x).max() if amax is None else amax
    if np.ndim(amax):
        rows = [
            quantize(row[None], bits=None, amax=a, bound=bound, error=error) for row, a in zip(x, amax, strict=True)
        ]
        return np.concatenate([r[0] for r in rows]), np.concatenate([r[1] for r in rows]), amax
    with np.errstate(all="ignore"):
        encode = encode_scale(amax, bound)
        decode = F(1) / encode
        largest = block_amax(x, block)
        blocks = x.reshape(*largest.shape, 16)
        if error is None:
            scales = e4m3(np.minimum(largest * (encode * F(1 / 6)), F(448)))
            codes = codes_for(blocks, scales, decode, bits)
        else:
            base = (largest / F(6)) * encode
            tries = []
            for factor in (F(1), F(1.5)):
                scales = e4m3(base * factor)
                codes = codes_for(blocks, scales, decode, None)
                value = values(codes) * scales.astype(F)[..., None] * F(amax) / F(6 * bound)
                tries.append((total_error(value - blocks, error, block), scales, codes))
            four = tries[1][0] < tries[0][0]
            scales = np.where(four, tries[1][1], tries[0][1])
            codes = np.where(four[..., None], tries[1][2], tries[0][2])
    return codes.reshape(x.shape), scales, amax


def codes_for(blocks, scales, decode, bits):
    encode = np.minimum(F(1) / (scales.astype(F) * decode), FLT_MAX)
    scaled = blocks * encode[..., None]
    if bits is None:
        return nearest_codes(scaled)
    rounded = np.vectorize(stochastic_value)(scaled, bits.reshape(scaled.shape))
    return (nearest_codes(np.abs(rounded)) + 8 * np.signbit(rounded)).astype(np.uint8)


def values(codes):
    return np.where(codes >= 8, -GRID[codes & 7], GRID[codes & 7]).astype(F)


def total_error(off, error, block):
    off = off * off if error == "mse" else np.abs(off)
    total = np.zeros(off.shape[:-1], F)
    for i in range(16):
        total = total + off[..., i]
    if block == "1x16":
        return total
    m = total.shape[-2]
    for start in range(0, m, 16):
        rows = total[..., start : start + 16, :].copy()
        while rows.shape[-2] > 1:
            half = rows.shape[-2] // 2
            rows = rows[..., :half, :] + rows[..., half:, :]
        total[..., start : start + 16, :] = rows
    return total


def pack(codes):
    return (codes[..., 0::2] + 16 * codes[..., 1::2]).astype(np.uint8)


def dequantize(codes, scales, amax, bound=448):
    with np.errstate(all="ignore"):
        blocks = values(codes).astype(np.float64).reshape(*scales.shape, 16) * scales.astype(np.float64)[..., None]
        amax = np.asarray(amax, np.float64)
        return blocks.reshape(codes.shape) * (amax[:, None] if amax.ndim else amax) / (6 * bound)


def tensors(seed=0, shape=(32, 64)):
    """{name: float32 [32, 64]}: every kind of tensor on which a careless quantiser differs."""
    rng = np.random.default_rng(seed)
    normal = rng.normal(size=shape).astype(F)
    found = {"normal": normal, "zeros": np.zeros(shape, F), "uniform": rng.uniform(-1, 1, shape).astype(F)}
    for exponent in (-149, -140, -127, -126, -120, -118, -115, -110, -60, -30, 30, 90, 120):
        found[f"scaled by 2^{exponent}"] = (normal.astype(np.float64) * 2.0**exponent).astype(F)
    found["huge"] = (normal / np.abs(normal).max() * FLT_MAX).astype(F)
    outlier = normal.copy()
    outlier[3, 5] = 3e4
    found["outlier"] = outlier
    found["wide"] = (normal * 10.0 ** rng.uniform(-42, 5, shape)).astype(F)
    found["wide and tiny"] = (normal * 10.0 ** rng.uniform(-44, -34, shape)).astype(F)
    ties = rng.choice([0, 0.25, 0.5, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6], shape) * rng.choice([-1, 1], shape)
    ties[:, ::16] = 6
    found["ties"] = (ties * 448).astype(F)  # amax 2688: every scale is 448, every element lands on a border
    found["near ties"] = np.nextafter(found["ties"], rng.choice([-np.inf, np.inf], shape).astype(F))
    blocks = normal.copy()
    blocks[:, 16:32] = 0
    blocks[4] = 0
    blocks[:, 32:48] *= F(1e-12)
    found["zero and tiny blocks"] = blocks
    signed = np.zeros(shape, F)
    signed[::2] = -0.0
    signed[0, 0] = -1e-40
    signed[1, 0] = -1.0
    found["signed zeros"] = signed
    infinite = normal.copy()
    infinite[2, 3] = np.inf
    infinite[7, 20] = -np.inf
    found["infinities"] = infinite
    one = np.zeros(shape, F)
    one[5, 7] = F(1e-45)
    found["one subnormal"] = one
    powers = (2.0 ** rng.integers(-149, 127, shape)).astype(F) * rng.choice([-1, 1], shape)
    found["powers of two"] = powers.astype(F)
    return found
