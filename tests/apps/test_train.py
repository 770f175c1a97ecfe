"""train, eval and generate on a tiny random model: what is written, printed, and equal to transformers."""

import ast
import json
import math
import os
import pathlib
import signal
import subprocess
import time
import unittest

from support import FINETUNE, NeedsTransformers, ProgramTest, read_jsonl, read_safetensors, records, write_jsonl

METRIC_KEYS = ["step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "trainable_tokens",
               "tokens_per_second", "step_seconds"]


def last_dict(stdout):
    lines = [line for line in stdout.splitlines() if line.startswith("{'train_runtime'")]
    assert len(lines) == 1, stdout
    return ast.literal_eval(lines[0])


class Train(ProgramTest):
    def test_a_run_writes_metrics_and_a_model(self):
        out = self.succeed(*self.train_arguments("--num_train_epochs", 2))
        metrics = read_jsonl(self.folder / "out" / "metrics.jsonl")
        self.assertEqual([row["step"] for row in metrics], list(range(1, 13)))
        for row in metrics:
            self.assertEqual(list(row), METRIC_KEYS)
            self.assertTrue(math.isfinite(row["loss"]) and row["grad_norm"] > 0)
        self.assertLess(metrics[-1]["loss"], metrics[0]["loss"])
        self.assertEqual(metrics[-1]["epoch"], 2.0)
        self.assertAlmostEqual(metrics[0]["learning_rate"], 1e-3)
        summary = last_dict(out)
        self.assertEqual(list(summary), ["train_runtime", "train_samples_per_second", "train_steps_per_second",
                                         "train_loss", "epoch"])
        self.assertAlmostEqual(summary["train_loss"], sum(row["loss"] for row in metrics) / 12, places=12)
        self.assertEqual(summary["epoch"], 2.0)
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            self.assertTrue((self.folder / "out" / name).exists(), name)
        self.assertFalse([p.name for p in (self.folder / "out").iterdir() if "tmp" in p.name])

    def test_the_last_step_of_an_epoch_may_be_partial(self):
        data = self.tiny_data(11)
        self.succeed(*self.train_arguments("--num_train_epochs", 1, "--gradient_accumulation_steps", 4, data=data))
        metrics = read_jsonl(self.folder / "out" / "metrics.jsonl")
        self.assertEqual([round(row["epoch"], 6) for row in metrics], [round(4 / 6, 6), 1.0])

    def test_ranks_agree_bitwise_when_deterministic(self):
        model, data = self.tiny_model(), self.tiny_data(14)
        losses = {}
        for ranks, accumulation in ((1, 4), (2, 2), (4, 1)):
            for strategy in ("FULL_SHARD", "NO_SHARD"):
                out = f"out_{ranks}_{strategy}"
                self.succeed(*self.train_arguments(
                    "--deterministic", "--num_train_epochs", 2, "--nproc_per_node", ranks,
                    "--gradient_accumulation_steps", accumulation, "--sharding_strategy", strategy,
                    model=model, data=data, out=out))
                rows = read_jsonl(self.folder / out / "metrics.jsonl")
                losses[ranks, strategy] = ([(r["loss"], r["grad_norm"], r["tokens"]) for r in rows],
                                           read_safetensors(self.folder / out / "model.safetensors")[1])
        first = losses[1, "FULL_SHARD"]
        for name, other in losses.items():
            self.assertEqual(first[0], other[0], name)
            self.assertEqual(first[1], other[1], f"weights of {name}")

    def test_evaluation_happens_when_asked(self):
        model, data = self.tiny_model(), self.tiny_data()
        validation = self.tiny_data(5, "validation.jsonl")
        self.succeed(*self.train_arguments("--eval_strategy", "steps", "--eval_steps", 4, "--validation_file",
                                           validation, "--num_train_epochs", 1, model=model, data=data))
        rows = [r for r in read_jsonl(self.folder / "out" / "metrics.jsonl") if "eval_loss" in r]
        self.assertEqual([r["step"] for r in rows], [4, 6])
        result = json.loads((self.folder / "out" / "eval_results.json").read_text())
        self.assertEqual(result["eval_loss"], rows[-1]["eval_loss"])
        self.succeed("eval", "--model_name_or_path", self.folder / "out", "--validation_file", validation,
                     "--max_seq_length", 64, "--output_dir", self.folder / "again", "--nproc_per_node", 2,
                     "--per_device_eval_batch_size", 2)  # three micro-batches: rank 1 has one fewer
        again = json.loads((self.folder / "again" / "eval_results.json").read_text())
        self.assertAlmostEqual(again["eval_loss"], result["eval_loss"], places=6)
        self.assertEqual(again["eval_samples"], 5)
        self.assertAlmostEqual(again["perplexity"], math.exp(again["eval_loss"]), places=6)

    def test_yaml_and_flags_together(self):
        model, data = self.tiny_model(), self.tiny_data()
        (self.folder / "run.yaml").write_text(
            f"model_name_or_path: {model}\ntrain_file: {data}\noutput_dir: {self.folder / 'out'}\n"
            "max_seq_length: 64\nmax_steps: 5\nlearning-rate: 1e-3\npacking: true\n")
        self.succeed("--config", self.folder / "run.yaml", "--max_steps", 2, "--bf16")
        self.assertEqual(len(read_jsonl(self.folder / "out" / "metrics.jsonl")), 2)
        options = json.loads((self.folder / "out" / "finetune_options.json").read_text())
        self.assertEqual((options["max_steps"], options["packing"], options["bf16"]), (2, True, True))

    def test_saved_types_follow_the_source_or_the_option(self):
        model, data = self.tiny_model(), self.tiny_data()
        self.succeed(*self.train_arguments("--max_steps", 1, "--bf16", model=model, data=data))
        header, _ = read_safetensors(self.folder / "out" / "model.safetensors")
        self.assertEqual({t["dtype"] for n, t in header.items() if n != "__metadata__"}, {"F32"})
        self.succeed(*self.train_arguments("--max_steps", 1, "--save_dtype", "bfloat16", model=model, data=data,
                                           out="half"))
        header, _ = read_safetensors(self.folder / "half" / "model.safetensors")
        self.assertEqual({t["dtype"] for n, t in header.items() if n != "__metadata__"}, {"BF16"})
        self.assertIn("bfloat16", (self.folder / "half" / "config.json").read_text())

    def test_a_full_output_folder_is_not_overwritten_unasked(self):
        arguments = self.train_arguments("--max_steps", 1)
        self.succeed(*arguments)
        before = (self.folder / "out" / "model.safetensors").read_bytes()
        self.assertIn("--overwrite_output_dir", self.fail_with(2, *arguments))
        self.assertEqual((self.folder / "out" / "model.safetensors").read_bytes(), before)
        self.succeed(*arguments, "--overwrite_output_dir", "--seed", 7)
        self.assertNotEqual((self.folder / "out" / "model.safetensors").read_bytes(), before)

    def test_lines_are_plain_without_a_terminal(self):
        result = self.run_program(*self.train_arguments("--max_steps", 3))
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertNotIn("\x1b", result.stdout + result.stderr)
        self.assertNotIn("\r", result.stdout + result.stderr)
        steps = [line for line in result.stdout.splitlines() if line.startswith("{'loss'")]
        self.assertEqual(len(steps), 3)
        self.assertEqual(list(ast.literal_eval(steps[0])), ["loss", "grad_norm", "learning_rate", "epoch"])


class Parity(NeedsTransformers):
    def transformers_loss(self, folder, data):
        torch = self.torch
        model = self.transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        rows = [json.loads(line) for line in self.succeed(
            "show-data", "--model_name_or_path", folder, "--train_file", data, "--json").splitlines()]
        total, tokens = 0.0, 0
        for row in rows:
            labels = torch.tensor([row["labels"]])
            with torch.no_grad():
                logits = model(torch.tensor([row["input_ids"]])).logits.double()
            total += torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100,
                                                       reduction="sum").item()
            tokens += int((labels[0, 1:] != -100).sum())
        return total / tokens, tokens

    def test_eval_loss_is_that_of_transformers_before_and_after(self):
        model, data = self.tiny_model(), self.tiny_data()
        self.succeed(*self.train_arguments("--nproc_per_node", 2, "--max_steps", 4, model=model, data=data))
        for name in ("model", "out"):
            self.succeed("eval", "--model_name_or_path", self.folder / name, "--validation_file", data,
                         "--output_dir", self.folder / f"eval_{name}")
            ours = json.loads((self.folder / f"eval_{name}" / "eval_results.json").read_text())
            loss, tokens = self.transformers_loss(self.folder / name, data)
            self.assertEqual(ours["eval_tokens"], tokens)
            self.assertAlmostEqual(ours["eval_loss"], loss, delta=1e-5 * loss)

    def test_greedy_text_is_that_of_transformers(self):
        model = self.tiny_model()
        line = json.loads(self.succeed("generate", "--model_name_or_path", model, "--prompt", "hello", "--json",
                                       "--max_new_tokens", 12))
        tokenizer = self.transformers.AutoTokenizer.from_pretrained(model)
        theirs = self.transformers.AutoModelForCausalLM.from_pretrained(model)
        text = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], add_generation_prompt=True,
                                             tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        self.assertEqual(line["prompt_tokens"], ids.shape[1])
        made = theirs.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1]:]
        self.assertEqual(line["text"], tokenizer.decode(made, skip_special_tokens=True))


class Generate(ProgramTest):
    def test_sampling_is_a_function_of_the_seed(self):
        model = self.tiny_model()
        base = ["generate", "--model_name_or_path", model, "--prompt", "x", "--max_new_tokens", 10, "--temperature", 1.5]
        one = self.succeed(*base, "--seed", 1)
        self.assertEqual(one, self.succeed(*base, "--seed", 1))
        self.assertNotEqual(one, self.succeed(*base, "--seed", 2))
        self.assertEqual(one, self.succeed(*base, "--seed", 1, "--nproc_per_node", 2))

    def test_raw_prompts_and_files_of_prompts(self):
        model, data = self.tiny_model(), self.tiny_data(3)
        raw = json.loads(self.succeed("generate", "--model_name_or_path", model, "--prompt", "abc", "--raw", "--json",
                                      "--max_new_tokens", 2))
        self.assertEqual(raw["prompt_tokens"], 3)
        lines = self.succeed("generate", "--model_name_or_path", model, "--prompt_file", data, "--json",
                             "--max_new_tokens", 2).splitlines()
        self.assertEqual(len(lines), 3)
        self.assertTrue(json.loads(lines[1])["prompt"].endswith("train.jsonl:2"))

    def test_a_prompt_beyond_the_models_positions_is_refused(self):
        line = self.fail_with(2, "generate", "--model_name_or_path", self.tiny_model(), "--prompt", "x",
                              "--max_new_tokens", 4000)
        self.assertIn("512 positions", line)


class Ranks(ProgramTest):
    def slow_run(self, ranks):
        write_jsonl(self.folder / "many.jsonl", records(64))
        arguments = self.train_arguments("--nproc_per_node", ranks, "--max_steps", 100000,
                                         data=self.folder / "many.jsonl")
        process = subprocess.Popen([FINETUNE, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   text=True, start_new_session=True)
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        metrics = self.folder / "out" / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while not (metrics.exists() and metrics.read_text().count("\n") > 2):
            self.assertLess(time.monotonic(), deadline, "no step was made")
            self.assertIsNone(process.poll(), "the run ended early")
            time.sleep(0.05)
        return process

    @staticmethod
    def children(pid):
        text = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
        return [int(word) for word in text.split()]

    @staticmethod
    def alive(pids):
        def state(pid):
            try:
                return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
            except OSError:
                return "Z"

        return [pid for pid in pids if state(pid) != "Z"]

    def wait_until_gone(self, pids, seconds):
        deadline = time.monotonic() + seconds
        while self.alive(pids) and time.monotonic() < deadline:
            time.sleep(0.02)
        self.assertEqual(self.alive(pids), [])

    def test_a_killed_rank_ends_all_within_two_seconds(self):
        process = self.slow_run(2)
        ranks = self.children(process.pid)
        self.assertEqual(len(ranks), 2)
        begin = time.monotonic()
        os.kill(ranks[1], signal.SIGKILL)
        _, stderr = process.communicate(timeout=20)
        self.assertLess(time.monotonic() - begin, 2.5)
        self.assertEqual(process.returncode, 8)
        self.assertRegex(stderr.strip().splitlines()[-1], r"rank \d")
        self.wait_until_gone(ranks, 1)

    def test_a_killed_launcher_takes_its_ranks_along(self):
        process = self.slow_run(2)
        ranks = self.children(process.pid)
        process.kill()
        self.wait_until_gone(ranks, 2)


if __name__ == "__main__":
    unittest.main()
