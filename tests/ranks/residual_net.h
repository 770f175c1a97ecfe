// A small model of many units, for tests: residual blocks of unequal parameters, an embedding and a
// head as the root.
#pragma once

#include <ATen/ATen.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/normalization.h>

#include <memory>
#include <vector>

#include "libfsdp/shard/unit.h"

namespace fsdp::testing {

struct ResidualBlockImpl : torch::nn::Module {
  ResidualBlockImpl(int64_t width, int64_t hidden)
      : norm(torch::nn::LayerNormOptions({width})), up(width, hidden), down(hidden, width) {
    register_module("norm", norm);
    register_module("up", up);
    register_module("down", down);
  }
  at::Tensor forward(const at::Tensor& x) { return x + down(at::gelu(up(norm(x)))); }
  torch::nn::LayerNorm norm;
  torch::nn::Linear up, down;
};
TORCH_MODULE(ResidualBlock);

/// loss(ids [T], targets [T]) = sum of cross entropies.
struct ResidualNetImpl : torch::nn::Module {
  explicit ResidualNetImpl(int units, int64_t width = 24, int64_t vocabulary = 37)
      : embed(vocabulary, width), head(torch::nn::LinearOptions(width, vocabulary).bias(false)) {
    register_module("embed", embed);
    for (int i = 0; i < units; ++i) {
      blocks.emplace_back(width, width * 2 + 5 * (i % 3));
      register_module("block" + std::to_string(i), blocks.back());
    }
    register_module("head", head);
  }
  at::Tensor forward(const at::Tensor& ids) {
    at::Tensor x = embed(ids);
    for (auto& block : blocks) x = block->forward(x);
    return head(x);
  }
  at::Tensor loss(const at::Tensor& ids, const at::Tensor& targets) {
    return at::cross_entropy_loss(forward(ids).to(at::kFloat), targets, {}, at::Reduction::Sum);
  }
  torch::nn::Embedding embed;
  std::vector<Unit<ResidualBlock>> blocks;
  torch::nn::Linear head;
};
TORCH_MODULE(ResidualNet);

}  // namespace fsdp::testing
