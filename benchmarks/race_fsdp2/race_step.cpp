// Our side of the race: two ranks that run training steps of a model on request.
//
// race_step MODEL_DIR RANKS TOKENS: reads numbers of steps from standard input, one a line, runs
// them, and answers with one JSON line each. Driven by race.py beside this file.

#include <ATen/Parallel.h>
#include <sys/resource.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <string>
#include <vector>

#include "libfsdp/base/error.h"
#include "libfsdp/comm/join.h"
#include "libfsdp/comm/launch/launcher.h"
#include "libfsdp/device/host_allocator.h"
#include "libfsdp/models/fast_matmul.h"
#include "libfsdp/models/tensor_memory.h"
#include "libfsdp/trainer/session.h"

namespace {

using namespace fsdp;

double cpu_seconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + 1e-6 * time.tv_usec;
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

// The same tokens as race.py: a function of step and rank.
models::CausalLmBatch batch_of(int64_t step, int64_t rank, int64_t tokens, int64_t vocabulary) {
  std::vector<int64_t> ids;
  for (int64_t t = 0; t < tokens; ++t)
    ids.push_back((t * t * 31 + t * 7919 + rank * 104729 + step * 1299709) % vocabulary);
  const at::Tensor row = at::tensor(ids).view({1, tokens});
  return models::make_batch(row, row);
}

double run_steps(trainer::ShardedLm& model, int64_t& step, int64_t steps, int64_t tokens,
                 int64_t vocabulary) {
  double loss = 0;
  for (int64_t end = step + steps; step < end; ++step) {
    const auto batch = batch_of(step, model.comm().rank(), tokens, vocabulary);
    Step open = model.begin_step(1);
    open.backward(model.run([&](auto& lm) { return lm.loss(batch); }), batch.trainable_tokens());
    loss = open.finish({.learning_rate = 1e-5, .max_grad_norm = 1.0}).loss;
  }
  return loss;
}

int serve(comm::Communicator& comm, const std::string& directory, int64_t tokens) {
  at::set_num_threads(1);
  models::use_fast_float32_matmul();
  models::use_tensor_heap();
  int64_t vocabulary = 0;
  auto model = [&] {  // Keeps no tokenizer: neither side of the race has one.
    const auto files = trainer::open_model(directory);
    vocabulary = files.config.vocab_size;
    return trainer::load_sharded(files, comm, {.groups = {{.name = "all", .weight_decay = 0.01}}},
                                 trainer::Purpose::kTraining);
  }();
  device::trim_host_allocator();
  std::vector<int64_t> pids(static_cast<size_t>(comm.size()));
  const int64_t pid = getpid();
  comm.exchange(&pid, sizeof pid, pids.data(), comm::make_tag("pids"));
  if (comm.rank() == 0) {
    std::printf("{\"pids\": [");
    for (size_t i = 0; i < pids.size(); ++i)
      std::printf("%s%lld", i ? ", " : "", static_cast<long long>(pids[i]));
    std::printf("]}\n");
    std::fflush(stdout);
  }
  int64_t step = 0;
  for (;;) {
    int64_t steps = 0;
    std::string line;
    if (comm.rank() == 0 && std::getline(std::cin, line)) steps = std::atoll(line.c_str());
    comm.broadcast(&steps, sizeof steps, 0, comm::make_tag("request"));
    if (steps == 0) return 0;
    const double cpu = cpu_seconds();
    const auto start = std::chrono::steady_clock::now();
    const double loss = run_steps(model, step, steps, tokens, vocabulary);
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    const auto used = static_cast<int64_t>(1e6 * (cpu_seconds() - cpu));
    const int64_t all = comm.sum(used, "cpu time");
    if (comm.rank() == 0) {
      std::printf("{\"loss\": %.9f, \"seconds\": %.6f, \"cpu_seconds\": %.6f}\n", loss, seconds,
                  1e-6 * static_cast<double>(all));
      std::fflush(stdout);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: race_step MODEL_DIR RANKS TOKENS\n");
    return 2;
  }
  device::tune_host_allocator();
  const std::vector<std::string> arguments(argv, argv + argc);
  if (!std::getenv("FSDP_LAUNCH_FD"))
    return comm::launch_local(std::atoi(argv[2]), arguments, {.name = "race_step"});
  return comm::run_rank(
      [&](comm::Communicator& comm) { return serve(comm, argv[1], std::atoll(argv[3])); },
      {.name = "race_step"});
}
