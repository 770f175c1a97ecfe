"""What goes wrong with files: one clear line, its exit code, nothing lost."""

import json
import os
import resource
import signal
import struct
import subprocess

from support import CONFIG, ProgramTest, read_safetensors, records, write_jsonl


def write_safetensors(path, header, data):
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


class Data(ProgramTest):
    def setUp(self):
        super().setUp()
        self.model = self.tiny_model()

    def train_error(self, code, rows=None, text=None, *extra):
        path = self.folder / "data.jsonl"
        if text is not None:
            path.write_text(text)
        else:
            write_jsonl(path, rows)
        line = self.fail_with(code, *self.train_arguments(*extra, model=self.model, data=path))
        self.assertFalse((self.folder / "out" / "model.safetensors").exists())
        return line

    def test_a_missing_file(self):
        line = self.fail_with(3, *self.train_arguments(model=self.model, data=self.folder / "none.jsonl"))
        self.assertIn("none.jsonl", line)

    def test_a_broken_line_is_named(self):
        self.assertIn("data.jsonl:2", self.train_error(3, None, json.dumps(records(1)[0]) + "\n{\"messages\": [\n"))

    def test_a_record_without_known_keys(self):
        line = self.train_error(3, [*records(1), {"quest": "x", "anser": "y"}])
        self.assertIn("data.jsonl:2", line)
        self.assertIn("messages", line)

    def test_an_empty_file(self):
        self.assertIn("data.jsonl", self.train_error(3, None, ""))

    def test_nothing_to_train_on(self):
        line = self.train_error(3, [{"messages": [{"role": "user", "content": "x" * 200},
                                                  {"role": "assistant", "content": "y"}]}])
        self.assertIn("data.jsonl", line)

    def test_long_answers_are_cut_and_counted(self):
        rows = [*records(3),
                {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y" * 300}]},
                {"messages": [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "y"}]}]
        write_jsonl(self.folder / "data.jsonl", rows)
        out = self.succeed(*self.train_arguments("--max_steps", 1, model=self.model, data=self.folder / "data.jsonl"))
        self.assertIn("5 records: 4 samples", out)
        self.assertIn("1 cut, 1 dropped", out)

    def test_show_data_marks_what_is_trained_on(self):
        path = self.folder / "data.jsonl"
        write_jsonl(path, records(2))
        text = self.succeed("show-data", "--model_name_or_path", self.model, "--train_file", path)
        self.assertIn("[[yes<|im_end|>]]", text)
        rows = [json.loads(line) for line in self.succeed(
            "show-data", "--model_name_or_path", self.model, "--train_file", path, "--json").splitlines()]
        self.assertEqual(len(rows), 2)
        self.assertEqual(set(rows[0]), {"input_ids", "labels", "position_ids"})
        self.assertEqual(bytes(t for t in rows[0]["labels"] if 0 <= t < 256), b"yes")


class Model(ProgramTest):
    def setUp(self):
        super().setUp()
        self.model = self.tiny_model()
        self.data = self.tiny_data()

    def train_error(self, code, *extra):
        line = self.fail_with(code, *self.train_arguments(*extra, model=self.model, data=self.data))
        self.assertFalse((self.folder / "out" / "model.safetensors").exists())
        return line

    def test_a_missing_folder(self):
        self.model = self.folder / "nowhere"
        self.assertIn("nowhere", self.train_error(4))

    def test_a_missing_tokenizer(self):
        (self.model / "tokenizer.json").unlink()
        self.assertIn("tokenizer.json", self.train_error(4))

    def test_a_tokenizer_that_does_not_fit(self):
        small = self.tiny_model_without_tokenizer(vocab_size=200)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (small / name).write_bytes((self.model / name).read_bytes())
        self.model = small
        self.assertIn("tokenizer does not fit", self.train_error(4))

    def tiny_model_without_tokenizer(self, **changes):
        path = self.folder / "small.json"
        path.write_text(json.dumps({**CONFIG, **changes}))
        self.succeed("new-model", "--model_config", path, "--output_dir", self.folder / "small")
        return self.folder / "small"

    def test_a_shape_that_does_not_match(self):
        config = json.loads((self.model / "config.json").read_text())
        config["intermediate_size"] = 72
        (self.model / "config.json").write_text(json.dumps(config))
        line = self.train_error(4)
        self.assertIn("mlp", line)
        self.assertIn("[72, 32]", line)

    def test_a_truncated_weights_file(self):
        path = self.model / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        self.assertIn("model.safetensors", self.train_error(4))

    def test_a_pickle_is_never_read(self):
        (self.model / "model.safetensors").rename(self.model / "pytorch_model.bin")
        self.assertIn("pickle", self.train_error(4))

    def test_weights_that_are_not_numbers_end_the_first_step(self):
        path = self.model / "model.safetensors"
        header, data = read_safetensors(path)
        begin = header["model.norm.weight"]["data_offsets"][0]
        write_safetensors(path, header, data[:begin] + struct.pack("<f", float("nan")) + data[begin + 4:])
        line = self.train_error(9)
        self.assertIn("step 1", line)
        self.assertIn("nan", line.lower())
        self.assertIn("rank", self.train_error(9, "--nproc_per_node", 2, "--overwrite_output_dir"))


class Disk(ProgramTest):
    def test_a_file_that_cannot_grow_is_a_host_error(self):
        arguments = self.train_arguments("--max_steps", 1)

        def limit():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writes then fail with EFBIG instead of a signal
            resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))

        line = self.fail_with(7, *arguments, preexec_fn=limit)
        self.assertIn("model", line)
        self.assertFalse((self.folder / "out" / "model.safetensors").exists())

    def test_a_disk_without_room_is_told_before_training(self):
        if os.geteuid() != 0:
            self.skipTest("needs root to mount a small tmpfs")
        arguments = self.train_arguments("--max_steps", 1, out="disk/out")
        (self.folder / "disk").mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", self.folder / "disk"])
        if mounted.returncode != 0:
            self.skipTest("cannot mount here")
        self.addCleanup(subprocess.run, ["umount", self.folder / "disk"])
        self.assertIn("bytes free", self.fail_with(7, *arguments))


class Convert(ProgramTest):
    def test_what_is_no_gguf_file_is_refused(self):
        path = self.folder / "x.gguf"
        path.write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 64)
        self.assertIn("x.gguf", self.fail_with(4, "convert", "--from", path, "--to", self.folder / "to"))
        self.assertIn("none.gguf",
                      self.fail_with(4, "convert", "--from", self.folder / "none.gguf", "--to", self.folder / "to"))
        self.assertFalse((self.folder / "to").exists())

    def test_new_model_names_what_is_wrong_in_config_json(self):
        path = self.folder / "config.json"
        path.write_text(json.dumps({**CONFIG, "num_attention_heads": 5}))
        self.fail_with(4, "new-model", "--model_config", path, "--output_dir", self.folder / "to")
        self.assertFalse((self.folder / "to").exists())
