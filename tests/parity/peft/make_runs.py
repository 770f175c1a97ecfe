"""Adapters trained by PEFT and torch.optim.AdamW, for peft_parity_test.

usage: make_runs.py OUTPUT_DIR

A random 4-layer Llama, or Qwen2; for each kind of adapter one with random values, 20 steps over batches that are a function of step
and micro-batch. Writes the model, and for each kind: start/ and end/ as PEFT saves them (of a projected prefix also
start/encoder.safetensors, the projection itself), and run.safetensors: losses, norms, logits after the last step, and how
far PEFT is from itself when it runs row by row.
"""
import os
import sys

import peft
import torch
import transformers
from safetensors.torch import save_file

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))
import runs as common

MICRO_BATCHES = 4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA_KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True},
              "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"down_proj": 3},
                           "layers_to_transform": [0, 1, 3], "modules_to_save": None},
              "embedding": {"use_dora": True, "target_modules": ["embed_tokens", "v_proj"]},
              "head": {"target_modules": ["q_proj", "lm_head"]},
              "bias": {"target_modules": ["q_proj", "o_proj"], "bias": "all"},
              "lora_only": {"bias": "lora_only"}}
# Type; seed; whether head and embedding are one weight.
BASES = {"base": ("llama", 5, True), "untied": ("llama", 5, False), "other": ("llama", 6, False),
         "biased": ("qwen2", 5, True)}
BASE_OF = {"embedding": "untied", "head": "untied", "bias": "biased", "lora_only": "biased"}


# B and the gates are random too: PEFT's own start, zero, says nothing about their part in the first loss.
def lora(model, **options):
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM",
                                                       **{"target_modules": TARGETS, **options}))
    for name, parameter in model.named_parameters():
        if "lora_embedding" in name:  # Normal numbers are far larger than those of the others.
            parameter.data.mul_(0.1)
    return model


def prefix(model, **options):
    return peft.get_peft_model(model, peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM", **options))


def llama_adapter(model):
    model = peft.get_peft_model(model, peft.AdaptionPromptConfig(adapter_len=5, adapter_layers=3, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if name.endswith("adaption_gate"):
            parameter.data.normal_()
    return model


PROMPT_KINDS = {"prefix": prefix, "projection": lambda model: prefix(model, prefix_projection=True, encoder_hidden_size=24),
                "llama_adapter": llama_adapter}
KINDS = {**{kind: lambda model, options=options: lora(model, **options) for kind, options in LORA_KINDS.items()},
         **PROMPT_KINDS}


def base_of(kind):
    return BASE_OF.get(kind, "base")


def adapters_of(model):
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: value.clone() for name, value in state.items()}


def main():
    torch.set_num_threads(1)
    out = sys.argv[1]
    for name, (model_type, seed, tied) in BASES.items():
        torch.manual_seed(seed)
        config = transformers.AutoConfig.for_model(model_type, **{**common.llama_sizes(4), "tie_word_embeddings": tied})
        base = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
        for key, value in base.named_parameters():
            if key.endswith(".bias"):  # They start at zero.
                value.data.normal_(std=0.1)
        base.save_pretrained(os.path.join(out, name))
    save_file(common.batches(MICRO_BATCHES), os.path.join(out, "batches.safetensors"))
    for kind, adapt in KINDS.items():
        directory = os.path.join(out, kind)
        ends = []
        for by_row in (False, True):
            torch.manual_seed(11)
            model = transformers.AutoModelForCausalLM.from_pretrained(os.path.join(out, base_of(kind)),
                                                                      attn_implementation="eager").float()
            model = adapt(model)
            model.train()
            if not by_row:
                model.save_pretrained(os.path.join(directory, "start"))
                if kind == "projection":
                    save_file({f"prompt_encoder.{name}": value.detach().clone() for name, value in
                               model.prompt_encoder["default"].named_parameters()},
                              os.path.join(directory, "start", "encoder.safetensors"))
            losses, norms = common.train(model, MICRO_BATCHES, weight_decay=0.0, by_row=by_row)
            ends.append((losses, norms, adapters_of(model)))
            if by_row:
                continue
            model.save_pretrained(os.path.join(directory, "end"), save_embedding_layers=False)
            with torch.no_grad():
                logits = model.eval()(input_ids=common.batch(0, 0)[0]).logits
        losses, norms, adapters = ends[0]
        spread = max(((adapters[name] - other).norm() / other.norm()).item() for name, other in ends[1][2].items())
        save_file({"losses": torch.tensor(losses, dtype=torch.float64), "norms": torch.tensor(norms, dtype=torch.float64),
                   "logits": logits.contiguous(), "spread": torch.tensor([spread], dtype=torch.float64)},
                  os.path.join(directory, "run.safetensors"))


if __name__ == "__main__":
    main()
