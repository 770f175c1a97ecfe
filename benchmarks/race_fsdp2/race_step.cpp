// Our side of the race: ranks that run training steps of a model on request.
//
// race_step MODEL_DIR RANKS TOKENS [METHOD ADAPTER_DIR]: reads numbers of steps from standard
// input, one a line, runs them, and answers with one JSON line each. METHOD: full; lora: the
// adapter of a PEFT folder over the frozen base; qlora: the same over NF4.
// race_step count MODEL_DIR RANKS TOKENS ADAPTER_DIR: what a rank sends and keeps, without peers
// and with all parameters zero: one JSON line for each method and placement.
// Driven by race.py beside this file.

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
#include "libfsdp/comm/fake.h"
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

struct Race {
  std::string directory;
  int ranks = 2;
  int64_t tokens = 0;
  std::string method = "full";
  std::string adapter;
};

trainer::PeftOptions peft_options(const Race& race) {
  trainer::PeftOptions peft;
  if (race.method == "full") return peft;
  peft.adapter_name_or_path = race.adapter;
  peft.quantization.load_in_4bit = race.method == "qlora";
  return peft;
}

ShardOptions shard_options() { return {.groups = {{.name = "all", .weight_decay = 0.01}}}; }

int serve(comm::Communicator& comm, const Race& race) {
  at::set_num_threads(1);
  models::use_fast_float32_matmul();
  models::use_tensor_heap();
  const int64_t tokens = race.tokens;
  int64_t vocabulary = 0;
  auto model = [&] {  // Keeps no tokenizer: neither side of the race has one.
    const auto files = trainer::open_model(race.directory);
    vocabulary = files.config.vocab_size;
    const auto peft = peft_options(race);
    trainer::ModelParts parts;
    auto sharded = trainer::build_sharded(files, comm, shard_options(), trainer::Purpose::kTraining,
                                          peft, parts);
    trainer::load_files(sharded, files, parts);
    trainer::fill_adapters(sharded.core(), parts, peft, /*seed=*/0);
    return sharded;
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

int64_t frozen_bytes(const plan::Layout& layout) {
  int64_t sum = 0;
  for (const plan::Bucket& bucket : layout.buckets)
    if (!bucket.trainable) sum += bucket.padded_bytes();
  return sum;
}

// A step like all others, but the first two, which find the order of calls and fill held slots.
void count_step(const Race& race, const char* name, const trainer::PeftOptions& peft,
                const ShardOptions& options) {
  auto comm = comm::make_fake(0, race.ranks, {.can_share = true, .repeat_own_data = false});
  const auto files = trainer::open_model(race.directory);
  trainer::ModelParts parts;
  auto model =
      trainer::build_sharded(files, *comm, options, trainer::Purpose::kTraining, peft, parts);
  int64_t step = 0;
  run_steps(model, step, 2, race.tokens, files.config.vocab_size);
  comm->reset_counts();
  run_steps(model, step, 1, race.tokens, files.config.vocab_size);
  std::printf("{\"method\": \"%s\"", name);
  using comm::CollectiveKind;
  for (const auto& [kind, text] : {std::pair{CollectiveKind::kGather, "gather"},
                                   {CollectiveKind::kFold, "reduce"},
                                   {CollectiveKind::kExchange, "exchange"},
                                   {CollectiveKind::kFence, "fence"}}) {
    const comm::FakeCount& count = comm->count(kind);
    std::printf(", \"%s\": [%lld, %lld]", text, static_cast<long long>(count.collectives),
                static_cast<long long>(count.bytes));
  }
  const auto packed = parts.quantized ? parts.quantized->bytes() : 0;
  const auto numel = parts.quantized ? parts.quantized->numel() : 0;
  std::printf(
      ", \"collectives\": %lld, \"frozen_bytes\": %lld, \"packed_bytes\": %lld, "
      "\"packed_numel\": %lld}\n",
      static_cast<long long>(comm->total().collectives),
      static_cast<long long>(frozen_bytes(model.core().executor().layout())),
      static_cast<long long>(packed), static_cast<long long>(numel));
}

int count(Race race) {
  at::set_num_threads(1);
  for (const char* method : {"full", "lora", "qlora"}) {
    race.method = method;
    trainer::PeftOptions peft = peft_options(race);
    ShardOptions options = shard_options();
    count_step(race, cat(method, ", shared home (default)").c_str(), peft, options);
    options.placement.force_slot_home = true;
    count_step(race, cat(method, ", two slots").c_str(), peft, options);
    options.strategy = plan::Strategy::kShardGradOp;
    count_step(race, cat(method, ", a slot for each unit").c_str(), peft, options);
    if (!peft.quantization.load_in_4bit) continue;
    peft.quantization.use_bnb_nested_quant = true;
    count_step(race, cat(method, " nested, a slot for each unit").c_str(), peft, options);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv, argv + argc);
  const bool counts = argc == 6 && arguments[1] == "count";
  if (argc != 4 && argc != 6) {
    std::fprintf(stderr, "usage: race_step [count] MODEL_DIR RANKS TOKENS [METHOD] ADAPTER_DIR\n");
    return 2;
  }
  if (counts)
    return count({arguments[2], std::atoi(argv[3]), std::atoll(argv[4]), "full", arguments[5]});
  Race race{arguments[1], std::atoi(argv[2]), std::atoll(argv[3])};
  if (argc == 6) {
    race.method = arguments[4];
    race.adapter = arguments[5];
  }
  device::tune_host_allocator();
  if (!std::getenv("FSDP_LAUNCH_FD"))
    return comm::launch_local(race.ranks, arguments, {.name = "race_step"});
  return comm::run_rank([&](comm::Communicator& comm) { return serve(comm, race); },
                        {.name = "race_step"});
}
