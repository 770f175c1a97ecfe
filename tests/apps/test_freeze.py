"""Parts of a model that are not trained."""

import re

from support import ProgramTest, read_safetensors


class Freeze(ProgramTest):
    def setUp(self):
        super().setUp()
        self.model, self.data = self.tiny_model(), self.tiny_data(24)

    def weights(self, folder):
        header, data = read_safetensors(folder / "model.safetensors")
        return {name: data[slice(*entry["data_offsets"])] for name, entry in header.items() if name != "__metadata__"}

    def unchanged(self, *options, ranks=2, out="out"):
        """Names of the tensors that a run leaves as they were."""
        self.output = self.succeed(*self.train_arguments(*options, "--overwrite_output_dir", "--nproc_per_node", ranks,
                                                         model=self.model, data=self.data, out=out))
        before, after = self.weights(self.model), self.weights(self.folder / out)
        self.assertEqual(before.keys(), after.keys())
        return {name for name in before if before[name] == after[name]}

    def test_what_is_frozen_stays_to_the_bit(self):
        names = set(self.weights(self.model))
        for options, pattern in (
                (("--freeze_layers",), r"model\.layers\.0\..*"),
                (("--freeze_layers", "--num_freeze_layers", 2, "--gradient_checkpointing"), r"model\.layers\.[01]\..*"),
                (("--freeze_modules", "embed_tokens,layers.0"), r"model\.(embed_tokens|layers\.0)\..*"),
                (("--freeze_modules", ".*_proj", "--unfreeze_modules", "layers.1.mlp"),
                 r".*layers\.[02]\..*_proj.*|.*layers\.1\.self_attn.*_proj.*"),
                (("--unfreeze_modules", "norm"), r"(?!model\.norm\.).*")):
            with self.subTest(options=options):
                self.assertEqual(self.unchanged(*options), {name for name in names if re.fullmatch(pattern, name)})
                trainable, total = (int(number.replace(",", "")) for number in
                                    re.search(r"trainable params: ([\d,]+) \|\| all params: ([\d,]+)", self.output).groups())
                self.assertTrue(0 < trainable < total)

    def test_refusals_say_what_and_why(self):
        def refusal(*options):
            return self.fail_with(2, *self.train_arguments(*options, model=self.model, data=self.data, out="no"))

        self.assertIn("no parameter is chosen by 'layers.7'", refusal("--freeze_modules", "layers.7"))
        self.assertIn("no parameter is chosen by 'layers.3'", refusal("--freeze_layers", "--num_freeze_layers", 4))
        self.assertIn("no layers are frozen", refusal("--num_freeze_layers", 1))
        self.assertIn("the model beside adapters is frozen", refusal("--use_peft", "--freeze_layers"))
        self.assertIn("there is nothing to train", refusal("--freeze_modules", ".*"))
