"""Writes what the `gguf` package (numpy) makes of seeded random blocks and weights.

    pip install gguf numpy && python blocks_golden.py

blocks_golden.tsv, a line per block: type, block index, hash of its weights' bits, 8 of the
weights' bits. The bytes of block i of type t are splitmix64's outputs, little-endian, from
the seed (t << 32) + i; the hash is FNV-1a over the weights' little-endian bits, NaNs made
one.

quantize_golden.tsv, a line per row of 128 weights, for the types that the package can
quantise: type, row index, the blocks in hexadecimal. Weight k of row i is the sum of the
four 16-bit halves, less 131070, of the k-th output from the seed 7 + i, times 2^-21.
"""

from pathlib import Path

import gguf
import numpy as np

BLOCKS = 12
TYPES = (
    "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 MXFP4 NVFP4 IQ4_NL IQ4_XS Q2_K Q3_K Q4_K Q5_K Q6_K "
    "IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ1_S IQ1_M"
).split()
MASK = (1 << 64) - 1


def seeded_bytes(seed, n):
    out = b""
    while len(out) < n:
        seed = (seed + 0x9E3779B97F4A7C15) & MASK
        z = seed
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        out += (z ^ (z >> 31)).to_bytes(8, "little")
    return out[:n]


def fnv1a(data):
    h = 0xCBF29CE484222325
    for byte in data:
        h = ((h ^ byte) * 0x100000001B3) & MASK
    return h


def seeded_weights(seed, n):
    halves = np.frombuffer(seeded_bytes(seed, 8 * n), "<u2").reshape(n, 4).astype(np.int64)
    return ((halves.sum(axis=1) - 131070) * 2.0**-21).astype(np.float32)


def write_table(name, rows):
    text = "".join("\t".join(map(str, row)) + "\n" for row in rows)
    Path(__file__).with_name(name).write_text(text)


def dequantized():
    for name in TYPES:
        ty = gguf.GGMLQuantizationType[name]
        length, size = gguf.GGML_QUANT_SIZES[ty]
        # Plain floats: 32 of them stand for a block.
        count = 32 if length == 1 else 1
        for i in range(BLOCKS):
            raw = np.frombuffer(seeded_bytes((int(ty) << 32) + i, size * count), np.uint8)
            with np.errstate(all="ignore"):
                weights = gguf.quants.dequantize(raw.reshape(1, -1), ty)
            weights = weights.astype(np.float32).ravel()
            nan = np.isnan(weights)
            bits = np.where(nan, np.uint32(0x7FC00000), weights.view(np.uint32))
            bits = bits.astype("<u4")
            samples = bits[:: len(bits) // 8][:8]
            yield name, i, f"{fnv1a(bits.tobytes()):016x}", *(f"{b:08x}" for b in samples)


def quantized():
    for name in "F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 MXFP4".split():
        ty = gguf.GGMLQuantizationType[name]
        for i in range(6):
            blocks = gguf.quants.quantize(seeded_weights(7 + i, 128).reshape(1, -1), ty)
            yield name, i, blocks.tobytes().hex()


write_table("blocks_golden.tsv", dequantized())
write_table("quantize_golden.tsv", quantized())
