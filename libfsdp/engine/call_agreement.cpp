#include "libfsdp/engine/call_agreement.h"

#include <algorithm>
#include <string>
#include <utility>

#include "libfsdp/base/error.h"

namespace fsdp::engine {
namespace {

/// What precedes a rank's calls in its message.
enum Head : size_t { kNumWords, kMicroBatches, kTokens, kHeadWords };

// Calls as (unit, parent, graph).
std::vector<int64_t> words_of(const std::vector<plan::Call>& calls) {
  std::vector<int64_t> words;
  for (const plan::Call& call : calls)
    words.insert(words.end(), {call.unit, call.parent, call.graph});
  return words;
}

std::vector<plan::Call> calls_of(const std::vector<int64_t>& words) {
  std::vector<plan::Call> calls;
  for (size_t i = 0; i + 2 < words.size(); i += 3) {
    calls.push_back({.unit = static_cast<int>(words[i]),
                     .parent = static_cast<int>(words[i + 1]),
                     .graph = words[i + 2] != 0});
  }
  return calls;
}

[[noreturn]] void throw_different_calls(const plan::Layout& layout, int64_t step,
                                        const std::vector<int64_t>& first, int first_rank,
                                        const std::vector<int64_t>& other, int rank) {
  const auto [a, b] = std::mismatch(first.begin(), first.end(), other.begin(), other.end());
  const auto call = static_cast<size_t>(a - first.begin()) / 3;
  const auto text = [&](const std::vector<int64_t>& calls) {
    return call * 3 < calls.size()
               ? cat("calls ", unit_text(layout, static_cast<int>(calls[call * 3])))
               : std::string("calls nothing more");
  };
  throw CommError(cat("step ", step, ": the ranks call units in different orders: as call ", call,
                      " of a micro-batch rank ", first_rank, " ", text(first), ", rank ", rank, " ",
                      text(other),
                      ". Hint: only where every rank has seen the same calls before may some ranks "
                      "leave some of them out."));
}

}  // namespace

std::string unit_text(const plan::Layout& layout, int unit) {
  return unit == 0 ? "the model" : cat("unit '", layout.units[static_cast<size_t>(unit)].name, "'");
}

AgreedCalls agree_on_calls(comm::Communicator& comm, const plan::Layout& layout,
                           const RankCalls& mine, int64_t step) {
  const std::vector<int64_t> words = words_of(mine.calls);
  const int64_t own_words = static_cast<int64_t>(words.size());
  std::vector<int64_t> message = {own_words, mine.micro_batches, mine.trainable_tokens};
  message.insert(message.end(), words.begin(), words.end());
  message.resize(kHeadWords + static_cast<size_t>(comm.maximum(own_words, "number of calls")));
  std::vector<int64_t> all(message.size() * static_cast<size_t>(comm.size()));
  comm.exchange(message.data(), message.size() * sizeof(int64_t), all.data(),
                comm::make_tag("order of calls", step));
  std::vector<int64_t> agreed;
  int agreed_rank = -1;
  int64_t first_tokens = 0;
  int64_t micro_batches = 0;
  for (int rank = 0; rank < comm.size(); ++rank) {
    const int64_t* const from = all.data() + message.size() * static_cast<size_t>(rank);
    micro_batches += from[kMicroBatches];
    if (from[kNumWords] == 0) continue;
    std::vector<int64_t> theirs(from + kHeadWords, from + kHeadWords + from[kNumWords]);
    if (agreed_rank < 0) {
      first_tokens = from[kTokens];
    } else if (theirs != agreed) {
      throw_different_calls(layout, step, agreed, agreed_rank, theirs, rank);
    }
    agreed = std::move(theirs);
    agreed_rank = rank;
  }
  return {.calls = calls_of(agreed), .expected_tokens = first_tokens * micro_batches};
}

}  // namespace fsdp::engine
