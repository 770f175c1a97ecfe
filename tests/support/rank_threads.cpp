#include "tests/support/rank_threads.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <thread>
#include <vector>

#include "libfsdp/base/error.h"
#include "libfsdp/base/log.h"
#include "libfsdp/comm/host/thread_world.h"

namespace fsdp::testing {
namespace {

struct Failure {
  int rank;
  bool consequence;
  std::string text;
};

void run_one(comm::Communicator& communicator, const std::function<void(comm::Communicator&)>& fn,
             std::vector<Failure>& failures) {
  const int rank = communicator.rank();
  log::set_rank(rank);
  try {
    fn(communicator);
  } catch (const CommError& e) {
    failures.push_back({rank, true, e.what()});
  } catch (const std::exception& e) {
    failures.push_back({rank, false, e.what()});
  } catch (...) {
    failures.push_back({rank, false, "an exception that is no std::exception"});
  }
  log::set_rank(-1);
  if (!failures.empty()) communicator.abort(failures.front().text);
}

std::vector<Failure> failures_of(int world, const std::function<void(comm::Communicator&)>& fn,
                                 const comm::CommOptions& options) {
  comm::ThreadWorld ranks(world, options);
  std::vector<std::unique_ptr<comm::Communicator>> communicators;
  for (int rank = 0; rank < world; ++rank) communicators.push_back(ranks.communicator(rank));
  std::vector<std::vector<Failure>> failures(world);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < world; ++rank) {
    threads.emplace_back([&, rank] {
      run_one(*communicators[rank], fn, failures[rank]);
      communicators[rank]
          .reset();  // Peers that still wait for this rank must see that it has left.
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::vector<Failure> all;
  for (const auto& of_rank : failures) all.insert(all.end(), of_rank.begin(), of_rank.end());
  std::stable_partition(all.begin(), all.end(),
                        [](const Failure& one) { return !one.consequence; });
  return all;
}

}  // namespace

std::string run_ranks_quietly(int world, const std::function<void(comm::Communicator&)>& fn,
                              const comm::CommOptions& options) {
  std::string text;
  for (const Failure& one : failures_of(world, fn, options))
    text += cat("rank ", one.rank, ": ", one.text, "\n");
  return text;
}

void run_ranks(int world, const std::function<void(comm::Communicator&)>& fn,
               const comm::CommOptions& options) {
  for (const Failure& one : failures_of(world, fn, options)) {
    ADD_FAILURE() << "rank " << one.rank << " of " << world << ": " << one.text;
  }
}

}  // namespace fsdp::testing
