"""What PyTorch does to gradients: clipping by norm and by value, and the scale of torch.amp.GradScaler.

usage: gradient_rules_oracle.py OUTPUT NUMEL SCALE MAX_NORM CLIP_VALUE INIT_SCALE GROWTH_INTERVAL OUTCOMES
Writes, raw: the summed gradient (float32); for norms 2, 1, inf the norm of the mean gradient and that gradient clipped;
the mean gradient clamped by value; for every outcome (a digit, 1 = not finite) scale and growth tracker after the step.
"""
import math
import struct
import sys

import torch

output, numel = sys.argv[1], int(sys.argv[2])
scale, max_norm, clip_value, init_scale = map(float, sys.argv[3:7])
growth_interval, outcomes = int(sys.argv[7]), sys.argv[8]

torch.manual_seed(0)
gradient = torch.randn(numel)
parameter = torch.nn.Parameter(torch.zeros(numel))


def mean_gradient():
    parameter.grad = gradient * torch.tensor(scale, dtype=torch.float32)


with open(output, "wb") as file:
    file.write(gradient.numpy().tobytes())
    for norm_type in (2.0, 1.0, math.inf):
        mean_gradient()
        norm = torch.nn.utils.clip_grad_norm_([parameter], max_norm, norm_type=norm_type)
        file.write(struct.pack("<f", norm.item()))
        file.write(parameter.grad.numpy().tobytes())
    mean_gradient()
    torch.nn.utils.clip_grad_value_([parameter], clip_value)
    file.write(parameter.grad.numpy().tobytes())

    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=growth_interval)
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    for outcome in outcomes:
        scaler.scale(torch.zeros(1))  # Makes the scaler's tensors at the first step.
        parameter.grad = torch.full((numel,), math.inf if outcome == "1" else 1.0)
        scaler.step(optimizer)
        scaler.update()
        file.write(struct.pack("<fi", scaler.get_scale(), scaler.state_dict()["_growth_tracker"]))
