"""Adapters through the program: trained, stopped and gone on with, evaluated, merged, over quantised weights, refused."""

import json
import shutil
import subprocess
import sys

from support import ProgramTest, read_safetensors, write_safetensors

ALL = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"

LOGITS = """
import sys, torch, transformers, peft
base, adapter, merged = sys.argv[1:]
ids = torch.arange(3, 40).reshape(1, -1)
with torch.no_grad():
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    plain = model(ids).logits
    adapted = peft.PeftModel.from_pretrained(model, adapter).eval()(ids).logits
    whole = transformers.AutoModelForCausalLM.from_pretrained(merged)(ids).logits
scale = adapted.abs().max().item()
print((whole - adapted).abs().max().item() / scale, (plain - adapted).abs().max().item() / scale)
"""


class Lora(ProgramTest):
    def setUp(self):
        super().setUp()
        self.model, self.data = self.tiny_model(), self.tiny_data(24)

    def train(self, *extra, out="out", ranks=2, accumulation=1):
        arguments = self.train_arguments(
            "--use_peft", "--lora_target_modules", ALL, "--lora_r", 4, "--deterministic", "--nproc_per_node", ranks,
            "--gradient_accumulation_steps", accumulation, *extra, model=self.model, data=self.data, out=out)
        arguments[arguments.index("--learning_rate") + 1] = 0.02
        return self.succeed(*arguments)

    def losses(self, output):
        return [line for line in output.splitlines() if line.startswith("{'loss'")]

    def eval_loss(self, *arguments):
        output = self.succeed("eval", "--validation_file", self.data, *arguments)
        return float(output.splitlines()[-1].split()[1])

    def test_ranks_agree_and_a_run_goes_on_elsewhere_to_the_bit(self):
        whole = self.train("--save_steps", 1, out="whole")
        self.assertIn("trainable params: ", whole)
        self.assertEqual(self.losses(whole), self.losses(self.train(ranks=1, accumulation=2, out="one")))
        shutil.copytree(self.folder / "whole", self.folder / "again")
        (self.folder / "again" / "adapter_model.safetensors").unlink()
        steps = sorted((self.folder / "again").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        self.assertEqual(sorted(path.name for path in steps[0].glob("*.safetensors")),
                         ["adapter_model.safetensors", "optimizer.safetensors"])
        for later in steps[1:]:
            shutil.rmtree(later)
        output = self.train("--save_steps", 1, "--resume_from_checkpoint", "auto", ranks=1, accumulation=2, out="again")
        self.assertIn("resumed: ", output)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            self.assertEqual((self.folder / "again" / name).read_bytes(), (self.folder / "whole" / name).read_bytes())

    def test_merged_models_are_the_adapted_ones_in_peft_and_transformers(self):
        for kind in ((), ("--use_dora",), ("--use_rslora", "--lora_modules_to_save", "norm")):
            with self.subTest(kind=kind):
                for folder in ("out", "merged"):
                    shutil.rmtree(self.folder / folder, ignore_errors=True)
                self.train(*kind)
                self.succeed("merge", "--model_name_or_path", self.model, "--adapter_name_or_path", self.folder / "out",
                             "--output_dir", self.folder / "merged")
                adapted = self.eval_loss("--model_name_or_path", self.model, "--adapter_name_or_path", self.folder / "out")
                merged = self.eval_loss("--model_name_or_path", self.folder / "merged")
                base = self.eval_loss("--model_name_or_path", self.model)
                self.assertLess(abs(adapted - merged), 1e-5 * merged)
                self.assertGreater(abs(adapted - base), 1e-2 * base)
                done = subprocess.run([sys.executable, "-c", LOGITS, self.model, self.folder / "out", self.folder / "merged"],
                                      capture_output=True, text=True, check=False)
                self.assertEqual(done.returncode, 0, done.stderr)
                merged_difference, effect = map(float, done.stdout.split())
                self.assertLess(merged_difference, 1e-5)
                self.assertGreater(effect, 1e-2)

    def test_an_adapter_is_gone_on_with(self):
        self.train(out="first")
        output = self.succeed(*self.train_arguments("--adapter_name_or_path", self.folder / "first", "--nproc_per_node", 2,
                                                    model=self.model, data=self.data, out="second"))
        first = json.loads((self.folder / "first" / "adapter_config.json").read_text())
        second = json.loads((self.folder / "second" / "adapter_config.json").read_text())
        self.assertEqual(first, second)
        start = float(self.losses(output)[0].split()[1].rstrip(","))
        self.assertLess(start, 4.0, "it begins where the first run ended")
        text = self.succeed("generate", "--model_name_or_path", self.model, "--adapter_name_or_path", self.folder / "second",
                            "--prompt", "say 1", "--max_new_tokens", 4)
        self.assertTrue(text)

    def test_weights_in_few_bits_train_adapters_to_the_bit_at_any_number_of_ranks(self):
        for bits in (("--load_in_4bit",), ("--load_in_4bit", "--bnb_4bit_quant_type", "fp4", "--use_bnb_nested_quant"),
                     ("--load_in_8bit",)):
            with self.subTest(bits=bits):
                for folder in ("one", "two"):
                    shutil.rmtree(self.folder / folder, ignore_errors=True)
                two = self.train(*bits, out="two")
                self.assertIn("quantised: ", two)
                self.assertEqual(self.losses(two), self.losses(self.train(*bits, ranks=1, accumulation=2, out="one")))
                self.assertEqual((self.folder / "one" / "adapter_model.safetensors").read_bytes(),
                                 (self.folder / "two" / "adapter_model.safetensors").read_bytes())

    def test_refusals_say_what_and_why(self):
        def refusal(code, *extra, command=()):
            return self.fail_with(code, *command, *self.train_arguments(*extra, model=self.model, data=self.data, out="no"))

        self.assertIn("quantised weights cannot be trained", refusal(2, "--load_in_4bit"))
        self.assertIn("there are no adapters", refusal(2, "--lora_r", 4))
        self.assertIn("lm_head shares its weight with the embedding in this model",
                      refusal(2, "--use_peft", "--lora_target_modules", "q_proj,lm_head"))
        self.assertIn("no module is targeted by v_porj",
                      refusal(2, "--use_peft", "--lora_target_modules", "q_proj,v_porj"))
        self.assertIn("no module is targeted by qq_proj", refusal(2, "--use_peft", "--lora_target_modules", "qq_proj"))

    def test_damaged_adapters_are_refused_wherever_they_are_read(self):
        self.train(out="good")
        good = self.folder / "good"
        config = json.loads((good / "adapter_config.json").read_text())
        header, data = read_safetensors(good / "adapter_model.safetensors")
        tensors = {name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])])
                   for name, entry in header.items() if name != "__metadata__"}
        name = next(name for name in tensors if name.endswith("lora_B.weight"))
        dtype, shape, values = tensors[name]
        module = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
        misnamed = {key.replace("lora_B", "lora_C") if key == name else key: tensor for key, tensor in tensors.items()}
        cases = {  # What is changed; what is said where it is trained on and evaluated, and where it is merged.
            "missing": ({}, {key: tensor for key, tensor in tensors.items() if key != name},
                        [f"1 missing tensors: {name}"], f"adapter of '{module}': B is missing"),
            "missing module": ({}, {key: tensor for key, tensor in tensors.items() if module not in key},
                               ["2 missing tensors: "], f"adapter of '{module}': A and B are missing"),
            "empty": ({}, {**tensors, name: (dtype, [shape[0], 0], b"")}, [name, str([shape[0], 0])], str([shape[0], 0])),
            "misnamed": ({}, misnamed, [f"1 missing tensors: {name}", "1 unexpected tensors: " + name.replace("_B", "_C")],
                         "lora_C.weight' of the adapter fits no tensor of"),
            "never updated": ({}, {**tensors, name: (dtype, shape, bytes(len(values)))},
                              [f"'{name}' is all zero: the adapter has never been updated"], "has never been updated"),
            "other rank": ({"r": 3}, tensors, ["lora_A"], "expected rank 3"),
            "unsupported field": ({"lora_bias": True}, tensors,
                                  ["'lora_bias' is true: this changes what the adapter computes and is not supported"],
                                  "'lora_bias' is true"),
        }
        for case, (changes, changed, texts, merged_text) in cases.items():
            with self.subTest(case=case):
                damaged = self.folder / case
                damaged.mkdir()
                (damaged / "adapter_config.json").write_text(json.dumps({**config, **changes}))
                write_safetensors(damaged / "adapter_model.safetensors", changed)
                adapter = ["--model_name_or_path", self.model, "--adapter_name_or_path", damaged]
                trained = self.run_program(*self.train_arguments("--adapter_name_or_path", damaged, model=self.model,
                                                                 data=self.data, out="no"))
                evaluated = self.run_program("eval", *adapter, "--validation_file", self.data)
                for result in (trained, evaluated):
                    self.assertEqual(result.returncode, 4, result.stderr)
                    for text in texts:
                        self.assertIn(text, result.stderr)
                self.assertIn(merged_text, self.fail_with(4, "merge", *adapter, "--output_dir", self.folder / "no"))

    def test_an_adapter_that_was_never_updated_is_not_saved(self):
        arguments = self.train_arguments("--use_peft", model=self.model, data=self.data)
        arguments[arguments.index("--learning_rate") + 1] = 0
        line = self.run_program(*arguments).stderr
        self.assertIn("is all zero: the adapter has never been updated", line)
        self.assertFalse((self.folder / "out" / "adapter_model.safetensors").exists())


if __name__ == "__main__":
    import unittest

    unittest.main()
