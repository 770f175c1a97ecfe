#include "libfsdp/checkpoint/checkpoint_save.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <ctime>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "libfsdp/base/error.h"
#include "libfsdp/base/log.h"
#include "libfsdp/checkpoint/checkpoint_files.h"
#include "libfsdp/checkpoint/checkpoint_list.h"
#include "libfsdp/checkpoint/joined.h"
#include "libfsdp/checkpoint/manifest.h"
#include "libfsdp/comm/os/quiet_thread.h"
#include "libfsdp/io/file.h"

namespace fsdp::checkpoint {
namespace {

// Places in Outcome::values after a rank has written its part.
enum : size_t { kListBytes, kListHigh, kListLow, kWrittenBytes };

std::string time_now() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  gmtime_r(&now, &parts);
  std::array<char, 32> text;
  std::strftime(text.data(), text.size(), "%Y-%m-%dT%H:%M:%SZ", &parts);
  return text.data();
}

}  // namespace

/// A save between start() and its commit.
struct CheckpointSave::Flight {
  SaveRequest request;
  std::optional<TemporaryCheckpoint> temporary;  // On rank 0.
  std::string directory;
  std::string final_path;
  std::optional<RangeWriter> writer;
  Outcome outcome;  // Of this rank's part; belongs to the thread until `written`.
  std::atomic<bool> written{false};
  std::thread eraser;  // Of the last save: it makes the room that this one may need.
  std::thread thread;

  ~Flight() {
    if (writer) writer->cancel();
    if (thread.joinable()) thread.join();
    if (eraser.joinable()) eraser.join();
  }

  void write(int64_t rank, int64_t world_size) noexcept {
    if (eraser.joinable()) eraser.join();
    outcome.run([&] {
      request.write(*writer);
      writer->finish();
      const RangeList list = write_list(directory, rank, world_size, writer->written());
      outcome.values[kListBytes] = list.bytes;
      outcome.values[kListHigh] = static_cast<int64_t>(list.digest.high);
      outcome.values[kListLow] = static_cast<int64_t>(list.digest.low);
      outcome.values[kWrittenBytes] = writer->written_bytes();
    });
    written.store(true, std::memory_order_release);
  }
};

CheckpointSave::CheckpointSave(comm::Communicator& comm, std::string output_directory)
    : comm_(comm),
      output_directory_(std::move(output_directory)),
      written_(comm),
      committed_(comm) {
  Outcome outcome;
  outcome.run([&] {
    written_.reserve();
    committed_.reserve();
    if (comm_.rank() != 0) return;
    make_directories(output_directory_);
    for (const std::string& name : remove_leftovers(output_directory_)) {
      log::info(cat("[checkpoint] removed ", output_directory_, "/", name,
                    ", which a run that has ended left unfinished"));
    }
  });
  written_.agree(outcome, "open checkpoints");
}

CheckpointSave::~CheckpointSave() {
  if (eraser_.joinable()) eraser_.join();
  if (flight_ == nullptr) return;
  if (comm_.rank() == 0) {
    log::warning("[checkpoint] a save is given up: the run ended before it was complete");
  }
}

void CheckpointSave::save(SaveRequest request) {
  start(std::move(request));
  wait();
}

void CheckpointSave::start(SaveRequest request) {
  wait();
  std::unique_ptr<Flight> flight;
  Outcome outcome;
  outcome.run([&] {
    flight = std::make_unique<Flight>();
    flight->request = std::move(request);
    begin(*flight, outcome);
  });
  const auto outcomes = written_.exchange(outcome, "start checkpoint");
  written_.throw_if_failed(outcomes);
  check(std::all_of(outcomes.begin(), outcomes.end(),
                    [&](const Outcome& one) { return one.values[0] == outcome.values[0]; }),
        "checkpoint: the ranks save different steps");
  Flight& own = *flight;
  flight_ = std::move(flight);
  own.eraser = std::move(eraser_);
  const auto write = [&own, rank = comm_.rank(), size = comm_.size()] { own.write(rank, size); };
  own.outcome.run([&] {
    own.directory = joined(output_directory_, "/", outcomes[0].text);
    own.writer.emplace(own.directory);
    if (!own.request.in_background) return;
    own.thread = comm::start_quiet_thread([write, rank = comm_.rank()] {
      log::set_rank(rank);
      write();
    });
  });
  if (!own.thread.joinable()) write();
}

void CheckpointSave::begin(Flight& flight, Outcome& outcome) {
  const int64_t step = flight.request.step;
  outcome.values[0] = step;
  check(step >= 0 && flight.request.write != nullptr, "checkpoint: no step, or nothing to write");
  flight.final_path = joined(output_directory_, "/", checkpoint_name(step));
  if (comm_.rank() != 0) return;
  if (!flight.request.overwrite && name_exists(flight.final_path)) {
    throw ConfigError(cat("[checkpoint] ", flight.final_path,
                          " exists already. Hint: choose another output directory, or allow the "
                          "checkpoint to be overwritten."));
  }
  flight.temporary.emplace(output_directory_, step);
  outcome.set_text(flight.temporary->name());
}

bool CheckpointSave::try_commit() {
  if (flight_ == nullptr) return true;
  const bool written = flight_->written.load(std::memory_order_acquire);
  if (comm_.maximum(written ? 0 : 1, "checkpoint written?") != 0) return false;
  commit();
  return true;
}

void CheckpointSave::wait() {
  if (flight_ != nullptr) commit();
}

void CheckpointSave::commit() {
  // Whatever happens, this save is over; rank 0 removes what is left of it.
  const std::unique_ptr<Flight> flight = std::move(flight_);
  if (flight->thread.joinable()) flight->thread.join();
  const auto outcomes = written_.exchange(flight->outcome, "checkpoint written");
  const bool complete = std::none_of(outcomes.begin(), outcomes.end(),
                                     [](const Outcome& one) { return one.failed(); });
  Outcome published;
  std::vector<Doomed> doomed;
  if (comm_.rank() == 0) {
    if (complete) published.run([&] { publish(*flight, outcomes); });
    if (complete && !published.failed()) {
      doomed = tidy_up(flight->request);
    } else {
      flight->temporary->remove();
    }
  }
  const auto verdicts = committed_.exchange(published, "checkpoint committed");
  written_.throw_if_failed(outcomes);
  committed_.throw_if_failed(verdicts);
  last_saved_.swap(flight->final_path);
  if (comm_.rank() == 0) erase(*flight, std::move(doomed));
}

// Large files take their time to go; in the background, that is not the training's.
void CheckpointSave::erase(Flight& flight, std::vector<Doomed> doomed) {
  Outcome outcome;
  outcome.run([&] {
    doomed.push_back(flight.temporary->take_remains());
    if (!flight.request.in_background) return;
    eraser_ = comm::start_quiet_thread([files = std::move(doomed)]() mutable { files.clear(); });
  });
}

void CheckpointSave::publish(Flight& flight, std::span<const Outcome> outcomes) {
  Manifest manifest;
  manifest.step = flight.request.step;
  manifest.world_size = comm_.size();
  manifest.time = time_now();
  manifest.strategy = flight.request.strategy;
  manifest.details = flight.request.details;
  std::vector<std::string> directories;
  manifest.files = files_below(flight.directory, &directories);
  int64_t written_bytes = 0;
  for (int64_t rank = 0; rank < comm_.size(); ++rank) {
    const auto& values = outcomes[static_cast<size_t>(rank)].values;
    manifest.lists.push_back(
        {list_file_name(rank, comm_.size()),
         values[kListBytes],
         {static_cast<uint64_t>(values[kListHigh]), static_cast<uint64_t>(values[kListLow])}});
    written_bytes += values[kWrittenBytes];
  }
  check(written_bytes == manifest.file_bytes(),
        cat("checkpoint: the ranks wrote ", written_bytes, " bytes of files that have ",
            manifest.file_bytes()));
  write_manifest(flight.directory, manifest);
  for (const std::string& directory : directories) io::sync_directory(directory);
  flight.temporary->publish(checkpoint_name(manifest.step), flight.request.overwrite);
}

// The checkpoint is safe already: what fails here is for the log.
std::vector<Doomed> CheckpointSave::tidy_up(const SaveRequest& request) const noexcept {
  Outcome outcome;
  outcome.run([&] { write_latest(output_directory_, checkpoint_name(request.step)); });
  if (outcome.failed()) log::warning(outcome.text);
  outcome = {};
  std::vector<Doomed> doomed;
  outcome.run([&] {
    if (request.save_total_limit > 0) {
      doomed = remove_older_checkpoints(output_directory_, request.step, request.best_step,
                                        request.save_total_limit);
    }
  });
  if (outcome.failed()) log::warning(outcome.text);
  return doomed;
}

}  // namespace fsdp::checkpoint
