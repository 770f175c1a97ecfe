// Our side of checkpoint_bench.py: ranks as processes that save and load a state on request.
//
// checkpoint_bench SHAPES.json RANKS: reads lines {"op": "save"|"load", "form": "full"|"sharded",
// "dir": ...} and answers each with {"seconds": ..., "bytes": ..., "peak_mib": [one per rank]}:
// the time between two barriers of the ranks, files synced, and the growth of resident memory.
#include <pthread.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iostream>
#include <map>
#include <string>
#include <vector>

#include "libfsdp/base/error.h"
#include "libfsdp/checkpoint/load_state.h"
#include "libfsdp/checkpoint/save_plan.h"
#include "libfsdp/io/json.h"

namespace fsdp {
namespace {

constexpr int kMaxRanks = 64;

/// What the ranks share.
struct Board {
  pthread_barrier_t barrier;
  std::array<double, kMaxRanks> peak_mib;
  std::array<int64_t, kMaxRanks> bytes;
  std::array<char, 4096> request;
};

int64_t status_kib(const char* key) {
  std::ifstream status("/proc/self/status");
  std::string line;
  while (std::getline(status, line)) {
    if (line.starts_with(key)) return std::stoll(line.substr(line.find(':') + 1));
  }
  return 0;
}

/// The rank's part of every tensor: as units are cut evenly, in one piece of memory.
class Shard {
 public:
  Shard(const io::Json& shapes, int64_t rank, int64_t ranks) {
    std::map<std::string, std::vector<checkpoint::TensorPart*>> units;
    for (const io::Json& item : shapes.elements()) {
      state.tensors.push_back({.name = item[0].as_string(),
                               .dtype = dtype_from_name(item[1].as_string()),
                               .shape = item[2].as<std::vector<int64_t>>()});
    }
    for (auto& part : state.tensors) units[unit_of(part.name)].push_back(&part);
    for (auto& [name, parts] : units) cut(parts, rank, ranks);
    memory_.resize(static_cast<size_t>(bytes_));
    uint64_t value = 0x9e3779b97f4a7c15U + static_cast<uint64_t>(rank);
    for (size_t i = 0; i + 8 <= memory_.size(); i += 8) {
      value = value * 6364136223846793005U + 1442695040888963407U;
      std::memcpy(memory_.data() + i, &value, 8);
    }
    connect();
  }

  uint64_t sum() const {
    uint64_t sum = 0, word = 0;
    for (size_t i = 0; i + 8 <= memory_.size(); i += 8) {
      std::memcpy(&word, memory_.data() + i, 8);
      sum = sum * 31 + word;
    }
    return sum;
  }
  void clear() { std::fill(memory_.begin(), memory_.end(), std::byte{0}); }

  checkpoint::StateDict state;

 private:
  static std::string unit_of(const std::string& name) {
    const size_t layer = name.find("layers.");
    return layer == std::string::npos ? "" : name.substr(0, name.find('.', layer + 7));
  }

  void cut(std::vector<checkpoint::TensorPart*>& parts, int64_t rank, int64_t ranks) {
    int64_t total = 0, start = 0;
    const auto numel = [](const checkpoint::TensorPart& part) {
      int64_t product = 1;
      for (const int64_t dim : part.shape) product *= dim;
      return product;
    };
    for (const auto* part : parts) total += numel(*part);
    for (auto* part : parts) {
      const int64_t begin = std::clamp<int64_t>(total * rank / ranks - start, 0, numel(*part));
      const int64_t end = std::clamp<int64_t>(total * (rank + 1) / ranks - start, 0, numel(*part));
      part->at = begin;
      part->numel = end - begin;
      start += numel(*part);
      bytes_ += part->numel * static_cast<int64_t>(dtype_bytes(part->dtype));
    }
  }

  void connect() {
    std::byte* at = memory_.data();
    for (auto& part : state.tensors) {
      const auto width = static_cast<int64_t>(dtype_bytes(part.dtype));
      part.read = [at, width](int64_t offset, std::span<std::byte> to) {
        std::memcpy(to.data(), at + offset * width, to.size());
      };
      part.write = [at, width](int64_t offset, std::span<const std::byte> from) {
        std::memcpy(at + offset * width, from.data(), from.size());
      };
      part.target = {at, static_cast<size_t>(part.numel * width)};
      part.source = part.target;
      at += part.numel * width;
    }
  }

  int64_t bytes_ = 0;
  std::vector<std::byte> memory_;
};

int64_t save(const Shard& shard, const io::Json& request, int64_t rank) {
  checkpoint::RangeWriter writer(request.get<std::string>("dir"));
  const checkpoint::SavePlan plan = request.get<std::string>("form") == "full"
                                        ? checkpoint::plan_full(shard.state)
                                        : checkpoint::plan_sharded(shard.state, rank);
  checkpoint::write_state(plan, shard.state, rank, writer);
  writer.finish();
  return writer.written_bytes();
}

int64_t load(const Shard& shard, const io::Json& request) {
  const auto stored = checkpoint::StoredTensors::open(request.get<std::string>("dir"));
  return checkpoint::load_state(shard.state, stored).loaded_bytes;
}

/// Answers requests until an empty one; what is loaded must be what was saved.
void run_rank(Board& board, const io::Json& shapes, int64_t rank, int64_t ranks) {
  Shard shard(shapes, rank, ranks);
  const uint64_t sum = shard.sum();
  pthread_barrier_wait(&board.barrier);  // Ready.
  for (;;) {
    pthread_barrier_wait(&board.barrier);  // A request is there.
    if (board.request[0] == '\0') return;
    const io::Json request = io::Json::parse(board.request.data(), "request");
    const bool is_load = request.get<std::string>("op") == "load";
    if (is_load) shard.clear();
    std::ofstream("/proc/self/clear_refs") << 5;  // The peak starts anew.
    const int64_t before = status_kib("VmRSS");
    const auto r = static_cast<size_t>(rank);
    pthread_barrier_wait(&board.barrier);
    board.bytes[r] = is_load ? load(shard, request) : save(shard, request, rank);
    pthread_barrier_wait(&board.barrier);
    board.peak_mib[r] = static_cast<double>(status_kib("VmHWM") - before) / 1024;
    check(!is_load || shard.sum() == sum, "what was loaded differs from what was saved");
    pthread_barrier_wait(&board.barrier);  // Results are there.
  }
}

/// The parent takes part in all barriers, so it sees the ranks' time.
std::string answer(Board& board, int64_t ranks) {
  pthread_barrier_wait(&board.barrier);
  pthread_barrier_wait(&board.barrier);
  const auto start = std::chrono::steady_clock::now();
  pthread_barrier_wait(&board.barrier);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  pthread_barrier_wait(&board.barrier);
  io::Json peaks = io::Json::array();
  int64_t bytes = 0;
  for (int64_t r = 0; r < ranks; ++r) {
    peaks.push_back(board.peak_mib[static_cast<size_t>(r)]);
    bytes += board.bytes[static_cast<size_t>(r)];
  }
  return io::Json::object({{"seconds", seconds.count()}, {"bytes", bytes}, {"peak_mib", peaks}})
      .dump();
}

Board* make_board(int64_t ranks) {
  void* memory =
      ::mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  check(memory != MAP_FAILED, "mmap");
  auto* board = new (memory) Board{};
  pthread_barrierattr_t attributes;
  pthread_barrierattr_init(&attributes);
  pthread_barrierattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
  pthread_barrier_init(&board->barrier, &attributes, static_cast<unsigned>(ranks + 1));
  return board;
}

void start_rank(Board& board, const io::Json& shapes, int64_t rank, int64_t ranks) {
  if (::fork() != 0) return;
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  try {
    run_rank(board, shapes, rank, ranks);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "rank %lld: %s\n", static_cast<long long>(rank), error.what());
    ::kill(::getppid(), SIGTERM);
    ::_exit(1);
  }
  ::_exit(0);
}

int run(int argc, char** argv) {
  if (argc != 3) throw ConfigError("usage: checkpoint_bench SHAPES.json RANKS");
  const io::Json shapes = io::Json::read(argv[1]);
  const int64_t ranks = std::stoll(argv[2]);
  check(ranks >= 1 && ranks <= kMaxRanks, "1 to 64 ranks");
  Board& board = *make_board(ranks);
  for (int64_t rank = 0; rank < ranks; ++rank) start_rank(board, shapes, rank, ranks);
  pthread_barrier_wait(&board.barrier);
  std::cout << "{\"ready\": true}" << std::endl;
  for (std::string line; std::getline(std::cin, line);) {
    check(line.size() < board.request.size(), "the request is too long");
    std::memcpy(board.request.data(), line.c_str(), line.size() + 1);
    std::cout << answer(board, ranks) << std::endl;
  }
  board.request[0] = '\0';
  pthread_barrier_wait(&board.barrier);
  while (::wait(nullptr) > 0) {
  }
  return 0;
}

}  // namespace
}  // namespace fsdp

int main(int argc, char** argv) {
  try {
    return fsdp::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
