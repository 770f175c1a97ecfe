"""Saves and loads one state with libfsdp, torch.distributed.checkpoint and safetensors, interleaved in one run.

    .venv/bin/python benchmarks/checkpoint_bench/checkpoint_bench.py --program build/bin/checkpoint_bench \
        [--models smollm2,1b] [--places tmpfs=/dev/shm,disk=build] [--rounds 5] [--report FILE.md] [--only-async]

All sides stay loaded (those of one model), and in each round every side saves and then loads, in rotating order, while the
others sleep. Files are synced by all (torch does so by default; safetensors' own save_file does not sync), and dropped
from the page cache before a load from disk. At last, what training waits for an asynchronous save of SmolLM2 with AdamW's
state, beside a plain copy of as many bytes between warm buffers (async_save.cpp, beside the program). Memory is the growth of a rank's resident memory over its state: the peak
during the operation minus what was resident before it, the warming round included (later ones find malloc's pages warm).
"""

import argparse
import json
import os
import pathlib
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
NAMES = {"ours_sharded": "libfsdp, sharded form", "ours_full": "libfsdp, full form",
         "dcp": "DCP, own format", "dcp_hf": "DCP, safetensors", "safetensors": "safetensors, 1 process, whole"}


def llama_shapes(dtype, vocab, hidden, inner, layers, heads, kv_heads, tied):
    head = hidden // heads
    shapes = [["model.embed_tokens.weight", dtype, [vocab, hidden]]]
    for i in range(layers):
        p = f"model.layers.{i}."
        for name, rows, columns in (("self_attn.q_proj", hidden, hidden), ("self_attn.k_proj", kv_heads * head, hidden),
                                    ("self_attn.v_proj", kv_heads * head, hidden), ("self_attn.o_proj", hidden, hidden),
                                    ("mlp.gate_proj", inner, hidden), ("mlp.up_proj", inner, hidden),
                                    ("mlp.down_proj", hidden, inner)):
            shapes.append([f"{p}{name}.weight", dtype, [rows, columns]])
        shapes += [[f"{p}{name}.weight", dtype, [hidden]] for name in ("input_layernorm", "post_attention_layernorm")]
    shapes.append(["model.norm.weight", dtype, [hidden]])
    return shapes if tied else shapes + [["lm_head.weight", dtype, [vocab, hidden]]]


MODELS = {"smollm2": ("SmolLM2-135M, fp32", llama_shapes("float32", 49152, 576, 1536, 30, 9, 3, True)),
          "1b": ("Llama of 1.1 B parameters, bf16", llama_shapes("bfloat16", 32000, 2048, 5632, 22, 32, 4, False))}


SMOLLM2 = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
           "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
           "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
           "tie_word_embeddings": True, "torch_dtype": "float32"}


class Side:
    def __init__(self, name, shapes, ranks, program):
        self.name, self.form, self.results = name, name.removeprefix("ours_"), {"save": [], "load": []}
        self.peak = {"save": 0, "load": 0}
        if name.startswith("ours"):
            self.processes = [self.start([program, shapes, str(ranks)], {})]
        else:
            ranks = 1 if name == "safetensors" else ranks
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            command = [sys.executable, HERE / "peer.py", shapes, self.form]
            self.processes = [self.start(command, {"RANK": str(r), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1",
                                                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
                              for r in range(ranks)]
        self.read()

    @staticmethod
    def start(command, more):
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                env={**os.environ, **more, "PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR"})

    def read(self):
        line = self.processes[0].stdout.readline()
        if not line:
            sys.exit(f"{self.name} has ended")
        return json.loads(line)

    def run(self, op, directory):
        for process in self.processes:
            process.stdin.write(json.dumps({"op": op, "form": self.form, "dir": str(directory)}) + "\n")
            process.stdin.flush()
        return self.read()

    def close(self):
        for process in self.processes:
            process.stdin.close()
        for process in self.processes:
            process.wait()


def evict(directory):
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def one_round(side, place, keep):
    directory = pathlib.Path(tempfile.mkdtemp(prefix="checkpoint_bench-", dir=place))
    try:
        saved = side.run("save", directory)
        evict(directory)
        loaded = side.run("load", directory)
    finally:
        shutil.rmtree(directory)
    for op, result in (("save", saved), ("load", loaded)):
        side.peak[op] = max(side.peak[op], *result["peak_mib"])
        if keep:
            side.results[op].append(result)


def cell(results):
    rates = [r["bytes"] / r["seconds"] / 1e9 for r in results]
    return f"{statistics.median(rates):.2f} ({min(rates):.2f}-{max(rates):.2f})"


def rate(side, op):
    return statistics.median(r["bytes"] / r["seconds"] for r in side.results[op])


def table(title, sides):
    lines = [f"\n## {title}\n", "| | save GB/s, median (min-max) | load GB/s | MiB above the state: save | load |",
             "|---|--:|--:|--:|--:|"]
    for side in sides:
        lines.append(f"| {NAMES[side.name]} | {cell(side.results['save'])} | {cell(side.results['load'])} | "
                     f"{side.peak['save']:.0f} | {side.peak['load']:.0f} |")
    ours = sides[0]
    for other in sides:
        if other.name.startswith("dcp"):
            lines.append(f"| **ours sharded against {NAMES[other.name]}** | **{rate(ours, 'save') / rate(other, 'save'):.2f}x** "
                         f"| **{rate(ours, 'load') / rate(other, 'load'):.2f}x** | | |")
    return lines


def measure(key, place_name, place, options):
    title, shapes = MODELS[key]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(shapes, file)
        file.flush()
        sides = [Side(name, file.name, options.ranks, options.program) for name in NAMES]
    for r in range(options.rounds + 1):  # The first is to warm up.
        for i in range(len(sides)):
            one_round(sides[(i + r) % len(sides)], place, keep=r > 0)
    lines = table(f"{title}, {place_name}", sides)
    for side in sides:
        side.close()
    return lines


def asynchronous(place_name, place, options):
    """The stall of an asynchronous save, in turns with a plain copy."""
    with tempfile.TemporaryDirectory(prefix="checkpoint_bench-", dir=place) as folder:
        model = pathlib.Path(folder) / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(SMOLLM2))
        program = pathlib.Path(options.program).with_name("async_save")
        result = json.loads(subprocess.run([program, model, str(options.ranks), f"{folder}/run", str(options.rounds + 1)],
                                           check=True, capture_output=True, text=True).stdout)
    copies, stalls, commits = (result[key][1:] for key in ("copy", "stall", "commit"))

    def milliseconds(values):
        return f"{1e3 * statistics.median(values):.0f} ({1e3 * min(values):.0f}-{1e3 * max(values):.0f})"

    ratio = statistics.median(stall / copy for stall, copy in zip(stalls, copies))
    return [f"\n## Asynchronous save of SmolLM2-135M in fp32 with AdamW's state, {place_name}\n",
            f"{result['bytes'] / 1e6:.0f} MB a rank; milliseconds of the slowest rank, median (min-max).\n",
            "| plain copy | save() returns after | stall / copy | first save | poll() that commits |", "|--:|--:|--:|--:|--:|",
            f"| {milliseconds(copies)} | {milliseconds(stalls)} | **{ratio:.2f}** | {1e3 * result['stall'][0]:.0f} | "
            f"{milliseconds(commits)} |"]


def processor():
    for line in open("/proc/cpuinfo"):
        if line.startswith("model name"):
            return " ".join(line.split(":")[1].split()[:2])
    return platform.processor()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", required=True)
    parser.add_argument("--models", default="smollm2,1b")
    parser.add_argument("--places", default="tmpfs=/dev/shm,disk=build")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--report")
    parser.add_argument("--only-async", action="store_true")
    options = parser.parse_args()
    import torch
    lines = ["# Saving and loading, against torch.distributed.checkpoint and safetensors\n",
             f"{options.ranks} ranks x 1 thread; {options.rounds} interleaved rounds after one to warm up; "
             f"{os.cpu_count()} cores, {processor()}; torch {torch.__version__}.",
             f"Command: `benchmarks/checkpoint_bench/checkpoint_bench.py --program checkpoint_bench --models {options.models} "
             f"--rounds {options.rounds} --ranks {options.ranks}`."]
    for place in options.places.split(","):
        name, path = place.split("=")
        for key in [] if options.only_async else options.models.split(","):
            lines += measure(key, name, path, options)
        lines += asynchronous(name, path, options)
    lines.append(f"\nLoad average at the end: {os.getloadavg()[0]:.1f}.")
    text = "\n".join(lines) + "\n"
    print(text)
    if options.report:
        pathlib.Path(options.report).write_text(text)


main()
