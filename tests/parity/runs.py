"""Training by torch.optim.AdamW over batches that are a function of step and micro-batch, for the parity tests' truths."""
import torch
import torch.nn.functional as F

STEPS, ROWS, LENGTH, VOCABULARY = 20, 2, 17, 97


def llama_sizes(layers):
    return dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=56, num_hidden_layers=layers,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True)


def batch(step, m):
    generator = torch.Generator().manual_seed(1000 * step + m)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    labels = ids.clone()
    labels[:, : 3 + m % 4] = -100  # Micro-batches with unequal numbers of trainable tokens.
    return ids, labels


def batches(micro_batches):
    result = {}
    for step in range(STEPS):
        for m in range(micro_batches):
            result[f"ids.{step}.{m}"], result[f"labels.{step}.{m}"] = batch(step, m)
    return result


def train(model, micro_batches, weight_decay, by_row=False):
    """Losses and norms of the gradient of each step; what requires grad is trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=weight_decay, foreach=False)
    losses, norms = [], []
    for step in range(STEPS):
        total, tokens = 0.0, 0
        for m in range(micro_batches):
            ids, labels = batch(step, m)
            for part_ids, part_labels in zip(ids.split(1 if by_row else ROWS), labels.split(1 if by_row else ROWS)):
                logits = model(input_ids=part_ids, use_cache=False).logits
                loss = F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), part_labels[:, 1:].reshape(-1),
                                       ignore_index=-100, reduction="sum")
                loss.backward()
                total += loss.double().item()
            tokens += int((labels[:, 1:] != -100).sum())
        for parameter in trained:
            parameter.grad.div_(tokens)
        norms.append(torch.nn.utils.clip_grad_norm_(trained, 1.0).item())
        losses.append(total / tokens)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses, norms
