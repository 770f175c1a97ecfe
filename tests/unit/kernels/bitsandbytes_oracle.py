"""Quantised weights by bitsandbytes on the CPU, for quantized_weight_test.cpp.

Usage: bitsandbytes_oracle.py FILE. The file is a sequence of records, each an int64 number of arrays and,
per array, an int64 number of bytes and the bytes; all records of a kind come together, the kinds in the
order of `main`.
"""
import os
import struct
import sys

os.environ["TORCHDYNAMO_DISABLE"] = "1"
import bitsandbytes.functional as bnb
import torch

torch.set_num_threads(1)  # The order of a sum over more than 32767 values depends on it.
TYPES = [torch.float32, torch.bfloat16, torch.float16]
LONG = os.environ.get("FSDP_TEST_SCALE") == "long"


def raw(value):
    if isinstance(value, list):
        return struct.pack(f"<{len(value)}q", *value)
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def put(out, *arrays):
    out.write(struct.pack("<q", len(arrays)))
    for array in arrays:
        data = raw(array)
        out.write(struct.pack("<q", len(data)) + data)


def edges(code):
    """A block whose elements lie on, just below and just above the midpoints between codes."""
    table = bnb.get_4bit_type(code, device="cpu").sort().values
    mid = (table[:-1] + table[1:]) / 2
    ends = [torch.nextafter(mid, torch.tensor(e)) for e in (-2.0, 2.0)]
    return torch.cat([torch.tensor([1.0, -0.0]), mid, *ends, torch.zeros(17)])


def tensors(seed):
    torch.manual_seed(seed)
    yield torch.randn(64 * 40)
    yield torch.randn(64 * 300 + 2) * 0.02
    for numel in (1, 2, 31, 63, 65, 127, 64 * 257 + 1):
        yield torch.randn(numel)
    yield torch.zeros(64 * 3 + 10)
    yield torch.full((640,), 0.37)
    yield torch.full((100,), -1.5)
    yield edges("nf4")
    yield edges("fp4")
    yield torch.cat([edges("nf4"), edges("fp4")]) * 0.1
    yield torch.randn(640) * 1e-40
    yield torch.randn(650) * 1e-38
    yield (torch.rand(640) * 2 - 1) * 3e38
    yield torch.randn(6400) * torch.exp(torch.randn(6400) * 8)
    sparse = torch.zeros(64 * 260)
    sparse[::997] = torch.randn(len(sparse[::997]))
    yield sparse
    if LONG:
        for _ in range(20):
            yield torch.randn(64 * 4096 + 12) * 0.05


def rounded(wide, got):
    """AVX512-BF16 flushes subnormal results to zero; other processors, and we, do not."""
    tiny = wide.abs() < 1.1755e-38
    return torch.where(tiny, wide.to(got.dtype), got)


def read(packed, state, absmax):
    """FP4's code 8 is zero in the table, but minus zero in some of its kernels, depending on shape and processor."""
    got = bnb.dequantize_4bit(packed, state).reshape(-1)
    flat = packed.reshape(-1)
    codes = torch.stack([flat >> 4, flat & 15], 1).reshape(-1)[: len(got)]
    zeros = (absmax * 0.0).repeat_interleave(state.blocksize)[: len(got)].to(got.dtype)
    return torch.where((codes == 8) & (got == 0), zeros, got) if state.quant_type == "fp4" else got


def four_bit(out):
    for seed, values in enumerate(tensors(0)):
        for number, dtype in enumerate(TYPES):
            weight = values.to(dtype)
            if not weight.isfinite().all():
                continue
            for code in ("nf4", "fp4"):
                blocksize = (64, 64, 32, 128, 4096)[seed % 5]
                for nested in (False, True):
                    packed, state = bnb.quantize_4bit(
                        weight, blocksize=blocksize, quant_type=code, compress_statistics=nested
                    )
                    absmax, parts = state.absmax, []
                    if nested:
                        absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
                        parts = [state.absmax, state.state2.absmax, state.offset]
                    wide = None
                    values_read = []
                    for to in TYPES:
                        state.dtype = to
                        got = read(packed, state, absmax)
                        wide = got if wide is None else wide
                        values_read.append(rounded(wide, got))
                    head = [number, ("nf4", "fp4").index(code), blocksize, weight.numel()]
                    put(out, head, weight, packed, absmax, *values_read, *parts)


def means(out):
    sizes = [*range(1, 70), 255, 1000, 4097, 13824, 32767, 32768, 100003]
    for n in sizes + ([1 << 20, (1 << 22) + 5] if LONG else []):
        torch.manual_seed(n)
        values = torch.rand(n) * torch.exp(torch.randn(n))
        put(out, values, values.mean())


def absmax_codes(out):
    """Scales on and beside the borders between the 65536 cells that double quantisation uses."""
    cells = torch.arange(0, 65535, 1 if LONG else 13, dtype=torch.float64)
    border = ((cells + 0.5) / 65535 * 2 - 1).float()
    values = torch.cat([torch.nextafter(border, torch.tensor(e)) for e in (-2.0, 2.0)] + [border])
    values = torch.nn.functional.pad(values, (0, -len(values) % 255)).reshape(-1, 255)
    values = torch.cat([torch.ones(len(values), 1), values], 1)
    for scale in (1.0, 0.013, 1e-39):
        codes, state = bnb.quantize_blockwise((values * scale).reshape(-1), blocksize=256)
        put(out, values * scale, codes, state.absmax)


def int8(out):
    torch.manual_seed(1)
    for rows, columns in ((1, 1), (5, 7), (16, 64), (33, 200)):
        for number, dtype in enumerate(TYPES):
            weight = torch.randn(rows, columns) * 0.05
            weight[rows // 2] = 0
            weight[rows // 3] *= 1e-5
            weight[-1] = torch.round(weight[-1] * 100) / 8
            weight = weight.to(dtype)
            codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
            wide = bnb.int8_vectorwise_dequant(codes, scales)
            put(out, [number, rows, columns], weight, codes, scales, *[wide.to(t) for t in TYPES])


def tables(out):
    codes = [bnb.get_4bit_type(code, device="cpu") for code in ("nf4", "fp4")]
    put(out, *codes, bnb.create_dynamic_map())


def main():
    with open(sys.argv[1], "wb") as out:
        for kind in (tables, four_bit, means, absmax_codes, int8):
            kind(out)
            put(out)  # No arrays: the kind's end.


main()
