"""`finetune convert`: every form and back, and the files of others, tensor by tensor."""

import json
import shutil
import unittest

from support import ProgramTest, read_safetensors

try:
    import torch
    from safetensors.torch import load_file
except ImportError:
    torch = None


class Forms(ProgramTest):
    def convert(self, source, target, *extra):
        self.succeed("convert", "--from", source, "--to", self.folder / target, *extra)
        return self.folder / target

    def test_full_to_sharded_and_back_is_the_same_file(self):
        model = self.tiny_model()
        sharded = self.convert(model, "sharded", "--format", "sharded", "--num_shards", 3)
        self.assertEqual(sorted(p.name for p in sharded.glob("*.safetensors")),
                         [f"shard-0000{r}-model-00001-of-00001.safetensors" for r in (1, 2, 3)])
        again = self.convert(sharded, "again")
        self.assertEqual((again / "model.safetensors").read_bytes(), (model / "model.safetensors").read_bytes())
        self.assertEqual((again / "tokenizer.json").read_bytes(), (model / "tokenizer.json").read_bytes())
        self.assertFalse(list(again.glob(".tmp*")))

    def test_types_and_sizes_of_files(self):
        model = self.tiny_model()
        small = self.convert(model, "small", "--dtype", "bfloat16", "--max_shard_size", "30KB")
        index = json.loads((small / "model.safetensors.index.json").read_text())
        self.assertGreater(len(set(index["weight_map"].values())), 1)
        self.assertEqual(json.loads((small / "config.json").read_text())["torch_dtype"], "bfloat16")
        header, _ = read_safetensors(sorted(small.glob("model-00001-of-*.safetensors"))[0])
        self.assertEqual({v["dtype"] for k, v in header.items() if k != "__metadata__"}, {"BF16"})
        self.convert(small, "one")
        self.succeed("generate", "--model_name_or_path", self.folder / "one", "--prompt", "x", "--max_new_tokens", 1)

    def test_a_missing_shard_is_named_and_nothing_appears(self):
        sharded = self.convert(self.tiny_model(), "sharded", "--format", "sharded", "--num_shards", 2)
        (sharded / "shard-00002-model-00001-of-00001.safetensors").unlink()
        line = self.fail_with(4, "convert", "--from", sharded, "--to", self.folder / "to")
        self.assertIn("are in no file", line)
        self.assertFalse((self.folder / "to" / "model.safetensors").exists())

    def test_what_cannot_be_is_refused(self):
        model = self.tiny_model()
        self.assertIn("is not empty", self.fail_with(2, "convert", "--from", model, "--to", model))
        self.assertIn("begins with 'x.'",
                      self.fail_with(2, "convert", "--from", model, "--to", self.folder / "to", "--prefix", "x."))
        self.assertIn("num_shards", self.fail_with(2, "convert", "--from", model, "--to", self.folder / "to",
                                                   "--num_shards", 2))
        (self.folder / "evil.pth").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
        self.assertIn("evil.pth", self.fail_with(4, "convert", "--from", self.folder / "evil.pth",
                                                 "--to", self.folder / "to"))


@unittest.skipIf(torch is None, "needs torch")
class Torch(ProgramTest):
    def convert(self, source, target, *extra):
        self.succeed("convert", "--from", source, "--to", self.folder / target, *extra)
        return load_file(self.folder / target / "model.safetensors")

    def assert_same(self, got, expected):
        self.assertEqual(got.keys(), expected.keys())
        for name, tensor in expected.items():
            self.assertEqual(got[name].dtype, tensor.dtype, name)
            self.assertTrue(torch.equal(got[name], tensor), name)

    def test_llama_files_of_two_parts(self):
        dim, heads, kv_heads, layers, vocab, inner, parts = 32, 4, 2, 2, 64, 48, 2
        torch.manual_seed(1)
        full = {"tok_embeddings.weight": torch.randn(vocab, dim), "norm.weight": torch.randn(dim),
                "output.weight": torch.randn(vocab, dim)}
        sizes = {"attention.wq": (dim, dim), "attention.wk": (kv_heads * 8, dim), "attention.wv": (kv_heads * 8, dim),
                 "attention.wo": (dim, dim), "feed_forward.w1": (inner, dim), "feed_forward.w2": (dim, inner),
                 "feed_forward.w3": (inner, dim), "attention_norm": (dim,), "ffn_norm": (dim,)}
        for i in range(layers):
            full.update({f"layers.{i}.{name}.weight": torch.randn(size) for name, size in sizes.items()})
        full = {name: tensor.bfloat16() for name, tensor in full.items()}

        def cut(name, tensor, part, embedding_dim):
            if tensor.dim() == 1:
                return tensor
            columns = any(key in name for key in ("wo.", "w2.")) or ("tok_emb" in name and embedding_dim == 1)
            return tensor.chunk(parts, 1 if columns else 0)[part].contiguous()

        def rotate(weight, n):
            return weight.view(n, weight.shape[0] // n // 2, 2, -1).transpose(1, 2).reshape(weight.shape)

        names = {"attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
                 "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
                 "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
                 "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm",
                 "ffn_norm": "post_attention_layernorm"}
        expected = {"model.embed_tokens.weight": full["tok_embeddings.weight"], "model.norm.weight": full["norm.weight"],
                    "lm_head.weight": full["output.weight"]}
        for i in range(layers):
            for theirs, ours in names.items():
                tensor = full[f"layers.{i}.{theirs}.weight"]
                if theirs in ("attention.wq", "attention.wk"):
                    tensor = rotate(tensor, heads if theirs == "attention.wq" else kv_heads)
                expected[f"model.layers.{i}.{ours}.weight"] = tensor

        params = {"dim": dim, "n_layers": layers, "n_heads": heads, "n_kv_heads": kv_heads, "vocab_size": -1,
                  "multiple_of": 16, "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True}
        for embedding_dim in (0, 1):  # Llama 3 cuts the embedding by rows, Llama 2 by columns.
            folder = self.folder / f"llama{embedding_dim}"
            folder.mkdir()
            for part in range(parts):
                state = {name: cut(name, tensor, part, embedding_dim) for name, tensor in full.items()}
                torch.save({**state, "rope.freqs": torch.zeros(4)}, folder / f"consolidated.0{part}.pth")
            (folder / "params.json").write_text(json.dumps(params))
            self.assert_same(self.convert(folder, f"hf{embedding_dim}"), expected)
            config = json.loads((self.folder / f"hf{embedding_dim}" / "config.json").read_text())
            self.assertEqual(config["rope_scaling"]["rope_type"], "llama3")
            self.assertEqual((config["intermediate_size"], config["num_key_value_heads"]), (inner, kv_heads))
        (folder / "consolidated.01.pth").unlink()
        self.assertIn("are all parts consolidated.NN.pth there?", self.fail_with(4, "convert", "--from", folder, "--to", self.folder / "to"))

    def test_dcp_directories_and_torch_save(self):
        import torch.distributed.checkpoint as dcp
        model = self.tiny_model()
        expected = load_file(model / "model.safetensors")
        dcp.save({"model": expected, "step": 3}, checkpoint_id=self.folder / "dcp", no_dist=True)
        self.assert_same(self.convert(self.folder / "dcp", "from_dcp", "--prefix", "model."), expected)
        torch.save(expected, self.folder / "x.pth")
        self.assert_same(self.convert(self.folder / "x.pth", "from_pth"), expected)
        pickled = self.folder / "pickled"
        pickled.mkdir()
        names = sorted(expected)
        for i, part in enumerate((names[:4], names[4:])):
            torch.save({name: expected[name] for name in part}, pickled / f"pytorch_model-0000{i + 1}-of-00002.bin")
        shutil.copy(model / "config.json", pickled)
        self.assert_same(self.convert(pickled, "from_bin"), expected)

    def test_dcp_reads_what_convert_wrote(self):
        import torch.distributed.checkpoint as dcp
        model = self.tiny_model()
        expected = load_file(model / "model.safetensors")
        self.succeed("convert", "--from", model, "--to", self.folder / "sharded", "--format", "sharded",
                     "--num_shards", 5)
        loaded = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
        dcp.load(loaded, storage_reader=dcp.HuggingFaceStorageReader(str(self.folder / "sharded")), no_dist=True)
        self.assert_same(loaded, expected)


if __name__ == "__main__":
    unittest.main()
