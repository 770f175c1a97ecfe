#include "libfsdp/checkpoint/convert_state.h"

#include <algorithm>
#include <utility>

#include "libfsdp/base/error.h"
#include "libfsdp/checkpoint/save_plan.h"

namespace fsdp::checkpoint {
namespace {

/// Rows [rank * n, (rank + 1) * n) of the tensor, n = rows / shards rounded up, as torch.chunk cuts
/// them; a scalar is rank 0's.
TensorPart rows_of(const TensorPart& whole, int64_t rank, int64_t shards) {
  TensorPart part = whole;
  const int64_t rows = whole.shape.empty() ? 1 : whole.shape[0];
  if (rows == 0) return part;
  const int64_t row_numel = whole.numel / rows;
  const int64_t each = (rows + shards - 1) / shards;
  const int64_t begin = std::min(rank * each, rows), end = std::min(begin + each, rows);
  part.at = begin * row_numel;
  part.numel = (end - begin) * row_numel;
  part.source = {};
  part.read = [read = whole.read, at = part.at](int64_t offset, std::span<std::byte> to) {
    read(at + offset, to);
  };
  return part;
}

int64_t tensor_bytes(const RangeWriter& writer) {
  int64_t bytes = 0;
  for (const WrittenRange& range : writer.written())
    bytes += range.tensor.empty() ? 0 : range.bytes;
  return bytes;
}

}  // namespace

int64_t file_bytes(const StateDict& state, std::optional<DType> dtype) {
  int64_t bytes = 0;
  for (const TensorPart& part : state.tensors) {
    const bool is_floating = part.dtype <= DType::kBF16;
    bytes +=
        part.numel * static_cast<int64_t>(dtype_bytes(dtype && is_floating ? *dtype : part.dtype));
  }
  return bytes;
}

int64_t write_converted(const StateDict& state, const ConvertedForm& form,
                        const std::string& directory) {
  if (form.num_shards == 0) {
    RangeWriter writer(directory);
    const FullForm full{
        .stem = form.stem, .dtype = form.dtype, .max_file_bytes = form.max_file_bytes};
    write_state(plan_full(state, full), state, 0, writer);
    writer.finish();
    return tensor_bytes(writer);
  }
  int64_t bytes = 0;
  for (int64_t rank = 0; rank < form.num_shards; ++rank) {
    StateDict shard;
    for (const TensorPart& part : state.tensors)
      shard.tensors.push_back(rows_of(part, rank, form.num_shards));
    RangeWriter writer(directory);
    write_state(plan_sharded(shard, rank, form.dtype), shard, rank, writer);
    writer.finish();
    bytes += tensor_bytes(writer);
  }
  return bytes;
}

}  // namespace fsdp::checkpoint
