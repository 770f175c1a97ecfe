#include <chrono>
#include <functional>
#include <thread>

#include "libfsdp/base/error.h"
#include "tests/support/sanitized.h"
#include "tests/unit/comm/conformance_cases.h"

namespace fsdp::comm {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// The text of the CommError that fn must throw, which must contain every one of `parts`.
std::string expect_error(const std::function<void()>& fn, const std::vector<std::string>& parts) {
  std::string text;
  try {
    fn();
  } catch (const CommError& e) {
    text = e.what();
  }
  expect(!text.empty(), "a CommError is thrown");
  for (const std::string& part : parts)
    expect(text.find(part) != std::string::npos, cat("'", text, "' has '", part, "'"));
  return text;
}

constexpr size_t kBytes = 4096;

/// Runs `odd` on rank 1 and `usual` on the others, of which none may end without an error that
/// names both.
void expect_difference(Communicator& c,
                       const std::function<Ticket(SymmetricMemory&, float*)>& usual,
                       const std::function<Ticket(SymmetricMemory&, float*)>& odd,
                       const std::string& usual_text, const std::string& odd_text) {
  const auto memory = c.allocate(2 * kBytes, "source");
  std::vector<float> destination(2 * kBytes * c.size() / sizeof(float), 42.0F);
  // A slow rank may learn of it while it is still at the barrier.
  expect_error(
      [&] {
        c.barrier(make_tag("ready"));
        c.finish((c.rank() == 1 ? odd : usual)(*memory, destination.data()));
      },
      {"rank 1 began", usual_text, odd_text, "same order"});
  for (const float value : destination) expect(value == 42.0F, "no data is used");
  expect_error([&] { c.barrier(make_tag("afterwards")); }, {"failed"});
  expect_error([&] { c.allocate(1, "afterwards"); }, {"failed"});
}

Ticket fold_of(Communicator& c, SymmetricMemory& memory, float* to, DType dtype, size_t bytes,
               const Tag& tag, size_t offset = 0) {
  return c.begin_fold(c.world(), {&memory, offset, bytes}, dtype, 0, {to, 4}, true, tag);
}

void another_kind_is_an_error(Communicator& c) {
  expect_difference(
      c,
      [&](auto& m, float* to) {
        return fold_of(c, m, to, DType::kF32, kBytes, make_tag("grads", 7, 3));
      },
      [&](auto& m, float* to) {
        return c.begin_gather(c.world(), {&m, 0, kBytes}, reinterpret_cast<std::byte*>(to),
                              make_tag("grads", 7, 3));
      },
      "fold 'grads' of unit 3 at step 7 (float32, 4096 bytes)",
      "gather 'grads' of unit 3 at step 7 (4096 bytes)");
}

void another_size_is_an_error(Communicator& c) {
  expect_difference(
      c, [&](auto& m, float* to) { return fold_of(c, m, to, DType::kF32, kBytes, make_tag("g")); },
      [&](auto& m, float* to) { return fold_of(c, m, to, DType::kF32, kBytes - 4, make_tag("g")); },
      "4096 bytes", "4092 bytes");
}

void another_dtype_is_an_error(Communicator& c) {
  expect_difference(
      c, [&](auto& m, float* to) { return fold_of(c, m, to, DType::kF32, kBytes, make_tag("g")); },
      [&](auto& m, float* to) { return fold_of(c, m, to, DType::kBF16, kBytes, make_tag("g")); },
      "float32", "bfloat16");
}

void another_unit_is_an_error(Communicator& c) {
  expect_difference(
      c,
      [&](auto& m, float* to) {
        return fold_of(c, m, to, DType::kF32, kBytes, make_tag("g", 1, 5));
      },
      [&](auto& m, float* to) {
        return fold_of(c, m, to, DType::kF32, kBytes, make_tag("g", 1, 6));
      },
      "unit 5", "unit 6");
}

void another_step_is_an_error(Communicator& c) {
  expect_difference(
      c,
      [&](auto& m, float* to) {
        return fold_of(c, m, to, DType::kF32, kBytes, make_tag("g", 10, 5));
      },
      [&](auto& m, float* to) {
        return fold_of(c, m, to, DType::kF32, kBytes, make_tag("g", 11, 5));
      },
      "step 10", "step 11");
}

void another_source_is_an_error(Communicator& c) {
  expect_difference(
      c, [&](auto& m, float* to) { return fold_of(c, m, to, DType::kF32, kBytes, make_tag("g")); },
      [&](auto& m, float* to) { return fold_of(c, m, to, DType::kF32, kBytes, make_tag("g"), 64); },
      "offset 0", "offset 64");
}

void a_skipped_collective_is_an_error(Communicator& c) {
  const auto memory = c.allocate(kBytes, "gradients");
  std::vector<float> sums(4);
  expect_error(
      [&] {
        for (int64_t step = 0; step < 10; ++step) {
          for (int unit = 0; unit < 4; ++unit) {
            if (c.rank() == 1 && step == 6 && unit == 2) continue;
            c.wait_released(fold_of(c, *memory, sums.data(), DType::kF32, kBytes,
                                    make_tag("reduce", step, unit)));
          }
        }
      },
      {"of unit 2 at step 6", "of unit 3 at step 6", "rank 1"});
}

void an_abort_reaches_all_with_its_reason(Communicator& c) {
  c.barrier(make_tag("ready"));
  const auto start = Clock::now();
  if (c.rank() == 1) {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    c.abort("the dog ate the data");
  }
  expect_error([&] { c.barrier(make_tag("never")); }, {"rank 1 failed: the dog ate the data"});
  expect(seconds_since(start) < 0.5, "noticed within half a second");
  expect_error([&] { c.sum(1, "afterwards"); }, {"the dog ate the data"});
}

void a_rank_that_leaves_is_an_error_for_who_waits(Communicator& c) {
  c.report_progress(12, "backward");
  c.barrier(make_tag("ready", 11));
  const auto start = Clock::now();
  const auto last = [&] { c.barrier(make_tag("last", 12)); };
  if (c.rank() == 1) return last();
  expect_error(
      [&] {
        last();
        c.barrier(make_tag("never", 13));
      },
      {"rank 1 has left", "barrier 'never' at step 13", "step 12, phase backward"});
  expect(seconds_since(start) < 1, "noticed within a second");
}

// Ranks join under it, too, which a sanitizer makes slow.
constexpr double kTimeoutSeconds = testing::kSanitized ? 6 : 0.4;

void a_missing_rank_is_an_error_after_the_timeout(Communicator& c) {
  c.barrier(make_tag("ready"));
  const std::chrono::duration<double> late(kTimeoutSeconds + 1.1);
  if (c.rank() == 1) std::this_thread::sleep_for(late);
  const auto start = Clock::now();
  expect_error([&] { c.barrier(make_tag("late")); },
               {cat("rank 1 did not come within ", kTimeoutSeconds, " s")});
  expect(seconds_since(start) < late.count() - 0.1, "noticed after the time-out");
}

void too_large_an_allocation_is_refused_on_all(Communicator& c) {
  for (int i = 0; i < 3; ++i) {
    std::string text;
    try {
      c.allocate(size_t{1} << 60, "parameters");
    } catch (const HostResourceError& e) {
      text = e.what();
    }
    for (int r = 0; r < c.size(); ++r) {
      const std::string part = cat("rank ", r, ": [comm] cannot");
      expect(text.find(part) != std::string::npos, cat("'", text, "' has '", part, "'"));
    }
    expect(text.find("'parameters'") != std::string::npos, "the label is named");
    expect(c.sum(1, "still usable") == c.size(), "the communicator is still usable");
    expect(c.allocate(100, "small")->bytes() == 100, "and gives memory");
  }
}

void wrong_use_is_an_internal_error(Communicator& c) {
  const auto memory = c.allocate(100, "source");
  const auto refused = [&](const std::function<void()>& fn) {
    bool thrown = false;
    try {
      fn();
    } catch (const InternalError&) {
      thrown = true;
    }
    expect(thrown, "an InternalError is thrown");
  };
  std::vector<float> sums(26);
  refused([&] { c.begin_gather(c.world(), {memory.get(), 60, 41}, nullptr, make_tag("beyond")); });
  refused([&] {
    c.begin_fold(c.world(), {memory.get(), 0, 100}, DType::kF32, 0, sums, false, make_tag("more"));
  });
  refused([&] {
    c.begin_fold(c.world(), {memory.get(), 0, 100}, DType::kF32, -1, {}, false, make_tag("less"));
  });
  refused([&] { c.begin_gather({c.size()}, {memory.get(), 0, 4}, nullptr, make_tag("stranger")); });
  refused([&] { c.finish({1'000'000}); });
  refused([&] { c.broadcast(nullptr, 0, c.size(), make_tag("no root")); });
  c.barrier(make_tag("still in step"));
}

}  // namespace

const std::vector<ConformanceCase>& failure_cases() {
  static const std::vector<ConformanceCase> cases = {
      {"AnotherKindIsAnError", another_kind_is_an_error, 2},
      {"AnotherSizeIsAnError", another_size_is_an_error, 2},
      {"AnotherDtypeIsAnError", another_dtype_is_an_error, 2},
      {"AnotherUnitIsAnError", another_unit_is_an_error, 2},
      {"AnotherStepIsAnError", another_step_is_an_error, 2},
      {"AnotherSourceIsAnError", another_source_is_an_error, 2},
      {"ASkippedCollectiveIsAnError", a_skipped_collective_is_an_error, 2},
      {"AnAbortReachesAllWithItsReason", an_abort_reaches_all_with_its_reason, 2},
      {"ARankThatLeavesIsAnErrorForWhoWaits", a_rank_that_leaves_is_an_error_for_who_waits, 2},
      {"AMissingRankIsAnErrorAfterTheTimeout",
       a_missing_rank_is_an_error_after_the_timeout,
       2,
       {.timeout_s = kTimeoutSeconds}},
      {"TooLargeAnAllocationIsRefusedOnAll", too_large_an_allocation_is_refused_on_all},
      {"WrongUseIsAnInternalError", wrong_use_is_an_internal_error},
  };
  return cases;
}

}  // namespace fsdp::comm
