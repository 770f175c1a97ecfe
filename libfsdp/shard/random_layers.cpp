// Which of LibTorch's layers draw random numbers in training.

#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/dropout.h>
#include <torch/nn/modules/pooling.h>
#include <torch/nn/modules/rnn.h>

#include "libfsdp/base/error.h"
#include "libfsdp/shard/dropout.h"

namespace fsdp {
namespace {

namespace nn = torch::nn;

template <class... Layer>
struct Dropouts {
  static bool draws(const nn::Module& module) { return (draws_one<Layer>(module) || ...); }
  template <class One>
  static bool draws_one(const nn::Module& module) {
    const auto* layer = dynamic_cast<const One*>(&module);
    return layer && layer->options.p() > 0;
  }
};

// Between their layers, so only where there are several.
template <class... Layer>
bool recurrent_draws(const nn::Module& module) {
  const auto draws = [](const auto* layer) {
    return layer && layer->options.dropout() > 0 && layer->options.num_layers() > 1;
  };
  return (draws(dynamic_cast<const Layer*>(&module)) || ...);
}

bool rrelu_draws(const nn::Module& module) {
  const auto* layer = dynamic_cast<const nn::RReLUImpl*>(&module);
  return layer && layer->options.lower() != layer->options.upper();
}

bool attention_draws(const nn::Module& module) {
  const auto* layer = dynamic_cast<const nn::MultiheadAttentionImpl*>(&module);
  return layer && layer->options.dropout() > 0;
}

template <class Layer>
bool pooling_draws(const nn::Module& module) {
  const auto* layer = dynamic_cast<const Layer*>(&module);
  return layer && !layer->_random_samples.defined();
}

bool draws(const nn::Module& module) {
  return Dropouts<nn::DropoutImpl, nn::Dropout2dImpl, nn::Dropout3dImpl, nn::AlphaDropoutImpl,
                  nn::FeatureAlphaDropoutImpl>::draws(module) ||
         recurrent_draws<nn::RNNImpl, nn::LSTMImpl, nn::GRUImpl>(module) ||
         attention_draws(module) || rrelu_draws(module) ||
         pooling_draws<nn::FractionalMaxPool2dImpl>(module) ||
         pooling_draws<nn::FractionalMaxPool3dImpl>(module);
}

}  // namespace

void refuse_stock_dropout(const torch::nn::Module& model) {
  std::string names;
  for (const auto& entry : model.named_modules()) {
    if (!draws(*entry.value())) continue;
    names += cat(names.empty() ? "" : ", ", "'", entry.key(), "' (", entry.value()->name(), ")");
  }
  if (names.empty()) return;
  throw ConfigError(cat("deterministic training: ", names,
                        " draw from a global generator, so that the numbers depend on the number "
                        "of ranks. Hint: use fsdp::dropout or fsdp::Dropout, or set their "
                        "probability to zero."));
}

}  // namespace fsdp
