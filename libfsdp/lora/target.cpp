#include "libfsdp/lora/target.h"

#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>

#include <algorithm>
#include <variant>

namespace fsdp::lora {
namespace {

namespace nn = torch::nn;

// PEFT gives the convolution A the layer's stride and padding, but neither its way of padding nor
// its dilation.
template <size_t D>
std::string refusal_of(const nn::detail::ConvNdOptions<D>& options) {
  if (!std::holds_alternative<torch::enumtype::kZeros>(options.padding_mode()))
    return "it does not pad with zeros, as adapters do";
  const auto above_one = [](const auto& sizes) {
    return std::any_of(sizes->begin(), sizes->end(), [](int64_t size) { return size > 1; });
  };
  if (std::holds_alternative<torch::enumtype::kSame>(options.padding()) &&
      above_one(options.dilation()) && above_one(options.kernel_size()))
    return "it has dilation and padding 'same', which PEFT's adapters compute without dilation";
  return {};
}

template <class Conv>
std::optional<TargetLayer> convolution(const nn::Module& module) {
  const auto* layer = dynamic_cast<const Conv*>(&module);
  if (!layer) return std::nullopt;
  return TargetLayer{.kind = TargetKind::kConvolution,
                     .weight = layer->weight,
                     .operations = Operations::kAll,
                     .groups = layer->options.groups(),
                     .refusal = refusal_of(layer->options)};
}

std::optional<TargetLayer> stock_layer(const nn::Module& module) {
  if (const auto* linear = dynamic_cast<const nn::LinearImpl*>(&module)) {
    return TargetLayer{.kind = TargetKind::kLinear,
                       .weight = linear->weight,
                       .operations = Operations::kAll,
                       .refusal = {}};
  }
  if (const auto* table = dynamic_cast<const nn::EmbeddingImpl*>(&module)) {
    return TargetLayer{.kind = TargetKind::kEmbedding,
                       .weight = table->weight,
                       .operations = Operations::kAll,
                       .refusal = table->options.max_norm()
                                      ? "its max_norm changes the frozen weight in every call"
                                      : ""};
  }
  if (auto conv = convolution<nn::Conv1dImpl>(module)) return conv;
  if (auto conv = convolution<nn::Conv2dImpl>(module)) return conv;
  return convolution<nn::Conv3dImpl>(module);
}

}  // namespace

std::optional<TargetLayer> find_target(const torch::nn::Module& module) {
  const auto* target = dynamic_cast<const Target*>(&module);
  if (!target) return stock_layer(module);
  return TargetLayer{
      .kind = target->target_kind(), .weight = target->target_weight(), .refusal = {}};
}

}  // namespace fsdp::lora
