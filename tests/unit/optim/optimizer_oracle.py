"""Twenty steps of torch.optim, as raw float32: start, gradients, parameters after every step.

usage: optimizer_oracle.py OUTPUT KIND NUMEL STEPS SCALE KEY=VALUE...
"""
import sys

import torch

output, kind, numel, steps, scale = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
options = {key: float(value) for key, value in (pair.split("=") for pair in sys.argv[6:])}

torch.manual_seed(0)
parameter = torch.nn.Parameter(torch.randn(numel))
if kind == "adamw":
    betas = (options.pop("beta1"), options.pop("beta2"))
    optimizer = torch.optim.AdamW([parameter], betas=betas, foreach=False, fused=False, **options)
else:
    nesterov = bool(options.pop("nesterov"))
    optimizer = torch.optim.SGD([parameter], nesterov=nesterov, foreach=False, fused=False, **options)

with open(output, "wb") as file:
    def put(tensor):
        file.write(tensor.detach().numpy().tobytes())

    put(parameter)
    for step in range(steps):
        gradient = torch.randn(numel) * 0.01
        put(gradient)
        parameter.grad = gradient * torch.tensor(scale, dtype=torch.float32)
        optimizer.step()
        put(parameter)
