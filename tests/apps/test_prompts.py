"""Prefix tuning and llama-adapter through the program: trained, gone on with, evaluated, generated with, refused."""

import json
import shutil

from support import ProgramTest, read_safetensors

KINDS = {"prefix": ("--peft_method", "prefix", "--num_virtual_tokens", 4),
         "projection": ("--peft_method", "prefix", "--num_virtual_tokens", 4, "--prefix_projection"),
         "llama_adapter": ("--peft_method", "llama_adapter", "--adapter_len", 4, "--adapter_layers", 2)}


class Prompts(ProgramTest):
    def setUp(self):
        super().setUp()
        self.model, self.data = self.tiny_model(), self.tiny_data(24)

    def train(self, kind, *extra, out="out", ranks=2, accumulation=1):
        arguments = self.train_arguments("--use_peft", *KINDS[kind], "--deterministic", "--nproc_per_node", ranks,
                                         "--gradient_accumulation_steps", accumulation, *extra, model=self.model,
                                         data=self.data, out=out)
        arguments[arguments.index("--learning_rate") + 1] = 0.05
        return self.succeed(*arguments)

    def losses(self, output):
        """Without the epochs, which count a rank's own micro-batches."""
        return [line.split(", 'epoch'")[0] for line in output.splitlines() if line.startswith("{'loss'")]

    def eval_loss(self, *arguments):
        output = self.succeed("eval", "--model_name_or_path", self.model, "--validation_file", self.data, *arguments)
        return float(output.splitlines()[-1].split()[1])

    def test_ranks_agree_and_a_run_goes_on_elsewhere_to_the_bit(self):
        for kind in KINDS:
            with self.subTest(kind=kind):
                for folder in ("whole", "one", "again"):
                    shutil.rmtree(self.folder / folder, ignore_errors=True)
                whole = self.train(kind, "--save_steps", 1, "--packing", out="whole")
                self.assertIn("trainable params: ", whole)
                one = self.train(kind, "--packing", "--gradient_checkpointing", ranks=1, accumulation=2, out="one")
                self.assertEqual(self.losses(whole), self.losses(one))
                shutil.copytree(self.folder / "whole", self.folder / "again")
                (self.folder / "again" / "adapter_model.safetensors").unlink()
                steps = sorted((self.folder / "again").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
                self.assertEqual(sorted(path.name for path in steps[0].glob("*.safetensors")),
                                 ["adapter_model.safetensors", "optimizer.safetensors"])
                for later in steps[1:]:
                    shutil.rmtree(later)
                output = self.train(kind, "--save_steps", 1, "--packing", "--resume_from_checkpoint", "auto", ranks=1,
                                    accumulation=2, out="again")
                self.assertIn("resumed: ", output)
                for name in ("adapter_model.safetensors", "adapter_config.json"):
                    self.assertEqual((self.folder / "again" / name).read_bytes(),
                                     (self.folder / "whole" / name).read_bytes())

    def test_adapters_are_evaluated_generated_with_and_gone_on_with(self):
        base = self.eval_loss()
        for kind in KINDS:
            with self.subTest(kind=kind):
                for folder in ("first", "second"):
                    shutil.rmtree(self.folder / folder, ignore_errors=True)
                self.train(kind, out="first")
                adapter = ("--adapter_name_or_path", self.folder / "first")
                adapted = self.eval_loss(*adapter)
                self.assertLess(adapted, base - 0.05)
                self.assertEqual(adapted, self.eval_loss(*adapter, "--nproc_per_node", 2, "--deterministic"))
                prompt = ("generate", "--model_name_or_path", self.model, "--prompt", "say 1", "--max_new_tokens", 24,
                          "--temperature", 1)
                self.assertNotEqual(self.succeed(*prompt, *adapter), self.succeed(*prompt))
                again = self.train_arguments(*adapter, model=self.model, data=self.data, out="second")
                if kind == "projection":
                    self.assertIn("made by a projection", self.fail_with(2, *again))
                    continue
                start = float(self.losses(self.succeed(*again))[0].split()[1].rstrip(","))
                self.assertLess(start, base, "it begins where the first run ended")
                first, second = (json.loads((self.folder / run / "adapter_config.json").read_text())
                                 for run in ("first", "second"))
                self.assertEqual(first, second)

    def test_weights_in_few_bits_can_have_them(self):
        for kind in ("prefix", "llama_adapter"):
            for folder in ("one", "two"):
                shutil.rmtree(self.folder / folder, ignore_errors=True)
            two = self.train(kind, "--load_in_4bit", out="two")
            self.assertIn("quantised: ", two)
            self.assertEqual(self.losses(two),
                             self.losses(self.train(kind, "--load_in_4bit", ranks=1, accumulation=2, out="one")))

    def test_refusals_say_what_and_why(self):
        self.train("llama_adapter", out="good")

        def refusal(code, *extra):
            return self.fail_with(code, *self.train_arguments(*extra, model=self.model, data=self.data, out="no"))

        merge = ("merge", "--model_name_or_path", self.model, "--adapter_name_or_path", self.folder / "good", "--output_dir",
                 self.folder / "merged")
        self.assertIn("there is no merged model", self.fail_with(2, *merge))
        self.assertIn("it is an option of lora", refusal(2, "--use_peft", "--peft_method", "prefix", "--lora_r", 4))
        self.assertIn("it is an option of prefix", refusal(2, "--use_peft", "--num_virtual_tokens", 4))
        self.assertIn("there are no adapters", refusal(2, "--peft_method", "prefix"))
        self.assertIn("the adapter's folder says that",
                      refusal(2, "--adapter_name_or_path", self.folder / "good", "--adapter_len", 3))
        self.assertIn("adapter_layers is 30, and the model has 3",
                      refusal(2, "--use_peft", "--peft_method", "llama_adapter"))
        self.model = self.tiny_model("qwen", model_type="qwen3", head_dim=8)
        self.assertIn("PEFT has it for llama and mistral", refusal(2, "--use_peft", *KINDS["llama_adapter"]))
        damaged = self.folder / "damaged"
        shutil.copytree(self.folder / "good", damaged)
        header, _ = read_safetensors(damaged / "adapter_model.safetensors")
        raw = (damaged / "adapter_model.safetensors").read_bytes()
        name = next(name for name in header if name.endswith("adaption_gate"))
        begin, end = header[name]["data_offsets"]
        data = len(raw) - max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
        (damaged / "adapter_model.safetensors").write_bytes(raw[:data + begin] + bytes(end - begin) + raw[data + end:])
        self.model = self.folder / "model"
        self.assertIn(f"'{name}' is all zero", refusal(4, "--adapter_name_or_path", damaged))


if __name__ == "__main__":
    import unittest

    unittest.main()
