#include "libfsdp/shard/tensors.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <span>

#include "libfsdp/base/error.h"
#include "libfsdp/shard/shell.h"

namespace fsdp {
namespace {

// A parameter's bucket and segment.
struct Place {
  int bucket = -1;
  int segment = -1;
};

Place find_place(const ShardedCore& core, const std::string& name) {
  const plan::Layout& layout = core.executor().layout();
  std::string known;
  for (size_t b = 0; b < layout.buckets.size(); ++b) {
    const plan::Bucket& bucket = layout.buckets[b];
    for (size_t s = 0; s < bucket.segments.size(); ++s) {
      const std::string& here = layout.param(bucket, bucket.segments[s]).name;
      if (here == name) return {static_cast<int>(b), static_cast<int>(s)};
      const std::string last = name.substr(name.rfind('.') + 1);
      if (known.size() < 300 && here.ends_with(last)) known += cat(" '", here, "'");
    }
  }
  throw ConfigError(cat("no parameter '", name, "'", known.empty() ? "" : cat(". Similar:", known),
                        ". Hint: a tied parameter has the first of its names."));
}

// Collects a tensor from the ranks that own its pieces; `read` fills this rank's.
template <class Read>
at::Tensor collect_pieces(ShardedCore& core, const Place& place, const char* what, Read read) {
  const plan::Layout& layout = core.executor().layout();
  const plan::Bucket& bucket = layout.buckets[static_cast<size_t>(place.bucket)];
  const plan::ParamSpec& param =
      layout.param(bucket, bucket.segments[static_cast<size_t>(place.segment)]);
  at::Tensor whole = at::zeros(param.shape, at::kFloat);
  auto* values = whole.data_ptr<float>();
  for (int owner = 0; owner < layout.mesh.shard; ++owner) {  // The first replica's ranks.
    for (const plan::ShardSlice& slice : plan::slices_of(layout, owner)) {
      if (slice.bucket != place.bucket || slice.segment != place.segment) continue;
      const std::span<float> piece(values + slice.param_at, static_cast<size_t>(slice.numel));
      if (owner == core.comm().rank()) read(slice, piece);
      core.comm().broadcast(piece.data(), piece.size_bytes(), owner, comm::make_tag(what));
    }
  }
  return whole;
}

}  // namespace

std::vector<LocalShard> local_shards(ShardedCore& core) {
  engine::Storage& storage = core.executor().storage();
  storage.keep_sums_apart();  // The gradients' addresses are handed out.
  const plan::Layout& layout = core.executor().layout();
  std::vector<LocalShard> shards;
  for (const OwnedSlice& slice : core.owned_slices()) {
    const plan::Bucket& bucket = layout.buckets[static_cast<size_t>(slice.bucket)];
    if (!bucket.trainable) continue;
    float* master = bucket.dtype == DType::kF32
                        ? reinterpret_cast<float*>(storage.shard(slice.bucket))
                        : storage.master(slice.bucket);
    if (!master) {
      throw ConfigError(cat("parameter '", slice.name, "' is ", dtype_name(bucket.dtype),
                            " without an fp32 master in one piece. Hint: ShardOptions::master = "
                            "engine::MasterPrecision::kF32."));
    }
    const auto view = [&](float* begin) {
      return view_memory(begin + slice.shard_at, {slice.numel}, at::kFloat,
                         device_of(storage.home()));
    };
    at::Tensor value = view(master).requires_grad_();
    value.mutable_grad() = view(storage.gradient_shard(slice.bucket).data());
    shards.push_back({.name = slice.name, .param_at = slice.param_at, .value = value});
  }
  return shards;
}

at::Tensor full_parameter(ShardedCore& core, const std::string& name) {
  const Place place = find_place(core, name);
  engine::Storage& storage = core.executor().storage();
  const plan::Layout& layout = core.executor().layout();
  const bool is_bytes = layout.buckets[static_cast<size_t>(place.bucket)].dtype == DType::kU8;
  return collect_pieces(core, place, "full parameter",
                        [&](const plan::ShardSlice& slice, std::span<float> piece) {
                          if (!is_bytes) return storage.load(slice.bucket, slice.shard_at, piece);
                          std::vector<uint8_t> bytes(piece.size());
                          storage.home().read(storage.shard(slice.bucket) + slice.shard_at,
                                              bytes.data(), bytes.size());
                          std::copy(bytes.begin(), bytes.end(), piece.begin());
                        });
}

at::Tensor full_gradient(ShardedCore& core, const std::string& name) {
  if (!core.executor().gradients_complete()) {
    throw ConfigError(cat("gradient of '", name,
                          "': gradients are summed between Step::complete_gradients and the "
                          "step's finish only"));
  }
  const Place place = find_place(core, name);
  engine::Storage& storage = core.executor().storage();
  if (storage.gradient_shard(place.bucket).data() == nullptr)
    throw ConfigError(cat("parameter '", name, "' is frozen: it has no gradient"));
  return collect_pieces(
      core, place, "full gradient", [&](const plan::ShardSlice& slice, std::span<float> piece) {
        const auto from =
            storage.gradient_shard(slice.bucket).subspan(static_cast<size_t>(slice.shard_at));
        storage.home().read_floats(from.data(), DType::kF32, piece);
      });
}

}  // namespace fsdp
