#include "libfsdp/shard/state.h"

#include <algorithm>
#include <map>
#include <vector>

#include "libfsdp/base/error.h"
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
  comm::Communicator& comm = core.comm();
  checkpoint::HfSave save(directory.string(), named_shapes(core), dtype, max_file_bytes);
  if (comm.rank() == 0) save.create();
  comm.barrier(comm::make_tag("files are made"));
  if (core.writes_state()) {
    constexpr int64_t kChunk = int64_t{1} << 20;
    std::vector<float> values;
    for (const OwnedSlice& piece : core.owned_slices()) {
      for (int64_t at = 0; at < piece.numel; at += kChunk) {
        values.resize(static_cast<size_t>(std::min(kChunk, piece.numel - at)));
        core.load(piece, at, values);
        save.write({.name = piece.name,
                    .param_at = piece.param_at + at,
                    .numel = static_cast<int64_t>(values.size()),
                    .shard_at = piece.shard_at + at},
                   values);
      }
    }
  }
  const int64_t written = comm.sum(save.written_numel(), "elements written");
  check(written == save.total_numel(),
        cat("a save wrote ", written, " of ", save.total_numel(), " elements"));
  if (comm.rank() == 0) save.commit();
  comm.barrier(comm::make_tag("files are committed"));
}

}  // namespace fsdp
