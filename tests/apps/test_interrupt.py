"""Signals from outside: a clean terminal and the documented exit code."""

import os
import pathlib
import pty
import re
import select
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
