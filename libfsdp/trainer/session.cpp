#include "libfsdp/trainer/session.h"

#include "libfsdp/device/host_allocator.h"
#include "libfsdp/models/registry.h"
#include "libfsdp/shard/shell.h"
#include "libfsdp/shard/state.h"

namespace fsdp::trainer {
namespace {

constexpr int kDecayed = 0;
constexpr int kNotDecayed = 1;

/// Norm weights and biases are the parameters with fewer than two dimensions.
int decay_group(const std::string&, c10::IntArrayRef shape) {
  return shape.size() < 2 ? kNotDecayed : kDecayed;
}

}  // namespace

ShardOptions shard_options(const RankOptions& options) {
  ShardOptions shard;
  shard.strategy = plan::strategy_from_name(options.sharding_strategy);
  shard.param_dtype = options.param_dtype();
  if (options.pure_bf16) shard.master = engine::MasterPrecision::kNone;
  shard.deterministic = options.deterministic;
  shard.placement.sharding_group_size = static_cast<int>(options.sharding_group_size);
  shard.placement.slots = static_cast<int>(options.gather_slots.value_or(0));
  shard.placement.kept_units = static_cast<int>(options.kept_units.value_or(-1));
  constexpr double kGib = 1024.0 * 1024.0 * 1024.0;
  shard.placement.memory_budget_bytes =
      static_cast<int64_t>(options.memory_budget_gib.value_or(0) * kGib);
  return shard;
}

ShardOptions shard_options(const TrainOptions& options) {
  auto shard = shard_options(options.ranks);
  shard.activation_checkpointing = options.gradient_checkpointing;
  shard.optimizer.kind = optim::optimizer_kind_from_name(options.optim);
  if (options.ranks.pure_bf16) {
    shard.optimizer.kind = optim::OptimizerKind::kAnyPrecisionAdamW;
    shard.optimizer.use_kahan_summation = true;
  }
  shard.optimizer.momentum = options.momentum;
  shard.seed = static_cast<uint64_t>(options.seed);
  if (!options.reduce_dtype.empty()) shard.reduce_dtype = dtype_from_name(options.reduce_dtype);
  if (options.unsharded_accumulation) shard.placement.accumulation = plan::Accumulation::kUnsharded;
  shard.optimizer.beta1 = options.adam_beta1;
  shard.optimizer.beta2 = options.adam_beta2;
  shard.optimizer.epsilon = options.adam_epsilon;
  shard.groups = {{.name = "decayed", .weight_decay = options.weight_decay},
                  {.name = "not decayed"}};
  shard.param_group = decay_group;
  return shard;
}

ShardedLm build_sharded(const ModelFiles& files, comm::Communicator& comm,
                        const ShardOptions& options, Purpose purpose) {
  comm.report_progress(-1, "load");
  const auto dtype = to_scalar_type(options.param_dtype.value_or(DType::kF32));
  auto model = models::make_causal_lm(files.config, at::TensorOptions(at::kMeta).dtype(dtype));
  if (purpose == Purpose::kInference) {
    // Frozen parameters have no gradients, no masters and no optimizer state.
    for (at::Tensor& parameter : model->parameters()) parameter.requires_grad_(false);
  }
  // The communicator belongs to the caller: a handle without ownership.
  const std::shared_ptr<comm::Communicator> handle(std::shared_ptr<void>(), &comm);
  return fully_shard(std::move(model), handle, with_environment(options));
}

void load_files(ShardedLm& model, const ModelFiles& files) {
  // A tied model's files may hold the projection a second time.
  std::vector<std::string> tied;
  if (files.config.tie_word_embeddings) tied.emplace_back("lm_head.weight");
  load_weights(model.core(), io::HfWeights::open(files.directory.string()), tied);
  device::trim_host_allocator();  // What building and loading left.
}

ShardedLm load_sharded(const ModelFiles& files, comm::Communicator& comm,
                       const ShardOptions& options, Purpose purpose) {
  auto sharded = build_sharded(files, comm, options, purpose);
  load_files(sharded, files);
  return sharded;
}

}  // namespace fsdp::trainer
