// A model that is loaded and sharded, ready to train or to evaluate.
#pragma once

#include <memory>

#include "libfsdp/comm/communicator.h"
#include "libfsdp/models/llama.h"
#include "libfsdp/shard/sharded.h"
#include "libfsdp/trainer/model_files.h"
#include "libfsdp/trainer/options.h"
#include "libfsdp/trainer/peft.h"

namespace fsdp::trainer {

using ShardedLm = Sharded<models::LlamaForCausalLM>;

/// What a model is loaded for: for inference it takes no memory for gradients and optimizer state.
enum class Purpose { kTraining, kInference };

/// Builds the model on the meta device, gives it the parts that `peft` asks for, freezes what
/// `freezing` says, and shards it; its parameters are zero. Collective. `comm` must outlive the
/// model. Throws: CommError, DoesNotFitError; as check_base(), add_parts() and freeze_parts().
ShardedLm build_sharded(const ModelFiles& files, comm::Communicator& comm, ShardOptions options,
                        Purpose purpose, const PeftOptions& peft, ModelParts& parts,
                        const FreezeOptions& freezing = {});
/// Fills each rank's part of the base from the files. Collective. Throws: ModelError.
void load_files(ShardedLm& model, const ModelFiles& files, const ModelParts& parts = {});

/// Both, and the adapters' values.
ShardedLm load_sharded(const ModelFiles& files, comm::Communicator& comm,
                       const ShardOptions& options, Purpose purpose, const PeftOptions& peft = {});

/// What eval and generate load: `adapter` may be empty.
PeftOptions inference_parts(const std::filesystem::path& adapter,
                            const QuantizationOptions& quantization);

/// What RankOptions mean for sharding; optimizer and checkpointing stay at their defaults.
ShardOptions shard_options(const RankOptions& options);

/// The same with the optimizer, its groups (norms and biases do not decay) and activation
/// checkpointing.
ShardOptions shard_options(const TrainOptions& options);

}  // namespace fsdp::trainer
