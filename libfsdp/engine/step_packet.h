// The small message that ends a step: losses, tokens, sums over gradients, parameters that were
// used, the schedule's fingerprint; one from every rank to every rank.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "libfsdp/kernels/gradient_sums.h"

namespace fsdp::engine {

/// What all ranks know after the exchange.
struct PacketContents {
  double loss_sum = 0;  ///< Summed in the order of micro-batch a * ranks + rank.
  int64_t trainable_tokens = 0;
  int64_t micro_batches = 0;
  kernels::GradientSums sums;
  std::vector<int64_t> non_finite;  ///< By rank: elements of its gradient shards, losses included.
};

class StepPacket {
 public:
  /// `segments`: by bucket.
  explicit StepPacket(const std::vector<size_t>& segments);

  /// Before the first micro-batch.
  void begin(int64_t local_micro_batches, int micro_batches);
  void add_result(int micro_batch, double loss_sum, int64_t trainable_tokens);
  void mark_used(int bucket, int segment) {
    used_[static_cast<size_t>(bucket)][static_cast<size_t>(segment)] = 1;
  }
  /// Whether any rank used the parameter in this step; right after read().
  bool used(int bucket, int segment) const {
    return used_[static_cast<size_t>(bucket)][static_cast<size_t>(segment)] != 0;
  }

  /// This rank's message: equally long on all ranks.
  const std::vector<std::byte>& write(const kernels::GradientSums& sums, uint64_t schedule_hash);
  /// Room for the messages of `ranks` ranks.
  std::byte* receive(int ranks);
  /// Reads what receive() holds. Throws CommError that names a rank with another schedule.
  PacketContents& read(int ranks, int rank, int64_t step);

 private:
  struct Result {
    double loss_sum = 0;
    int64_t trainable_tokens = 0;
  };
  struct Head;

  int64_t local_micro_batches_ = 0;
  uint64_t schedule_hash_ = 0;
  std::vector<Result> results_;             // By micro-batch of this rank.
  std::vector<Result> global_results_;      // By global micro-batch.
  std::vector<std::vector<uint8_t>> used_;  // By bucket and segment: in this step.
  std::vector<std::byte> message_;
  std::vector<std::byte> messages_;
  PacketContents contents_;
};

}  // namespace fsdp::engine
