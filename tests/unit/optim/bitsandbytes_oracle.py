"""Steps of bitsandbytes' AdamW8bit on the CPU: raw maps, then for each parameter its start, then step by step the
gradient, the parameter and the state after it.

usage: bitsandbytes_oracle.py OUTPUT STEPS LR WEIGHT_DECAY NUMEL...
Exits with 77 when bitsandbytes is not installed.
"""
import sys

import torch

try:
    from bitsandbytes.backends.cpu import ops
    from bitsandbytes.optim import AdamW8bit
except ImportError:
    sys.exit(77)


def quantize_to_nearest(values, code, absmax_out, out, blocksize):
    """In place of the library's CPU search, which takes codes near zero from a coarse table. The nearest code is what
    the method and the library's CUDA kernels take."""
    blocks = torch.nn.functional.pad(values, (0, -values.numel() % blocksize)).view(-1, blocksize)
    absmax = blocks.abs().amax(1)
    scaled = blocks / torch.where(absmax > 0, absmax, 1).view(-1, 1)
    midpoints = (code[:-1] + code[1:]) / 2
    out.copy_(torch.bucketize(scaled, midpoints).view(-1)[:values.numel()])
    absmax_out.copy_(absmax)


ops._quant_blockwise_fp32_direct = quantize_to_nearest

output, steps, lr, decay = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
torch.manual_seed(0)
parameters = [torch.nn.Parameter(torch.randn(int(numel))) for numel in sys.argv[5:]]
# Blocks of very different size, and one of zeros.
scales = [torch.logspace(-6, 0, p.numel()) * (torch.arange(p.numel()) // 256 != 2) for p in parameters]
optimizer = AdamW8bit(parameters, lr=lr, weight_decay=decay)
with open(output, "wb") as file:
    def write(tensor):
        file.write(tensor.detach().numpy().tobytes())

    optimizer.fill_qmap()
    write(optimizer.name2qmap["dynamic"])
    write(optimizer.name2qmap["udynamic"])
    for p in parameters:
        write(p)
    for step in range(steps):
        for p, scale in zip(parameters, scales):
            p.grad = torch.randn_like(p) * scale
        gradients = [p.grad.clone() for p in parameters]
        optimizer.step()
        for p, gradient in zip(parameters, gradients):
            write(gradient)
            write(p)
            state = optimizer.state[p]
            for name in ("state1", "absmax1", "state2", "absmax2"):
                if name in state:
                    write(state[name])
