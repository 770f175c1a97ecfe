#!/usr/bin/env python3
"""Lets one rank of a real training run fail, many times, and looks at what the others and the launcher do.

Each trial draws the way to fail, the phase, the number of ranks (2 to 4) and the failing rank. In most trials
training_program (tests/procs) fails at the drawn place of a step; in the others a signal hits a rank of finetune
at a random moment. A trial is good when everything is over in time, the exit code is the right one, the last
line names the failing rank, step, phase and all others, and no process and no file is left.

usage: trials.py --finetune PATH --training-program PATH [--trials N] [--seed S] [--patience X] [--report FILE]
Without --trials: 12, or 330 with FSDP_TEST_SCALE=long. Exit code 0 = all trials were good.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import os
import pathlib
import platform
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

SOURCE = pathlib.Path(__file__).resolve().parents[2]
STEPS = 6
HANG_S = 40       # after the fault
START_UP_S = 300  # until it

SIGNALS = {"kill": "SIGKILL", "term": "SIGTERM", "segv": "SIGSEGV", "bus": "SIGBUS", "abrt": "SIGABRT",
           "fpe": "SIGFPE", "int": "SIGINT", "hup": "SIGHUP"}
# kind -> (exit code, what the last line says behind the rank)
EXPECTED = {
    **{kind: (8, f" was killed by {name}") for kind, name in SIGNALS.items()},
    "abort": (8, " was killed by SIGABRT"),
    "stop": (8, " was stopped by SIGSTOP for "),
    "throw": (1, ": internal error: boom"),
    "throw-int": (1, ": "),
    "throw-data": (3, ": train.jsonl:7: no known key"),
    "throw-in-thread": (1, ": boom"),
    "throw-in-destructor": (1, ": internal error: thrown by a destructor"),
    "bad-alloc": (7, ": out of host memory"),
    "exit-0": (8, " ended with exit code 0"),
    "quick-exit-0": (8, " ended with exit code 0"),
    "exit-in-destructor": (8, " ended with exit code 0"),
    "exit-3": (3, " ended with exit code 3"),
    "pause": (0, None),           # SIGSTOP, and SIGCONT within the time-out: nothing happens
    "launcher-kill": (-9, None),  # the launcher dies, the ranks follow
}
ANYWHERE = [*SIGNALS, "stop", "pause", "launcher-kill", "quick-exit-0"]  # may come from another thread
IN_LINE = [kind for kind in EXPECTED if kind not in SIGNALS and kind not in ("stop", "pause", "launcher-kill")]
# place -> longest delay in microseconds after it was reached
PLACES = {"rendezvous": 20000, "load": 3000, "forward": 1500, "backward": 1500, "reduce-wait": 40000, "packet": 40000,
          "optimizer": 300, "save": 3000}
WAITS = ("reduce-wait", "packet")  # the delay is fixed, and the others come late
BEFORE_MAIN = {"throw": (8, " was killed by SIGABRT"), "throw-int": (8, " was killed by SIGABRT"),
               "throw-in-thread": (8, " was killed by SIGABRT"), "throw-in-destructor": (8, " was killed by SIGABRT"),
               "exit-in-destructor": (8, " was killed by SIGABRT"), "bad-alloc": (8, " was killed by SIGABRT")}
PHASE_TEXT = {"load": "load", "forward": "forward", "backward": "backward", "packet": "update", "optimizer": "update",
              "save": "save"}

Trial = collections.namedtuple("Trial", "kind place step rank ranks after_us peer_timeout")
Result = collections.namedtuple("Result", "trial seconds code phase problems text")


def draw(index, rng, outside):
    """Kinds and places take turns, everything else is drawn."""
    ranks = 2 + index % 3
    rank = rng.randrange(ranks)
    if outside:
        kind = [*SIGNALS, "stop", "pause", "launcher-kill"][index % 11]
        return Trial(kind, "outside", -1, rank, ranks, rng.randrange(50, 1500) * 1000, 1.0)
    in_line = index % 2 == 1
    kind = (IN_LINE if in_line else ANYWHERE)[index // 2 % len(IN_LINE if in_line else ANYWHERE)]
    place = rng.choice([*PLACES])
    after_us = 0 if in_line else PLACES[place] if place in WAITS else 1 + rng.randrange(PLACES[place])
    step = rng.randrange(2, STEPS) if place not in ("rendezvous", "load", "save") else -1
    if kind == "exit-3" and place == "rendezvous":
        kind = "quick-exit-0"
    return Trial(kind, place, step, rank, ranks, after_us, 8.0 if kind == "stop" and index % 5 == 0 else 1.0)


class Bench:
    def __init__(self, finetune, training_program, folder, patience=1):
        self.patience = patience
        self.finetune, self.program, self.folder = finetune, training_program, folder
        os.environ["FINETUNE"], os.environ["FSDP_SOURCE_DIR"] = str(finetune), str(SOURCE)
        sys.path.insert(0, str(SOURCE / "tests/apps"))
        import support
        source = folder / "source"
        source.mkdir()
        support.write_tokenizer(source)
        (source / "config.json").write_text(json.dumps(support.CONFIG))
        subprocess.run([finetune, "new-model", "--model_config", source / "config.json", "--tokenizer", source,
                        "--output_dir", folder / "model", "--seed", "1"], check=True, stdout=subprocess.DEVNULL)
        support.write_jsonl(folder / "train.jsonl", support.records(200))
        self.count = 0
        self.weights = {}  # by number of ranks: digest of an undisturbed run's result

    def command(self, trial, out):
        if trial.place != "outside":
            return [self.program, self.folder / "model", self.folder / "train.jsonl", out, trial.ranks, STEPS]
        return [self.finetune, "train", "--model_name_or_path", self.folder / "model", "--train_file",
                self.folder / "train.jsonl", "--output_dir", out, "--max_seq_length", 64,
                "--per_device_train_batch_size", 2, "--nproc_per_node", trial.ranks, "--max_steps", 150]

    def start(self, trial, mark, out, log):
        fault = f"rank={trial.rank} place={trial.place} step={trial.step} kind={trial.kind} after_us={trial.after_us}"
        env = {**os.environ, "FSDP_TEST_MARK": mark, "OMP_NUM_THREADS": "1"}
        if trial.kind == "stop" and trial.peer_timeout != 8:
            env["FSDP_PEER_TIMEOUT"] = str(trial.peer_timeout)
        if trial.kind != "nothing" and trial.place != "outside":
            env.update(FSDP_TEST_FAULT=fault, FSDP_TEST_FAULT_LOG=str(log))
        return subprocess.Popen([*map(str, self.command(trial, out))], env=env, stdin=subprocess.DEVNULL,
                                stdout=subprocess.DEVNULL, stderr=open(f"{out}.err", "w"), cwd=self.folder)

    def undisturbed(self, trial):
        """Digest of the weights that a run without a fault writes."""
        key = (trial.place == "outside", trial.ranks)
        if key not in self.weights:
            out = self.folder / f"whole_{key[0]}_{key[1]}"
            run = self.start(trial._replace(kind="nothing"), "whole", out, None)
            if run.wait(START_UP_S) != 0:
                raise SystemExit(f"a run without a fault failed:\n{pathlib.Path(f'{out}.err').read_text()}")
            self.weights[key] = digest(out)
        return self.weights[key]

    def run(self, trial):
        self.count += 1
        mark = f"trial_{os.getpid()}_{self.count}"
        out, log = self.folder / f"out{self.count}", self.folder / f"log{self.count}"
        if trial.kind == "pause":
            self.undisturbed(trial)
        process = self.start(trial, mark, out, log)
        fault_at = self.fail_from_outside(process, trial, mark) if trial.place == "outside" else None
        try:
            if trial.place != "outside":
                self.wait_for_fault(process, trial, log)
            code = process.wait(HANG_S)
        except subprocess.TimeoutExpired:
            code = None
        ended_at = time.monotonic()
        if trial.place != "outside" and log.exists():
            fault_at = int(log.read_text().split()[2]) * 1e-9
        result = self.judge(trial, code, fault_at, ended_at, mark, out)
        for path in (out, log, pathlib.Path(f"{out}.err")):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        return result

    def fail_from_outside(self, process, trial, mark):
        """Waits for the drawn moment after the rank has started, and sends the signal."""
        while process.poll() is None:
            victim = next((pid for pid, rank in processes(mark) if rank == trial.rank), None)
            if victim:
                break
            time.sleep(0.002)
        else:
            return None
        time.sleep(trial.after_us * 1e-6)
        number = signal.SIGSTOP if trial.kind in ("stop", "pause") else getattr(signal, SIGNALS.get(trial.kind, "SIGKILL"))
        fault_at = time.monotonic()
        try:
            os.kill(process.pid if trial.kind == "launcher-kill" else victim, number)
        except ProcessLookupError:
            return None
        if trial.kind == "pause":
            time.sleep(0.4)
            with contextlib.suppress(ProcessLookupError):  # it had just ended when it was stopped
                os.kill(victim, signal.SIGCONT)
        return fault_at

    @staticmethod
    def wait_for_fault(process, trial, log):
        end = time.monotonic() + START_UP_S
        while not log.exists() or len(log.read_text().split()) < 3:
            if time.monotonic() > end or process.poll() is not None:
                return
            time.sleep(0.005)
        if trial.kind == "pause":
            time.sleep(0.4)
            os.kill(int(log.read_text().split()[1]), signal.SIGCONT)

    def judge(self, trial, code, fault_at, ended_at, mark, out):
        text = pathlib.Path(f"{out}.err").read_text()
        last = text.strip().splitlines()[-1] if text.strip() else ""
        if fault_at is None or (trial.place == "outside" and code == 0 and trial.kind not in ("pause", "nothing")):
            return None  # the run was over before the fault
        problems = []
        if trial.kind == "launcher-kill":
            while processes(mark) and time.monotonic() - ended_at < 5:
                time.sleep(0.005)
            ended_at = time.monotonic()
        left = processes(mark)
        if code is None:
            problems.append("hang")
            left = []  # of course
        if left:
            problems.append("orphan")
        for pid, _ in processes(mark):
            os.kill(pid, signal.SIGKILL)
        seconds = ended_at - fault_at
        limit = 10.0 if trial.kind == "stop" and trial.peer_timeout == 8 else 4.0 if trial.kind == "stop" else 2.0
        if trial.kind != "pause" and seconds > limit * self.patience:
            problems.append("late")
        wanted_code, wanted_text = EXPECTED[trial.kind]
        # A rank that hears SIGTERM or SIGINT has all of them stop after the step, with a checkpoint, or end if that was
        # the last. Before the first step there is nothing to save.
        stopped = trial.kind in ("term", "int") and code in (0, 75, 130)
        if stopped:
            wanted_code, wanted_text = code, None
            if code == 75 and not list(out.glob("checkpoint-*/manifest.json")):
                problems.append("no checkpoint")
            if code == 130 and (last != "finetune: interrupted, nothing saved" or steps_of(out)):
                problems.append("steps thrown away")
        if trial.place == "rendezvous" and not stopped:
            wanted_code, wanted_text = BEFORE_MAIN.get(trial.kind, (wanted_code, wanted_text))
        if trial.kind == "throw-data" and trial.place == "rendezvous":
            wanted_text = None  # main() prints it itself, and ends with its code
        if code is not None and code != wanted_code:
            problems.append("exit code")
        if wanted_text is not None and not last.startswith(f"finetune: rank {trial.rank}"):
            problems.append("wrong culprit")
        elif wanted_text is not None and not last.startswith(f"finetune: rank {trial.rank}{wanted_text}"):
            problems.append("wrong words")
        if not stopped:
            problems += self.wrong_place(trial, last, text)
        if trial.kind == "pause" and code == 0 and digest(out) != self.undisturbed(trial):
            problems.append("other weights")
        # Where all die at once nobody is left to remove a half-written save; the next start does. What rank 0 alone
        # writes or publishes (a small file, a checkpoint under its unpublished name) stays when that rank dies.
        own = [path.name for path in out.glob("*") if re.search(r"\.tmp-(\d+|checkpoint|latest)-", path.name)]
        others = [path.name for path in out.glob("*") if ".tmp" in path.name and path.name not in own]
        if trial.kind != "launcher-kill" and (others or (own and trial.rank != 0)):
            problems.append("file left")
        phase = trial.place if trial.place != "outside" else "stopped" if stopped else phase_of(last)
        return Result(trial, seconds, code, phase, problems, text)

    @staticmethod
    def wrong_place(trial, last, text):
        """Problems with the step, the phase and the lines about the other ranks."""
        problems = []
        if trial.kind in ("pause", "launcher-kill", "throw-data"):
            return problems
        if trial.place in PHASE_TEXT and trial.after_us == 0 and f"phase {PHASE_TEXT[trial.place]}" not in last:
            problems.append("wrong phase")
        if trial.step >= 0 and trial.after_us == 0 and f"step {trial.step}," not in last:
            problems.append("wrong step")
        lines = re.findall(r"^  rank (\d+): \S", text, re.MULTILINE)
        if sorted(map(int, lines)) != [rank for rank in range(trial.ranks) if rank != trial.rank]:
            problems.append("ranks not listed")
        # On a busy machine the fault may come later than it was meant to.
        in_time = f"step {trial.step}, phase {'backward' if trial.place == 'reduce-wait' else 'update'}" in last
        if trial.place in WAITS and trial.after_us > 0 and in_time and " while it waited for rank " not in last:
            problems.append("wait not told")
        return problems


def processes(mark):
    """(pid, rank or None) of the running processes that carry the mark."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            environment = pathlib.Path(f"/proc/{pid}/environ").read_bytes()
            state = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        if f"FSDP_TEST_MARK={mark}\0".encode() in environment and state != "Z":
            rank = re.search(rb"(?:^|\0)LOCAL_RANK=(\d+)\0", environment)
            found.append((int(pid), int(rank[1]) if rank else None))
    return found


def digest(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def steps_of(folder):
    metrics = folder / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def phase_of(last):
    if "before it joined" in last:
        return "rendezvous"
    found = re.search(r"phase (\w+)", last)
    return f"{found[1]} (any moment)" if found else "any moment"


def table(rows):
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def summary_row(name, results):
    count = lambda what: str(sum(what in result.problems for result in results))
    seconds = [result.seconds for result in results]
    others = sum(bool(set(r.problems) - {"hang", "orphan", "wrong culprit", "file left", "late"}) for r in results)
    codes = collections.Counter(result.code for result in results)
    return [name, str(len(results)), f"{statistics.median(seconds):.2f}", f"{max(seconds):.2f}", count("late"),
            " ".join(f"{code}×{n}" if len(codes) > 1 else str(code) for code, n in sorted(codes.items(), key=str)),
            count("hang"), count("orphan"), count("wrong culprit"), count("file left"), str(others)]


HEAD = ["trials", "median s", "longest s", "late", "exit codes", "hangs", "orphans", "wrong culprit", "file left", "other"]


def report(results, args, elapsed):
    def of(choose, names):
        groups = {name: [r for r in results if choose(r) == name] for name in names}
        return [summary_row(name, group) for name, group in groups.items() if group]

    def kind(result):
        slow = result.trial.kind == "stop" and result.trial.peer_timeout == 8
        return "stop (default time-out)" if slow else "stop (time-out 1 s)" if result.trial.kind == "stop" else result.trial.kind

    kinds = list(dict.fromkeys(kind(r) for r in sorted(results, key=lambda r: list(EXPECTED).index(r.trial.kind))))
    phases = [*PLACES, *sorted({r.phase for r in results} - {*PLACES})]
    grid = [["", *phases]]
    for name in kinds:
        cells = [[r.seconds for r in results if kind(r) == name and r.phase == phase] for phase in phases]
        grid.append([name, *(f"{len(cell)}: {max(cell):.2f}" if cell else "" for cell in cells)])
    good = sum(not r.problems for r in results)
    return f"""# Failing ranks: {len(results)} trials

{good} of {len(results)} trials were good: over in time (2 s; a stopped rank within 10 s by default, here mostly with
`FSDP_PEER_TIMEOUT=1`), the right exit code, the failing rank named, no process and no file left.

Command: `benchmarks/failure_trials/trials.py --trials {args.trials} --seed {args.seed}`, {elapsed / 60:.0f} min on
{cpu()}, {os.cpu_count()} cores (load average at the end {os.getloadavg()[2]:.0f}), {platform.system()} {platform.release()}. Each trial is a training of a tiny Llama on 2 to 4
ranks ({sum(r.trial.place != 'outside' for r in results)} fail at a drawn place of a step, {sum(r.trial.place == 'outside' for r in results)} by a signal from outside at
any moment). Seconds run from the fault to the end of everything, the launcher included; for `pause`
(SIGSTOP, then SIGCONT after 0.4 s: the run goes on, its weights must be those of an undisturbed run) to the end of the run.

## By the way to fail

{table([["", *HEAD], *of(kind, kinds), summary_row("all", results)])}

## By phase

{table([["", *HEAD], *of(lambda r: r.phase, phases)])}

## Way to fail × phase: trials, longest seconds

{table(grid)}
"""


def cpu():
    names = re.findall(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
    return names[0] if names else platform.machine()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--finetune", type=pathlib.Path, required=True)
    parser.add_argument("--training-program", type=pathlib.Path, required=True)
    parser.add_argument("--trials", type=int, default=330 if os.environ.get("FSDP_TEST_SCALE") == "long" else 12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=pathlib.Path)
    parser.add_argument("--patience", type=float, default=1, help="factor on the time limits, for a busy machine")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background they may be ignored,
    signal.signal(signal.SIGHUP, signal.SIG_DFL)              # and children would inherit that
    began, results, rng = time.monotonic(), [], random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="failure_trials_") as folder:
        bench = Bench(args.finetune.resolve(), args.training_program.resolve(), pathlib.Path(folder), args.patience)
        index = 0
        while len(results) < args.trials:
            trial = draw(index // 4 if index % 4 == 3 else index - index // 4, rng, index % 4 == 3)
            index += 1
            result = bench.run(trial)
            if result is None:
                continue
            results.append(result)
            if result.problems:
                print(f"{trial}: {', '.join(result.problems)} (exit {result.code}, {result.seconds:.2f} s)\n{result.text}",
                      flush=True)
    text = report(results, args, time.monotonic() - began)
    if args.report:
        args.report.write_text(text)
    print(text)
    bad = [r for r in results if r.problems]
    print(f"{len(bad)} of {len(results)} trials were not good")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
