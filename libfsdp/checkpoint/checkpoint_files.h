// Directories of checkpoints: their names, how they are made aside, change places and go away.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace fsdp::checkpoint {

inline constexpr std::string_view kManifestFile = "manifest.json";
/// Text file with the name of the newest checkpoint: a hint for people and scripts.
inline constexpr std::string_view kLatestFile = "latest";

/// "checkpoint-120", and back; none for any other name.
std::string checkpoint_name(int64_t step);
std::optional<int64_t> step_of_name(std::string_view name);

/// Names in a directory, sorted. Throws: HostResourceError.
std::vector<std::string> names_in(const std::string& directory);

/// Whether something has this name, be it a dangling link.
bool name_exists(const std::string& path);

/// Makes a directory unless it is there. Throws: HostResourceError, ConfigError.
void make_directory(const std::string& path);
/// The same with its parents, durably.
void make_directories(const std::string& path);

/// Keeps other processes from taking a directory or file for left over by a dead one. Move-only.
class Claim {
 public:
  Claim() = default;
  /// None if another process has it, if it is gone, or if the file system cannot tell.
  static std::optional<Claim> take(const std::string& path);
  Claim(Claim&& other) noexcept;
  Claim& operator=(Claim&& other) noexcept;
  ~Claim();

 private:
  explicit Claim(int descriptor) : descriptor_(descriptor) {}
  int descriptor_ = -1;
};

/// A new directory `<parent>/.tmp-checkpoint-<step>-<nonce>` that no other run takes for left over.
/// Removed with the object, unless it became a checkpoint.
class TemporaryCheckpoint {
 public:
  TemporaryCheckpoint(std::string parent, int64_t step);
  TemporaryCheckpoint(const TemporaryCheckpoint&) = delete;
  TemporaryCheckpoint& operator=(const TemporaryCheckpoint&) = delete;
  ~TemporaryCheckpoint();

  const std::string& name() const { return name_; }
  const std::string& path() const { return path_; }

  /// Gives the directory its name and makes that durable. There is no instant at which a checkpoint
  /// that had this name before, or the new one, is not whole under some name; the old one is
  /// removed. Throws: ConfigError if the name is taken and not `overwrite`; HostResourceError; then
  /// all is as before.
  void publish(const std::string& name, bool overwrite);

  /// Removes the directory now. Never throws: what cannot be removed is for the next run.
  void remove() noexcept;

 private:
  void take_name(const std::string& final_path);
  void exchange_names(const std::string& final_path);

  std::string parent_;
  std::string name_;
  std::string path_;
  Claim claim_;
  bool published_ = false;
};

/// Takes a checkpoint away: first its name, durably, then its files; so half of one never has the
/// name of a whole one. Throws: HostResourceError.
void remove_checkpoint(const std::string& parent, const std::string& name);

/// Writes `latest`, atomically and durably. Throws: HostResourceError.
void write_latest(const std::string& parent, const std::string& name);
/// The checkpoint that `latest` names; none if there is no such file or it names none.
std::optional<std::string> read_latest(const std::string& parent);

/// Removes what dead processes left half done, and finishes what one was about to rename. What
/// belongs to a live one stays. Returns the names that are gone. Throws: HostResourceError.
std::vector<std::string> remove_leftovers(const std::string& parent);

/// Of an overwritten checkpoint between its two names, where the file system cannot exchange names:
/// the step; none for any other name.
std::optional<int64_t> step_of_old_name(std::string_view name);

}  // namespace fsdp::checkpoint
