"""Random tiny models by transformers, with logits, loss and gradients in fp32 and fp64, for llama_parity_test.

usage: make_models.py OUTPUT_DIR        one directory per model: the model, and oracle.safetensors
"""
import os
import sys

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file

COMMON = dict(vocab_size=211, hidden_size=48, intermediate_size=112, num_hidden_layers=3, num_attention_heads=6,
              num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5, tie_word_embeddings=False,
              bos_token_id=1, eos_token_id=2)
LLAMA3_ROPE = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=64)
CASES = {
    "llama_tied": ("llama", dict(tie_word_embeddings=True)),
    "llama_untied": ("llama", dict()),
    "llama_biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "llama_head_40": ("llama", dict(head_dim=40, num_key_value_heads=6)),
    "llama_rope_linear": ("llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=4.0))),
    "llama_rope_llama3": ("llama", dict(rope_parameters=LLAMA3_ROPE, num_key_value_heads=1)),
    "mistral": ("mistral", dict(sliding_window=None, head_dim=8)),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("qwen3", dict(head_dim=32)),
}


def randomize(model):
    """Weights that make every parameter matter: transformers' own leave biases and norms at zero and one."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale, mean = (0.2, 1.0) if name.endswith("norm.weight") else (0.15, 0.0)
            p.copy_(mean + scale * torch.randn(p.shape))


def run(model, ids, labels):
    model.zero_grad(set_to_none=True)
    output = model(ids, labels=labels, use_cache=False)
    logits = output.logits
    targets = labels[:, 1:].reshape(-1)
    loss = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]).to(torch.promote_types(logits.dtype, torch.float32)),
                           targets, ignore_index=-100, reduction="sum")
    count = (targets != -100).sum()
    assert abs(output.loss.item() - loss.item() / count) < 1e-4, "transformers shifts labels differently"
    loss.backward()
    return logits.detach(), loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def make(name, kind, changes, out):
    torch.manual_seed(sum(map(ord, name)))
    config = transformers.AutoConfig.for_model(kind, **{**COMMON, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    randomize(model)
    directory = os.path.join(out, name)
    model.save_pretrained(directory)
    ids = torch.randint(0, COMMON["vocab_size"], (2, 150))
    labels = ids.clone()
    labels[0, :40] = -100
    labels[1, 100:] = -100
    logits, loss, grads = run(model, ids, labels)
    logits64, loss64, grads64 = run(model.double(), ids, labels)
    tensors = {"input_ids": ids, "labels": labels, "logits": logits, "logits64": logits64, "loss64": loss64.reshape(1)}
    for key, g in grads64.items():
        tensors["grad64." + key] = g.contiguous()
        tensors["spread." + key] = (grads[key].double() - g).norm().reshape(1)
    save_file(tensors, os.path.join(directory, "oracle.safetensors"))
    print(f"{name}: loss {loss64.item():.6f}, max |logit| {logits64.abs().max().item():.2f}, "
          f"fp32 logits off by {(logits.double() - logits64).abs().max().item():.1e}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for case, (kind, changes) in CASES.items():
        make(case, kind, changes, sys.argv[1])
