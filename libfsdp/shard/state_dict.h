// The state of a sharded module as tensors by name, for files of any format.
#pragma once

#include "libfsdp/checkpoint/state_dict.h"
#include "libfsdp/shard/sharded_core.h"

namespace fsdp {

/// Parameters by their names in named_parameters() (a tied one has the first of its names), in the
/// type that the model computes with, and buffers.
///
/// Not collective; equal names on all ranks. The description refers to `core`, which must outlive
/// it. Read and write between steps, in the thread that trains; after writing, publish() (all
/// ranks). Writing a parameter also sets its master, to the value in the type that was written:
/// load the optimizer's state, which has the exact masters, after the model's.
checkpoint::StateDict model_state(ShardedCore& core);

/// State of the optimizer under the names that torch.distributed.checkpoint gives it:
/// `state.<parameter>.exp_avg` and so on, `state.<parameter>.step`, and beside them
/// `state.<parameter>.master`, the exact fp32 value of a 16-bit parameter that has one.
///
/// As model_state(). Scales of blocks (8-bit AdamW) are tensors of one dimension, one element for
/// 256 of the parameter. Writing a step sets that of the whole model.
checkpoint::StateDict optimizer_state(ShardedCore& core);

}  // namespace fsdp
