#include "libfsdp/shard/state_dict.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>
#include <map>

#include "libfsdp/base/error.h"
#include "libfsdp/optim/flat_optimizers.h"
#include "libfsdp/shard/shell.h"

namespace fsdp {
namespace {

using checkpoint::TensorPart;

/// One parameter of the layout, and what this rank owns of it.
struct Piece {
  const plan::ParamSpec* param = nullptr;
  int bucket = 0;
  int64_t param_at = 0;
  int64_t shard_at = 0;
  int64_t numel = 0;
};

std::vector<Piece> pieces_of(const ShardedCore& core) {
  const plan::Layout& layout = core.executor().layout();
  std::map<std::pair<int, int>, plan::ShardSlice> owned;
  for (const plan::ShardSlice& slice :
       plan::slices_of(layout, layout.mesh.shard_coordinate(core.executor().rank())))
    owned[{slice.bucket, slice.segment}] = slice;
  std::vector<Piece> pieces;
  for (size_t b = 0; b < layout.buckets.size(); ++b) {
    const plan::Bucket& bucket = layout.buckets[b];
    for (size_t s = 0; s < bucket.segments.size(); ++s) {
      Piece piece{.param = &layout.param(bucket, bucket.segments[s]),
                  .bucket = static_cast<int>(b)};
      const auto found = owned.find({static_cast<int>(b), static_cast<int>(s)});
      if (found != owned.end()) {
        piece.param_at = found->second.param_at;
        piece.shard_at = found->second.shard_at;
        piece.numel = found->second.numel;
      }
      pieces.push_back(piece);
    }
  }
  return pieces;
}

const plan::Bucket& bucket_of(const ShardedCore& core, int bucket) {
  return core.executor().layout().buckets[static_cast<size_t>(bucket)];
}

/// Reads and writes elements of `dtype` from `begin` on, as they are.
void attach_memory(TensorPart& part, kernels::Compute& compute, std::byte* begin) {
  const auto item = static_cast<int64_t>(dtype_bytes(part.dtype));
  if (compute.device() < 0) {
    part.target = {begin, static_cast<size_t>(part.numel * item)};
    part.source = part.target;
  }
  part.read = [&compute, begin, item](int64_t offset, std::span<std::byte> to) {
    compute.read(begin + offset * item, to.data(), to.size());
  };
  part.write = [&compute, begin, item](int64_t offset, std::span<const std::byte> from) {
    compute.write(begin + offset * item, from.data(), from.size());
  };
}

bool has_master(const ShardedCore& core, int bucket) {
  auto& storage = const_cast<ShardedCore&>(core).executor().storage();
  return storage.master(bucket) != nullptr || storage.remainder(bucket) != nullptr;
}

TensorPart part_of(const ShardedCore& core, const Piece& piece, std::string name, DType dtype) {
  return {.name = std::move(name),
          .dtype = dtype,
          .shape = piece.param->shape,
          .at = piece.param_at,
          .numel = piece.numel,
          .saved = core.writes_state()};
}

TensorPart parameter_part(ShardedCore& core, const Piece& piece) {
  engine::Storage& storage = core.executor().storage();
  const DType dtype = bucket_of(core, piece.bucket).dtype;
  TensorPart part = part_of(core, piece, piece.param->name, dtype);
  const auto offset = piece.shard_at * static_cast<int64_t>(dtype_bytes(dtype));
  attach_memory(part, storage.home(), storage.shard(piece.bucket) + offset);
  if (!has_master(core, piece.bucket)) return part;
  part.target = {};
  part.write = [&storage, piece, dtype](int64_t at, std::span<const std::byte> from) {
    std::vector<float> values(from.size() / dtype_bytes(dtype));
    convert_floats(from.data(), dtype, values.data(), DType::kF32, values.size());
    storage.store(piece.bucket, piece.shard_at + at, values);
  };
  return part;
}

TensorPart master_part(ShardedCore& core, const Piece& piece, const std::string& prefix) {
  engine::Storage& storage = core.executor().storage();
  TensorPart part = part_of(core, piece, prefix + "master", DType::kF32);
  part.read = [&storage, piece](int64_t at, std::span<std::byte> to) {
    storage.load(piece.bucket, piece.shard_at + at,
                 {reinterpret_cast<float*>(to.data()), to.size() / sizeof(float)});
  };
  part.write = [&storage, piece](int64_t at, std::span<const std::byte> from) {
    storage.store(piece.bucket, piece.shard_at + at,
                  {reinterpret_cast<const float*>(from.data()), from.size() / sizeof(float)});
  };
  return part;
}

/// The number of updates, as PyTorch keeps it: by parameter, a float.
TensorPart step_part(ShardedCore& core, const std::string& prefix) {
  engine::Executor& executor = core.executor();
  TensorPart part{.name = prefix + "step", .numel = 1, .saved = core.comm().rank() == 0};
  part.read = [&executor](int64_t, std::span<std::byte> to) {
    const auto value = static_cast<float>(executor.updates());
    std::memcpy(to.data(), &value, to.size());
  };
  part.write = [&executor](int64_t, std::span<const std::byte> from) {
    float value = 0;
    std::memcpy(&value, from.data(), from.size());
    if (!(value >= 0 && value < 0x1p63F))
      throw ModelError(cat("an optimizer's state has seen ", value, " steps"));
    const auto updates = static_cast<int64_t>(value);
    executor.set_progress(std::max(updates, executor.step()), updates);
  };
  return part;
}

/// Makes one array of a parameter's state into a tensor; `array` is that of the whole parameter.
TensorPart state_part(ShardedCore& core, const Piece& piece, const optim::StateArray& array,
                      const std::string& prefix) {
  TensorPart part = part_of(core, piece, cat(prefix, array.name), array.dtype);
  const int64_t block = array.elements_per_value;
  if (block > 1) {
    part.shape = {array.count};
    part.at = piece.param_at / block;
    part.numel = (piece.numel + block - 1) / block;
  }
  if (piece.numel == 0) return part;
  for (const optim::StateTensor& here : core.executor().optimizer(piece.bucket).state_tensors()) {
    const int64_t at = (piece.shard_at - here.begin) / block;
    const auto item = static_cast<int64_t>(dtype_bytes(here.dtype));
    const auto values = static_cast<int64_t>(here.values.size()) / item;
    if (here.name != array.name || piece.shard_at < here.begin || at >= values) continue;
    check(
        here.dtype == array.dtype && here.elements_per_value == block && at + part.numel <= values,
        "an optimizer's state is not that of its plan");
    attach_memory(part, core.executor().storage().home(), here.values.data() + at * item);
    return part;
  }
  throw InternalError(cat("optimizer state '", array.name, "' is missing on a rank"));
}

/// A buffer is whole on every rank; the first rank's is saved.
TensorPart buffer_part(ShardedCore& core, const std::string& name, const at::Tensor& buffer) {
  TensorPart part{.name = name,
                  .dtype = to_dtype(buffer.scalar_type()),
                  .shape = buffer.sizes().vec(),
                  .numel = buffer.numel(),
                  .saved = core.comm().rank() == 0};
  const auto item = static_cast<int64_t>(dtype_bytes(part.dtype));
  part.read = [buffer, item](int64_t at, std::span<std::byte> to) {
    const at::Tensor flat = buffer.detach().to(at::kCPU).contiguous();
    std::memcpy(to.data(), static_cast<const std::byte*>(flat.data_ptr()) + at * item, to.size());
  };
  part.write = [buffer, item](int64_t at, std::span<const std::byte> from) {
    const at::NoGradGuard no_graph;
    const at::Tensor flat = buffer.detach().to(at::kCPU).contiguous();
    std::memcpy(static_cast<std::byte*>(flat.data_ptr()) + at * item, from.data(), from.size());
    buffer.detach().copy_(flat);
  };
  return part;
}

}  // namespace

checkpoint::StateDict model_state(ShardedCore& core) {
  checkpoint::StateDict state;
  for (const Piece& piece : pieces_of(core)) state.tensors.push_back(parameter_part(core, piece));
  for (const auto& entry : core.module().named_buffers())
    state.tensors.push_back(buffer_part(core, entry.key(), entry.value()));
  return state;
}

checkpoint::StateDict optimizer_state(ShardedCore& core) {
  checkpoint::StateDict state;
  for (const Piece& piece : pieces_of(core)) {
    if (!bucket_of(core, piece.bucket).trainable) continue;
    const std::string prefix = cat("state.", piece.param->name, ".");
    // That of the whole parameter: equal on all ranks, whatever they own.
    const int64_t numel = piece.param->numel();
    const optim::GroupSegment whole{.begin = 0, .end = numel, .param_numel = numel};
    const optim::StatePlan plan(core.options().optimizer, numel, {&whole, 1});
    for (const optim::StateArray& array : plan.arrays())
      state.tensors.push_back(state_part(core, piece, array, prefix));
    if (has_master(core, piece.bucket)) state.tensors.push_back(master_part(core, piece, prefix));
    state.tensors.push_back(step_part(core, prefix));
  }
  return state;
}

}  // namespace fsdp
