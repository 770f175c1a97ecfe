#include "libfsdp/trainer/session.h"

#include "libfsdp/device/host_allocator.h"
#include "libfsdp/lora/adapters.h"
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
  // Adapters are small: their gradients are sent once a step, but where the order of sums counts.
  if (options.unsharded_accumulation || (options.peft.adapts() && !options.ranks.deterministic))
    shard.placement.accumulation = plan::Accumulation::kUnsharded;
  shard.optimizer.beta1 = options.adam_beta1;
  shard.optimizer.beta2 = options.adam_beta2;
  shard.optimizer.epsilon = options.adam_epsilon;
  shard.groups = {{.name = "decayed", .weight_decay = options.weight_decay},
                  {.name = "not decayed"}};
  shard.param_group = decay_group;
  return shard;
}

ShardedLm build_sharded(const ModelFiles& files, comm::Communicator& comm, ShardOptions options,
                        Purpose purpose, const PeftOptions& peft, ModelParts& parts,
                        const FreezeOptions& freezing) {
  comm.report_progress(-1, "load");
  const auto dtype = to_scalar_type(options.param_dtype.value_or(DType::kF32));
  auto model = models::make_causal_lm(files.config, at::TensorOptions(at::kMeta).dtype(dtype));
  const bool trains = purpose == Purpose::kTraining;
  // Frozen parameters have no gradients, no masters and no optimizer state, and may be quantised.
  const auto freeze = [&] {
    for (at::Tensor& parameter : model->parameters()) parameter.requires_grad_(false);
  };
  check_base(files, peft, trains);
  if (!trains) freeze();
  parts = add_parts(*model, peft, files, trains);
  freeze_parts(*model, freezing);
  if (!trains) {
    freeze();  // The adapters.
    model->eval();
  }
  if (parts.adapters)
    options = parts.adapters->shard_options(lora::with_b_rate(options, peft.loraplus_lr_ratio));
  // The communicator belongs to the caller: a handle without ownership.
  const std::shared_ptr<comm::Communicator> handle(std::shared_ptr<void>(), &comm);
  return fully_shard(std::move(model), handle, with_environment(options));
}

void load_files(ShardedLm& model, const ModelFiles& files, const ModelParts& parts) {
  const io::HfWeights weights = io::HfWeights::open(files.directory.string());
  std::vector<std::string> not_loaded;
  // A tied model's files may hold the projection a second time.
  if (files.config.tie_word_embeddings) not_loaded.emplace_back("lm_head.weight");
  std::function<bool(const std::string&)> left_out = lora::Adapters::is_adapter;
  if (parts.quantized) {
    left_out = parts.quantized->left_out();
    not_loaded.insert(not_loaded.end(), parts.quantized->file_names().begin(),
                      parts.quantized->file_names().end());
  }
  load_weights(model.core(), weights, not_loaded, left_out);
  if (parts.quantized) parts.quantized->load(model.core(), weights);
  device::trim_host_allocator();  // What building and loading left.
}

ShardedLm load_sharded(const ModelFiles& files, comm::Communicator& comm,
                       const ShardOptions& options, Purpose purpose, const PeftOptions& peft) {
  ModelParts parts;
  auto sharded = build_sharded(files, comm, options, purpose, peft, parts);
  load_files(sharded, files, parts);
  fill_adapters(sharded.core(), parts, peft, options.seed);
  return sharded;
}

PeftOptions inference_parts(const std::filesystem::path& adapter,
                            const QuantizationOptions& quantization) {
  PeftOptions peft;
  peft.adapter_name_or_path = adapter;
  peft.quantization = quantization;
  return peft;
}

}  // namespace fsdp::trainer
