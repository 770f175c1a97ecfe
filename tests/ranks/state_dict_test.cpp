// The state of a sharded module at one number of ranks and strategy, loaded at another: the same
// bits.

#include <gtest/gtest.h>

#include <cstdlib>
#include <mutex>
#include <thread>

#include "libfsdp/base/error.h"
#include "libfsdp/comm/device/device_transport.h"
#include "libfsdp/comm/host/thread_world.h"
#include "libfsdp/shard/state_dict.h"
#include "tests/ranks/training_run.h"
#include "tests/support/rank_threads.h"

namespace fsdp::testing {
namespace {

/// Whole tensors in memory, filled and read by the ranks' pieces: what a file would be.
class MemoryFile {
 public:
  struct Tensor {
    DType dtype;
    std::vector<int64_t> shape;
    std::vector<std::byte> bytes;
    std::vector<int> writes;  // By element.
    bool operator==(const Tensor& other) const {
      return dtype == other.dtype && shape == other.shape && bytes == other.bytes;
    }
  };

  void save(const checkpoint::StateDict& state) {
    const std::lock_guard lock(mutex_);
    for (const checkpoint::TensorPart& part : state.tensors) {
      Tensor& whole = tensors_[part.name];
      const auto item = static_cast<int64_t>(dtype_bytes(part.dtype));
      int64_t numel = 1;
      for (const int64_t dim : part.shape) numel *= dim;
      whole.dtype = part.dtype;
      whole.shape = part.shape;
      whole.bytes.resize(static_cast<size_t>(numel * item));
      whole.writes.resize(static_cast<size_t>(numel));
      if (!part.saved) continue;
      constexpr int64_t kOdd = 1000;  // Pieces in several parts.
      for (int64_t at = 0; at < part.numel; at += kOdd) {
        const int64_t n = std::min(kOdd, part.numel - at);
        part.read(at, std::span(whole.bytes)
                          .subspan(static_cast<size_t>((part.at + at) * item),
                                   static_cast<size_t>(n * item)));
        for (int64_t i = 0; i < n; ++i) ++whole.writes[static_cast<size_t>(part.at + at + i)];
      }
    }
  }

  void load(const checkpoint::StateDict& state) {
    for (const checkpoint::TensorPart& part : state.tensors) {
      const Tensor& whole = tensors_.at(part.name);
      ASSERT_EQ(whole.dtype, part.dtype) << part.name;
      ASSERT_EQ(whole.shape, part.shape) << part.name;
      const auto item = static_cast<int64_t>(dtype_bytes(part.dtype));
      for (int64_t at = 0; at < part.numel; at += 700) {
        const int64_t n = std::min<int64_t>(700, part.numel - at);
        part.write(at, std::span(whole.bytes)
                           .subspan(static_cast<size_t>((part.at + at) * item),
                                    static_cast<size_t>(n * item)));
      }
    }
  }

  void expect_covered_once() const {
    for (const auto& [name, tensor] : tensors_) {
      for (const int writes : tensor.writes) ASSERT_EQ(writes, 1) << name;
    }
  }

  std::map<std::string, Tensor> tensors_;

 private:
  std::mutex mutex_;
};

struct SavedState {
  MemoryFile model, optimizer;
  std::vector<double> losses;  // Of the steps that follow.
  MemoryFile model_after, optimizer_after;
  // What is no tensor; equal on all ranks.
  int64_t updates = 0;
  optim::LossScalerState scaler;
};

// Before anything asks for CUDA.
const bool kUsesStandIn = setenv("FSDP_CUDA_LIBRARY", FSDP_CUDA_STAND_IN, 1) == 0;

struct Where {
  int ranks = 1;
  plan::Strategy strategy = plan::Strategy::kFullShard;
  bool slots = true;
  int group = 0;
  bool device = false;  // A stand-in's (tests/support/cuda_stand_in.cpp).
  plan::Offload offload = plan::Offload::kNone;
};

/// run_ranks(), each rank with its memory on a device.
void run_ranks_on_devices(int ranks, const std::function<void(comm::Communicator&)>& fn) {
  comm::ThreadWorld world(ranks);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks; ++rank) {
    threads.emplace_back([&, rank] {
      std::unique_ptr<comm::Communicator> own;
      try {
        own = comm::on_device(world.communicator(rank), {}, "cuda_ipc");
        fn(*own);
      } catch (const std::exception& e) {
        ADD_FAILURE() << "rank " << rank << ": " << e.what();
        if (own) own->abort(e.what());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

std::string text(const Where& where) {
  return cat(plan::strategy_name(where.strategy), where.slots ? "" : " shared home", " on ",
             where.ranks, where.group > 0 ? cat(" groups of ", where.group) : "",
             where.device ? " on devices" : "",
             where.offload == plan::Offload::kNone ? "" : ", offloaded");
}

constexpr int kAll = 4;  // Micro-batches of a step, over all ranks.

template <class Model>
double train_step(Model& model, int step) {
  const int rank = model.comm().rank(), ranks = model.comm().size();
  Step open = model.begin_step((kAll - rank + ranks - 1) / ranks);
  for (int m = rank; m < kAll; m += ranks) {
    const MicroBatch batch = micro_batch(step, m);
    open.backward(model.run([&](auto& net) { return net.loss(batch.ids, batch.targets); }),
                  batch.ids.numel());
  }
  return open.finish({.learning_rate = 1e-2, .max_grad_norm = kMaxNorm}).loss;
}

ShardOptions at_place(ShardOptions options, const Where& where) {
  options.strategy = where.strategy;
  options.placement.force_slot_home = where.slots;
  options.placement.slots = where.slots ? 2 : 0;
  options.placement.sharding_group_size = where.group;
  options.poison = where.slots;
  options.placement.offload = where.offload;
  return options;
}

ResidualNet small_net(int seed) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  torch::manual_seed(static_cast<uint64_t>(seed));
  return ResidualNet(3);
}

/// Trains from `begin` (or from the start, without) and saves before and after two more steps.
void run(const Where& where, const ShardOptions& base, const SavedState* begin, SavedState& into) {
  SCOPED_TRACE(text(where));
  const auto on_ranks = [&](const std::function<void(comm::Communicator&)>& rank) {
    where.device ? run_ranks_on_devices(where.ranks, rank) : run_ranks(where.ranks, rank);
  };
  on_ranks([&](comm::Communicator& own) {
    // A loaded run starts from other weights: what is not loaded shows.
    auto model = fully_shard(small_net(begin ? 99 : 1), borrow(own), at_place(base, where));
    if (begin) {
      auto& file = const_cast<SavedState&>(*begin);
      file.model.load(model_state(model.core()));
      file.optimizer.load(optimizer_state(model.core()));
      model.core().publish();
      model.core().executor().set_progress(2, begin->updates);
      if (optim::LossScaler* scaler = model.core().loss_scaler()) scaler->restore(begin->scaler);
    } else {
      for (int step = 0; step < 2; ++step) train_step(model, step);
    }
    into.model.save(model_state(model.core()));
    into.optimizer.save(optimizer_state(model.core()));
    if (own.rank() == 0) {
      into.updates = model.core().executor().updates();
      if (optim::LossScaler* scaler = model.core().loss_scaler()) into.scaler = scaler->state();
    }
    for (int step = 2; step < 4; ++step) {
      const double loss = train_step(model, step);
      if (own.rank() == 0) into.losses.push_back(loss);
    }
    into.model_after.save(model_state(model.core()));
    into.optimizer_after.save(optimizer_state(model.core()));
  });
  into.model.expect_covered_once();
  into.optimizer.expect_covered_once();
}

std::vector<Where> places() {
  using plan::Strategy;
  std::vector<Where> all;
  for (const int ranks : {1, 2, 3, 4, 8}) {
    all.push_back({ranks, Strategy::kFullShard, true});
    all.push_back({ranks, Strategy::kFullShard, false});
    all.push_back({ranks, Strategy::kShardGradOp, true});
    all.push_back({ranks, Strategy::kNoShard, true});
    if (ranks % 2 == 0) all.push_back({ranks, Strategy::kHybridShard, true, 2});
  }
  all.push_back({2, Strategy::kFullShard, true, 0, true});
  all.push_back({4, Strategy::kHybridShard, true, 2, true});
  all.push_back({2, Strategy::kFullShard, true, 0, true, plan::Offload::kParameters});
  all.push_back({3, Strategy::kFullShard, true, 0, true, plan::Offload::kOptimizer});
  return all;
}

void expect_equal(const SavedState& got, const SavedState& truth) {
  EXPECT_EQ(got.model.tensors_, truth.model.tensors_);
  EXPECT_EQ(got.optimizer.tensors_, truth.optimizer.tensors_);
  EXPECT_EQ(got.losses, truth.losses);
  EXPECT_EQ(got.model_after.tensors_, truth.model_after.tensors_);
  EXPECT_EQ(got.optimizer_after.tensors_, truth.optimizer_after.tensors_);
}

struct Precision {
  const char* name;
  ShardOptions options;
};
void PrintTo(const Precision& one, std::ostream* out) { *out << one.name; }

ShardOptions with(std::optional<DType> dtype, engine::MasterPrecision master,
                  optim::OptimizerOptions optimizer) {
  ShardOptions options = base_options();
  options.param_dtype = dtype;
  options.master = master;
  options.optimizer = optimizer;
  return options;
}

std::vector<Precision> precisions() {
  using engine::MasterPrecision;
  using optim::OptimizerKind;
  const optim::OptimizerOptions momentum{.kind = OptimizerKind::kSgd, .momentum = 0.9};
  optim::OptimizerOptions kahan{.kind = OptimizerKind::kAnyPrecisionAdamW};
  kahan.use_kahan_summation = true;
  kahan.variance_dtype = DType::kBF16;
  const optim::OptimizerOptions quantized{.kind = OptimizerKind::kAdamW8bit, .min_8bit_size = 1000};
  optim::OptimizerOptions stochastic{.kind = OptimizerKind::kAnyPrecisionAdamW};
  stochastic.stochastic_rounding = true;
  return {{"Fp32", with(DType::kF32, MasterPrecision::kSplit, {})},
          {"Bf16Split", with(DType::kBF16, MasterPrecision::kSplit, {})},
          {"Bf16PlainMaster", with(DType::kBF16, MasterPrecision::kF32, {})},
          {"Bf16Kahan", with(DType::kBF16, MasterPrecision::kNone, kahan)},
          {"Bf16Stochastic", with(DType::kBF16, MasterPrecision::kNone, stochastic)},
          {"Fp16", with(DType::kF16, MasterPrecision::kSplit, {})},
          {"Fp32Adam8bit", with(DType::kF32, MasterPrecision::kSplit, quantized)},
          {"Bf16Adam8bit", with(DType::kBF16, MasterPrecision::kSplit, quantized)},
          {"Fp32Momentum", with(DType::kF32, MasterPrecision::kSplit, momentum)}};
}

class StateGrid : public ::testing::TestWithParam<Precision> {};

TEST_P(StateGrid, IsEqualAtEveryPlaceAndGoesOnWithTheSameBits) {
  const bool all = std::getenv("FSDP_TEST_SCALE") != nullptr;
  SavedState truth;
  run({}, GetParam().options, nullptr, truth);
  const std::vector<Where> where = places();
  for (size_t from = 0; from < where.size(); ++from) {
    SavedState saved;
    run(where[from], GetParam().options, nullptr, saved);
    expect_equal(saved, truth);
    for (size_t to = 0; to < where.size(); ++to) {
      if (!all && to != (5 * from + 3) % where.size()) continue;
      SavedState loaded;
      run(where[to], GetParam().options, &saved, loaded);
      SCOPED_TRACE(cat(text(where[from]), " to ", text(where[to])));
      expect_equal(loaded, truth);
      if (HasFailure()) return;
    }
  }
}
INSTANTIATE_TEST_SUITE_P(All, StateGrid, ::testing::ValuesIn(precisions()),
                         [](const auto& info) { return info.param.name; });

TEST(StateDict, NamesTensorsAsDistributedCheckpointDoes) {
  run_ranks(2, [](comm::Communicator& own) {
    ShardOptions options = base_options();
    options.param_dtype = DType::kBF16;
    auto model = fully_shard(small_net(1), borrow(own), options);
    std::map<std::string, checkpoint::TensorPart> by_name;
    for (const auto& part : optimizer_state(model.core()).tensors) by_name[part.name] = part;
    for (const std::string what : {"exp_avg", "exp_avg_sq", "master"}) {
      const auto& part = by_name.at("state.block1.up.weight." + what);
      EXPECT_EQ(part.dtype, DType::kF32);
      EXPECT_EQ(part.shape, (std::vector<int64_t>{53, 24}));
    }
    EXPECT_TRUE(by_name.at("state.block1.up.weight.step").shape.empty());
    EXPECT_EQ(by_name.size(), 4 * model.core().parameters().size());
  });
}

struct CountedImpl : torch::nn::Module {
  torch::nn::Linear linear{4, 4};
  at::Tensor seen;
  CountedImpl() {
    register_module("linear", linear);
    seen = register_buffer("seen", at::zeros({2}, at::kLong));
  }
  at::Tensor forward(const at::Tensor& x) { return linear(x); }
};
TORCH_MODULE(Counted);

TEST(StateDict, HoldsBuffersOfTheFirstRank) {
  MemoryFile file;
  run_ranks(2, [&](comm::Communicator& own) {
    Counted net;
    net->seen.fill_(own.rank() == 0 ? 7 : 8);
    auto model = fully_shard(net, borrow(own), base_options());
    file.save(model_state(model.core()));
  });
  file.expect_covered_once();
  run_ranks(3, [&](comm::Communicator& own) {
    Counted net;
    auto model = fully_shard(net, borrow(own), base_options());
    file.load(model_state(model.core()));
    model.core().publish();
    EXPECT_EQ(net->seen[1].item<int64_t>(), 7);
  });
}

}  // namespace
}  // namespace fsdp::testing
