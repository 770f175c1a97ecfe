"""NaN in one rank's gradient, ranks as processes: no rank updates, all end with 9 and one message."""

import os
import subprocess
import sys
import unittest

sys.path.insert(0, os.path.join(os.environ["FSDP_SOURCE_DIR"], "tests/apps"))
from support import ProgramTest  # noqa: E402


class Numerics(ProgramTest):
    def test_nan_on_one_rank_updates_no_rank(self):
        model, data = self.tiny_model(), self.tiny_data(48)
        for ranks in (2, 3):
            with self.subTest(ranks=ranks):
                result = subprocess.run(
                    [os.environ["TRAINING_PROGRAM"], model, data, self.folder / f"out{ranks}", str(ranks), "5"],
                    capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
                    env={**os.environ, "OMP_NUM_THREADS": "1", "FSDP_TEST_FAULT": "rank=1 kind=nan step=3"})
                self.assertEqual(result.returncode, 9, result.stderr)
                lines = result.stderr.strip().splitlines()
                self.assertEqual(len(lines), 1, result.stderr)
                self.assertRegex(lines[0], r"^finetune: rank \d: 3 elements of the gradient are not finite at step 3 ")
                self.assertRegex(lines[0], r"\(.*: 3 on rank \d\)")
                for rank in range(ranks):
                    self.assertRegex(result.stdout, rf"(?m)^rank {rank}: [1-9]\d* bytes of parameters unchanged$")
                self.assertEqual(result.stdout.count("{'loss': "), 2, "two good steps came before")
                self.assertFalse((self.folder / f"out{ranks}" / "model.safetensors").exists())


if __name__ == "__main__":
    unittest.main()
