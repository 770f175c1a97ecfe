"""What the tests of the finetune program share: running it, and a tiny model with a byte tokenizer."""

import json
import os
import pathlib
import shutil
import struct
import subprocess
import tempfile
import unittest

FINETUNE = os.environ["FINETUNE"]
SOURCE = pathlib.Path(os.environ["FSDP_SOURCE_DIR"])

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 264, "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "hidden_act": "silu", "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
    "bos_token_id": 256, "eos_token_id": 257, "torch_dtype": "float32", "initializer_range": 0.1,
}


def byte_symbols():
    """The printable characters that stand for the 256 bytes in byte-level tokenizers."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols, extra = {}, 0
    for byte in range(256):
        if byte in plain:
            symbols[byte] = chr(byte)
        else:
            symbols[byte] = chr(256 + extra)
            extra += 1
    return symbols


def write_tokenizer(folder):
    vocabulary = {symbol: byte for byte, symbol in byte_symbols().items()}
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    added = [{"id": 256 + i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for i, text in enumerate(special)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {**vocabulary, **{text: 256 + i for i, text in enumerate(special)}}, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>", "chat_template": CHATML, "model_max_length": 512}))


def records(count, words=3):
    return [{"messages": [{"role": "user", "content": f"say {i} " + "na " * (i % 5)},
                          {"role": "assistant", "content": " ".join(["yes"] * (1 + i % words))}]}
            for i in range(count)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_safetensors(path):
    """(header, data bytes) of a safetensors file."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8:8 + length]), raw[8 + length:]


def write_safetensors(path, tensors):
    """Name -> (type, shape, bytes)."""
    header, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, _, data in tensors.values():
            file.write(data)


class ProgramTest(unittest.TestCase):
    """Runs the program in a folder of its own that goes away afterwards."""

    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="finetune_test_"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)

    def run_program(self, *arguments, env=None, timeout=120, **options):
        return subprocess.run([FINETUNE, *map(str, arguments)], capture_output=True, text=True, timeout=timeout,
                              stdin=subprocess.DEVNULL, cwd=self.folder, env={**os.environ, **(env or {})}, **options)

    def succeed(self, *arguments, **options):
        result = self.run_program(*arguments, **options)
        self.assertEqual(result.returncode, 0, f"{arguments}\nstdout:\n{result.stdout}\nstderr:\n{result.stderr}")
        return result.stdout

    def fail_with(self, code, *arguments, **options):
        """Expects the exit code and one line of error, and returns that line."""
        result = self.run_program(*arguments, **options)
        self.assertEqual(result.returncode, code, f"{arguments}\nstdout:\n{result.stdout}\nstderr:\n{result.stderr}")
        lines = result.stderr.strip().splitlines()
        self.assertTrue(lines, "no error text")
        return lines[-1]

    def tiny_model(self, name="model", **changes):
        """A folder with a random model; `changes` go into config.json."""
        source = self.folder / f"{name}_source"
        source.mkdir()
        write_tokenizer(source)
        (source / "config.json").write_text(json.dumps({**CONFIG, **changes}))
        self.succeed("new-model", "--model_config", source / "config.json", "--tokenizer", source,
                     "--output_dir", self.folder / name, "--seed", 1)
        return self.folder / name

    def tiny_data(self, count=12, name="train.jsonl"):
        write_jsonl(self.folder / name, records(count))
        return self.folder / name

    def train_arguments(self, *extra, model=None, data=None, out="out"):
        return ["train", "--model_name_or_path", model or self.tiny_model(), "--train_file", data or self.tiny_data(),
                "--output_dir", self.folder / out, "--max_seq_length", 64, "--per_device_train_batch_size", 2,
                "--logging_steps", 1, "--learning_rate", "1e-3", *extra]


class NeedsTransformers(ProgramTest):
    """Tests against Python; skipped where there is none."""

    def setUp(self):
        super().setUp()
        try:
            import torch
            import transformers
        except ImportError:
            self.skipTest("needs torch and transformers")
        self.torch, self.transformers = torch, transformers
