#include "libfsdp/engine/step_packet.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "libfsdp/base/error.h"

namespace fsdp::engine {
namespace {

size_t at(int index) { return static_cast<size_t>(index); }

}  // namespace

struct StepPacket::Head {
  int64_t micro_batches = 0;
  uint64_t schedule_hash = 0;
  int64_t non_finite = 0;
  double max_abs = 0;
  kernels::ExactSum::Limbs limbs{};
};

StepPacket::StepPacket(const std::vector<size_t>& segments) {
  for (const size_t count : segments) used_.emplace_back(count, uint8_t{0});
}

void StepPacket::begin(int64_t local_micro_batches, int micro_batches) {
  local_micro_batches_ = local_micro_batches;
  results_.assign(at(micro_batches), {});
  for (auto& flags : used_) std::fill(flags.begin(), flags.end(), uint8_t{0});
}

void StepPacket::add_result(int micro_batch, double loss_sum, int64_t trainable_tokens) {
  results_[at(micro_batch)] = {loss_sum, trainable_tokens};
}

const std::vector<std::byte>& StepPacket::write(const kernels::GradientSums& sums,
                                                uint64_t schedule_hash) {
  schedule_hash_ = schedule_hash;
  const Head head{.micro_batches = local_micro_batches_,
                  .schedule_hash = schedule_hash,
                  .non_finite = sums.non_finite,
                  .max_abs = static_cast<double>(sums.max_abs),
                  .limbs = sums.sum.limbs()};
  message_.clear();
  const auto append = [this](const void* data, size_t bytes) {
    const auto* begin = static_cast<const std::byte*>(data);
    message_.insert(message_.end(), begin, begin + bytes);
  };
  append(&head, sizeof head);
  append(results_.data(), results_.size() * sizeof(Result));
  for (const auto& flags : used_) append(flags.data(), flags.size());
  return message_;
}

std::byte* StepPacket::receive(int ranks) {
  messages_.resize(message_.size() * at(ranks));
  return messages_.data();
}

PacketContents& StepPacket::read(int ranks, int rank, int64_t step) {
  contents_ = {.loss_sum = 0,
               .trainable_tokens = 0,
               .micro_batches = 0,
               .sums = {},
               .non_finite = std::move(contents_.non_finite)};
  contents_.non_finite.assign(at(ranks), 0);
  kernels::ExactSum::Limbs limbs{};
  global_results_.resize(results_.size() * at(ranks));
  for (int peer = 0; peer < ranks; ++peer) {
    const std::byte* message = messages_.data() + message_.size() * at(peer);
    Head head;
    std::memcpy(&head, message, sizeof head);
    message += sizeof head;
    if (head.schedule_hash != schedule_hash_) {
      throw CommError(cat("rank ", peer, " runs another schedule than rank ", rank, " at step ",
                          step, ": their models call their units in different orders"));
    }
    contents_.micro_batches += head.micro_batches;
    contents_.sums.non_finite += head.non_finite;
    contents_.sums.max_abs = std::max(contents_.sums.max_abs, static_cast<float>(head.max_abs));
    contents_.non_finite[at(peer)] = head.non_finite;
    for (size_t i = 0; i < limbs.size(); ++i) limbs[i] += head.limbs[i];
    for (size_t a = 0; a < results_.size(); ++a, message += sizeof(Result)) {
      Result& result = global_results_[a * at(ranks) + at(peer)];
      std::memcpy(&result, message, sizeof(Result));
      if (!std::isfinite(result.loss_sum)) ++contents_.non_finite[at(peer)];
    }
    for (auto& flags : used_) {
      for (uint8_t& flag : flags) flag |= static_cast<uint8_t>(*message++);
    }
  }
  contents_.sums.sum = kernels::ExactSum::from_limbs(limbs);
  for (const Result& result : global_results_) {  // In the order of a * ranks + rank.
    contents_.loss_sum += result.loss_sum;
    contents_.trainable_tokens += result.trainable_tokens;
  }
  return contents_;
}

}  // namespace fsdp::engine
