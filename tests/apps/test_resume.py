"""Checkpoints of a run: stopped by signals, killed, damaged, resumed elsewhere, with the bits of a run that was not."""

import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import time

from support import FINETUNE, NeedsTransformers, ProgramTest, read_jsonl, records, write_jsonl

LONG = os.environ.get("FSDP_TEST_SCALE") == "long"
EXACT = ("step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "trainable_tokens", "eval_loss",
         "eval_tokens", "eval_samples")


def exact_rows(folder):
    """metrics.jsonl without what depends on the clock."""
    return [{key: row[key] for key in EXACT if key in row} for row in read_jsonl(folder / "metrics.jsonl")]


def history(folder):
    rows = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{key: value for key, value in row.items() if "runtime" not in key and "_per_second" not in key}
            for row in rows]


def checkpoints(folder):
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


class Runs(ProgramTest):
    """One data set, one model, runs that differ in what happens to them."""

    records = 11  # With two a micro-batch the last one of an epoch has one.
    options = ("--deterministic", "--num_train_epochs", 2)
    logging_steps = 1

    def setUp(self):
        super().setUp()
        self.model, self.data = self.tiny_model(), self.folder / "train.jsonl"
        write_jsonl(self.data, records(self.records))
        self.validation = self.tiny_data(5, "validation.jsonl")

    def arguments(self, *extra, out="out"):
        arguments = self.train_arguments(*self.options, *extra, model=self.model, data=self.data, out=out)
        arguments[arguments.index("--logging_steps") + 1] = self.logging_steps
        return [*arguments, "--peer_timeout", 60]  # The machine may be busy.

    def train(self, *extra, out="out", **options):
        return self.succeed(*self.arguments(*extra, out=out), **options)

    def expect_same_end(self, out, truth="truth"):
        one, other = self.folder / out, self.folder / truth
        self.assertEqual(exact_rows(one), exact_rows(other))
        self.assertEqual(history(one), history(other))
        self.assertEqual((one / "model.safetensors").read_bytes(), (other / "model.safetensors").read_bytes())


class Resume(Runs):
    def test_every_step_can_be_the_one_to_go_on_from(self):
        if LONG:
            write_jsonl(self.data, records(53))
            self.options = ("--deterministic", "--num_train_epochs", 3)
        self.logging_steps = 4  # An average begins before a checkpoint and ends after it.
        always = ("--validation_file", self.validation, "--eval_strategy", "steps", "--eval_steps", 5)
        self.train("--save_strategy", "no", "--nproc_per_node", 2, *always, out="truth")
        self.train("--save_steps", 1, "--nproc_per_node", 2, *always, out="all")
        steps = checkpoints(self.folder / "all")
        self.assertEqual(len(steps), 42 if LONG else 6)
        for step in steps:
            with self.subTest(step=step):
                out = self.folder / f"from_{step}"
                out.mkdir()
                shutil.copytree(self.folder / "all" / f"checkpoint-{step}", out / f"checkpoint-{step}")
                shutil.copy(self.folder / "all" / "metrics.jsonl", out)  # Has lines of later steps too.
                form = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")[step % 2]
                told = self.train("--save_strategy", "no", "--resume_from_checkpoint", "auto", *always,
                                  "--nproc_per_node", 1 + step % 4, "--fsdp_state_dict_type", form, out=out.name)
                self.assertIn(f"resumed: {out}/checkpoint-{step}, {step} of {steps[-1]} steps done", told)
                self.expect_same_end(out.name)

    def test_precisions_and_optimizers(self):
        cases = [("--bf16",), ("--bf16", "--optim", "adamw_bnb_8bit"), ("--fp16",), ("--pure_bf16",),
                 ("--optim", "sgd", "--momentum", 0.9), ("--gradient_checkpointing", "--packing")]
        for number, case in enumerate(cases):
            with self.subTest(case=case):
                form = ("--fsdp_state_dict_type", ("FULL_STATE_DICT", "SHARDED_STATE_DICT")[number % 2])
                asynchronous = ("--async_save",) * (number % 3 == 0)
                truth, out = f"truth_{number}", f"out_{number}"
                self.train(*case, *form, *asynchronous, "--save_steps", 5, "--nproc_per_node", 2,
                           "--max_steps", 8, out=truth)
                (self.folder / out).mkdir()
                shutil.copytree(self.folder / truth / "checkpoint-5", self.folder / out / "checkpoint-5")
                shutil.copy(self.folder / truth / "metrics.jsonl", self.folder / out)
                self.train(*case, *form, "--max_steps", 8, "--resume_from_checkpoint", "true", "--nproc_per_node", 3,
                           "--sharding_strategy", "NO_SHARD", out=out)
                self.expect_same_end(out, truth)

    def test_a_damaged_newest_checkpoint_is_passed_by(self):
        self.train("--save_steps", 3, out="truth")
        shutil.copytree(self.folder / "truth", self.folder / "out")
        path = self.folder / "out" / "checkpoint-12" / "model.safetensors"
        raw = bytearray(path.read_bytes())
        raw[-3] ^= 4
        path.write_bytes(raw)
        out = self.train("--save_steps", 3, "--resume_from_checkpoint", "auto", "--nproc_per_node", 2)
        self.assertRegex(out, r"checkpoint-12 was skipped: .*checkpoint-12/model.safetensors, tensor '")
        self.assertIn("checkpoint-9, 9 of 12 steps done", out)
        self.expect_same_end("out")
        self.assertEqual(checkpoints(self.folder / "out"), [3, 6, 9, 12])
        path.write_bytes(raw)
        line = self.fail_with(4, *self.arguments("--resume_from_checkpoint", path.parent))
        self.assertIn("model.safetensors", line)

    def test_without_a_checkpoint_it_starts_anew_and_says_so(self):
        self.assertIn("there is no whole checkpoint in", self.train("--resume_from_checkpoint", "auto"))
        line = self.fail_with(2, *self.arguments("--resume_from_checkpoint", "true", out="nothing"))
        self.assertIn("--resume_from_checkpoint auto starts from the beginning", line)

    def test_changed_options_are_refused_with_what_they_were(self):
        self.options = ("--deterministic",)
        base = ("--nproc_per_node", 2, "--gradient_accumulation_steps", 2, "--save_strategy", "steps")
        self.train(*base, "--save_steps", 2, "--max_steps", 4)
        again = ("--resume_from_checkpoint", "auto", "--max_steps", 4)
        line = self.fail_with(2, *self.arguments(*again, "--weight_decay", 0.5, "--adam_beta1", 0.8))
        self.assertIn("weight_decay (saved: 0, now: 0.5)", line)
        self.assertIn("adam_beta1 (saved: 0.9, now: 0.8)", line)
        self.assertIn("--allow_changed_options adam_beta1", line.replace("weight_decay,adam_beta1", "adam_beta1"))
        line = self.fail_with(2, *self.arguments(*again, "--nproc_per_node", 4, "--gradient_accumulation_steps", 2))
        self.assertIn("gradient_accumulation_steps (saved: 4 micro-batches a step, now: 8", line)
        write_jsonl(self.data, records(self.records, words=2))
        self.assertIn("train_file (saved: tokens", self.fail_with(2, *self.arguments(*again)))
        self.train(*again, "--weight_decay", 0.5, "--allow_changed_options", "weight_decay,train_file")
        # These change nothing.
        write_jsonl(self.data, records(self.records))
        self.train(*again, "--nproc_per_node", 3, "--save_total_limit", 7, "--sharding_strategy", "SHARD_GRAD_OP",
                   "--ddp_timeout", 900)

    def test_another_run_in_the_same_folder_is_not_mixed_in(self):
        self.train("--save_steps", 4)
        self.assertIn("--overwrite_output_dir", self.fail_with(2, *self.arguments()))
        self.train("--save_steps", 5, "--overwrite_output_dir", "--seed", 3)
        self.assertEqual(checkpoints(self.folder / "out"), [5, 10, 12])


class Retention(Runs):
    # The loss falls, so that with greater_is_better the first evaluation is the best.
    first_is_best = ("--metric_for_best_model", "loss", "--greater_is_better", "true", "--eval_strategy", "steps",
                     "--eval_steps", 2)

    def evaluated(self, *extra, **options):
        return self.train("--validation_file", self.validation, *self.first_is_best, *extra, **options)

    def test_the_newest_and_the_best_are_kept(self):
        self.train("--save_steps", 2, "--save_total_limit", 2)
        self.assertEqual(checkpoints(self.folder / "out"), [10, 12])
        self.assertEqual((self.folder / "out" / "latest").read_text().strip(), "checkpoint-12")
        self.evaluated("--save_steps", 2, "--save_total_limit", 2, "--load_best_model_at_end", out="best")
        self.assertEqual(checkpoints(self.folder / "best"), [2, 12])
        self.assertEqual((self.folder / "best" / "model.safetensors").read_bytes(),
                         (self.folder / "best" / "checkpoint-2" / "model.safetensors").read_bytes())
        state = json.loads((self.folder / "best" / "trainer_state.json").read_text())
        self.assertEqual((state["best_global_step"], state["best_model_checkpoint"]),
                         (2, str(self.folder / "best" / "checkpoint-2")))

    def test_strategies(self):
        self.train("--save_strategy", "epoch", out="epoch")
        self.assertEqual(checkpoints(self.folder / "epoch"), [6, 12])
        self.train("--save_steps", 0.3, out="share")
        self.assertEqual(checkpoints(self.folder / "share"), [4, 8, 12])
        self.train("--save_strategy", "no", out="no")
        self.assertEqual(checkpoints(self.folder / "no"), [])
        self.evaluated("--save_strategy", "best", out="best")
        self.assertEqual(checkpoints(self.folder / "best"), [2])

    def test_early_stopping_survives_a_resume(self):
        stops = ("--early_stopping_patience", 2, "--save_strategy", "steps", "--save_steps", 4)
        self.evaluated(*stops, out="truth")
        self.assertEqual(read_jsonl(self.folder / "truth" / "metrics.jsonl")[-1]["step"], 6)
        shutil.copytree(self.folder / "truth", self.folder / "out")
        self.evaluated(*stops, "--resume_from_checkpoint", "auto")
        self.expect_same_end("out")


class Signals(Runs):
    records = 64
    options = ("--deterministic", "--max_steps", 300, "--save_strategy", "no")

    def start(self, *extra, out="out"):
        process = subprocess.Popen([FINETUNE, *map(str, self.arguments(*extra, out=out))], stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.folder)
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        return process

    def wait_for_lines(self, process, count, out="out"):
        metrics, end = self.folder / out / "metrics.jsonl", time.monotonic() + 100
        while not (metrics.exists() and metrics.read_text().count("\n") >= count):
            self.assertLess(time.monotonic(), end, "no step was made")
            self.assertIsNone(process.poll(), "the run ended early")
            time.sleep(0.002)

    @staticmethod
    def ranks(process):
        return [int(pid) for pid in
                pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]

    def stopped_step(self, process):
        stdout, stderr = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 75, stdout[-500:] + stderr)
        found = re.search(r"stopped by (SIG\w+) after step (\d+) of", stdout)
        self.assertTrue(found, stdout[-500:])
        self.assertEqual(checkpoints(self.folder / "out")[-1], int(found[2]))
        self.assertFalse((self.folder / "out" / "model.safetensors").exists())
        return found[1], int(found[2])

    def test_a_signal_saves_and_the_run_goes_on_elsewhere(self):
        self.train("--nproc_per_node", 2, out="truth")
        cases = [(signal.SIGTERM, None), (signal.SIGINT, None), (signal.SIGUSR1, 0), (signal.SIGTERM, 1)]
        generator = random.Random(5)
        for number, (signal_number, rank) in enumerate(cases * (10 if LONG else 1)):
            with self.subTest(signal=signal_number, rank=rank):
                shutil.rmtree(self.folder / "out", ignore_errors=True)
                process = self.start("--nproc_per_node", 2, *(("--async_save",) * (number % 2)))
                self.wait_for_lines(process, generator.randrange(1, 200))
                os.kill(process.pid if rank is None else self.ranks(process)[rank], signal_number)
                name, _ = self.stopped_step(process)
                self.assertEqual(name, signal_number.name)
                self.train("--resume_from_checkpoint", "auto", "--nproc_per_node", 1 + number % 4)
                self.expect_same_end("out")

    def test_one_rank_without_a_launcher(self):
        process = self.start()
        self.wait_for_lines(process, 20)
        process.send_signal(signal.SIGTERM)
        self.assertEqual(self.stopped_step(process)[0], "SIGTERM")

    def test_a_signal_in_an_evaluation_is_heard_at_once(self):
        write_jsonl(self.validation, records(400))
        self.options = ("--deterministic", "--max_steps", 4, "--save_strategy", "no", "--validation_file",
                        self.validation, "--eval_strategy", "steps", "--eval_steps", 1,
                        "--per_device_eval_batch_size", 1)
        self.train("--nproc_per_node", 2, out="truth")
        process = self.start("--nproc_per_node", 2)
        self.wait_for_lines(process, 3)  # Step, evaluation, step: the second evaluation has begun.
        process.send_signal(signal.SIGTERM)
        _, step = self.stopped_step(process)
        state = json.loads((self.folder / "out" / f"checkpoint-{step}" / "finetune_state.json").read_text())
        self.assertTrue(state["objects"]["run"]["progress"]["evaluation_due"])
        self.train("--resume_from_checkpoint", "auto", "--nproc_per_node", 3)
        self.expect_same_end("out")

    def test_sigusr2_saves_and_goes_on(self):
        process = self.start("--nproc_per_node", 2)
        self.wait_for_lines(process, 10)
        process.send_signal(signal.SIGUSR2)
        stdout, stderr = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 0, stderr)
        saved = checkpoints(self.folder / "out")
        self.assertEqual(len(saved), 1)
        self.assertIn(f"checkpoint-{saved[0]}", stdout)
        self.assertEqual(len(read_jsonl(self.folder / "out" / "metrics.jsonl")), 300)

    def test_a_second_signal_aborts(self):
        process = self.start("--nproc_per_node", 2)
        self.wait_for_lines(process, 5)
        ranks = self.ranks(process)
        os.kill(ranks[1], signal.SIGSTOP)  # The others cannot finish their step.
        os.kill(ranks[0], signal.SIGTERM)
        time.sleep(0.7)
        self.assertIsNone(process.poll())
        os.kill(ranks[0], signal.SIGTERM)
        process.communicate(timeout=20)
        self.assertEqual(process.returncode, 130)

    def test_a_killed_run_goes_on_from_its_last_checkpoint(self):
        self.options = ("--deterministic", "--max_steps", 300, "--save_steps", 20, "--save_total_limit", 2)
        self.train("--nproc_per_node", 2, out="truth")
        generator = random.Random(7)
        for number in range(20 if LONG else 3):
            with self.subTest(number=number):
                shutil.rmtree(self.folder / "out", ignore_errors=True)
                process = self.start("--nproc_per_node", 2, *(("--async_save",) * (number % 2)))
                self.wait_for_lines(process, generator.randrange(1, 280))
                process.kill() if number % 2 else os.kill(self.ranks(process)[number % 2], signal.SIGKILL)
                process.communicate(timeout=30)
                # What starts anew has the global batch of its own ranks.
                ranks = 1 + number % 3 if checkpoints(self.folder / "out") else 2
                self.train("--resume_from_checkpoint", "auto", "--nproc_per_node", ranks)
                self.expect_same_end("out")
                self.assertEqual(checkpoints(self.folder / "out"), [280, 300])
                self.assertFalse([p.name for p in (self.folder / "out").iterdir() if "tmp" in p.name])


class HuggingFace(NeedsTransformers, Runs):
    def test_transformers_reads_a_checkpoint(self):
        self.train("--save_steps", 4, "--validation_file", self.validation, "--eval_strategy", "epoch",
                   "--early_stopping_patience", 3, "--nproc_per_node", 2)
        folder = self.folder / "out" / "checkpoint-6"
        model, info = self.transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        self.assertFalse(any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info)
        final = self.transformers.AutoModelForCausalLM.from_pretrained(self.folder / "out").state_dict()
        for name, tensor in model.state_dict().items():
            self.assertTrue(self.torch.equal(tensor, final[name]), name)
        self.assertEqual(self.transformers.AutoTokenizer.from_pretrained(folder).decode([104, 105]),
                         self.transformers.AutoTokenizer.from_pretrained(self.model).decode([104, 105]))
        state = self.transformers.TrainerState.load_from_json(str(folder / "trainer_state.json"))
        self.assertEqual((state.global_step, state.epoch, state.max_steps, state.best_global_step), (6, 2.0, 6, 6))
        self.assertEqual([row["step"] for row in state.log_history if "loss" in row], list(range(1, 7)))
        self.assertEqual([row["step"] for row in state.log_history if "eval_loss" in row], [3, 6])
        self.assertEqual(state.stateful_callbacks["EarlyStoppingCallback"]["args"]["early_stopping_patience"], 3)
        # The same text as transformers itself writes.
        state.save_to_json(str(self.folder / "theirs.json"))
        self.assertEqual(json.loads((self.folder / "theirs.json").read_text()),
                         json.loads((folder / "trainer_state.json").read_text()))

    def test_distributed_checkpoint_reads_the_sharded_form(self):
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint import HuggingFaceStorageReader
        self.train("--fsdp_state_dict_type", "SHARDED_STATE_DICT", "--nproc_per_node", 3)
        folder = self.folder / "out" / "checkpoint-4"
        self.assertEqual(sorted(p.name for p in folder.iterdir() if p.is_dir()),
                         ["optimizer_0", "pytorch_model_fsdp_0"])
        final = self.transformers.AutoModelForCausalLM.from_pretrained(self.folder / "out").state_dict()
        final.pop("lm_head.weight", None)  # Tied.
        state = {name: self.torch.zeros_like(tensor) for name, tensor in final.items()}
        dcp.load(state, storage_reader=HuggingFaceStorageReader(str(folder / "pytorch_model_fsdp_0")))
        for name, tensor in final.items():
            self.assertTrue(self.torch.equal(state[name], tensor), name)
        moments = {f"state.{name}.exp_avg": self.torch.zeros_like(tensor) for name, tensor in final.items()}
        dcp.load(moments, storage_reader=HuggingFaceStorageReader(str(folder / "optimizer_0")))
        for name, tensor in moments.items():
            self.assertGreater(tensor.abs().max().item(), 0, name)

    def test_an_optimizer_of_torch_goes_on_with_our_state(self):
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint import HuggingFaceStorageReader
        from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_optimizer_state_dict,
                                                             set_optimizer_state_dict)
        torch, rate = self.torch, 1e-3
        self.model = self.tiny_model("untied", tie_word_embeddings=False)
        self.train("--fsdp_state_dict_type", "SHARDED_STATE_DICT", "--nproc_per_node", 3)
        model = self.transformers.AutoModelForCausalLM.from_pretrained(self.folder / "out")
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0)
        flat = StateDictOptions(flatten_optimizer_state_dict=True)
        state = get_optimizer_state_dict(model, optimizer, options=flat)
        tensors = {name: value for name, value in state.items() if name.startswith("state.")}
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(self.folder / "out/checkpoint-4/optimizer_0")))
        set_optimizer_state_dict(model, optimizer, {**state, **tensors}, options=flat)
        expected = {}
        for name, parameter in model.named_parameters():
            parameter.grad = torch.full_like(parameter, 0.01)
            first = 0.9 * tensors[f"state.{name}.exp_avg"] + 0.1 * 0.01
            second = 0.999 * tensors[f"state.{name}.exp_avg_sq"] + 0.001 * 0.01**2
            self.assertEqual(tensors[f"state.{name}.step"].item(), 4)
            step = rate * (first / (1 - 0.9**5)) / ((second / (1 - 0.999**5)).sqrt() + 1e-8)
            expected[name] = parameter.detach() - step
        optimizer.step()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach(), expected[name], msg=name)
