"""The other sides of the checkpoint benchmark, one rank each; driven by checkpoint_bench.py.

Requests are the lines {"op": "save"|"load", "form": ..., "dir": ...}. Forms: "dcp" (its own format), "dcp_hf" (its
safetensors), both with DTensors cut along dim 0 as FSDP2 has them; "safetensors" (one process, whole tensors).
"""

import json
import sys
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor, Shard


def status_kib(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1])


def make_state(shapes, form, mesh):
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, dtype, shape in shapes:
        if form == "safetensors":
            state[name] = torch.randn(shape, generator=generator).to(getattr(torch, dtype))
            continue
        rows = list(torch.chunk(torch.arange(shape[0]), mesh.size()))
        mine = len(rows[dist.get_rank()]) if dist.get_rank() < len(rows) else 0
        local = torch.randn([mine, *shape[1:]], generator=generator).to(getattr(torch, dtype))
        state[name] = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape),
                                         stride=torch.empty(shape, device="meta").stride())
    return state


def save(state, form, directory):
    if form == "safetensors":
        save_file(state, f"{directory}/model.safetensors")
    elif form == "dcp":
        dcp.save(state, checkpoint_id=directory)
    else:
        dcp.save(state, storage_writer=HuggingFaceStorageWriter(directory, save_distributed=True))


def load(state, form, directory):
    if form == "safetensors":
        for name, tensor in load_file(f"{directory}/model.safetensors").items():
            state[name].copy_(tensor)
    elif form == "dcp":
        dcp.load(state, checkpoint_id=directory)
    else:
        dcp.load(state, storage_reader=HuggingFaceStorageReader(directory))


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def main():
    shapes, form = json.load(open(sys.argv[1])), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    state = make_state(shapes, form, mesh)
    first = next(iter(state.values()))
    sample = local(first).clone()
    bytes_here = sum(local(t).numel() * t.element_size() for t in state.values())
    dist.barrier()
    if dist.get_rank() == 0:
        print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request["op"] == "load":
            for tensor in state.values():
                local(tensor).zero_()
        open("/proc/self/clear_refs", "w").write("5")
        before = status_kib("VmRSS")
        dist.barrier()
        start = time.perf_counter()
        (save if request["op"] == "save" else load)(state, form, request["dir"])
        dist.barrier()
        seconds = time.perf_counter() - start
        peak = (status_kib("VmHWM") - before) / 1024
        assert local(first).equal(sample)
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (bytes_here, peak))
        if dist.get_rank() == 0:
            print(json.dumps({"seconds": seconds, "bytes": sum(b for b, _ in gathered),
                              "peak_mib": [p for _, p in gathered]}), flush=True)
    dist.destroy_process_group()


main()
