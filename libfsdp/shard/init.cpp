#include "libfsdp/shard/init.h"

#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/instancenorm.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/normalization.h>
#include <torch/nn/modules/rnn.h>
#include <torch/nn/modules/transformer.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <utility>

#include "libfsdp/base/error.h"
#include "libfsdp/shard/random.h"

namespace fsdp {
namespace {

namespace nn = torch::nn;

struct Fans {
  double in, out;
};

// As torch's _calculate_fan_in_and_fan_out.
Fans fans_of(std::string_view name, c10::IntArrayRef shape) {
  if (shape.size() < 2) {
    throw ConfigError(cat("parameter '", name, "' of shape ", shape,
                          " has no fan_in: expected at least 2 dimensions"));
  }
  double field = 1;
  for (size_t i = 2; i < shape.size(); ++i) field *= static_cast<double>(shape[i]);
  return {static_cast<double>(shape[1]) * field, static_cast<double>(shape[0]) * field};
}

double inverse_sqrt(double x) { return x > 0 ? 1 / std::sqrt(x) : 0; }

// How one parameter is filled.
struct Recipe {
  enum class Kind { kConstant, kUniform, kNormal } kind = Kind::kConstant;
  double value = 0;         // The constant, bound of the uniform, or deviation of the normal.
  int64_t zero_begin = -1;  // Elements that stay zero: the row of an embedding's padding index.
  int64_t zero_end = -1;
};
using Recipes = std::map<std::string, Recipe>;

Recipe constant_recipe(double value) { return {Recipe::Kind::kConstant, value}; }
Recipe uniform_recipe(double bound) { return {Recipe::Kind::kUniform, bound}; }
Recipe normal_recipe(double deviation) { return {Recipe::Kind::kNormal, deviation}; }

Recipe xavier_uniform(std::string_view name, const at::Tensor& tensor) {
  const Fans fans = fans_of(name, tensor.sizes());
  return uniform_recipe(std::sqrt(6 / (fans.in + fans.out)));
}

void fill(const Recipe& recipe, uint64_t key, int64_t begin, std::span<float> values) {
  switch (recipe.kind) {
    case Recipe::Kind::kConstant:
      std::fill(values.begin(), values.end(), static_cast<float>(recipe.value));
      break;
    case Recipe::Kind::kUniform:
      fill_uniform(key, begin, values, -recipe.value, recipe.value);
      break;
    case Recipe::Kind::kNormal:
      fill_normal(key, begin, values, 0, recipe.value);
      break;
  }
  const int64_t end = begin + static_cast<int64_t>(values.size());
  for (int64_t i = std::max(begin, recipe.zero_begin); i < std::min(end, recipe.zero_end); ++i)
    values[static_cast<size_t>(i - begin)] = 0;
}

template <class... Types>
bool is_one_of(const nn::Module& module) {
  return (dynamic_cast<const Types*>(&module) || ...);
}

// Writes the recipes of the parameters that `module` itself holds (and of those of children that it
// resets after them). Later modules are parents of, or beside, earlier ones. False: not LibTorch's.
class RecipeMaker {
 public:
  RecipeMaker(Recipes& recipes, std::string prefix, const nn::Module& module)
      : recipes_(recipes), prefix_(std::move(prefix)), module_(module) {}

  bool make() {
    return by_fan_in() || norm() || embedding() || recurrent() || attention() || other_layers();
  }
  // Transformer's reset_parameters goes over all parameters inside, whatever they are.
  void transformer() {
    if (!is_one_of<nn::TransformerImpl>(module_)) return;
    for (const auto& entry : module_.named_parameters()) {
      if (entry.value().dim() > 1)
        recipes_[prefix_ + entry.key()] = xavier_uniform(entry.key(), entry.value());
    }
  }

 private:
  void set(const std::string& name, const Recipe& recipe) { recipes_[prefix_ + name] = recipe; }
  void set_all(const Recipe& recipe) {
    for (const auto& entry : module_.named_parameters(/*recurse=*/false)) set(entry.key(), recipe);
  }

  bool by_fan_in() {
    if (!is_one_of<nn::LinearImpl, nn::Conv1dImpl, nn::Conv2dImpl, nn::Conv3dImpl,
                   nn::ConvTranspose1dImpl, nn::ConvTranspose2dImpl, nn::ConvTranspose3dImpl>(
            module_))
      return false;
    const auto own = module_.named_parameters(/*recurse=*/false);
    set_all(uniform_recipe(inverse_sqrt(fans_of(prefix_ + "weight", own["weight"].sizes()).in)));
    return true;
  }

  bool norm() {
    if (!is_one_of<nn::LayerNormImpl, nn::GroupNormImpl, nn::BatchNorm1dImpl, nn::BatchNorm2dImpl,
                   nn::BatchNorm3dImpl, nn::InstanceNorm1dImpl, nn::InstanceNorm2dImpl,
                   nn::InstanceNorm3dImpl>(module_))
      return false;
    set("weight", constant_recipe(1));
    set("bias", constant_recipe(0));
    return true;
  }

  template <class Layer>
  bool embedding_of() {
    const auto* layer = dynamic_cast<const Layer*>(&module_);
    if (!layer) return false;
    Recipe recipe = normal_recipe(1);
    if (const auto padding = layer->options.padding_idx()) {
      const int64_t width = layer->options.embedding_dim();
      const int64_t row = *padding < 0 ? *padding + layer->options.num_embeddings() : *padding;
      recipe.zero_begin = row * width;
      recipe.zero_end = (row + 1) * width;
    }
    set("weight", recipe);
    return true;
  }
  bool embedding() {
    return embedding_of<nn::EmbeddingImpl>() || embedding_of<nn::EmbeddingBagImpl>();
  }

  template <class Layer>
  bool recurrent_of() {
    const auto* layer = dynamic_cast<const Layer*>(&module_);
    if (!layer) return false;
    set_all(uniform_recipe(inverse_sqrt(static_cast<double>(layer->options.hidden_size()))));
    return true;
  }
  bool recurrent() {
    return recurrent_of<nn::RNNImpl>() || recurrent_of<nn::LSTMImpl>() ||
           recurrent_of<nn::GRUImpl>() || recurrent_of<nn::RNNCellImpl>() ||
           recurrent_of<nn::LSTMCellImpl>() || recurrent_of<nn::GRUCellImpl>();
  }

  bool attention() {
    if (!is_one_of<nn::MultiheadAttentionImpl>(module_)) return false;
    for (const auto& entry : module_.named_parameters(/*recurse=*/false)) {
      const at::Tensor& tensor = entry.value();
      if (entry.key() == "in_proj_bias") {
        set(entry.key(), constant_recipe(0));
        set("out_proj.bias", constant_recipe(0));
      } else if (entry.key().starts_with("bias_")) {
        const Fans fans = fans_of(entry.key(), tensor.sizes());
        set(entry.key(), normal_recipe(std::sqrt(2 / (fans.in + fans.out))));
      } else {
        set(entry.key(), xavier_uniform(entry.key(), tensor));
      }
    }
    return true;
  }

  bool other_layers() {
    if (const auto* bilinear = dynamic_cast<const nn::BilinearImpl*>(&module_)) {
      set_all(uniform_recipe(inverse_sqrt(static_cast<double>(bilinear->options.in1_features()))));
      return true;
    }
    if (const auto* prelu = dynamic_cast<const nn::PReLUImpl*>(&module_)) {
      set_all(constant_recipe(prelu->options.init()));
      return true;
    }
    return false;
  }

  Recipes& recipes_;
  std::string prefix_;
  const nn::Module& module_;
};

std::string prefix_of(const std::string& module) { return module.empty() ? "" : module + "."; }

// Children before their parents, which may reset them again.
Recipes make_recipes(const nn::Module& model) {
  Recipes recipes;
  const auto modules = model.named_modules().items();
  for (auto entry = modules.rbegin(); entry != modules.rend(); ++entry)
    RecipeMaker(recipes, prefix_of(entry->key()), *entry->value()).make();
  for (auto entry = modules.rbegin(); entry != modules.rend(); ++entry)
    RecipeMaker(recipes, prefix_of(entry->key()), *entry->value()).transformer();
  return recipes;
}

void refuse_unknown(const nn::Module& model, const Recipes& recipes) {
  std::string names;
  for (const auto& entry : model.named_parameters()) {
    if (!recipes.contains(entry.key()))
      names += cat(names.empty() ? "" : ", ", "'", entry.key(), "'");
  }
  if (names.empty()) return;
  throw ConfigError(cat("default_initializer: no layer of LibTorch holds ", names,
                        ". Hint: give a function that fills them as its last argument."));
}

FillFunction from_recipe(uint64_t seed, const Recipe& recipe) {
  return [seed, recipe](const std::string& name, c10::IntArrayRef, int64_t begin,
                        std::span<float> values) {
    fill(recipe, stream_key(seed, name), begin, values);
  };
}

}  // namespace

namespace init {

FillFunction constant(double value) { return from_recipe(0, constant_recipe(value)); }

FillFunction normal(uint64_t seed, double deviation, double mean) {
  return [=](const std::string& name, c10::IntArrayRef, int64_t begin, std::span<float> values) {
    fill_normal(stream_key(seed, name), begin, values, mean, deviation);
  };
}

FillFunction uniform(uint64_t seed, double low, double high) {
  return [=](const std::string& name, c10::IntArrayRef, int64_t begin, std::span<float> values) {
    fill_uniform(stream_key(seed, name), begin, values, low, high);
  };
}

FillFunction truncated_normal(uint64_t seed, double deviation, double mean, double low,
                              double high) {
  return [=](const std::string& name, c10::IntArrayRef, int64_t begin, std::span<float> values) {
    fill_truncated_normal(stream_key(seed, name), begin, values, mean, deviation, low, high);
  };
}

FillFunction kaiming_uniform(uint64_t seed) {
  return
      [=](const std::string& name, c10::IntArrayRef shape, int64_t begin, std::span<float> values) {
        const double bound = inverse_sqrt(fans_of(name, shape).in);
        fill_uniform(stream_key(seed, name), begin, values, -bound, bound);
      };
}

}  // namespace init

FillFunction default_initializer(const torch::nn::Module& model, uint64_t seed,
                                 FillFunction otherwise) {
  auto recipes = std::make_shared<const Recipes>(make_recipes(model));
  if (!otherwise) refuse_unknown(model, *recipes);
  return
      [recipes, seed, otherwise = std::move(otherwise)](
          const std::string& name, c10::IntArrayRef shape, int64_t begin, std::span<float> values) {
        const auto found = recipes->find(name);
        if (found == recipes->end()) return otherwise(name, shape, begin, values);
        fill(found->second, stream_key(seed, name), begin, values);
      };
}

}  // namespace fsdp
