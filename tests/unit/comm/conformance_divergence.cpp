// Rank 1 does something else than the others: every rank gets an error that names both, and no data
// of the collective in question is used.
#include <algorithm>
#include <array>
#include <cctype>
#include <cstring>
#include <functional>
#include <string>
#include <utility>

#include "libfsdp/base/error.h"
#include "tests/unit/comm/conformance_cases.h"

namespace fsdp::comm {
namespace {

constexpr size_t kBytes = 4096;

/// One rank's side of a case: runs operations, and keeps what they write to.
struct Scratch {
  explicit Scratch(Communicator& c) : c(c) {}
  void allocate() {
    source = c.allocate(2 * kBytes, "source");
    std::memset(source->local(), 1, 2 * kBytes);
  }
  /// Memory for the next operation, filled with 42s.
  float* destination() {
    destinations.emplace_back(2 * kBytes * c.size() / sizeof(float), 42.0F);
    return destinations.back().data();
  }
  SymmetricSpan span(size_t bytes) const { return {source.get(), 0, bytes}; }

  Communicator& c;
  std::shared_ptr<SymmetricMemory> source;
  std::vector<std::vector<float>> destinations;
};

struct Operation {
  const char* name;
  void (*run)(Scratch&, const char* what, size_t bytes, DType dtype);
  bool has_size = true;
};

void gather(Scratch& s, const char* what, size_t bytes, DType) {
  s.c.wait_released(s.c.begin_gather(
      s.c.world(), s.span(bytes), reinterpret_cast<std::byte*>(s.destination()), make_tag(what)));
}

void fold(Scratch& s, const char* what, size_t bytes, DType dtype) {
  s.c.wait_released(s.c.begin_fold(s.c.world(), s.span(bytes), dtype, 0, {s.destination(), 4}, true,
                                   make_tag(what)));
}

void fence(Scratch& s, const char* what, size_t, DType) {
  s.c.wait_released(s.c.begin_fence(s.c.world(), make_tag(what)));
}

void exchange(Scratch& s, const char* what, size_t bytes, DType) {
  s.c.exchange(s.source->local(), bytes, s.destination(), make_tag(what));
}

void exchange_little(Scratch& s, const char* what, size_t bytes, DType dtype) {
  exchange(s, what, bytes / 64, dtype);
}

void broadcast(Scratch& s, const char* what, size_t bytes, DType) {
  s.c.broadcast(s.destination(), bytes, 0, make_tag(what));
}

void barrier(Scratch& s, const char* what, size_t, DType) { s.c.barrier(make_tag(what)); }

void allocate(Scratch& s, const char* what, size_t bytes, DType) { s.c.allocate(bytes, what); }

void allocate_shared(Scratch& s, const char* what, size_t bytes, DType) {
  if (!s.c.can_share(s.c.world())) return allocate(s, what, bytes, DType::kU8);
  s.c.allocate_shared(s.c.world(), bytes, what);
}

// Each is retyped into the one beside it.
constexpr std::array<Operation, 9> kOperations = {{{"Gather", gather},
                                                   {"Fold", fold},
                                                   {"Exchange", exchange},
                                                   {"ExchangeOfLittle", exchange_little},
                                                   {"Broadcast", broadcast},
                                                   {"Barrier", barrier, false},
                                                   {"Fence", fence, false},
                                                   {"Allocation", allocate},
                                                   {"SharedAllocation", allocate_shared}}};

enum class Divergence { kSkipped, kRepeated, kReordered, kResized, kRetyped };
constexpr std::array<const char*, 5> kDivergences = {"Skipped", "Repeated", "Reordered", "Resized",
                                                     "Retyped"};

/// What a rank does, and what the error must say of its side.
struct Program {
  std::vector<std::function<void(Scratch&)>> steps;
  std::string says;
};

struct Pair {
  Program usual;
  Program odd;
  size_t first_bad_destination = 0;
};

std::function<void(Scratch&)> step(const Operation& operation, const char* what,
                                   size_t bytes = kBytes, DType dtype = DType::kF32) {
  return [=](Scratch& s) { operation.run(s, what, bytes, dtype); };
}

Pair programs(size_t index, Divergence divergence, Communicator& c) {
  const Operation& one = kOperations[index];
  const auto subject = step(one, "subject");
  const auto other = step(kOperations[index == 0 ? 1 : 0], "other");
  switch (divergence) {
    case Divergence::kSkipped:
      return {{{subject, other}, "'subject'"}, {{other}, "'other'"}};
    case Divergence::kRepeated: {
      const size_t first =
          one.run == allocate || one.run == allocate_shared || !one.has_size ? 0 : 1;
      return {{{subject, other}, "'other'"}, {{subject, subject, other}, "'subject'"}, first};
    }
    case Divergence::kReordered:
      return {{{subject, other}, "'subject'"}, {{other, subject}, "'other'"}};
    case Divergence::kResized: {
      const size_t scale = one.run == exchange_little ? 64 : 1;
      return {{{subject}, cat(kBytes / scale, " bytes")},
              {{step(one, "subject", kBytes / 2)}, cat(kBytes / 2 / scale, " bytes")}};
    }
    case Divergence::kRetyped: {
      if (one.run == fold)
        return {{{subject}, "float32"}, {{step(one, "subject", kBytes, DType::kBF16)}, "bfloat16"}};
      const bool shares = one.run != allocate_shared || c.can_share(c.world());
      const Operation& odd = shares ? kOperations[(index + 8) % 9] : kOperations[0];
      return {{{subject}, "'subject'"}, {{step(odd, "subject")}, "'subject'"}};
    }
  }
  return {};
}

void expect_noticed(Communicator& c, const Pair& pair) {
  Scratch scratch(c);
  std::string text;
  try {
    scratch.allocate();  // A slow rank may learn of the others' errors even here.
    const Program& mine = c.rank() == 1 ? pair.odd : pair.usual;
    for (const auto& step : mine.steps) step(scratch);
    c.barrier(make_tag("end"));
  } catch (const CommError& e) {
    text = e.what();
  }
  for (const std::string& part : {std::string("rank 1 began "), pair.usual.says, pair.odd.says,
                                  std::string("began different collectives")}) {
    expect(text.find(part) != std::string::npos, cat("'", text, "' has '", part, "'"));
  }
  for (size_t i = pair.first_bad_destination; i < scratch.destinations.size(); ++i) {
    for (const float value : scratch.destinations[i])
      expect(value == 42.0F, cat("no data is used, destination ", i));
  }
}

template <size_t kOperation, size_t kDivergence>
void diverge(Communicator& c) {
  expect_noticed(c, programs(kOperation, static_cast<Divergence>(kDivergence), c));
}

template <size_t... kIndex>
std::vector<ConformanceCase> make_cases(std::index_sequence<kIndex...>) {
  std::vector<ConformanceCase> cases;
  const auto add = [&](size_t operation, size_t divergence, void (*run)(Communicator&)) {
    if (static_cast<Divergence>(divergence) == Divergence::kResized &&
        !kOperations[operation].has_size)
      return;
    cases.push_back({cat("A", kDivergences[divergence], kOperations[operation].name), run, 2});
  };
  (add(kIndex / 5, kIndex % 5, diverge<kIndex / 5, kIndex % 5>), ...);
  return cases;
}

}  // namespace

const std::vector<ConformanceCase>& divergence_cases() {
  static const std::vector<ConformanceCase> cases =
      make_cases(std::make_index_sequence<kOperations.size() * kDivergences.size()>());
  return cases;
}

}  // namespace fsdp::comm
