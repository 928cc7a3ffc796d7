"""Stored numbers and their values by other implementations: `stored_values.py FOLDER`.

For each type of GGUF block 64 random blocks of finite scales, `TYPE.stored`, and what PyPI gguf dequantises them to,
`TYPE.values`. For 4-bit and fp8 codes of safetensors all codes and scales, with the values of PyPI ml_dtypes. Values are
little-endian f32.
"""

import pathlib
import sys

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

BLOCKS = 64
# Where in a block f16 scales stand.
SCALES = {"Q8_0": [0], "Q4_0": [0], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "MXFP4": []}


def write(folder, name, stored, values):
    (folder / f"{name}.stored").write_bytes(np.ascontiguousarray(stored).tobytes())
    (folder / f"{name}.values").write_bytes(np.ascontiguousarray(values, dtype="<f4").tobytes())


def main():
    folder = pathlib.Path(sys.argv[1])
    random = np.random.default_rng(7)
    for name, places in SCALES.items():
        kind = GGMLQuantizationType[name]
        blocks = random.integers(0, 256, (BLOCKS, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
        for place in places:
            scales = random.normal(0, 0.1, BLOCKS).astype("<f2")
            blocks[:, place : place + 2] = scales.view(np.uint8).reshape(BLOCKS, 2)
        if name == "MXFP4":
            blocks[:, 0] = random.integers(1, 252, BLOCKS)  # products that neither overflow nor vanish
        write(folder, name, blocks, quants.dequantize(blocks, kind))

    # One group of 32 codes per exponent; neighbours share a byte, the lower half first.
    exponents = np.arange(255, dtype=np.uint8)
    codes = (np.arange(255 * 32).reshape(255, 32) * 7 % 16).astype(np.uint8)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    scales = exponents.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    with np.errstate(over="ignore"):  # 6 times the largest power of two
        write(folder, "fp4", codes[:, ::2] | codes[:, 1::2] << 4, values * scales[:, None])

    # All codes under each of four scales.
    codes = np.arange(256, dtype=np.uint8)
    scales = np.array([1.0, 0.37, 3.1e-5, 417.0], dtype=np.float32)
    values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    (folder / "fp8.scales").write_bytes(scales.tobytes())
    write(folder, "fp8", np.tile(codes, (4, 1)), values[None] * scales[:, None])


main()
