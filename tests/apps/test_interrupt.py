"""Signals from outside: a clean terminal and the documented exit code."""

import contextlib
import os
import pathlib
import pty
import re
import select
import shutil
import signal
import subprocess
import time

from support import FINETUNE, ProgramTest

WIPE = b"\r\x1b[K"


class Interrupt(ProgramTest):
    def interrupt(self, number, *extra):
        """Sends the signal once the bar is drawn; (exit code, what the terminal got)."""
        model, data = self.folder / "model", self.folder / "train.jsonl"
        arguments = self.train_arguments("--max_steps", 100000, *extra,
                                         model=model if model.exists() else None,
                                         data=data if data.exists() else None)
        ours, theirs = pty.openpty()
        self.addCleanup(os.close, ours)
        process = subprocess.Popen([FINETUNE, *map(str, arguments)], stdin=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, stderr=theirs, cwd=self.folder)
        os.close(theirs)
        self.addCleanup(lambda: process.poll() is None and process.kill())
        text, sent, end = b"", False, time.monotonic() + 60
        while time.monotonic() < end:
            if select.select([ours], [], [], 0.1)[0]:
                try:
                    part = os.read(ours, 65536)
                except OSError:  # Linux says EIO when nobody holds the other end any more
                    break
                text += part
            if not sent and re.search(rb"[1-9]\d*/100000", text):
                process.send_signal(number)
                sent = True
        self.assertTrue(sent, text)
        return process.wait(30), text

    def test_a_clean_terminal_and_75(self):
        for number, ranks in ((signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGINT, 2)):
            code, text = self.interrupt(number, "--overwrite_output_dir", "--nproc_per_node", ranks)
            self.assertEqual(code, 75)
            self.assertEqual(text[text.rindex(WIPE):], WIPE)

    def test_what_makes_no_checkpoints_ends_at_once_with_130(self):
        model, data = self.tiny_model(), self.tiny_data(20000)
        for ranks in (1, 2):
            process = subprocess.Popen(
                [FINETUNE, "eval", "--model_name_or_path", model, "--validation_file", data, "--nproc_per_node",
                 str(ranks), "--per_device_eval_batch_size", "1"], stdin=subprocess.DEVNULL, cwd=self.folder,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            self.assertIn("data: ", process.stdout.readline())
            process.send_signal(signal.SIGINT)
            error = process.communicate(timeout=30)[1]
            self.assertEqual(process.returncode, 130, error)
            self.assertEqual(error, "finetune: interrupted by SIGINT, nothing saved\n")

    def start(self, ranks):
        arguments = self.train_arguments("--max_steps", 3, "--save_strategy", "no", "--nproc_per_node", ranks,
                                         model=self.model, data=self.data)
        process = subprocess.Popen([FINETUNE, *map(str, arguments)], stdin=subprocess.DEVNULL, cwd=self.folder,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.addCleanup(process.communicate)
        self.addCleanup(lambda: process.poll() is None and process.kill())
        return process

    def wait_until(self, process, what):
        end = time.monotonic() + 30
        while not what():
            self.assertIsNone(process.poll())
            self.assertLess(time.monotonic(), end)

    @staticmethod
    def children(process):
        try:
            return pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        except FileNotFoundError:
            return []

    @staticmethod
    def minds(pid, number):
        """Whether the signal would neither kill nor be ignored: caught or blocked."""
        masks = dict(line.split(":\t") for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
                     if line.startswith(("SigBlk", "SigCgt")))
        return any(int(mask, 16) >> (number - 1) & 1 for mask in masks.values())

    def early(self, number, ranks, to_rank):
        """Sends the signal as soon as the program has begun, or as its second rank exists; (exit code, errors)."""
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        process = self.start(ranks)
        if to_rank:
            self.wait_until(process, lambda: len(self.children(process)) == ranks)
        pid = int(self.children(process)[1]) if to_rank else process.pid
        self.wait_until(process, lambda: self.minds(pid, number))
        os.kill(pid, number)
        error = process.communicate(timeout=60)[1]
        return process.returncode, error, sorted(p.name for p in (self.folder / "out").glob("checkpoint-*"))

    def test_a_signal_before_the_first_step_is_not_lost_and_kills_no_rank(self):
        self.model, self.data = self.tiny_model(), self.tiny_data()
        for ranks, to_rank in ((1, False), (2, False), (2, True)):
            with self.subTest(ranks=ranks, to_rank=to_rank):
                self.assertEqual(self.early(signal.SIGUSR2, ranks, to_rank), (0, "", ["checkpoint-1"]))
                by = "" if to_rank else " by SIGUSR1"
                self.assertEqual(self.early(signal.SIGUSR1, ranks, to_rank),
                                 (130, f"finetune: interrupted{by}, nothing saved\n", []))

    def test_a_signal_behind_the_last_step_interrupts_nothing(self):
        self.model, self.data = self.tiny_model(), self.tiny_data()
        for _ in range(4):
            shutil.rmtree(self.folder / "out", ignore_errors=True)
            process = self.start(2)
            while not process.stdout.readline().startswith("saved: "):
                self.assertIsNone(process.poll())
            for pid in self.children(process):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGTERM)
            error = process.communicate(timeout=60)[1]
            self.assertEqual((process.returncode, error), (0, ""))

    def test_the_time_outs_are_options(self):
        started = time.monotonic()
        arguments = self.train_arguments("--max_steps", 100000, "--nproc_per_node", 2, "--peer_timeout", 0.5)
        process = subprocess.Popen([FINETUNE, *map(str, arguments)], stdin=subprocess.DEVNULL, cwd=self.folder,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.assertIn("model: ", process.stdout.readline())  # rank 0 has joined
        ranks = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(ranks[1]), signal.SIGSTOP)
        error = process.communicate(timeout=30)[1]
        self.assertEqual(process.returncode, 8)
        self.assertIn("finetune: rank 1 was stopped by SIGSTOP for 0.5 s", error.splitlines()[-1])
        self.assertLess(time.monotonic() - started, 20)
