"""Races our training step against PyTorch FSDP2 over gloo: same model, same tokens, same losses, interleaved rounds.

    .venv/bin/python benchmarks/race_fsdp2/race.py --model build/demo/smol [--rounds 7] [--report FILE.md]

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
    return Racer("libfsdp", [start([options.program, options.model, str(options.ranks), str(options.tokens)], {})])


def start_peer(name, options, environment):
    port = free_port()
    processes = [start([sys.executable, str(HERE / "peer.py"), options.model, str(options.tokens)],
                       {"RANK": str(rank), "WORLD_SIZE": str(options.ranks), "LOCAL_RANK": str(rank),
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment})
                 for rank in range(options.ranks)]
    return Racer(name, processes)


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
        if max(losses) - min(losses) > 1e-5 * losses[0]:
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
    head = [f"{options.ranks} ranks x 1 thread, {options.tokens} tokens a rank, fp32, AdamW, clipping; "
            f"{options.rounds} interleaved rounds of {options.steps} steps; {os.cpu_count()} cores, {cpu}; "
            f"torch {torch.__version__}, transformers {transformers.__version__}.",
            f"Last losses: {losses}. Load average at the end: {os.getloadavg()[0]:.1f}.",
            "Command: `benchmarks/race_fsdp2/race.py --model MODEL " + " ".join(
                f"--{key} {getattr(options, key)}" for key in ("ranks", "tokens", "rounds", "steps", "warmup")) + "`.", ""]
    return "\n".join(head + lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--program", default=str(ROOT / "build/release/bin/race_step"))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--report")
    options = parser.parse_args()
    races = [race(options, "FSDP2 + gloo", {}), race(options, "FSDP2 + gloo, tuned malloc", TUNED_MALLOC)]
    text = report(options, races)
    print(text)
    if options.report:
        pathlib.Path(options.report).write_text("# Training step against PyTorch FSDP2 + gloo\n\n" + text)


if __name__ == "__main__":
    main()
