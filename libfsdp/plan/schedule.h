// One optimizer step as data: what is executed, checked for races, summed into the memory plan and
// printed.
//
// A schedule is a list of operations in issue order on three streams: compute, communication and
// copies between host and device. Operations of one stream run in that order; across the streams
// only the listed dependencies order them. Every rank runs the same schedule, again and again:
// dependencies may point into the previous run (previous_step).
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "libfsdp/plan/mesh.h"
#include "libfsdp/plan/slots.h"
#include "libfsdp/plan/strategy.h"

namespace fsdp::plan {

enum class OpKind : uint8_t {
  kFence,    ///< Compute stream, collective over the shard group: shards that peers updated may be
             ///< read in place from here on (shared home).
  kFetch,    ///< Copy. Reads the unit's shard in the host's memory, writes its stage.
  kGather,   ///< Communication. Reads every rank's shard of the unit, or the stages that hold them,
             ///< writes this rank's slot.
  kForward,  ///< Compute, by the model: from the unit's call, or from the return of a unit inside
             ///< it (`resumed`).
  kBackward,   ///< Compute, by autograd, or the whole forward again where it is recomputed. Once
               ///< more (`resumed`) for what comes after the backward of the units inside.
  kCollect,    ///< Compute: writes the unit's gradient slot. Its writes may come earlier, from the
               ///< moment on that what it waits for has happened.
  kFetchSums,  ///< Copy. Reads the unit's gradient shard in the host's memory, writes its gradient
               ///< stage: a reduction goes on adding there.
  kReduce,  ///< Communication. Folds every rank's gradient slot, or those of the shard group, into
            ///< this rank's gradient shard, or gradient stage.
  kReduceOuter,  ///< Communication. Folds this rank's part of the sums of all replicas into its
                 ///< outer slot.
  kGatherOuter,  ///< Communication. Replaces the sums by the replicas' parts.
  kStoreSums,    ///< Copy. Reads the unit's gradient stage, writes its gradient shard.
  kPacket,       ///< Compute stream, collective over all ranks: losses, tokens, norm. Nobody passes
                 ///< before all are here.
  kOptimizer,    ///< Compute: reads gradient shards, writes shards.
};

enum class Stream : uint8_t { kCompute, kCommunication, kCopy };
inline constexpr int kNumStreams = 3;

/// The ranks that take part in an operation, or whose shards it reads in place.
enum class Scope : uint8_t { kShardGroup, kReplicas, kWorld };

/// When another operation counts as done.
enum class Moment : uint8_t {
  kFinished,  ///< Its results are there on this rank.
  kReleased,  ///< Collectives only: every rank has read this rank's source.
};

struct Dependency {
  int op = 0;  ///< Index into Schedule::ops.
  Moment moment = Moment::kFinished;
  bool previous_step = false;  ///< The operation of the step before this one.

  bool operator==(const Dependency&) const = default;
};

/// A piece of memory of one rank that operations can fight for.
enum class BufferKind : uint8_t {
  kShard,
  kStage,
  kSlot,
  kGradientSlot,
  kGradientStage,
  kOuterSlot,
  kGradientShard,
};
struct Access {
  BufferKind buffer = BufferKind::kShard;
  /// Unit for shards, slot number for slots and stages (the root's slots come after the units', a
  /// gradient stage has its gradient slot's number); there is one outer slot.
  int index = 0;
  bool write = false;
  bool by_peers =
      false;  ///< A read that every rank does of this rank's buffer (the source of a collective).
  int unit = -1;  ///< All but shards: whose contents.

  bool operator==(const Access&) const = default;
};

struct Op {
  OpKind kind = OpKind::kGather;
  int unit = -1;  ///< -1 for kFence, kPacket and kOptimizer.
  Scope scope = Scope::kShardGroup;
  int micro_batch =
      0;          ///< Of a gather: of its first reader. Of kPacket and kOptimizer: the last one.
  int slot = -1;  ///< Parameter slot that is written or read; -1 = read where the shards lie.
  int gradient_slot = -1;    ///< kCollect and kReduce; of what comes behind it: the stage's number.
  int stage = -1;            ///< kFetch, kGather: -1 = shards are read where they lie.
  bool accumulate = false;   ///< kReduce, kCollect: add to what is there instead of replacing it.
  bool resumed = false;      ///< kForward: a unit inside has returned. kBackward: all of them have.
  bool in_backward = false;  ///< kForward: of a unit inside one whose forward is run again.
  std::vector<Access> accesses;
  std::vector<Dependency> after;  ///< What must have happened before this may begin.
};

Stream stream_of(OpKind kind);
/// Communication, packet and fence: begin on all members before any member's finishes.
bool is_collective(OpKind kind);
std::string_view op_name(OpKind kind);
/// "shard", "gradient slot", ...
std::string_view buffer_name(BufferKind buffer);

/// One call of a unit in the forward of a micro-batch; unit 0 is a call of the model itself.
struct Call {
  int unit = 0;
  int parent = -1;    ///< Index of the call around this one; -1 for calls of the model.
  bool graph = true;  ///< Gradients are recorded.

  auto operator<=>(const Call&) const = default;
};

/// A model that is called once, and its `units` one after the other.
std::vector<Call> calls_in_order(const std::vector<int>& units);

/// What a schedule is compiled from.
struct ScheduleInput {
  std::vector<Call> calls;      ///< Of one micro-batch, in the order of entry.
  std::vector<bool> trainable;  ///< By unit, root included: has trainable parameters.
  int micro_batches = 1;        ///< Of the rank that has most.
  bool recompute = false;  ///< Calls outside of other units run their forward again in backward.
  Placement placement;
  SlotMap slots;
};

struct Schedule {
  std::vector<Op> ops;
  Mesh mesh;  ///< Gathers are over its shard groups, the packet over all ranks.
  Reduction reduction = Reduction::kWorld;
  int slots = 0;           ///< Gather slots of the units; slot number `slots` is the root's.
  int gradient_slots = 0;  ///< Likewise.
  int stages = 0;
  int micro_batches = 0;

  /// Equal on two ranks exactly when all fields are (64-bit FNV-1a of their bytes).
  uint64_t hash() const;
  /// One line an operation, for people.
  std::string to_string(const std::vector<std::string>& unit_names = {}) const;
};

/// Compiles one step.
///
/// A unit keeps its slot for the whole step, so that what autograd saved in the forward is right
/// again after the re-gather. A gather whose unit still lies in its slot is left out. Gathers are
/// issued as soon as their slot is free and before the reduction of the same moment, fetches as
/// soon as their stage is. Backward comes in the reverse order of the calls' ends; a unit's
/// gradients are collected at the end of its last backward of the micro-batch, then reduced; sums
/// over replicas follow once a step, a few reductions later. The dependencies are the smallest set
/// that orders all conflicting accesses. Throws ConfigError when units that need the same slot are
/// called inside each other, or no unit that is called has a trainable parameter.
Schedule compile(const ScheduleInput& input);

}  // namespace fsdp::plan
