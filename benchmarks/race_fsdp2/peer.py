"""The peer's side of the race: one rank of PyTorch FSDP2 over gloo, transformers' Llama, AdamW. Driven by race.py.

usage: peer.py MODEL_DIR TOKENS [ADAPTER_DIR]         serves steps; with an adapter of PEFT that alone is trained
       peer.py adapter MODEL_DIR ADAPTER_DIR          writes a LoRA adapter, r 8 on the seven projections, B random
       peer.py count MODEL_DIR TOKENS [ADAPTER_DIR]   one step: the collectives of rank 0, and bytes from its peers
"""

import json
import os
import resource
import sys
import time

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Count(TorchDispatchMode):
    """Collectives and the bytes that a rank receives from its peers, by operation."""

    def __init__(self, ranks):
        super().__init__()
        self.peers, self.of = ranks - 1, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name.startswith(("c10d::", "_c10d_functional::")) and "wait" not in name:
            tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            # The smallest tensor is a rank's part: what each peer sends of a gather and of a reduction.
            part = min(tensor.nbytes for tensor in tensors)
            times, received = self.of.get(name, (0, 0))
            self.of[name] = (times + 1, received + part * self.peers)
        return function(*args, **(kwargs or {}))


def load(directory, adapter, mesh):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa")
    layers = model.model.layers
    if adapter:
        import peft
        model = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)
    model.train()
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def write_adapter(directory, adapter):
    import peft
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.01)
    model.save_pretrained(adapter)


def main():
    torch.set_num_threads(1)
    arguments = sys.argv[1:]
    if arguments[0] == "adapter":
        return write_adapter(*arguments[1:])
    counting = arguments[0] == "count"
    directory, tokens, *adapter = arguments[counting:]
    tokens = int(tokens)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = dist.init_device_mesh("cpu", (ranks,))
    model = load(directory, adapter[0] if adapter else None, mesh)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.01)
    pids = [None] * ranks
    dist.all_gather_object(pids, os.getpid())
    if rank == 0:
        print(json.dumps({"pids": pids}), flush=True)
    step = 0
    vocabulary = model.config.vocab_size
    t = torch.arange(tokens, dtype=torch.int64)

    def run_step(step):
        ids = ((t * t * 31 + t * 7919 + rank * 104729 + step * 1299709) % vocabulary)[None]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    if counting:
        run_step(0)
        with Count(ranks) as count:
            run_step(1)
        if rank == 0:
            print(json.dumps(count.of), flush=True)
        return dist.destroy_process_group()
    for line in sys.stdin:
        steps = int(line)
        if steps == 0:
            break
        cpu, start = cpu_seconds(), time.perf_counter()
        for _ in range(steps):
            loss = run_step(step)
            step += 1
        seconds, used = time.perf_counter() - start, torch.tensor([cpu_seconds() - cpu], dtype=torch.float64)
        loss = loss.detach().double() / ranks
        dist.all_reduce(loss)
        dist.all_reduce(used)
        if rank == 0:
            print(json.dumps({"loss": loss.item(), "seconds": seconds, "cpu_seconds": used.item()}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
