"""Learning rates of transformers' schedules, one line each: kind total warmup rate rate ..."""
import sys

import torch
from transformers import get_scheduler

with open(sys.argv[1], "w") as file:
    for kind in ("constant", "constant_with_warmup", "linear", "cosine"):
        for total, warmup in ((1, 0), (10, 0), (37, 5), (40, 40), (40, 60), (1000, 31)):
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
            scheduler = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=total)
            rates = []
            for _ in range(total):
                rates.append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                scheduler.step()
            print(kind, total, warmup, *map(float.hex, rates), file=file)
