"""Options, help and configuration files: mistakes end with exit code 2 and one line, before any work."""

import json

from support import SOURCE, ProgramTest

COMMANDS = ["train", "eval", "generate", "convert", "new-model", "show-data", "verify", "env"]


class Help(ProgramTest):
    def test_usage_lists_every_command(self):
        for arguments in ([], ["--help"], ["-h"], ["help"]):
            text = self.succeed(*arguments)
            for command in COMMANDS:
                self.assertIn(f"  {command} ", text)

    def test_every_command_has_help_within_100_columns(self):
        for command in COMMANDS:
            text = self.succeed(command, "--help")
            self.assertIn("--", text)
            self.assertLessEqual(max(map(len, text.splitlines())), 100)

    def test_documentation_is_what_the_program_says(self):
        written = (SOURCE / "docs" / "configuration.md").read_text()
        self.assertEqual(written, self.succeed("--help-markdown"),
                         "docs/configuration.md is old; write it with: finetune --help-markdown")

    def test_version_is_one_line(self):
        self.assertRegex(self.succeed("--version"), r"^finetune \d+\.\d+\.\d+\n$")

    def test_env_names_versions_and_devices(self):
        facts = json.loads(self.succeed("env", "--json"))
        for key in ("finetune", "libtorch", "cores", "memory_total", "cuda"):
            self.assertIn(key, facts)
        self.assertIn("libtorch", self.succeed("env"))


class Mistakes(ProgramTest):
    def test_unknown_command_names_its_neighbour(self):
        self.assertIn("Did you mean 'train'?", self.fail_with(2, "trian"))

    def test_unknown_flag_names_its_neighbour_and_origin(self):
        line = self.fail_with(2, "--lerning_rate", "1")
        self.assertIn("--lerning_rate (command line)", line)
        self.assertIn("Did you mean --learning_rate?", line)

    def test_wrong_type_and_range(self):
        self.assertIn("expected an integer", self.fail_with(2, "train", "--max_steps", "ten"))
        self.assertIn("expected at least 1", self.fail_with(2, "train", "--per_device_train_batch_size=0"))
        self.assertIn("FULL_SHARD, SHARD_GRAD_OP, HYBRID_SHARD, HYBRID_SHARD_ZERO2, NO_SHARD",
                      self.fail_with(2, "train", "--sharding_strategy", "ZERO"))

    def test_required_options_are_named(self):
        self.assertIn("--model_name_or_path is required", self.fail_with(2, "train", "--max_steps", "1"))
        self.assertIn("--prompt", self.fail_with(2, "generate", "--model_name_or_path", "x"))

    def test_contradictions(self):
        base = ["train", "--model_name_or_path", "x", "--train_file", "y", "--output_dir", "z"]
        self.assertIn("contradicts", self.fail_with(2, *base, "--eval_strategy", "steps"))
        self.assertIn("contradicts", self.fail_with(2, *base, "--warmup_steps", 5, "--warmup_ratio", 0.1))
        self.assertFalse((self.folder / "z").exists(), "work was done before the check")

    def test_known_names_that_are_not_supported_say_why(self):
        self.assertIn("cannot be honoured", self.fail_with(2, "train", "--report_to"))
        self.assertIn("nothing is uploaded", self.fail_with(2, "train", "--push_to_hub"))

    def test_yaml_mistakes_name_file_and_line(self):
        path = self.folder / "run.yaml"
        path.write_text("max_steps: 3\nlogging_step: 1\n")
        line = self.fail_with(2, "train", "--config", path)
        self.assertIn("run.yaml:2", line)
        self.assertIn("Did you mean --logging_steps?", line)
        path.write_text("max_steps: 3\nmax-steps: 4\n")
        self.assertIn("run.yaml:2 gives 'max_steps' a second time", self.fail_with(2, "train", "--config", path))
        path.write_text("max_steps: [\n")
        self.assertIn("not valid yaml", self.fail_with(2, "train", "--config", path))
        self.assertIn("is not a file", self.fail_with(2, "train", "--config", self.folder / "none.yaml"))

    def test_a_mistake_is_one_message_with_many_ranks(self):
        result = self.run_program("train", "--nproc_per_node", 4, "--model_name_or_path", "x", "--train_file", "y",
                                  "--output_dir", "z")
        self.assertEqual(result.returncode, 4)
        self.assertEqual(len(result.stderr.strip().splitlines()), 1, result.stderr)
