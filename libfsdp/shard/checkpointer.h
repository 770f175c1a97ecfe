// Checkpoints of a training loop: a sharded module, its optimizer and whatever else has a state.
//
//   fsdp::Checkpointer checkpoints(model, {.directory = "run"});
//   checkpoints.add("order", sampler);                  // Anything with state() and load_state().
//   int64_t step = checkpoints.resume("auto").value_or(0);
//   for (; step < total; checkpoints.poll()) {
//     ...
//     if (++step % 100 == 0) checkpoints.save(step);
//   }
//   checkpoints.wait();
#pragma once

#include <concepts>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "libfsdp/checkpoint/checkpoint_save.h"
#include "libfsdp/checkpoint/state_dict.h"
#include "libfsdp/io/json.h"
#include "libfsdp/shard/sharded.h"

namespace fsdp {

/// How tensors lie in files. Either can be loaded at any number of ranks and under any strategy.
enum class StateForm {
  kSharded,  ///< pytorch_model_fsdp_0/ and optimizer_0/, as torch.distributed.checkpoint reads
             ///< them.
  kFull,     ///< model.safetensors and optimizer.safetensors, as Hugging Face's tools read them.
};

struct CheckpointerOptions {
  std::string directory;  ///< Holds checkpoint-<step>/.
  StateForm form = StateForm::kSharded;
  /// Write in the background, from a copy in host memory (as large as what this rank saves, taken
  /// at once and kept): save() returns when the copy is made.
  bool async = false;
  int64_t save_total_limit = 0;           ///< Keep so many checkpoints, the newest; 0 = all.
  bool overwrite = false;                 ///< Replace a checkpoint of the same step.
  std::string state_file = "state.json";  ///< Everything that is no tensor.
  /// What is saved of the model, and the stem of its files in the full form; null = model_state().
  /// (A run that trains adapters saves these alone.)
  std::function<checkpoint::StateDict(ShardedCore&)> model;
  std::string model_stem = "model";
};

/// What has a state: JSON text, equal on all ranks.
template <class T>
concept HasState = requires(T& object, const std::string& text) {
  { object.state() } -> std::convertible_to<std::string>;
  object.load_state(text);
};

/// What one save has besides.
struct CheckpointExtras {
  struct File {
    std::string name;
    std::string content;
  };
  std::vector<File> files;  ///< Rank 0's are written.
  int64_t best_step = -1;   ///< This checkpoint stays whatever the limit says; -1 = none.
};

/// The checkpoints of one run. Used by the thread that trains, between steps; every rank calls the
/// same functions in the same order. Errors are thrown by all ranks alike, unless a rank is gone.
///
/// Random numbers (fsdp::dropout, stochastic rounding) are functions of seed and step, and need no
/// state of their own.
class Checkpointer {
 public:
  /// Collective. Makes the directory; removes what dead runs left half done in it. `core` must
  /// outlive it. Throws: ConfigError, HostResourceError.
  Checkpointer(ShardedCore& core, CheckpointerOptions options);
  template <class Holder>
  Checkpointer(Sharded<Holder>& model, CheckpointerOptions options)
      : Checkpointer(model.core(), std::move(options)) {}
  ~Checkpointer();
  Checkpointer(const Checkpointer&) = delete;
  Checkpointer& operator=(const Checkpointer&) = delete;

  /// Saves and loads `object` too, which must outlive it. Not collective, but equal on all ranks.
  template <HasState T>
  void add(const std::string& name, T& object) {
    add(
        name, [&object] { return std::string(object.state()); },
        [&object](const std::string& text) { object.load_state(text); });
  }
  void add(const std::string& name, std::function<std::string()> state,
           std::function<void(const std::string&)> load_state);

  /// Saves the state after `step` steps. Collective.
  ///
  /// Written in the background (options.async) it returns when the copy is made, after an earlier
  /// save has ended; its errors come from poll(), wait() or the next save. Otherwise the checkpoint
  /// is on disk when it returns. Throws: HostResourceError, ConfigError (this step's checkpoint
  /// exists); older checkpoints are as they were then.
  void save(int64_t step, const CheckpointExtras& extras = {});
  void save_async(int64_t step, const CheckpointExtras& extras = {});

  /// At the end of each step: commits a save that has been written in the background. Collective
  /// while a save is in flight, else nothing. Returns whether none is in flight. Throws as save().
  bool poll() { return save_.try_commit(); }
  /// Waits for the save in flight. Collective.
  void wait() { save_.wait(); }
  bool in_flight() const { return save_.in_flight(); }
  /// The newest checkpoint that this object has committed; empty = none yet.
  const std::string& last_saved() const { return save_.last_saved(); }

  /// find(), then load(). The number of steps that the state has seen; none = nothing to resume.
  std::optional<int64_t> resume(const std::string& where = "auto");

  /// The checkpoint that `where` means, read once and found whole: a path, or "auto" for the newest
  /// whole one in the directory, if there is one. Collective. notes() says what was skipped, and
  /// why. Throws: ModelError that names what is damaged in a path that was given.
  std::optional<std::string> find(const std::string& where);
  const std::vector<std::string>& notes() const { return notes_; }
  /// What the checkpoint's state file holds of an object, as JSON text; "" = nothing. Not
  /// collective. Throws: ModelError.
  std::string stored_object(const std::string& checkpoint, const std::string& name) const;

  /// Reads model, optimizer, counters, loss scaler and objects; each rank its own bytes.
  /// Collective. Throws: ModelError for tensors that are missing, unexpected or of another shape or
  /// type; ConfigError for another seed.
  int64_t load(const std::string& checkpoint);
  /// Reads parameters and buffers only (with exact masters), for evaluation or export. Collective.
  void load_model(const std::string& checkpoint);

 private:
  struct Object {
    std::string name;
    std::function<std::string()> state;
    std::function<void(const std::string&)> load_state;
  };
  class Snapshot;
  struct Content;

  void start(int64_t step, const CheckpointExtras& extras, bool in_background);
  std::shared_ptr<Content> collect(int64_t step, const CheckpointExtras& extras,
                                   bool in_background);
  checkpoint::StateDict saved_model() const;
  std::string state_text(int64_t step) const;
  io::Json read_state(const std::string& checkpoint) const;
  void load_objects(const io::Json& stored, const std::string& checkpoint);

  ShardedCore& core_;
  CheckpointerOptions options_;
  std::vector<Object> objects_;
  std::unique_ptr<Snapshot> snapshot_;
  checkpoint::Verdict verdict_;
  checkpoint::CheckpointSave save_;  // Ends before the snapshot that it reads.
  std::vector<std::string> notes_;
};

}  // namespace fsdp
