// How long training waits for an asynchronous save, beside a plain copy of as many bytes; run by
// checkpoint_bench.py.
//
// async_save MODEL_DIR RANKS DIRECTORY ROUNDS: ranks that hold the model of MODEL_DIR/config.json
// with AdamW's state save it through the Checkpointer, as a training loop does. Prints one line of
// JSON: bytes of a rank, and of every round the seconds of the slowest rank.
#include <torch/nn/module.h>

#include <chrono>
#include <cstring>
#include <iostream>
#include <string>
#include <thread>

#include "libfsdp/comm/join.h"
#include "libfsdp/comm/launch/launcher.h"
#include "libfsdp/device/host_arena.h"
#include "libfsdp/models/registry.h"
#include "libfsdp/shard/checkpointer.h"
#include "libfsdp/shard/state_dict.h"

namespace fsdp {
namespace {

/// Seconds that `work` takes the slowest rank, which all begin together.
template <class Work>
double slowest(comm::Communicator& comm, Work&& work) {
  comm.barrier(comm::make_tag("ready"));
  const auto begin = std::chrono::steady_clock::now();
  work();
  const std::chrono::duration<double, std::nano> took = std::chrono::steady_clock::now() - begin;
  return 1e-9 * static_cast<double>(comm.maximum(static_cast<int64_t>(took.count()), "took"));
}

/// Gives every element a value, so that no page is the kernel's page of zeros; returns the bytes
/// that this rank saves.
int64_t fill(const checkpoint::StateDict& state) {
  int64_t bytes = 0;
  for (const checkpoint::TensorPart& part : state.tensors) {
    if (part.numel == 0) continue;
    const std::vector<float> values(static_cast<size_t>(part.numel), 0.5F + part.name.size());
    part.write(0, std::as_bytes(std::span(values)));
    bytes += part.saved ? static_cast<int64_t>(values.size() * sizeof(float)) : 0;
  }
  return bytes;
}

class Copy {
 public:
  explicit Copy(int64_t bytes)
      : bytes_(static_cast<size_t>(bytes)),
        memory_(2 * bytes_ + 4096, {.label = "copy", .prefault = true}),
        from_(memory_.allocate(bytes_)),
        to_(memory_.allocate(bytes_)) {
    std::memset(from_, 1, bytes_);
  }
  void run() { std::memcpy(to_, from_, bytes_); }

 private:
  size_t bytes_;
  device::HostArena memory_;
  std::byte *from_, *to_;
};

int measure(comm::Communicator& comm, char** argv) {
  const auto config = io::HfModelConfig::read(argv[1]);
  auto model =
      fully_shard(models::make_causal_lm(config, at::TensorOptions(at::kMeta).dtype(at::kFloat)),
                  {std::shared_ptr<void>(), &comm}, {});
  const int64_t bytes = fill(model_state(model.core())) + fill(optimizer_state(model.core()));
  model.core().publish();
  Copy copy(bytes);
  Checkpointer checkpoints(model, {.directory = argv[3], .async = true, .save_total_limit = 1});
  io::Json copies = io::Json::array(), stalls = io::Json::array(), commits = io::Json::array();
  const auto save = [&](int64_t round) {
    stalls.push_back(slowest(comm, [&] { checkpoints.save(round); }));
    double commit = 0;
    for (bool ended = false; !ended;) {  // As a training loop polls, between its steps.
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      commit = slowest(comm, [&] { ended = checkpoints.poll(); });
    }
    commits.push_back(commit);
  };
  const auto plain = [&] { copies.push_back(slowest(comm, [&] { copy.run(); })); };
  for (int64_t round = 0; round < std::stoll(argv[4]); ++round) {
    if (round % 2 != 0) plain();
    save(round);
    if (round % 2 == 0) plain();
  }
  if (comm.rank() != 0) return 0;
  std::cout << io::Json::object(
                   {{"bytes", bytes}, {"copy", copies}, {"stall", stalls}, {"commit", commits}})
                   .dump()
            << std::endl;
  return 0;
}

}  // namespace
}  // namespace fsdp

int main(int argc, char** argv) {
  if (argc != 5) return std::cerr << "async_save MODEL_DIR RANKS DIRECTORY ROUNDS\n", 2;
  if (!fsdp::comm::started_as_rank())
    return fsdp::comm::launch_local(std::stoi(argv[2]), {argv, argv + argc});
  return fsdp::comm::run_rank([&](auto& comm) { return fsdp::measure(comm, argv); });
}
