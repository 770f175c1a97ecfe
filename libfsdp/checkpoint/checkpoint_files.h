// Directories of checkpoints: their names, how they are made aside, change places and go away.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace fsdp::checkpoint {

inline constexpr std::string_view kManifestFile = "manifest.json";
/// Text file with the name of the newest checkpoint: a hint for people and scripts.
inline constexpr std::string_view kLatestFile = "latest";

/// "checkpoint-120", and back; none for any other name.
std::string checkpoint_name(int64_t step);
std::optional<int64_t> step_of_name(std::string_view name);

/// ".tmp-model-<nonce>": of files that will be moved up into the directory around it.
std::string temporary_model_name();

/// "out/" -> "out".
std::string without_end_slash(std::string path);

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

/// Files that no longer have the name of a checkpoint. They are removed with the object, which may
/// take a while where they are large. Move-only.
class Doomed {
 public:
  Doomed(std::string path, Claim claim) : path_(std::move(path)), claim_(std::move(claim)) {}
  Doomed(Doomed&& other) noexcept;
  Doomed& operator=(Doomed&& other) noexcept;
  /// What cannot be removed is for the next run: a warning.
  ~Doomed();

 private:
  std::string path_;
  Claim claim_;
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
  /// that had this name before, or the new one, is not whole under some name; the old one goes with
  /// this object. Throws: ConfigError if the name is taken and not `overwrite`; HostResourceError;
  /// then all is as before.
  void publish(const std::string& name, bool overwrite);

  /// Removes what still has the temporary name (this directory, or the checkpoint that it
  /// replaced), now. Never throws: what cannot be removed is for the next run.
  void remove() noexcept;
  /// The same, whenever the caller likes.
  Doomed take_remains() noexcept;

 private:
  void take_name(const std::string& final_path);
  void exchange_names(const std::string& final_path);

  std::string parent_;
  std::string name_;
  std::string path_;        // Of what has the temporary name; empty = nothing.
  std::string spare_path_;  // Where an old checkpoint goes if names cannot be exchanged.
  Claim claim_;
  Claim old_claim_;
};

/// Takes a checkpoint's name away, durably; so half of one never has the name of a whole one.
/// Throws: HostResourceError; then it has its name.
Doomed remove_checkpoint(const std::string& parent, const std::string& name);

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
