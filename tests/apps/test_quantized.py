"""Folders whose weights are in 4 or 8 bits: trained beside, evaluated, generated with, merged into; bitsandbytes,
transformers and PEFT are the truth."""

import json
import os
import pathlib
import struct
import subprocess
import sys

from support import FINETUNE, ProgramTest, read_safetensors, write_safetensors, write_tokenizer

TRUTH = pathlib.Path(__file__).with_name("quantized_truth.py")
CASES = {  # What quantising at load is called, of which base.
    "nf4": ("float32", ["--load_in_4bit"]),
    "nf4-nested": ("bfloat16", ["--load_in_4bit", "--use_bnb_nested_quant"]),
    "fp4-nested": ("bfloat16", ["--load_in_4bit", "--bnb_4bit_quant_type", "fp4", "--use_bnb_nested_quant"]),
    "int8": ("float32", ["--load_in_8bit"]),
}


def tensors_of(folder):
    """Name -> (type, shape, bytes) of all tensors of a model folder, one file or several."""
    tensors = {}
    for path in sorted(folder.glob("model*.safetensors")):
        header, data = read_safetensors(path)
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                tensors[name] = (entry["dtype"], entry["shape"], data[begin:end])
    return tensors


class Quantized(ProgramTest):
    def setUp(self):
        super().setUp()
        # Rows of 72 elements begin within blocks of 64. (Of rows of 32, bitsandbytes' CPU kernel mistakes the scales.)
        for dtype in ("float32", "bfloat16"):
            self.tiny_model(f"{dtype}_source", hidden_size=64, head_dim=16, intermediate_size=72)
            self.succeed("new-model", "--model_config", self.folder / f"{dtype}_source" / "config.json", "--tokenizer",
                         self.folder / f"{dtype}_source", "--output_dir", self.folder / dtype, "--dtype", dtype)
        self.data = self.tiny_data(16)
        sequences = self.succeed("show-data", "--model_name_or_path", self.folder / "float32", "--train_file", self.data,
                                 "--max_samples", 0, "--json")
        (self.folder / "sequences.jsonl").write_text(sequences)

    def truth(self, what):
        done = subprocess.run([sys.executable, TRUTH, what, self.folder], capture_output=True, text=True, check=False)
        if done.returncode == 77:
            self.skipTest(done.stdout)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        return {row["case"]: row for row in map(json.loads, filter(lambda line: line[:1] == "{", done.stdout.splitlines()))}

    def train(self, model, out, *extra, ranks=2):
        arguments = self.train_arguments("--use_peft", "--lora_target_modules", "all-linear", "--lora_r", 4, "--deterministic",
                                         "--save_strategy", "no", "--max_steps", 6, "--nproc_per_node", ranks,
                                         "--gradient_accumulation_steps", 2 // ranks, *extra, model=model, data=self.data,
                                         out=out)
        arguments[arguments.index("--learning_rate") + 1] = 0.02
        output = self.succeed(*arguments)
        return [line for line in output.splitlines() if line.startswith("{'loss'")]

    def eval_loss(self, model, *extra):
        output = self.succeed("eval", "--model_name_or_path", model, "--validation_file", self.data, *extra)
        return float(output.splitlines()[-1].split()[1])

    def generate(self, model, *extra):
        return self.succeed("generate", "--model_name_or_path", model, "--prompt", "say 1", "--max_new_tokens", 6, *extra)

    def test_a_folder_is_what_quantising_at_load_makes(self):
        truth = self.truth("make")
        for case, (base, flags) in CASES.items():
            with self.subTest(case=case):
                stored, plain = self.folder / case, self.folder / base
                self.assertEqual(self.train(stored, f"{case}-stored", "--gather_slots", 2),
                                 self.train(plain, f"{case}-made", *flags, ranks=1))
                folders = [self.folder / f"{case}-{end}" for end in ("stored", "made")]
                self.assertEqual(*((folder / "adapter_model.safetensors").read_bytes() for folder in folders))
                adapter = ["--adapter_name_or_path", folders[0]]
                before, after = self.eval_loss(stored, "--nproc_per_node", 2), self.eval_loss(stored, *adapter)
                self.assertEqual(before, self.eval_loss(plain, *flags))
                self.assertEqual(after, self.eval_loss(plain, *flags, *adapter))
                self.assertLess(after, before)
                # bitsandbytes multiplies in the type that it loaded (of int8: rounds the activations too).
                tolerance = 1e-5 if case == "nf4" else 2e-2
                self.assertLess(abs(before - truth[case]["loss"]), tolerance * before)
        self.assertNotEqual(self.eval_loss(self.folder / "nf4"), self.eval_loss(self.folder / "float32"))
        for more in ([], ["--adapter_name_or_path", self.folder / "nf4-stored"]):
            made = self.generate(self.folder / "float32", "--load_in_4bit", *more)
            self.assertEqual(self.generate(self.folder / "nf4", *more), made)
            self.assertEqual(self.generate(self.folder / "nf4", "--load_in_4bit", *more), made, "saying the same is legal")

    def test_merging_is_what_peft_does(self):
        self.truth("make")
        for case in CASES:
            self.train(self.folder / case, f"{case}-adapter", *(["--use_dora"] if case == "nf4-nested" else []))
        self.truth("merge")
        for case in CASES:
            with self.subTest(case=case):
                stored = self.folder / case
                arguments = ["merge", "--model_name_or_path", stored, "--adapter_name_or_path", self.folder / f"{case}-adapter"]
                self.succeed(*arguments, "--output_dir", self.folder / f"{case}-merged")
                theirs, ours = tensors_of(self.folder / f"{case}-peft"), tensors_of(self.folder / f"{case}-merged")
                self.assertEqual(ours.keys(), theirs.keys())
                changed = 0
                for name, tensor in ours.items():
                    if "quant_state" in name:  # Of a 16-bit base PEFT's sum is quantised "from" float32.
                        state, other = json.loads(tensor[2]), json.loads(theirs[name][2])
                        self.assertEqual({**state, "dtype": ""}, {**other, "dtype": ""}, name)
                        self.assertEqual(state["dtype"], CASES[case][0])
                        continue
                    self.assertEqual(tensor, theirs[name], name)
                    changed += tensor != tensors_of(stored)[name]
                self.assertGreater(changed, 3 * 7)
                config = json.loads((self.folder / f"{case}-merged" / "config.json").read_text())
                self.assertEqual(config["quantization_config"],
                                 json.loads((stored / "config.json").read_text())["quantization_config"])
                self.succeed(*arguments, "--output_dir", self.folder / f"{case}-parts", "--max_shard_size", "20KB")
                self.assertGreater(len(list((self.folder / f"{case}-parts").glob("model-*.safetensors"))), 1)
                self.assertEqual(tensors_of(self.folder / f"{case}-parts"), ours)
                self.succeed(*arguments, "--output_dir", self.folder / f"{case}-16", "--dequantize", "bfloat16")
                self.assertEqual(tensors_of(self.folder / f"{case}-16"), tensors_of(self.folder / f"{case}-peft16"))
                config = json.loads((self.folder / f"{case}-16" / "config.json").read_text())
                self.assertEqual((config.get("quantization_config"), config["dtype"]), (None, "bfloat16"))
                self.eval_loss(self.folder / f"{case}-16", "--bf16")
        for case, row in self.truth("load").items():
            self.assertEqual(row["difference"], 0, case)
            self.assertGreater(row["effect"], 1e-2, case)

    def test_what_contradicts_the_folder_is_refused(self):
        self.truth("make")

        def refusal(command, case, *extra, code=2):
            arguments = {"train": ["--train_file", self.data, "--output_dir", self.folder / "no", "--max_seq_length", 64],
                         "eval": ["--validation_file", self.data], "generate": ["--prompt", "x"]}[command]
            return self.fail_with(code, command, "--model_name_or_path", self.folder / case, *arguments, *extra)

        full = refusal("train", "nf4")
        self.assertIn("whose weights are in nf4 with plain scales, cannot be trained", full)
        self.assertIn("--use_peft trains adapters beside them", full)
        for command in ("eval", "generate"):
            self.assertIn("--load_in_8bit contradicts", refusal(command, "nf4", "--load_in_8bit"))
        adapts = ["--use_peft", "--load_in_4bit"]
        self.assertIn("--load_in_4bit contradicts", refusal("train", "int8", *adapts))
        self.assertIn("--bnb_4bit_quant_type contradicts",
                      refusal("train", "fp4-nested", *adapts, "--bnb_4bit_quant_type", "nf4"))
        self.assertIn("--use_bnb_nested_quant contradicts", refusal("train", "nf4", *adapts, "--use_bnb_nested_quant"))
        self.assertIn("(pissa, olora)", refusal("train", "nf4", "--use_peft", "--init_lora_weights", "pissa"))
        self.assertIn("'model.layers.0.self_attn.q_proj' is trained",
                      refusal("train", "nf4", "--use_peft", "--lora_modules_to_save", "layers.0.self_attn.q_proj"))
        self.assertIn("are not quantised", self.fail_with(
            2, "merge", "--model_name_or_path", self.folder / "float32", "--adapter_name_or_path", self.train_one(),
            "--output_dir", self.folder / "no", "--dequantize", "bfloat16"))
        self.assertIn("which is not converted", self.fail_with(4, "convert", "--from", self.folder / "nf4", "--to",
                                                               self.folder / "no"))
        config = self.folder / "nf4" / "config.json"
        document = json.loads(config.read_text())
        quantization = document.pop("quantization_config")
        config.write_text(json.dumps(document))
        self.assertIn("is nf4, and config.json has no quantization_config", refusal("eval", "nf4", code=4))
        config.write_text(json.dumps({**document, "quantization_config": {**quantization, "bnb_4bit_quant_type": "fp4"}}))
        self.assertIn("is nf4, and config.json says fp4", refusal("eval", "nf4", code=4))
        plain = self.folder / "float32" / "config.json"
        plain.write_text(json.dumps({**json.loads(plain.read_text()), "quantization_config": quantization}))
        self.assertIn("but the files hold none that is", refusal("eval", "float32", code=4))

    def train_one(self):
        self.train(self.folder / "float32", "adapter", ranks=1)
        return self.folder / "adapter"


NF4_VALUES = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
              -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
              0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


class Memory(ProgramTest):
    HIDDEN, INTERMEDIATE, RANK = 512, 2048, 8

    def quantised_model(self, layers):
        """A folder in nf4 with the same numbers in every layer, and an adapter of all its linear layers."""
        model, adapter = self.folder / f"model{layers}", self.folder / f"adapter{layers}"
        model.mkdir()
        adapter.mkdir()
        write_tokenizer(model)
        config = {"model_type": "llama", "vocab_size": 264, "hidden_size": self.HIDDEN, "num_hidden_layers": layers,
                  "intermediate_size": self.INTERMEDIATE, "num_attention_heads": 8, "num_key_value_heads": 8,
                  "tie_word_embeddings": True, "dtype": "bfloat16",
                  "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True,
                                          "bnb_4bit_quant_type": "nf4"}}
        (model / "config.json").write_text(json.dumps(config))
        (adapter / "adapter_config.json").write_text(json.dumps(
            {"peft_type": "LORA", "r": self.RANK, "lora_alpha": 8, "target_modules": "all-linear"}))
        square, tall = [self.HIDDEN, self.HIDDEN], [self.INTERMEDIATE, self.HIDDEN]
        shapes = {**{f"self_attn.{name}_proj": square for name in "qkvo"}, "mlp.gate_proj": tall, "mlp.up_proj": tall,
                  "mlp.down_proj": tall[::-1]}
        weights, adapters = {}, {}
        bf16 = lambda *shape: ("BF16", list(shape), b"\x80\x3f" * (shape[0] * (shape[1] if shape[1:] else 1)))
        for i in range(layers):
            for name, shape in shapes.items():
                module, numel = f"model.layers.{i}.{name}", shape[0] * shape[1]
                state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": shape}
                weights[module + ".weight"] = ("U8", [numel // 2, 1], bytes(range(256)) * (numel // 512))
                weights[module + ".weight.absmax"] = ("F32", [numel // 64], struct.pack("<f", 0.5) * (numel // 64))
                weights[module + ".weight.quant_map"] = ("F32", [16], struct.pack("<16f", *NF4_VALUES))
                text = json.dumps(state).encode()
                weights[module + ".weight.quant_state.bitsandbytes__nf4"] = ("U8", [len(text)], text)
                for part, size in ("A", [self.RANK, shape[1]]), ("B", [shape[0], self.RANK]):
                    adapters[f"base_model.model.{module}.lora_{part}.weight"] = (
                        "F32", size, struct.pack("<2f", 0.01, -0.02) * (size[0] * size[1] // 2))
            for name in ("input_layernorm", "post_attention_layernorm"):
                weights[f"model.layers.{i}.{name}.weight"] = bf16(self.HIDDEN)
        weights["model.norm.weight"] = bf16(self.HIDDEN)
        weights["model.embed_tokens.weight"] = bf16(264, self.HIDDEN)
        write_safetensors(model / "model.safetensors", weights)
        write_safetensors(adapter / "adapter_model.safetensors", adapters)
        return model, adapter

    def peak_mib(self, *arguments):
        """Largest resident memory of one run of the program."""
        program = subprocess.Popen([FINETUNE, *map(str, arguments)], stdout=subprocess.DEVNULL, cwd=self.folder)
        _, status, usage = os.wait4(program.pid, 0)
        program.returncode = os.waitstatus_to_exitcode(status)
        self.assertEqual(program.returncode, 0)
        return usage.ru_maxrss / 1024

    def test_merging_takes_no_more_memory_for_a_larger_model(self):
        peaks = {}
        for layers in (1, 13):
            model, adapter = self.quantised_model(layers)
            for form in ([], ["--dequantize", "bfloat16"]):
                peaks[layers, len(form)] = self.peak_mib(
                    "merge", "--model_name_or_path", model, "--adapter_name_or_path", adapter, "--output_dir",
                    self.folder / f"merged{layers}{len(form)}", *form)
        bytes_more = sum(((self.folder / f"model{layers}" / "model.safetensors").stat().st_size) * sign
                         for layers, sign in ((13, 1), (1, -1)))
        self.assertGreater(bytes_more, 27_000_000)
        for form in (0, 2):
            self.assertLess(peaks[13, form] - peaks[1, form], 6, peaks)


if __name__ == "__main__":
    import unittest

    unittest.main()
