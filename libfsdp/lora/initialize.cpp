// First values of adapters.
#include <ATen/ATen.h>

#include <cmath>

#include "libfsdp/base/error.h"
#include "libfsdp/lora/adapters.h"
#include "libfsdp/lora/fills.h"
#include "libfsdp/lora/linear_base.h"
#include "libfsdp/lora/parameter_names.h"
#include "libfsdp/shard/random.h"
#include "libfsdp/shard/tensors.h"

namespace fsdp::lora {
namespace {

using at::Tensor;

Tensor normal_tensor(uint64_t key, at::IntArrayRef shape) {
  Tensor tensor = at::empty(shape, at::kFloat);
  fill_normal(key, 0, {tensor.data_ptr<float>(), static_cast<size_t>(tensor.numel())}, 0, 1);
  return tensor;
}

struct Start {
  Tensor a, b;
  Tensor weight;  // What the base keeps; undefined = all.
};

Start principal(const Tensor& weight, int64_t rank, double scaling) {
  const auto [u, s, vh] = at::linalg_svd(weight, /*full_matrices=*/false);
  const Tensor root = (s.narrow(0, 0, rank) / scaling).sqrt();
  const Tensor a = root.unsqueeze(1) * vh.narrow(0, 0, rank);
  const Tensor b = u.narrow(1, 0, rank) * root;
  return {a, b, weight - scaling * at::mm(b, a)};
}

Start by_qr(const Tensor& weight, int64_t rank, double scaling) {
  const auto [q, r] = at::linalg_qr(weight);
  const Tensor a = r.narrow(0, 0, rank), b = q.narrow(1, 0, rank);
  return {a, b, weight - scaling * at::mm(b, a)};
}

// Halves of one orthogonal matrix: B A is zero although neither is.
Start orthogonal(uint64_t key, at::IntArrayRef weight, int64_t rank) {
  if (rank % 2 != 0)
    throw ConfigError(cat("[lora] orthogonal init needs an even rank, got ", rank));
  const Tensor q = std::get<0>(at::linalg_qr(normal_tensor(stream_key(key, "q"), {rank, rank})));
  const Tensor pairs = q.view({rank / 2, 2, rank});
  const Tensor in = normal_tensor(stream_key(key, "a"), {weight[1], rank / 2});
  const Tensor out = normal_tensor(stream_key(key, "b"), {weight[0], rank / 2});
  return {at::mm(in, pairs.select(1, 0)).t() / 10, at::mm(out, pairs.select(1, 1)) / 10, {}};
}

class Initializer {
 public:
  Initializer(ShardedCore& core, uint64_t seed, const std::string& name, Init init)
      : core_(core),
        parameters_(core.module().named_parameters()),
        seed_(seed),
        name_(name),
        init_(init) {}

  void add(const AdapterParameters& adapter) {
    const std::string a = a_name(adapter, name_), b = b_name(adapter, name_);
    const uint64_t key = stream_key(seed_, a);
    const int64_t rank = adapter.low_rank.a.size(0);
    if (adapter.magnitude.defined())  // B A is zero.
      fills_[magnitude_name(adapter, name_)] = values_of(output_norms(
          adapter.kind, weight_of(adapter),
          {at::zeros(adapter.low_rank.a.sizes()), at::zeros(adapter.low_rank.b.sizes())}));
    if (adapter.kind == TargetKind::kEmbedding) {  // The other way round, as PEFT does.
      fills_[a] = zeros();
      fills_[b] = normal(key, 1);
      return;
    }
    const double scaling = adapter.low_rank.scaling;
    const int64_t fan_in = adapter.low_rank.a.numel() / rank;
    switch (init_) {
      case Init::kDefault:
        fills_[a] = uniform(key, 1 / std::sqrt(static_cast<double>(fan_in)));
        fills_[b] = zeros();
        break;
      case Init::kGaussian:
        fills_[a] = normal(key, 1 / static_cast<double>(rank));
        fills_[b] = zeros();
        break;
      case Init::kPissa:
        take(adapter, principal(weight_of(adapter), rank, scaling));
        break;
      case Init::kOlora:
        take(adapter, by_qr(weight_of(adapter), rank, scaling));
        break;
      case Init::kOrthogonal:
        take(adapter,
             orthogonal(key, {adapter.low_rank.b.size(0), adapter.low_rank.a.size(1)}, rank));
        break;
    }
  }

  void store() { store_fills(core_, fills_); }

 private:
  Tensor weight_of(const AdapterParameters& adapter) {
    const std::string name = adapter.module + ".weight";
    const Tensor values = full_parameter(core_, name);
    const auto* base = dynamic_cast<const LinearBase*>(weight_adapter(parameters_[name]));
    if (!base || !base->packed) return values;
    return unpack(*base->packed, values.to(at::kByte), at::kFloat);
  }

  void take(const AdapterParameters& adapter, const Start& start) {
    fills_[a_name(adapter, name_)] = values_of(start.a);
    fills_[b_name(adapter, name_)] = values_of(start.b);
    if (start.weight.defined()) fills_[adapter.module + ".weight"] = values_of(start.weight);
  }

  ShardedCore& core_;
  torch::OrderedDict<std::string, Tensor> parameters_;
  uint64_t seed_;
  std::string name_;
  Init init_;
  Fills fills_;
};

}  // namespace

void Adapters::initialize(ShardedCore& core, uint64_t seed, const std::string& name) {
  Initializer initializer(core, seed, name, config(name).init);
  for (const AdapterParameters& adapter : parameters(name)) initializer.add(adapter);
  initializer.store();
}

}  // namespace fsdp::lora
