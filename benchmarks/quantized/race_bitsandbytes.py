"""4-bit weights: our loops, bitsandbytes' and memcpy in turns, one thread each.

race_bitsandbytes.py LIBRARY [rounds]   LIBRARY: libquantized_bench.so. Prints the median GB/s of output.
"""
import ctypes
import os
import statistics
import sys
import time

os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
import bitsandbytes.functional as bnb
import torch

torch.set_num_threads(1)
ours = ctypes.CDLL(sys.argv[1])
ROUNDS = int(sys.argv[2]) if len(sys.argv) > 2 else 21


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def race(names, calls, repeat, out_bytes):
    times = {name: [] for name in names}
    for _ in range(ROUNDS):
        for name, call in zip(names, calls):
            start = time.perf_counter()
            for _ in range(repeat):
                call()
            times[name].append((time.perf_counter() - start) / repeat)
    return {name: out_bytes / statistics.median(t) / 1e9 for name, t in times.items()}


def case(rows, columns, code, dtype):
    numel = rows * columns
    weight = torch.randn(rows, columns).to(dtype)
    number = ctypes.c_int(["nf4", "fp4"].index(code))
    kind = ctypes.c_int([torch.float32, torch.bfloat16].index(dtype))
    packed, state = bnb.quantize_4bit(weight, quant_type=code)
    out, theirs, copy = (torch.empty_like(weight) for _ in range(3))
    n = ctypes.c_int64(numel)
    short = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    native = getattr(bnb.lib, f"cdequantize_blockwise_cpu_{code}_{short}")
    read = [
        lambda: ours.fsdp_dequantize_4bit(pointer(packed), pointer(state.absmax), n, number, pointer(out), kind),
        lambda: native(pointer(packed), pointer(state.absmax), pointer(theirs), *map(ctypes.c_longlong, (64, rows, columns))),
        lambda: bnb.dequantize_4bit(packed, state),
        lambda: copy.copy_(weight),
    ]
    made, scales = torch.empty_like(packed), torch.empty_like(state.absmax)
    write = [
        lambda: ours.fsdp_quantize_4bit(pointer(weight), kind, n, number, pointer(made), pointer(scales)),
        lambda: bnb.quantize_4bit(weight, quant_type=code),
    ]
    repeat = max(1, (1 << 22) // numel)
    # Its kernel into memory that is there already, and the call that people make, which allocates.
    names = ["ours", "bitsandbytes' kernel", "bitsandbytes", "memcpy"]
    speeds = race(names, read, repeat, numel * weight.element_size())
    slow = race(["ours", "bitsandbytes"], write, 1, numel * weight.element_size())
    assert torch.equal(out, theirs) and torch.equal(made, packed) and torch.equal(scales, state.absmax)
    print(f"{rows}x{columns} {code} {str(dtype)[6:]}: dequantise GB/s of output",
          ", ".join(f"{k} {v:.1f}" for k, v in speeds.items()),
          "| quantise GB/s of input", ", ".join(f"{k} {v:.2f}" for k, v in slow.items()))


for rows, columns in ((576, 576), (1536, 576), (2048, 2048)):
    for code in ("nf4", "fp4"):
        for dtype in (torch.float32, torch.bfloat16):
            case(rows, columns, code, dtype)
