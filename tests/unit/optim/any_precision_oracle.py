"""AnyPrecisionAdamW's formula, written over again: raw start, then gradient, parameter and state of every step.

usage: any_precision_oracle.py OUTPUT NUMEL STEPS LR WEIGHT_DECAY CASE...
A case is MOMENTUM,VARIANCE,COMPENSATION with f32 or bf16, compensation also none; the parameter is bf16.

`exact` computes each tensor operation in fp32, one rounding per operation, and then rounds to the type of the tensor
that it writes. `literal` is the same step in torch's own in-place operations, whose kernels may fuse a product and a
sum; the two must agree but for a few last places.
"""
import sys

import numpy
import torch

TYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
output, numel, steps, lr, decay = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), float(sys.argv[5])


def scalar(value):
    return torch.tensor(value, dtype=torch.float32)


def exact(p, m, v, c, g, step):
    """New (p, m, v, c); every line is one tensor operation of the published step."""
    def into(tensor, value):
        return value.to(tensor.dtype)

    p = into(p, p.float() * scalar(1 - lr * decay))
    m = into(m, m.float() * scalar(BETA1))
    m = into(m, m.float() + scalar(1 - BETA1) * g)
    v = into(v, v.float() * scalar(BETA2))
    v = into(v, v.float() + (scalar(1 - BETA2) * g) * g)
    # Not torch's square root: vectorised, it is off by a last place for many numbers.
    denominator = into(v, torch.from_numpy(numpy.sqrt(v.float().numpy())))
    denominator = into(v, denominator.float() / scalar((1 - BETA2**step) ** 0.5))
    denominator = into(v, denominator.float() + scalar(EPS))
    change = (scalar(-lr / (1 - BETA1**step)) * m.float()) / denominator.float()
    if c is None:
        return into(p, p.float() + change), m, v, c
    c = into(c, c.float() + change)
    before = p
    p = into(p, p.float() + c.float())
    lost = into(p, before.float() - p.float())
    return p, m, v, into(c, c.float() + lost.float())


def literal(p, m, v, c, g, step):
    p, m, v = p.clone(), m.clone(), v.clone()
    p.mul_(1 - lr * decay)
    m.mul_(BETA1).add_(g, alpha=1 - BETA1)
    v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
    denominator = (v.sqrt() / (1 - BETA2**step) ** 0.5).add_(EPS)
    step_size = lr / (1 - BETA1**step)
    if c is None:
        return p.addcdiv_(m, denominator, value=-step_size), m, v, c
    c = c.clone().addcdiv_(m, denominator, value=-step_size)
    before = p.clone()
    p.add_(c)
    return p, m, v, c.add_(before.sub_(p))


def check_close(name, a, b):
    if a is None:
        return
    tolerance = 2.0**-7 if a.dtype == torch.bfloat16 else 2.0**-21
    differs = a != b
    # Terms may cancel, so the largest element is the measure. What Kahan's compensation holds is below that.
    if name != "compensation":
        assert ((a.float() - b.float()).abs() <= tolerance * a.float().abs().max()).all(), name
    if a.dtype == torch.bfloat16:
        assert differs.float().mean() < 0.02, (name, differs.float().mean())


def write(file, tensor):
    if tensor is not None:
        bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
        file.write(bits.numpy().tobytes())


with open(output, "wb") as file:
    for case in sys.argv[6:]:
        momentum, variance, compensation = case.split(",")
        torch.manual_seed(0)
        p = torch.randn(numel).bfloat16()
        m = torch.zeros(numel, dtype=TYPES[momentum])
        v = torch.zeros(numel, dtype=TYPES[variance])
        c = None if compensation == "none" else torch.zeros(numel, dtype=TYPES[compensation])
        write(file, p)
        for step in range(1, steps + 1):
            g = torch.randn(numel) * 0.01
            expected = exact(p, m, v, c, g, step)
            for name, a, b in zip(("parameter", "exp_avg", "exp_avg_sq", "compensation"), expected,
                                  literal(p, m, v, c, g, step)):
                check_close(name, a, b)
            p, m, v, c = expected
            for tensor in (g, p, m, v, c):
                write(file, tensor)
