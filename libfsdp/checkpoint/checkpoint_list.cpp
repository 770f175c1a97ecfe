#include "libfsdp/checkpoint/checkpoint_list.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <utility>

#include "libfsdp/base/error.h"
#include "libfsdp/base/log.h"
#include "libfsdp/checkpoint/joined.h"
#include "libfsdp/checkpoint/verdict.h"
#include "libfsdp/checkpoint/verify.h"

namespace fsdp::checkpoint {
namespace {

void check_size(const std::string& checkpoint, const std::string& file, int64_t bytes) {
  const std::string path = joined(checkpoint, "/", file);
  struct stat status;
  if (::stat(path.c_str(), &status) != 0) {
    throw ModelError(cat("[checkpoint] ", path, ": ", std::generic_category().message(errno)));
  }
  if (!S_ISREG(status.st_mode)) throw ModelError(cat("[checkpoint] ", path, ": not a file"));
  if (status.st_size != bytes) {
    throw ModelError(cat("[checkpoint] ", path, ": ", status.st_size, " bytes, expected ", bytes));
  }
}

io::Json as_json(const std::vector<CheckpointEntry>& entries,
                 const std::vector<SkippedCheckpoint>& skipped) {
  io::Json::Array whole;
  for (const auto& entry : entries) {
    whole.push_back(io::Json::object({{"step", entry.step}, {"path", entry.path}}));
  }
  io::Json::Array broken;
  for (const auto& one : skipped) {
    broken.push_back(io::Json::object({{"path", one.path}, {"why", one.why}}));
  }
  return io::Json::object({{"entries", io::Json(whole)}, {"skipped", io::Json(broken)}});
}

}  // namespace

CheckpointList::CheckpointList(std::string output_directory)
    : output_directory_(without_end_slash(std::move(output_directory))) {
  if (!name_exists(output_directory_)) return;
  const std::vector<std::string> names = names_in(output_directory_);
  for (const std::string& name : names) {
    if (const auto step = step_of_name(name)) consider(name, *step);
  }
  // An old one that was losing its name to a new one when the run died.
  for (const std::string& name : names) {
    const auto step = step_of_old_name(name);
    if (!step) continue;
    const bool replaced = std::any_of(entries_.begin(), entries_.end(),
                                      [&](const auto& entry) { return entry.step == *step; });
    if (!replaced) consider(name, *step);
  }
  std::sort(entries_.begin(), entries_.end(),
            [](const auto& a, const auto& b) { return a.step < b.step; });
}

void CheckpointList::consider(const std::string& name, int64_t step) {
  const std::string path = joined(output_directory_, "/", name);
  try {
    const Manifest manifest = read_checked_manifest(path);
    if (manifest.step != step) {
      throw ModelError(cat("[checkpoint] ", path, "/", kManifestFile, ": written at step ",
                           manifest.step, ", not ", step));
    }
    entries_.push_back({step, path});
  } catch (const ModelError& error) {
    skipped_.push_back({path, error.what()});
  }
}

// The ranks may have looked at different instants.
void CheckpointList::share_list(comm::Communicator& comm) {
  const Verdict verdict(comm);
  const auto tag = comm::make_tag("checkpoint list");
  Outcome outcome;
  std::string text;
  if (comm.rank() == 0) outcome.run([&] { text = as_json(entries_, skipped_).dump(); });
  auto bytes = static_cast<int64_t>(text.size());
  comm.broadcast(&bytes, sizeof bytes, 0, tag);
  outcome.run([&] { text.resize(static_cast<size_t>(bytes)); });
  verdict.agree(outcome, "checkpoint list");
  comm.broadcast(text.data(), text.size(), 0, tag);
  outcome.run([&] {
    const io::Json document = io::Json::parse(text, "list of checkpoints");
    entries_.clear();
    skipped_.clear();
    for (const io::Json& entry : document["entries"].elements())
      entries_.push_back({entry.get<int64_t>("step"), entry.get<std::string>("path")});
    for (const io::Json& one : document["skipped"].elements())
      skipped_.push_back({one.get<std::string>("path"), one.get<std::string>("why")});
  });
  verdict.agree(outcome, "checkpoint list");
}

std::optional<CheckpointEntry> CheckpointList::newest_whole(comm::Communicator& comm) {
  share_list(comm);
  Verdict verdict(comm);
  Outcome ready;
  ready.run([&] { verdict.reserve(); });
  verdict.agree(ready, "verify checkpoint");
  while (!entries_.empty()) {
    std::optional<CheckpointEntry> entry;
    Outcome outcome;
    outcome.run([&] {
      entry = entries_.back();
      const VerifyReport report = verify(entry->path, {comm.rank(), comm.size()});
      if (!report.whole()) throw ModelError(report.damages.front().text());
    });
    const auto outcomes = verdict.exchange(outcome, "verify checkpoint");
    const Outcome* damage = nullptr;
    for (const Outcome& one : outcomes) {
      // A rank that could not look says nothing about the checkpoint.
      if (one.failed() && one.code != static_cast<int64_t>(ExitCode::kModel))
        verdict.throw_if_failed(outcomes);
      if (one.failed() && damage == nullptr) damage = &one;
    }
    if (damage == nullptr) return entry;
    Outcome noted;
    noted.run([&] { skipped_.push_back({entry->path, damage->text}); });
    verdict.agree(noted, "verify checkpoint");
    entries_.pop_back();
  }
  return std::nullopt;
}

Manifest read_checked_manifest(const std::string& checkpoint) {
  Manifest manifest = read_manifest(checkpoint);
  for (const FileBytes& file : manifest.files) check_size(checkpoint, file.file, file.bytes);
  for (const RangeList& list : manifest.lists) check_size(checkpoint, list.file, list.bytes);
  return manifest;
}

std::vector<Doomed> remove_older_checkpoints(const std::string& output_directory, int64_t new_step,
                                             int64_t best_step, int64_t limit) {
  const CheckpointList list(output_directory);
  std::vector<Doomed> doomed;
  auto left = static_cast<int64_t>(list.entries().size());
  for (const CheckpointEntry& entry : list.entries()) {
    if (left <= limit) break;
    if (entry.step == new_step || entry.step == best_step) continue;
    doomed.push_back(remove_checkpoint(output_directory, checkpoint_name(entry.step)));
    --left;
  }
  return doomed;
}

}  // namespace fsdp::checkpoint
