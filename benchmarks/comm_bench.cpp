// Bus bandwidth and latency of gather and fold between two ranks: threads, and processes of one
// host.
//
// Bus bandwidth counts what one rank must receive from its peers: gather (n - 1) * bytes, fold (n -
// 1) / n * bytes, per second of the slowest rank. A fold takes bf16 sources and gives each rank
// half of the sums, in fp32: over what was there, as a reduce-scatter, or added to it, which moves
// half as much memory again.
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "libfsdp/comm/host/thread_world.h"
#include "libfsdp/comm/join.h"
#include "libfsdp/comm/launch/launcher.h"

namespace {

using namespace fsdp::comm;

constexpr size_t kLargest = 64 << 20;

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// Destination memory as an arena has it: present, in large pages where the system allows.
struct Destination {
  explicit Destination(size_t bytes)
      : data(static_cast<std::byte*>(std::aligned_alloc(2 << 20, bytes))) {
    madvise(data.get(), bytes, MADV_HUGEPAGE);
    std::memset(data.get(), 0, bytes);
  }
  struct Free {
    void operator()(std::byte* memory) const { std::free(memory); }
  };
  std::unique_ptr<std::byte, Free> data;
};

struct Buffers {
  explicit Buffers(Communicator& c)
      : source(c.allocate(kLargest, "source")), sums(kLargest), all(kLargest * c.size()) {
    std::memset(source->local(), 0, kLargest);
  }
  std::shared_ptr<SymmetricMemory> source;
  Destination sums;
  Destination all;
};

void gather_once(Communicator& c, Buffers& b, size_t bytes) {
  c.wait_released(
      c.begin_gather(c.world(), {b.source.get(), 0, bytes}, b.all.data.get(), make_tag("gather")));
}

void fold_once(Communicator& c, Buffers& b, size_t bytes, bool accumulate) {
  const size_t part = bytes / 2 / c.size();
  c.wait_released(c.begin_fold(c.world(), {b.source.get(), 0, bytes}, fsdp::DType::kBF16,
                               static_cast<int64_t>(part) * c.rank(),
                               {reinterpret_cast<float*>(b.sums.data.get()), part}, accumulate,
                               make_tag("fold")));
}

/// Median over rounds of the seconds of one operation.
template <class Operation>
double measure(Communicator& c, Operation operation, size_t bytes) {
  const int repeats = static_cast<int>(std::clamp<size_t>((32 << 20) / bytes, 1, 500));
  std::vector<double> rounds;
  for (int round = 0; round < 12; ++round) {
    c.barrier(make_tag("round"));
    const double start = seconds_now();
    for (int i = 0; i < repeats; ++i) operation(bytes);
    const double mine = (seconds_now() - start) / repeats;
    if (round > 1)
      rounds.push_back(
          static_cast<double>(c.maximum(static_cast<int64_t>(mine * 1e12), "slowest")) * 1e-12);
  }
  std::nth_element(rounds.begin(), rounds.begin() + rounds.size() / 2, rounds.end());
  return rounds[rounds.size() / 2];
}

int run(Communicator& c, const char* transport) {
  Buffers buffers(c);
  const double peers = c.size() - 1;
  if (c.rank() == 0)
    std::printf("%s, %d ranks\n%12s %14s %14s %14s %14s %14s\n", transport, c.size(), "bytes",
                "gather us", "gather GB/s", "fold us", "fold GB/s", "adding GB/s");
  for (size_t bytes = 1024; bytes <= kLargest; bytes *= 4) {
    const double gather = measure(
        c, [&](size_t n) { gather_once(c, buffers, n); }, bytes);
    const double fold = measure(
        c, [&](size_t n) { fold_once(c, buffers, n, false); }, bytes);
    const double added = measure(
        c, [&](size_t n) { fold_once(c, buffers, n, true); }, bytes);
    if (c.rank() == 0) {
      const double folded = peers / c.size() * bytes * 1e-9;
      std::printf("%12zu %14.1f %14.2f %14.1f %14.2f %14.2f\n", bytes, gather * 1e6,
                  peers * bytes / gather * 1e-9, fold * 1e6, folded / fold, folded / added);
    }
  }
  const double barrier = measure(
      c, [&](size_t) { c.barrier(make_tag("barrier")); }, 1024);
  const double fence = measure(
      c, [&](size_t) { c.finish(c.begin_fence(c.world(), make_tag("fence"))); }, 1024);
  if (c.rank() == 0)
    std::printf("%12s %14.1f us\n%12s %14.1f us\n\n", "barrier", barrier * 1e6, "fence",
                fence * 1e6);
  std::fflush(stdout);
  return 0;
}

void run_threads(int size) {
  ThreadWorld world(size);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] { run(*world.communicator(rank), "threads"); });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

int main(int argc, char** argv) {
  if (started_as_rank()) {
    return run_rank([](Communicator& c) { return run(c, "shm"); }, {.name = "comm_bench"});
  }
  const int size = argc > 1 ? std::stoi(argv[1]) : 2;
  run_threads(size);
  return launch_local(size, {argv[0]}, {.name = "comm_bench"});
}
