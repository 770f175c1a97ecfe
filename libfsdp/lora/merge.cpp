#include "libfsdp/lora/merge.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <set>

#include "libfsdp/base/error.h"
#include "libfsdp/checkpoint/quantized_reader.h"
#include "libfsdp/io/safetensors.h"
#include "libfsdp/lora/config.h"

namespace fsdp::lora {
namespace {

using at::Tensor;
using checkpoint::QuantizedReader;
using checkpoint::QuantizedWeight;
using checkpoint::StateDict;
using checkpoint::StoredTensor;
using checkpoint::TensorPart;
using io::TensorEntry;

constexpr std::string_view kPrefix = "base_model.model.";
constexpr std::string_view kWeight = ".weight";
constexpr int64_t kMostRowsNumel = int64_t{1} << 20;

struct Pair {
  const TensorEntry* a = nullptr;
  const TensorEntry* b = nullptr;
  const TensorEntry* magnitude = nullptr;
  const TensorEntry* base = nullptr;  // The weight, where the adapter's file holds it too.
  bool embedding = false;
};

// The base's files: tensors as they are stored, and quantised weights as what their codes mean.
class Base {
 public:
  explicit Base(const std::string& directory)
      : reader_(std::make_shared<QuantizedReader>(std::make_shared<checkpoint::StoredReader>(
            checkpoint::StoredTensors::open(directory)))) {}

  const std::string& directory() const { return stored().directory(); }
  const checkpoint::StoredTensors& stored() const { return reader_->stored().stored(); }
  QuantizedReader& reader() const { return *reader_; }
  const QuantizedWeight* quantized(const std::string& name) const {
    const auto found = reader_->weights().find(name);
    return found == reader_->weights().end() ? nullptr : &found->second;
  }
  // Of the matrix, if there is a tensor of that name.
  const std::vector<int64_t>* shape(const std::string& name) const {
    if (const QuantizedWeight* weight = quantized(name)) return &weight->shape;
    const StoredTensor* tensor = stored().find(name);
    return tensor ? &tensor->shape : nullptr;
  }
  // Elements from `at`, as fp32.
  void read_floats(const std::string& name, int64_t at, std::span<float> out) {
    if (const QuantizedWeight* weight = quantized(name))
      return reader_->dequantize(*weight, at, out);
    const StoredTensor& tensor = *stored().find(name);
    bytes_.resize(out.size() * dtype_bytes(*tensor.dtype));
    reader_->stored().read(tensor, at, bytes_);
    convert_floats(bytes_.data(), *tensor.dtype, out.data(), DType::kF32, out.size());
  }

 private:
  std::shared_ptr<QuantizedReader> reader_;
  std::vector<std::byte> bytes_;
};

class Merger : public std::enable_shared_from_this<Merger> {
 public:
  Merger(const std::string& base, const std::string& directory)
      : base_(base),
        directory_(directory),
        config_(read_adapter_config(directory)),
        file_(io::SafetensorsFile::open(directory + "/adapter_model.safetensors")) {
    if (config_.init == Init::kPissa || config_.init == Init::kOlora) {
      throw ConfigError(cat(directory,
                            ": the adapter began with a part of the base's weights, "
                            "which the base's files still hold: it cannot be merged"));
    }
    for (const TensorEntry& entry : file_.entries()) sort_in(entry);
    for (const auto& [module, pair] : pairs_) check_pair(module, pair);
    for (const auto& [name, tensor] : base_.stored().tensors()) check_target(name);
  }

  StateDict state(MergedForm form) {
    const std::vector<std::string> again = form == MergedForm::kAsBase ? requantized() : all();
    std::shared_ptr<QuantizedReader> reader;
    if (form == MergedForm::kAsBase) {
      reader = std::make_shared<QuantizedReader>(
          base_.reader(), again,
          [self = shared_from_this()](const QuantizedWeight& weight, int64_t at,
                                      std::span<float> out) {
            self->read_requantized(weight, at, out);
          });
    }
    std::set<std::string> parts;
    for (const std::string& name : again)
      for (const std::string& part : quantized_part_names(*base_.quantized(name)))
        parts.insert(part);
    StateDict state;
    for (const auto& [name, tensor] : base_.stored().tensors()) {
      if (parts.count(name) != 0) continue;
      const bool made = std::binary_search(again.begin(), again.end(), name);
      if (made && reader) {
        add_quantized_parts(reader, reader->weight(name), state);
      } else {
        state.tensors.push_back(made ? dequantized_part(name) : part(tensor));
      }
    }
    return state;
  }

 private:
  void sort_in(const TensorEntry& entry) {
    const auto misnamed = [&] {
      return ModelError(cat(directory_, ": tensor '", entry.name,
                            "' of the adapter fits no tensor of ", base_.directory()));
    };
    if (!entry.name.starts_with(kPrefix)) throw misnamed();
    const std::string name = entry.name.substr(kPrefix.size());
    const auto take = [&](std::string_view suffix, auto member, bool embedding) {
      if (!name.ends_with(suffix)) return false;
      const std::string module = name.substr(0, name.size() - suffix.size());
      if (!base_.shape(cat(module, kWeight))) throw misnamed();
      Pair& pair = pairs_[module];
      pair.*member = &entry;
      pair.embedding = pair.embedding || embedding;
      return true;
    };
    if (take(".lora_A.weight", &Pair::a, false) || take(".lora_B.weight", &Pair::b, false) ||
        take(".lora_embedding_A", &Pair::a, true) || take(".lora_embedding_B", &Pair::b, true) ||
        take(".lora_magnitude_vector", &Pair::magnitude, false) ||
        take(".base_layer.weight", &Pair::base, false))
      return;
    // What is trained besides; that of a layer with an adapter lies within another.
    std::string plain = name;
    constexpr std::string_view kWithin = ".base_layer";
    if (const size_t at = plain.rfind(cat(kWithin, ".")); at != std::string::npos)
      plain.erase(at, kWithin.size());
    const std::vector<int64_t>* shape = base_.shape(plain);
    if (!shape) throw misnamed();
    if (*shape != entry.shape) {
      throw ModelError(cat(directory_, ": tensor '", entry.name, "' is ",
                           io::shape_text(entry.shape), ", in the base ", io::shape_text(*shape)));
    }
    replaced_[plain] = &entry;
  }

  void check_pair(const std::string& module, const Pair& pair) {
    const auto refuse = [&](const std::string& text) {
      throw ModelError(cat(directory_, ": adapter of '", module, "': ", text));
    };
    if (!pair.a || !pair.b) refuse(cat(pair.a ? "B" : "A", " is missing"));
    if (config_.use_dora && !pair.magnitude) refuse("its magnitude vector is missing");
    const std::vector<int64_t>& weight = *base_.shape(cat(module, kWeight));
    if (weight.size() < 2) refuse(cat("its weight is ", io::shape_text(weight), ", not a matrix"));
    if (pair.base && pair.base->shape != weight) {
      refuse(cat("it has a weight of its own, ", io::shape_text(pair.base->shape), ", for one of ",
                 io::shape_text(weight)));
    }
    const int64_t rank = config_.rank_of(module);
    std::vector<int64_t> a = weight, b(weight.size(), 1);
    a[0] = rank;
    b[0] = weight[0];
    b[1] = rank;
    if (pair.embedding) {
      a = {rank, weight[0]};
      b = {weight[1], rank};
    }
    if (pair.a->shape != a || pair.b->shape != b) {
      refuse(cat("A is ", io::shape_text(pair.a->shape), " and B ", io::shape_text(pair.b->shape),
                 "; expected rank ", rank, " for a weight of ", io::shape_text(weight)));
    }
    const TensorEntry& second = pair.embedding ? *pair.a : *pair.b;
    if (!whole(second).any().item<bool>())
      refuse(cat("'", second.name, "' is all zero: the adapter has never been updated"));
  }

  // Whether a module that the config names has an adapter.
  void check_target(const std::string& name) const {
    const std::string module = module_of(name);
    if (module.empty() || base_.shape(name)->size() != 2 || pairs_.count(module) != 0) return;
    const bool is_linear = !module.ends_with("embed_tokens");
    if (!config_.targets(module, is_linear, module.ends_with("lm_head"))) return;
    throw ModelError(cat(directory_, ": adapter of '", module, "': A and B are missing"));
  }

  // Quantised weights that merging changes.
  std::vector<std::string> requantized() const {
    std::vector<std::string> names;
    for (const auto& [name, weight] : base_.reader().weights()) {
      if (replaced_.count(name) != 0) {
        throw ConfigError(cat(directory_, ": '", name, "' was trained whole, and ",
                              base_.directory(), " holds it as ", quant_kind_name(weight.kind),
                              ". Hint: merge into 16 bits (dequantize)"));
      }
      if (pairs_.count(module_of(name)) != 0) names.push_back(name);
    }
    return names;
  }
  std::vector<std::string> all() const {
    std::vector<std::string> names;
    for (const auto& [name, weight] : base_.reader().weights()) names.push_back(name);
    return names;
  }

  static std::string module_of(const std::string& name) {
    return name.ends_with(kWeight) ? name.substr(0, name.size() - kWeight.size()) : std::string();
  }

  TensorPart part(const StoredTensor& tensor) {
    if (!tensor.dtype) {
      throw ModelError(cat(base_.directory(), ": tensor '", tensor.name, "' has type ",
                           tensor.dtype_name, ", which cannot be merged into"));
    }
    TensorPart part{.name = tensor.name, .dtype = *tensor.dtype, .shape = tensor.shape, .numel = 1};
    for (const int64_t size : tensor.shape) part.numel *= size;
    const bool changed =
        replaced_.count(tensor.name) != 0 || pairs_.count(module_of(tensor.name)) != 0;
    part.read = [self = shared_from_this(), &tensor, changed](int64_t at, std::span<std::byte> to) {
      if (!changed) return self->base_.reader().stored().read(tensor, at, to);
      self->read(tensor.name, at, *tensor.dtype, to);
    };
    return part;
  }

  TensorPart dequantized_part(const std::string& name) {
    const QuantizedWeight& weight = *base_.quantized(name);
    TensorPart part{
        .name = name, .dtype = DType::kF32, .shape = weight.shape, .numel = weight.numel};
    part.read = [self = shared_from_this(), name](int64_t at, std::span<std::byte> to) {
      self->read(name, at, DType::kF32, to);
    };
    return part;
  }

  // Elements of the adapter's file from `begin`.
  void read_floats(const TensorEntry& entry, int64_t begin, std::span<float> out) {
    if (!entry.dtype)
      throw ModelError(cat(file_.path(), ": tensor '", entry.name, "' is ", entry.dtype_name));
    const size_t item = dtype_bytes(*entry.dtype);
    bytes_.resize(out.size() * item);
    file_.read(entry, begin * static_cast<int64_t>(item), bytes_);
    convert_floats(bytes_.data(), *entry.dtype, out.data(), DType::kF32, out.size());
  }

  Tensor whole(const TensorEntry& entry) {
    const Tensor values = at::empty(entry.shape, at::kFloat);
    read_floats(entry, 0, {values.data_ptr<float>(), static_cast<size_t>(entry.numel)});
    return values;
  }

  // Matrices of the module that was asked for last.
  void load(const std::string& module) {
    if (module == loaded_) return;
    const Pair& pair = pairs_.at(module);
    a_ = whole(*pair.a).flatten(1);
    b_ = whole(*pair.b).flatten(1);
    magnitude_ = pair.magnitude ? whole(*pair.magnitude).flatten() : Tensor();
    loaded_ = module;
    if (pair.embedding && pair.magnitude) magnitude_ /= norms_of_features(module);
  }

  // Of the whole table with its adapter: a pass over it.
  Tensor norms_of_features(const std::string& module) {
    const std::vector<int64_t>& shape = *base_.shape(cat(module, kWeight));
    const int64_t most_rows = std::max<int64_t>(1, kMostRowsNumel / shape[1]);
    Tensor squares = at::zeros({shape[1]}, at::kDouble);
    for (int64_t row = 0; row < shape[0]; row += most_rows) {
      const Tensor part = summed_rows(module, row, std::min(most_rows, shape[0] - row));
      squares += part.to(at::kDouble).square().sum(0);
    }
    return squares.sqrt().to(at::kFloat);
  }

  // Elements of a row of the weight: of all that belongs to one output of a convolution.
  int64_t columns_of(const std::string& module) const {
    const std::vector<int64_t>& shape = *base_.shape(cat(module, kWeight));
    return std::accumulate(shape.begin() + 1, shape.end(), int64_t{1}, std::multiplies<>());
  }

  // Rows [begin, begin + rows) of W + scaling B A: product, scaling and sum rounded one by one, as
  // PEFT has them. Valid until the next call.
  Tensor summed_rows(const std::string& module, int64_t begin, int64_t rows) {
    const int64_t columns = columns_of(module);
    const Pair& pair = pairs_.at(module);
    const Tensor sum = scratch(sum_, rows, columns);
    const std::span values(sum.data_ptr<float>(), static_cast<size_t>(sum.numel()));
    if (pair.base) {
      read_floats(*pair.base, begin * columns, values);
    } else {
      base_.read_floats(cat(module, kWeight), begin * columns, values);
    }
    const double scaling = config_.scaling_of(module);
    if (pair.embedding) {
      Tensor product = scratch(product_, columns, rows);
      return sum.add_(at::mm_out(product, b_, a_.narrow(1, begin, rows)).mul_(scaling).t());
    }
    Tensor product = scratch(product_, rows, columns);
    return sum.add_(at::mm_out(product, b_.narrow(0, begin, rows), a_).mul_(scaling));
  }

  // In memory that is kept: glibc 2.36 does not find again what aligned blocks leave behind, and
  // its heap would grow with the model.
  static Tensor scratch(Tensor& kept, int64_t rows, int64_t columns) {
    const int64_t numel = rows * columns;
    if (!kept.defined() || kept.numel() < numel)
      kept = at::empty({std::max(numel, kMostRowsNumel)}, at::kFloat);
    return kept.narrow(0, 0, numel).view({rows, columns});
  }

  // Rows of the merged weight. Valid until the next call.
  Tensor merged_rows(const std::string& module, int64_t begin, int64_t rows) {
    load(module);
    const Tensor sum = summed_rows(module, begin, rows);
    if (!magnitude_.defined()) return sum;
    if (pairs_.at(module).embedding) return sum.mul_(magnitude_);
    const Tensor norms = at::linalg_vector_norm(sum, 2, at::IntArrayRef{1});
    return sum.mul_((magnitude_.narrow(0, begin, rows) / norms).unsqueeze(1));
  }

  // Elements [at, at + n) of the merged weight, some rows at a time: use(values, how many).
  template <class Use>
  void for_merged(const std::string& module, int64_t at, int64_t n, Use use) {
    const int64_t columns = columns_of(module);
    const int64_t end = at + n;
    const int64_t most_rows = std::max<int64_t>(1, kMostRowsNumel / columns);
    while (at < end) {
      const int64_t row = at / columns;
      const int64_t rows = std::min(most_rows, (end - 1) / columns - row + 1);
      const int64_t count = std::min(end, (row + rows) * columns) - at;
      const Tensor values = merged_rows(module, row, rows);
      use(values.data_ptr<float>() + (at - row * columns), static_cast<size_t>(count));
      at += count;
    }
  }

  // Elements from `at` of a tensor that the adapter changes, or that is dequantised, as `dtype`.
  void read(const std::string& name, int64_t at, DType dtype, std::span<std::byte> to) {
    const size_t item = dtype_bytes(dtype);
    const auto numel = static_cast<int64_t>(to.size() / item);
    const auto write = [&](const float* values, size_t count) {
      convert_floats(values, DType::kF32, to.data(), dtype, count);
      to = to.subspan(count * item);
    };
    const auto replaced = replaced_.find(name);
    if (replaced != replaced_.end()) {
      std::vector<float> values(static_cast<size_t>(numel));
      read_floats(*replaced->second, at, values);
      write(values.data(), values.size());
    } else if (pairs_.count(module_of(name)) != 0) {
      for_merged(module_of(name), at, numel, write);
    } else {
      std::vector<float> values(static_cast<size_t>(numel));
      base_.read_floats(name, at, values);
      write(values.data(), values.size());
    }
  }

  // What is quantised again. PEFT rounds the product with DoRA's magnitudes, but no other sum, to
  // the type that the weight was quantised from.
  void read_requantized(const QuantizedWeight& weight, int64_t at, std::span<float> out) {
    const std::string module = module_of(weight.name);
    for_merged(module, at, static_cast<int64_t>(out.size()), [&](const float* values, size_t n) {
      std::copy_n(values, n, out.begin());
      if (magnitude_.defined() && weight.dtype != DType::kF32) {
        std::vector<std::byte> rounded(n * dtype_bytes(weight.dtype));
        convert_floats(values, DType::kF32, rounded.data(), weight.dtype, n);
        convert_floats(rounded.data(), weight.dtype, out.data(), DType::kF32, n);
      }
      out = out.subspan(n);
    });
  }

  Base base_;
  std::string directory_;
  LoraConfig config_;
  io::SafetensorsFile file_;
  std::map<std::string, Pair> pairs_;                   // By module.
  std::map<std::string, const TensorEntry*> replaced_;  // By tensor of the base.
  std::string loaded_;
  Tensor a_, b_, magnitude_;
  Tensor sum_, product_;  // See scratch().
  std::vector<std::byte> bytes_;
};

}  // namespace

StateDict merged_state(const std::string& base_directory, const std::string& adapter_directory,
                       MergedForm form) {
  return std::make_shared<Merger>(base_directory, adapter_directory)->state(form);
}

}  // namespace fsdp::lora
