// A training run of ResidualNet, plain and sharded, as functions: shared by the tests of the
// engine.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "libfsdp/shard/sharded.h"
#include "tests/ranks/residual_net.h"
#include "tests/support/sanitized.h"

namespace fsdp::testing {

inline constexpr int kUnits = 12;
inline constexpr int kSteps = kSanitized ? 5 : 20;  // A sanitizer takes fifty times as long.
inline constexpr double kRate = 1e-3;
inline constexpr double kMaxNorm = 1.0;

struct Trajectory {
  std::vector<double> losses;
  std::vector<double> norms;
  std::map<std::string, std::vector<float>> weights;
};

/// Equal on every call.
ResidualNet make_net();

struct MicroBatch {
  at::Tensor ids, targets;
};
/// Micro-batch m of step s: 5 to 8 tokens, a function of (s, m) alone.
MicroBatch micro_batch(int step, int m);

/// kSteps steps of `micro_batches` each in one process, with LibTorch's AdamW and clipping. In
/// bf16: the parameters are the half-up rounded fp32 masters, each micro-batch's bf16 gradients are
/// summed in fp32.
Trajectory train_plainly(int micro_batches, DType dtype = DType::kF32);

/// The same on threads: rank r takes the micro-batches a * ranks + r.
Trajectory train_sharded(int ranks, int micro_batches, const ShardOptions& options);

/// AdamW with decay 0.01, deterministic, two poisoned slots for the 12 units.
ShardOptions base_options();

std::shared_ptr<comm::Communicator> borrow(comm::Communicator& own);

/// All parameters from every rank's shards; thread-safe.
void collect_weights(ShardedCore& core, Trajectory& into);

/// Losses to `loss_tolerance` and each tensor's norm of difference to `weight_tolerance`, relative.
void expect_close(const Trajectory& got, const Trajectory& truth, double loss_tolerance,
                  double weight_tolerance);

}  // namespace fsdp::testing
