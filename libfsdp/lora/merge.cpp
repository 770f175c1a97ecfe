#include "libfsdp/lora/merge.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <map>
#include <memory>

#include "libfsdp/base/error.h"
#include "libfsdp/io/safetensors.h"
#include "libfsdp/lora/config.h"

namespace fsdp::lora {
namespace {

using at::Tensor;
using io::TensorEntry;

constexpr std::string_view kPrefix = "base_model.model.";
constexpr int64_t kMostRowsNumel = int64_t{1} << 20;

struct Pair {
  const TensorEntry* a = nullptr;
  const TensorEntry* b = nullptr;
  const TensorEntry* magnitude = nullptr;
  bool embedding = false;
};

class Merger {
 public:
  Merger(const io::HfWeights& base, const std::string& directory)
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
  }

  checkpoint::TensorPart part(const std::shared_ptr<Merger>& self, const std::string& name) {
    const TensorEntry& entry = *base_.find(name)->entry;
    if (!entry.dtype) {
      throw ModelError(cat(base_.directory(), ": tensor '", name, "' has type ", entry.dtype_name,
                           ", which cannot be merged into"));
    }
    checkpoint::TensorPart part{
        .name = name, .dtype = *entry.dtype, .shape = entry.shape, .numel = entry.numel};
    part.read = [self, name](int64_t at, std::span<std::byte> to) { self->read(name, at, to); };
    return part;
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
      if (!base_.find(module + ".weight")) throw misnamed();
      Pair& pair = pairs_[module];
      pair.*member = &entry;
      pair.embedding = pair.embedding || embedding;
      return true;
    };
    if (take(".lora_A.weight", &Pair::a, false) || take(".lora_B.weight", &Pair::b, false) ||
        take(".lora_embedding_A", &Pair::a, true) || take(".lora_embedding_B", &Pair::b, true) ||
        take(".lora_magnitude_vector", &Pair::magnitude, false))
      return;
    const auto found = base_.find(name);
    if (!found) throw misnamed();
    if (found->entry->shape != entry.shape) {
      throw ModelError(cat(directory_, ": tensor '", entry.name, "' is ",
                           io::shape_text(entry.shape), ", in the base ",
                           io::shape_text(found->entry->shape)));
    }
    replaced_[name] = &entry;
  }

  void check_pair(const std::string& module, const Pair& pair) const {
    const auto refuse = [&](const std::string& text) {
      throw ModelError(cat(directory_, ": adapter of '", module, "': ", text));
    };
    if (!pair.a || !pair.b) refuse(cat(pair.a ? "B" : "A", " is missing"));
    if (config_.use_dora && !pair.magnitude) refuse("its magnitude vector is missing");
    const std::vector<int64_t>& weight = base_.find(module + ".weight")->entry->shape;
    if (weight.size() < 2) refuse(cat("its weight is ", io::shape_text(weight), ", not a matrix"));
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
  }

  static Tensor as_floats(const io::SafetensorsFile& file, const TensorEntry& entry, int64_t begin,
                          int64_t numel) {
    if (!entry.dtype)
      throw ModelError(cat(file.path(), ": tensor '", entry.name, "' is ", entry.dtype_name));
    const size_t item = dtype_bytes(*entry.dtype);
    std::vector<std::byte> bytes(static_cast<size_t>(numel) * item);
    file.read(entry, begin * static_cast<int64_t>(item), bytes);
    Tensor values = at::empty({numel}, at::kFloat);
    convert_floats(bytes.data(), *entry.dtype, values.data_ptr<float>(), DType::kF32,
                   static_cast<size_t>(numel));
    return values;
  }

  Tensor whole(const TensorEntry& entry) const {
    return as_floats(file_, entry, 0, entry.numel).view(entry.shape);
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
    const io::HfWeights::Location base = *base_.find(module + ".weight");
    const int64_t rows = base.entry->shape[0], columns = base.entry->shape[1];
    const int64_t most_rows = std::max<int64_t>(1, kMostRowsNumel / columns);
    Tensor squares = at::zeros({columns}, at::kDouble);
    for (int64_t row = 0; row < rows; row += most_rows) {
      const Tensor part = summed_rows(module, base, row, std::min(most_rows, rows - row));
      squares += part.to(at::kDouble).square().sum(0);
    }
    return squares.sqrt().to(at::kFloat);
  }

  // Rows [begin, begin + rows) of W + scaling B A.
  Tensor summed_rows(const std::string& module, const io::HfWeights::Location& base, int64_t begin,
                     int64_t rows) {
    const int64_t columns = base.entry->numel / base.entry->shape[0];
    const Tensor weight =
        as_floats(*base.file, *base.entry, begin * columns, rows * columns).view({rows, columns});
    const double scaling = config_.scaling_of(module);
    if (pairs_.at(module).embedding)
      return at::addmm(weight, a_.narrow(1, begin, rows).t(), b_.t(), 1, scaling);
    return at::addmm(weight, b_.narrow(0, begin, rows), a_, 1, scaling);
  }

  // Rows of the merged weight.
  Tensor merged_rows(const std::string& module, const io::HfWeights::Location& base, int64_t begin,
                     int64_t rows) {
    load(module);
    const Tensor sum = summed_rows(module, base, begin, rows);
    if (!magnitude_.defined()) return sum;
    if (pairs_.at(module).embedding) return sum * magnitude_;
    const Tensor norms = at::linalg_vector_norm(sum, 2, at::IntArrayRef{1});
    return sum * (magnitude_.narrow(0, begin, rows) / norms).unsqueeze(1);
  }

  void read(const std::string& name, int64_t at, std::span<std::byte> to) {
    const io::HfWeights::Location base = *base_.find(name);
    const DType dtype = *base.entry->dtype;
    const auto item = static_cast<int64_t>(dtype_bytes(dtype));
    const auto replaced = replaced_.find(name);
    const std::string module =
        name.ends_with(".weight") ? name.substr(0, name.size() - 7) : std::string();
    if (replaced != replaced_.end()) {
      const int64_t numel = static_cast<int64_t>(to.size()) / item;
      write(as_floats(file_, *replaced->second, at, numel), 0, numel, dtype, to);
    } else if (pairs_.count(module) == 0) {
      base.file->read(*base.entry, at * item, to);
    } else {
      read_merged(module, base, at, to);
    }
  }

  void read_merged(const std::string& module, const io::HfWeights::Location& base, int64_t at,
                   std::span<std::byte> to) {
    const DType dtype = *base.entry->dtype;
    const auto item = static_cast<int64_t>(dtype_bytes(dtype));
    const int64_t columns = base.entry->numel / base.entry->shape[0];
    const int64_t end = at + static_cast<int64_t>(to.size()) / item;
    const int64_t most_rows = std::max<int64_t>(1, kMostRowsNumel / columns);
    while (at < end) {
      const int64_t row = at / columns;
      const int64_t rows = std::min(most_rows, (end - 1) / columns - row + 1);
      const int64_t numel = std::min(end, (row + rows) * columns) - at;
      const Tensor values = merged_rows(module, base, row, rows).contiguous();
      const auto bytes = static_cast<size_t>(numel * item);
      write(values.view({-1}), at - row * columns, numel, dtype, to.first(bytes));
      to = to.subspan(bytes);
      at += numel;
    }
  }

  static void write(const Tensor& values, int64_t at, int64_t numel, DType dtype,
                    std::span<std::byte> to) {
    convert_floats(values.data_ptr<float>() + at, DType::kF32, to.data(), dtype,
                   static_cast<size_t>(numel));
  }

  const io::HfWeights& base_;
  std::string directory_;
  LoraConfig config_;
  io::SafetensorsFile file_;
  std::map<std::string, Pair> pairs_;                   // By module.
  std::map<std::string, const TensorEntry*> replaced_;  // By tensor of the base.
  std::string loaded_;
  Tensor a_, b_, magnitude_;
};

}  // namespace

checkpoint::StateDict merged_state(const io::HfWeights& base,
                                   const std::string& adapter_directory) {
  const auto merger = std::make_shared<Merger>(base, adapter_directory);
  checkpoint::StateDict state;
  for (const std::string& name : base.names()) state.tensors.push_back(merger->part(merger, name));
  return state;
}

}  // namespace fsdp::lora
