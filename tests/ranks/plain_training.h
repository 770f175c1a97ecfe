// AdamW over plain leaves: the truth that sharded training of adapters is compared with.
#pragma once

#include <torch/optim/adamw.h>

#include <vector>

#include "tests/ranks/training_run.h"

namespace fsdp::testing {

/// Of a step, over all ranks.
constexpr int kAllMicroBatches = 4;

/// The loss per token of each step; every step goes over all its micro-batches in turn.
/// `loss_of(batch)`: the sum over the batch's tokens.
template <class LossOf>
std::vector<double> train_plain(const std::vector<at::Tensor>& leaves, int steps, double rate,
                                LossOf loss_of) {
  torch::optim::AdamW optimizer(leaves, torch::optim::AdamWOptions(rate).weight_decay(0).eps(1e-8));
  std::vector<double> losses;
  for (int step = 0; step < steps; ++step) {
    optimizer.zero_grad();
    double sum = 0;
    int64_t tokens = 0;
    for (int m = 0; m < kAllMicroBatches; ++m) tokens += micro_batch(step, m).ids.numel();
    for (int m = 0; m < kAllMicroBatches; ++m) {
      const at::Tensor loss = loss_of(micro_batch(step, m));
      sum += loss.template item<double>();
      (loss / static_cast<double>(tokens)).backward();
    }
    optimizer.step();
    losses.push_back(sum / static_cast<double>(tokens));
  }
  return losses;
}

}  // namespace fsdp::testing
