#include "libfsdp/shard/checkpointer.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <filesystem>
#include <thread>
#include <tuple>

#include "libfsdp/base/error.h"
#include "libfsdp/base/log.h"
#include "libfsdp/checkpoint/checkpoint_list.h"
#include "libfsdp/checkpoint/load_state.h"
#include "libfsdp/checkpoint/save_plan.h"
#include "libfsdp/checkpoint/verify.h"
#include "libfsdp/comm/os/quiet_thread.h"
#include "libfsdp/device/host_arena.h"
#include "libfsdp/shard/state_dict.h"

namespace fsdp {
namespace {

namespace fs = std::filesystem;
using checkpoint::Outcome;
using checkpoint::StateDict;
using checkpoint::TensorPart;

constexpr int64_t kStateVersion = 1;
// Where accelerate has them.
constexpr const char* kModelFolder = "pytorch_model_fsdp_0";
constexpr const char* kOptimizerFolder = "optimizer_0";

size_t part_bytes(const TensorPart& part) {
  return part.saved ? static_cast<size_t>(part.numel) * dtype_bytes(part.dtype) : 0;
}

bool same_parts(const StateDict& a, const StateDict& b) {
  const auto shape_of = [](const TensorPart& part) {
    return std::tie(part.name, part.dtype, part.shape, part.at, part.numel, part.saved);
  };
  return std::ranges::equal(a.tensors, b.tensors, {}, shape_of, shape_of);
}

checkpoint::StoredTensors open_tensors(const std::string& checkpoint, const char* folder,
                                       const std::string& stem) {
  const fs::path sharded = fs::path(checkpoint) / folder;
  return checkpoint::StoredTensors::open(fs::is_directory(sharded) ? sharded.string() : checkpoint,
                                         stem);
}

/// Exactly what was saved: nothing missing, nothing converted.
void load_exactly(const StateDict& state, const std::string& checkpoint, const char* folder,
                  const std::string& stem) {
  checkpoint::load_state(state, open_tensors(checkpoint, folder, stem),
                         {.strict = true, .convert = false});
}

StateDict masters_of(const StateDict& optimizer) {
  StateDict masters;
  for (const TensorPart& part : optimizer.tensors) {
    if (part.name.ends_with(".master")) masters.tensors.push_back(part);
  }
  return masters;
}

void verify_share(const std::string& checkpoint, int64_t rank, int64_t ranks) {
  const auto report = checkpoint::verify(checkpoint, {.index = rank, .count = ranks});
  if (!report.whole()) throw ModelError(report.damages.front().text());
}

}  // namespace

/// A copy of what this rank saves, in memory that is taken once, in the background.
class Checkpointer::Snapshot {
 public:
  Snapshot(const StateDict& model, const StateDict& optimizer)
      : memory_(bytes_of(model) + bytes_of(optimizer), {.label = "snapshot"}) {
    model_ = held(model);
    optimizer_ = held(optimizer);
    toucher_ = comm::start_quiet_thread([this] { touch_pages(); });
  }
  ~Snapshot() {
    ends_ = true;
    if (toucher_.joinable()) toucher_.join();
  }
  /// Whether it is of this state: what is saved may change, as when other adapters compute.
  bool fits(const StateDict& model, const StateDict& optimizer) const {
    return same_parts(model, model_) && same_parts(optimizer, optimizer_);
  }
  /// The cost of an asynchronous save: one copy.
  void copy(const StateDict& model, const StateDict& optimizer) {
    if (toucher_.joinable()) toucher_.join();
    auto to = places_.begin();
    for (const StateDict* state : {&model, &optimizer}) {
      for (const TensorPart& part : state->tensors) {
        if (part_bytes(part) > 0) part.read(0, *to++);
      }
    }
  }
  const StateDict& model() const { return model_; }
  const StateDict& optimizer() const { return optimizer_; }

 private:
  static constexpr size_t kAlignment = 64;
  static constexpr size_t kPageBytes = 4096;
  static size_t bytes_of(const StateDict& state) {
    size_t bytes = 0;
    for (const TensorPart& part : state.tensors) bytes += part_bytes(part) + kAlignment;
    return bytes;
  }

  StateDict held(const StateDict& state) {
    StateDict copy;
    for (TensorPart part : state.tensors) {
      const size_t bytes = part_bytes(part);
      if (bytes > 0) {
        const std::span<std::byte> here(memory_.allocate(bytes, kAlignment), bytes);
        places_.push_back(here);
        const size_t item = dtype_bytes(part.dtype);
        part.source = here;
        part.read = [here, item](int64_t at, std::span<std::byte> to) {
          const auto from = here.subspan(static_cast<size_t>(at) * item, to.size());
          std::memcpy(to.data(), from.data(), to.size());
        };
      }
      part.write = nullptr;
      part.target = {};
      copy.tensors.push_back(std::move(part));
    }
    return copy;
  }

  /// Lets the kernel give us the pages, which takes longer than the copy.
  void touch_pages() {
    for (const std::span<std::byte> place : places_) {
      for (size_t at = 0; at < place.size() && !ends_; at += kPageBytes)
        static_cast<volatile std::byte&>(place[at]) = std::byte{0};
    }
  }

  device::HostArena memory_;
  std::vector<std::span<std::byte>> places_;  // Of the parts that this rank saves, in their order.
  StateDict model_;
  StateDict optimizer_;
  std::atomic<bool> ends_{false};
  std::thread toucher_;  // Until the first copy.
};

/// What one save writes on this rank.
struct Checkpointer::Content {
  StateDict model, optimizer;
  StateForm form = StateForm::kSharded;
  std::string model_stem;
  int64_t rank = 0;
  std::vector<CheckpointExtras::File> files;  // Rank 0's.

  void write(checkpoint::RangeWriter& writer) const {
    write(model, model_stem, kModelFolder, writer);
    write(optimizer, "optimizer", kOptimizerFolder, writer);
    for (const auto& file : files) writer.write_file(file.name, file.content);
  }

 private:
  void write(const StateDict& state, const std::string& stem, const char* folder,
             checkpoint::RangeWriter& writer) const {
    const bool sharded = form == StateForm::kSharded;
    const auto plan = sharded ? checkpoint::plan_sharded(state, rank)
                              : checkpoint::plan_full(state, {.stem = stem});
    checkpoint::write_state(plan, state, rank, writer, sharded ? folder : "");
  }
};

Checkpointer::Checkpointer(ShardedCore& core, CheckpointerOptions options)
    : core_(core),
      options_(std::move(options)),
      verdict_(core.comm()),
      save_(core.comm(), options_.directory) {
  if (!options_.async) return;
  Outcome outcome;
  outcome.run(
      [&] { snapshot_ = std::make_unique<Snapshot>(saved_model(), optimizer_state(core_)); });
  verdict_.agree(outcome, "room for a snapshot");
}

Checkpointer::~Checkpointer() = default;

void Checkpointer::add(const std::string& name, std::function<std::string()> state,
                       std::function<void(const std::string&)> load_state) {
  for (const Object& object : objects_)
    if (object.name == name)
      throw ConfigError(cat("two objects with a state are called '", name, "'"));
  objects_.push_back({name, std::move(state), std::move(load_state)});
}

// ---------------------------------------------------------------------------------------------------------------------
// Save

StateDict Checkpointer::saved_model() const {
  return options_.model ? options_.model(core_) : model_state(core_);
}

std::string Checkpointer::state_text(int64_t step) const {
  io::Json objects = io::Json::object();
  for (const Object& object : objects_)
    objects[object.name] = io::Json::parse(object.state(), cat("state of '", object.name, "'"));
  io::Json scaler;
  if (const optim::LossScaler* own = core_.loss_scaler()) {
    scaler = io::Json::object(
        {{"scale", own->state().scale}, {"growth_tracker", own->state().growth_tracker}});
  }
  const engine::Executor& executor = core_.executor();
  return io::Json::object({{"format_version", kStateVersion},
                           {"step", step},
                           {"engine_steps", executor.step()},
                           {"updates", executor.updates()},
                           {"seed", core_.options().seed},
                           {"world_size", core_.comm().size()},
                           {"strategy", plan::strategy_name(core_.options().strategy)},
                           {"loss_scaler", scaler},
                           {"objects", objects}})
             .dump(2) +
         "\n";
}

std::shared_ptr<Checkpointer::Content> Checkpointer::collect(int64_t step,
                                                             const CheckpointExtras& extras,
                                                             bool in_background) {
  auto content = std::make_shared<Content>();
  content->model = saved_model();
  content->optimizer = optimizer_state(core_);
  content->form = options_.form;
  content->model_stem = options_.model_stem;
  content->rank = core_.comm().rank();
  if (in_background) {
    if (!snapshot_ || !snapshot_->fits(content->model, content->optimizer)) {
      snapshot_.reset();
      snapshot_ = std::make_unique<Snapshot>(content->model, content->optimizer);
    }
    snapshot_->copy(content->model, content->optimizer);
    content->model = snapshot_->model();
    content->optimizer = snapshot_->optimizer();
  }
  if (content->rank == 0) {
    content->files = extras.files;
    content->files.push_back({options_.state_file, state_text(step)});
  }
  return content;
}

void Checkpointer::start(int64_t step, const CheckpointExtras& extras, bool in_background) {
  save_.wait();  // What is in flight reads the snapshot.
  core_.comm().report_progress(step, "save");
  std::shared_ptr<Content> content;
  Outcome outcome;
  outcome.run([&] {
    if (core_.executor().in_step()) throw ConfigError("a save inside a step: finish it first");
    content = collect(step, extras, in_background);
  });
  verdict_.agree(outcome, "collect checkpoint");
  save_.start({.step = step,
               .strategy = std::string(plan::strategy_name(core_.options().strategy)),
               .details = io::Json::object(
                   {{"form", options_.form == StateForm::kFull ? "full" : "sharded"}}),
               .write = [content](checkpoint::RangeWriter& writer) { content->write(writer); },
               .in_background = in_background,
               .overwrite = options_.overwrite,
               .save_total_limit = options_.save_total_limit,
               .best_step = extras.best_step});
}

void Checkpointer::save(int64_t step, const CheckpointExtras& extras) {
  if (options_.async) return save_async(step, extras);
  start(step, extras, false);
  save_.wait();
}

void Checkpointer::save_async(int64_t step, const CheckpointExtras& extras) {
  start(step, extras, true);
}

// ---------------------------------------------------------------------------------------------------------------------
// Load

std::optional<int64_t> Checkpointer::resume(const std::string& where) {
  const std::optional<std::string> checkpoint = find(where);
  if (core_.comm().rank() == 0) {
    for (const std::string& note : notes_) log::warning(note);
  }
  if (!checkpoint) return std::nullopt;
  return load(*checkpoint);
}

std::optional<std::string> Checkpointer::find(const std::string& where) {
  comm::Communicator& comm = core_.comm();
  notes_.clear();
  comm.report_progress(-1, "verify");
  Outcome outcome;
  if (where != "auto") {
    outcome.run([&] { verify_share(where, comm.rank(), comm.size()); });
    verdict_.agree(outcome, "verify checkpoint");
    return where;
  }
  std::optional<checkpoint::CheckpointList> list;
  outcome.run([&] { list.emplace(options_.directory); });
  verdict_.agree(outcome, "list checkpoints");
  const auto newest = list->newest_whole(comm);
  for (const auto& skipped : list->skipped())
    notes_.push_back(cat("[resume] ", skipped.path, " was skipped: ", skipped.why));
  return newest ? std::optional(newest->path) : std::nullopt;
}

io::Json Checkpointer::read_state(const std::string& checkpoint) const {
  const std::string path = (fs::path(checkpoint) / options_.state_file).string();
  io::Json state = io::Json::read(path);
  if (const auto version = state.get<int64_t>("format_version"); version != kStateVersion) {
    throw ModelError(cat("[resume] ", path, " has version ", version, " of its format; this is ",
                         kStateVersion));
  }
  return state;
}

std::string Checkpointer::stored_object(const std::string& checkpoint,
                                        const std::string& name) const {
  const io::Json state = read_state(checkpoint);
  const io::Json* found = state["objects"].find(name);
  return found ? found->dump() : "";
}

void Checkpointer::load_objects(const io::Json& stored, const std::string& checkpoint) {
  for (const Object& object : objects_) {
    const io::Json* found = stored.find(object.name);
    if (!found)
      throw ModelError(cat("[resume] ", checkpoint, " holds no state of '", object.name, "'"));
    object.load_state(found->dump());
  }
}

int64_t Checkpointer::load(const std::string& checkpoint) {
  core_.comm().report_progress(-1, "resume");
  io::Json state;
  Outcome outcome;
  outcome.run([&] {
    state = read_state(checkpoint);
    if (const auto seed = state.get<uint64_t>("seed"); seed != core_.options().seed) {
      throw ConfigError(cat("[resume] ", checkpoint, " was made with the seed ", seed,
                            ", this run has ", core_.options().seed,
                            ": random numbers would not go on where they were."));
    }
    load_exactly(saved_model(), checkpoint, kModelFolder, options_.model_stem);
    load_exactly(optimizer_state(core_), checkpoint, kOptimizerFolder, "optimizer");
    core_.executor().set_progress(state.get<int64_t>("engine_steps"),
                                  state.get<int64_t>("updates"));
    const io::Json& scaler = state["loss_scaler"];
    optim::LossScaler* const own = core_.loss_scaler();
    // Before the first step the scale is not yet that of sums of losses.
    if (own && !scaler.is_null() && core_.executor().step() > 0) {
      own->restore({.scale = scaler.get<float>("scale"),
                    .growth_tracker = scaler.get<int64_t>("growth_tracker")});
    }
    load_objects(state["objects"], checkpoint);
  });
  verdict_.agree(outcome, "load checkpoint");
  core_.publish();
  return state.get<int64_t>("step");
}

void Checkpointer::load_model(const std::string& checkpoint) {
  core_.comm().report_progress(-1, "load");
  Outcome outcome;
  outcome.run([&] {
    load_exactly(saved_model(), checkpoint, kModelFolder, options_.model_stem);
    checkpoint::LoadOptions options{.strict = false, .convert = false};
    checkpoint::load_state(masters_of(optimizer_state(core_)),
                           open_tensors(checkpoint, kOptimizerFolder, "optimizer"), options);
  });
  verdict_.agree(outcome, "load model");
  core_.publish();
}

}  // namespace fsdp
