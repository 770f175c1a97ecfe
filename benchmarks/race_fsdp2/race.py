"""Races our training step against PyTorch FSDP2 over gloo: same model, same tokens, same losses, interleaved rounds.

    .venv/bin/python benchmarks/race_fsdp2/race.py --model build/demo/smol [--method lora] [--rounds 7] [--report FILE.md]

Methods: full; lora, where both sides train one adapter (PEFT's files, r 8 on the seven projections, B random); qlora, where
our base lies in NF4 (the peer's stays fp32, and the losses are not compared: FSDP2 shards no 4-bit weights on the CPU).
--count adds a table of each side's collectives and bytes in a step; with --rounds 0 it is all there is.

Two races: against the peer as it comes, and against the peer with a malloc tuned to keep its pages. Both sides of a race
stay loaded; in each round each runs its steps while the other sleeps, in alternating order (A B B A ...). Memory is the
largest sum of PSS over a side's ranks, sampled in extra rounds that are not timed, and VmHWM. Losses must agree to 1e-5.
"""

import argparse
import json
import os
import pathlib
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TUNED_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "17179869184",
                "MALLOC_TOP_PAD_": "67108864", "MALLOC_ARENA_MAX": "1"}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Racer:
    """One side: its processes, and requests to run steps."""

    def __init__(self, name, processes):
        self.name, self.processes, self.results = name, processes, []
        self.pids = self.read()["pids"]

    def read(self):
        line = self.processes[0].stdout.readline()
        if not line:
            sys.exit(f"{self.name} has ended")
        return json.loads(line)

    def run(self, steps):
        for process in self.processes:
            if process.poll() is not None:
                sys.exit(f"{self.name} has ended with {process.returncode}")
            process.stdin.write(f"{steps}\n")
            process.stdin.flush()
        return self.read()

    def pss_bytes(self):
        total = 0
        for pid in self.pids:
            for line in open(f"/proc/{pid}/smaps_rollup"):
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
        return total

    def peak_rss_bytes(self):
        return sum(int(line.split()[1]) * 1024 for pid in self.pids for line in open(f"/proc/{pid}/status")
                   if line.startswith("VmHWM:"))

    def peak_pss_bytes(self, steps):
        peak, done = 0, threading.Event()

        def sample():
            nonlocal peak
            while not done.is_set():
                peak = max(peak, self.pss_bytes())
                time.sleep(0.02)

        sampler = threading.Thread(target=sample)
        sampler.start()
        self.run(steps)
        done.set()
        sampler.join()
        return peak

    def stop(self):
        for process in self.processes:
            process.stdin.write("0\n")
            process.stdin.close()
        for process in self.processes:
            process.wait(timeout=60)


def start(command, environment):
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def start_ours(options):
    method = [options.method, options.adapter] if options.adapter else []
    return Racer("libfsdp", [start([options.program, options.model, str(options.ranks), str(options.tokens), *method], {})])


def start_peers(options, arguments, environment):
    port = free_port()
    return [start([sys.executable, str(HERE / "peer.py"), *arguments],
                  {"RANK": str(rank), "WORLD_SIZE": str(options.ranks), "LOCAL_RANK": str(rank),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment})
            for rank in range(options.ranks)]


def start_peer(name, options, environment):
    adapter = [options.adapter] if options.adapter else []
    return Racer(name, start_peers(options, [options.model, str(options.tokens), *adapter], environment))


def counts_of_peer(options, adapter):
    processes = start_peers(options, ["count", options.model, str(options.tokens), *adapter], {})
    processes[0].stdout.readline()  # Its process ids.
    counts = json.loads(processes[0].stdout.readline())
    for process in processes:
        process.wait(timeout=60)
    return counts


def count_table(options, adapter):
    """Markdown: what rank 0 sends in a step that is not the first, on both sides."""
    lines = ["## Collectives of a step", "",
             f"Of one of {options.ranks} ranks; bytes are those that it receives from its peers. Ours are counted by a "
             "transport without peers (`race_step count`), FSDP2's as its operations are dispatched (`peer.py count`).", "",
             "| | gathers | bytes | reductions | bytes | fences | small messages | bytes |", "|---|" + "--:|" * 7]
    text = subprocess.run([options.program, "count", options.model, str(options.ranks), str(options.tokens), adapter],
                          capture_output=True, text=True, check=True).stdout
    ours = [json.loads(line) for line in text.splitlines()]
    for one in ours:
        gathers, reductions, messages = one["gather"], one["reduce"], one["exchange"]
        lines.append(f"| {one['method']} | {gathers[0]} | {gathers[1]:,} | {reductions[0]} | {reductions[1]:,} "
                     f"| {one['fence'][0]} | {messages[0]} | {messages[1]:,} |")
        if one["collectives"] != gathers[0] + reductions[0] + messages[0] + one["fence"][0]:
            sys.exit(f"a collective that the table has no column for: {one}")
    for method, arguments in (("full", []), ("lora", [adapter])):
        counts = counts_of_peer(options, arguments)
        kinds = [[value for name, value in counts.items() if any(word in name for word in words)]
                 for words in (("allgather", "all_gather"), ("reduce_scatter",), ("allreduce", "all_reduce"))]
        if sum(len(kind) for kind in kinds) != len(counts):
            sys.exit(f"a collective that the table has no column for: {counts}")
        numbers = [[sum(count) for count in zip(*kind)] or [0, 0] for kind in kinds]
        cells = " | ".join(f"{times} | {received:,}" for times, received in numbers[:2])
        lines.append(f"| FSDP2, {method} | {cells} | | {numbers[2][0]} | {numbers[2][1]:,} |")
    lines += ["", "## Bytes of the frozen base", "",
              "| | all frozen parameters, bytes | of them packed | their elements | packed bytes an element |", "|---|" + "--:|" * 4]
    for one in ours:
        if one["frozen_bytes"] and "shared" in one["method"] or "nested" in one["method"]:
            packed = f"{one['packed_bytes'] / one['packed_numel']:.4f}" if one["packed_numel"] else ""
            lines.append(f"| {one['method'].split(',')[0]} | {one['frozen_bytes']:,} | {one['packed_bytes']:,} "
                         f"| {one['packed_numel']:,} | {packed} |")
    return "\n".join(lines) + "\n"


def race(options, name, environment):
    racers = [start_ours(options), start_peer(name, options, environment)]
    for racer in racers:
        racer.run(options.warmup)
    for number in range(options.rounds):
        for racer in racers if number % 2 == 0 else reversed(racers):
            racer.results.append(racer.run(options.steps))
        losses = [racer.results[-1]["loss"] for racer in racers]
        print(f"round {number + 1}: " + ", ".join(
            f"{racer.name} {racer.results[-1]['seconds'] / options.steps:.3f} s/step" for racer in racers)
            + f"; losses {losses}", flush=True)
        if options.method != "qlora" and max(losses) - min(losses) > 1e-5 * losses[0]:
            sys.exit("the losses differ: this is no race")
    for racer in racers:
        racer.pss = racer.peak_pss_bytes(2)
        racer.rss = racer.peak_rss_bytes()
    for racer in racers:
        racer.stop()
    return racers


def rows(options, ours, peer):
    tokens = options.tokens * options.ranks * options.steps
    ratios = [theirs["seconds"] / mine["seconds"] for mine, theirs in zip(ours.results, peer.results)]
    for racer in (ours, peer):
        each = [result["seconds"] / options.steps for result in racer.results]
        cpu = statistics.median(result["cpu_seconds"] for result in racer.results) / options.steps
        yield (f"| {racer.name} | {statistics.median(each):.3f} ({min(each):.3f}-{max(each):.3f}) "
               f"| {tokens / options.steps / statistics.median(each):.1f} | {cpu:.3f} "
               f"| {racer.pss / 2**20:.0f} | {racer.rss / 2**20:.0f} ")
    yield (f"| **ours against {peer.name}** | **{statistics.median(ratios):.2f}x tokens/s** "
           f"({min(ratios):.2f}-{max(ratios):.2f} by round) | | "
           f"| **{ours.pss / peer.pss:.2f}** | **{ours.rss / peer.rss:.2f}** ")


def report(options, races):
    lines = ["| | s/step, median (min-max) | tokens/s | CPU s/step, all ranks | peak PSS MiB | peak RSS MiB |",
             "|---|" + "--:|" * 5]
    for ours, peer in races:
        lines += [row + "|" for row in rows(options, ours, peer)]
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line), platform.machine())
    import torch
    import transformers
    losses = ", ".join(f"{ours.results[-1]['loss']:.7f} and {peer.results[-1]['loss']:.7f}" for ours, peer in races)
    trained = {"full": "fp32", "lora": "LoRA r 8 on 7 projections over a frozen fp32 base",
               "qlora": "LoRA r 8 on 7 projections, our base in NF4, the peer's in fp32"}[options.method]
    head = [f"{options.ranks} ranks x 1 thread, {options.tokens} tokens a rank, {trained}, AdamW, clipping; "
            f"{options.rounds} interleaved rounds of {options.steps} steps; {os.cpu_count()} cores, {cpu}; "
            f"torch {torch.__version__}, transformers {transformers.__version__}.",
            f"Last losses: {losses}. Load average at the end: {os.getloadavg()[0]:.1f}.",
            "Command: `benchmarks/race_fsdp2/race.py --model MODEL " + " ".join(
                f"--{key} {getattr(options, key)}" for key in ("method", "ranks", "tokens", "rounds", "steps", "warmup")) + "`.", ""]
    return "\n".join(head + lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--program", default=str(ROOT / "build/release/bin/race_step"))
    parser.add_argument("--method", choices=("full", "lora", "qlora"), default="full")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--report")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as adapter:
        if options.method != "full" or options.count:
            subprocess.run([sys.executable, str(HERE / "peer.py"), "adapter", options.model, adapter], check=True)
        options.adapter = adapter if options.method != "full" else None
        races = [race(options, name, environment) for name, environment in
                 (("FSDP2 + gloo", {}), ("FSDP2 + gloo, tuned malloc", TUNED_MALLOC)) if options.rounds]
        text = report(options, races) if races else ""
        if options.count:
            text += ("\n" if text else "") + count_table(options, adapter)
    print(text)
    if options.report:
        pathlib.Path(options.report).write_text("# Training step against PyTorch FSDP2 + gloo\n\n" + text)


if __name__ == "__main__":
    main()
