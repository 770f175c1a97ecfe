#include "libfsdp/base/error.h"
#include "libfsdp/checkpoint/load_state.h"
#include "libfsdp/checkpoint/slice_io.h"

namespace fsdp::checkpoint {
namespace {

void check_slice(const StoredTensors& stored, const TensorSlice& slice) {
  const StoredTensor* tensor = stored.find(slice.name);
  if (tensor == nullptr)
    throw ModelError(
        cat(stored.directory(), ": tensor '", slice.name, "' is not in the model's files"));
  int64_t numel = 1;
  for (const int64_t dim : tensor->shape) numel *= dim;
  check(slice.param_at >= 0 && slice.numel >= 0 && slice.param_at <= numel &&
            slice.numel <= numel - slice.param_at,
        cat("slice of '", slice.name, "' lies outside the tensor"));
}

/// The slice as a part of a state in float.
TensorPart as_part(const StoredTensors& stored, const TensorSlice& slice, const SliceSink& sink) {
  TensorPart part{.name = slice.name,
                  .shape = stored.find(slice.name)->shape,
                  .at = slice.param_at,
                  .numel = slice.numel};
  part.write = [&](int64_t offset, std::span<const std::byte> from) {
    sink(slice, offset, {reinterpret_cast<const float*>(from.data()), from.size() / sizeof(float)});
  };
  return part;
}

}  // namespace

void check_names(const io::HfWeights& weights, std::span<const io::NamedShape> expected,
                 std::span<const std::string> tied_aliases) {
  StateDict state;
  for (const io::NamedShape& tensor : expected)
    state.tensors.push_back({.name = tensor.name, .shape = tensor.shape});
  LoadOptions options{.strict = false};
  for (const std::string& alias : tied_aliases) options.aliases.push_back({alias, ""});
  const LoadReport report = compare_state(state, StoredTensors::of(weights), options);
  if (report.clean()) return;
  throw ModelError(
      cat(weights.directory(),
          ": the weights do not fit the model that config.json describes:", report.text()));
}

void load_slices(const io::HfWeights& weights, std::span<const TensorSlice> slices,
                 const SliceSink& sink, int64_t chunk_bytes) {
  const StoredTensors stored = StoredTensors::of(weights);
  StateDict state;
  for (const TensorSlice& slice : slices) {
    check_slice(stored, slice);
    state.tensors.push_back(as_part(stored, slice, sink));
  }
  const LoadReport report =
      load_state(state, stored, {.strict = false, .buffer_bytes = chunk_bytes});
  if (report.wrong_type.empty()) return;
  throw ModelError(cat(weights.directory(), ": ", report.text()));
}

}  // namespace fsdp::checkpoint
