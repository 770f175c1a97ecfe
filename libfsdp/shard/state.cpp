#include "libfsdp/shard/state.h"

#include <algorithm>
#include <map>
#include <vector>

#include "libfsdp/base/error.h"
#include "libfsdp/checkpoint/model_save.h"
#include "libfsdp/checkpoint/slice_io.h"

namespace fsdp {
namespace {

std::vector<io::NamedShape> named_shapes(const ShardedCore& core) {
  std::vector<io::NamedShape> named;
  for (const ParameterInfo& info : core.parameters()) named.push_back({info.name, info.shape});
  return named;
}

std::vector<std::string> all_aliases(const ShardedCore& core, std::span<const std::string> more) {
  std::vector<std::string> aliases(more.begin(), more.end());
  for (const ParameterInfo& info : core.parameters()) {
    aliases.insert(aliases.end(), info.aliases.begin(), info.aliases.end());
  }
  return aliases;
}

/// All parameters as fp32: the masters, where there are such.
checkpoint::StateDict exact_weights(const ShardedCore& core) {
  std::map<std::string, OwnedSlice> owned;
  for (OwnedSlice& piece : core.owned_slices()) {
    const std::string name = piece.name;
    check(owned.emplace(name, std::move(piece)).second, "a parameter lies in two pieces");
  }
  checkpoint::StateDict state;
  for (const ParameterInfo& info : core.parameters()) {
    checkpoint::TensorPart part{.name = info.name, .shape = info.shape};
    if (const auto piece = owned.find(info.name); piece != owned.end()) {
      part.at = piece->second.param_at;
      part.numel = piece->second.numel;
      part.saved = core.writes_state();
      part.read = [&core, piece = piece->second](int64_t at, std::span<std::byte> to) {
        core.load(piece, at, {reinterpret_cast<float*>(to.data()), to.size() / sizeof(float)});
      };
    }
    state.tensors.push_back(std::move(part));
  }
  return state;
}

}  // namespace

void load_weights(ShardedCore& core, const io::HfWeights& weights,
                  std::span<const std::string> tied_aliases,
                  const std::function<bool(const std::string& name)>& left_out) {
  std::vector<io::NamedShape> expected = named_shapes(core);
  std::vector<OwnedSlice> owned = core.owned_slices();
  if (left_out) {
    std::erase_if(expected, [&](const io::NamedShape& tensor) { return left_out(tensor.name); });
    std::erase_if(owned, [&](const OwnedSlice& piece) { return left_out(piece.name); });
  }
  checkpoint::check_names(weights, expected, all_aliases(core, tied_aliases));
  std::vector<checkpoint::TensorSlice> slices;
  std::map<std::pair<std::string, int64_t>, const OwnedSlice*> by_place;
  for (const OwnedSlice& piece : owned) {
    slices.push_back({.name = piece.name,
                      .param_at = piece.param_at,
                      .numel = piece.numel,
                      .shard_at = piece.shard_at});
    by_place[{piece.name, piece.param_at}] = &piece;
  }
  checkpoint::load_slices(
      weights, slices,
      [&](const checkpoint::TensorSlice& slice, int64_t at, std::span<const float> values) {
        core.store(*by_place.at({slice.name, slice.param_at}), at, values);
      });
  core.publish();
}

void save_weights(ShardedCore& core, const std::filesystem::path& directory, DType dtype,
                  int64_t max_file_bytes) {
  checkpoint::save_model(core.comm(), directory.string(), exact_weights(core),
                         {.dtype = dtype, .max_file_bytes = max_file_bytes});
}

}  // namespace fsdp
