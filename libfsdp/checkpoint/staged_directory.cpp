#include "libfsdp/checkpoint/staged_directory.h"

#include <unistd.h>

#include <algorithm>
#include <utility>

#include "libfsdp/base/error.h"
#include "libfsdp/base/log.h"
#include "libfsdp/checkpoint/joined.h"
#include "libfsdp/io/file.h"
#include "libfsdp/io/hf_weights.h"

namespace fsdp::checkpoint {
namespace {

constexpr std::string_view kIndexFile = "model.safetensors.index.json";

/// Readers look for config.json and the index first; what those promise is then there.
int turn(const std::string& name) {
  return name.ends_with("config.json") ? 2 : name.ends_with(".index.json") ? 1 : 0;
}

bool is_weights(const std::string& name) { return io::is_hf_weights_file(name); }

}  // namespace

StagedDirectory::StagedDirectory(std::string directory)
    : directory_(std::move(directory)),
      name_(temporary_model_name()),
      path_(joined(directory_, "/", name_)) {
  make_directory(path_);
  if (auto claim = Claim::take(path_)) claim_ = std::move(*claim);
}

StagedDirectory::~StagedDirectory() { Doomed(path_, std::move(claim_)); }

void StagedDirectory::publish() {
  std::vector<std::string> names = names_in(path_);
  std::stable_sort(names.begin(), names.end(),
                   [](const std::string& a, const std::string& b) { return turn(a) < turn(b); });
  io::sync_directory(path_);
  const auto weights = std::count_if(names.begin(), names.end(), is_weights);
  const bool replaces = std::any_of(names.begin(), names.end(), [&](const std::string& name) {
    return is_weights(name) && name_exists(joined(directory_, "/", name));
  });
  // Files of an older index under the same names: without an index a reader stops instead of mixing
  // old and new.
  if (replaces && weights > 1) {
    ::unlink(joined(directory_, "/", kIndexFile).c_str());
    io::sync_directory(directory_);
  }
  for (const std::string& name : names)
    io::rename_file(joined(path_, "/", name), joined(directory_, "/", name));
  io::sync_directory(directory_);
  if (weights > 0) remove_old_weights(names);
}

void StagedDirectory::remove_old_weights(const std::vector<std::string>& names) const {
  for (const std::string& old : names_in(directory_)) {
    if (!is_weights(old) || std::count(names.begin(), names.end(), old) > 0) continue;
    const std::string path = joined(directory_, "/", old);
    if (::unlink(path.c_str()) != 0) log::warning(cat(path, ": an old weights file stays"));
  }
}

}  // namespace fsdp::checkpoint
