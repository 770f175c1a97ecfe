// One optimizer step as data: what is executed, checked for races, summed into the memory plan and
// printed.
//
// A schedule is a list of operations in issue order on two streams, compute and communication.
// Operations of one stream run in that order; across the streams only the listed dependencies order
// them. Every rank runs the same schedule, again and again: dependencies may point into the
// previous run (previous_step).
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "libfsdp/plan/mesh.h"
#include "libfsdp/plan/strategy.h"

namespace fsdp::plan {

enum class OpKind : uint8_t {
  kGather,     ///< Communication. Reads every rank's shard of the unit, writes this rank's slot.
  kForward,    ///< Compute, by the model.
  kBackward,   ///< Compute, by autograd; writes the unit's gradient slot.
  kReduce,     ///< Communication. Folds every rank's gradient slot into this rank's gradient shard.
  kPacket,     ///< Compute stream, collective over all ranks: losses, tokens, norm. Nobody passes
               ///< before all are here.
  kOptimizer,  ///< Compute: reads gradient shards, writes shards.
};

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
enum class BufferKind : uint8_t { kShard, kSlot, kGradientSlot, kGradientShard };
struct Access {
  BufferKind buffer = BufferKind::kShard;
  int index =
      0;  ///< Unit for shards, slot number for slots; the root's slots come after the units'.
  bool write = false;
  bool by_peers =
      false;  ///< A read that every rank does of this rank's buffer (the source of a collective).

  bool operator==(const Access&) const = default;
};

struct Op {
  OpKind kind = OpKind::kGather;
  int unit = -1;  ///< -1 for kPacket and kOptimizer.
  int micro_batch =
      0;          ///< Of a gather: of its first reader. Of kPacket and kOptimizer: the last one.
  int slot = -1;  ///< Parameter slot that is written or read; -1 = resident.
  int gradient_slot = -1;
  bool accumulate = false;  ///< kReduce: add to the gradient shard instead of replacing it.
  std::vector<Access> accesses;
  std::vector<Dependency> after;  ///< What must have happened before this may begin.
};

bool on_communication_stream(OpKind kind);
/// Gather, reduce and packet: begin on all ranks before any rank's finishes.
bool is_collective(OpKind kind);
std::string_view op_name(OpKind kind);

/// What a schedule is compiled from.
struct ScheduleInput {
  std::vector<int> forward_order;  ///< Units besides the root (1..), in the order of their calls in
                                   ///< a micro-batch.
  std::vector<bool> trainable;     ///< By unit, root included: has trainable parameters.
  std::vector<bool> has_params;    ///< By unit, root included.
  int micro_batches = 1;           ///< Of the rank that has most.
  Placement placement;
};

struct Schedule {
  std::vector<Op> ops;
  Mesh mesh;  ///< Gathers are over its shard groups, reductions and the packet over all ranks.
  int slots =
      0;  ///< Gather slots of the units; slot number `slots` is the root's. Resident home: 0.
  int gradient_slots = 0;  ///< Likewise.
  int micro_batches = 0;

  /// Equal on two ranks exactly when all fields are (64-bit FNV-1a of their bytes).
  uint64_t hash() const;
  /// One line an operation, for people.
  std::string to_string(const std::vector<std::string>& unit_names = {}) const;
};

/// Compiles one step.
///
/// Unit number i in call order has slot i mod slots for the whole step, so that what autograd saved
/// in the forward is right again after the re-gather. A gather whose unit still lies in its slot is
/// left out. Gathers are issued as soon as their slot is free and before the reduction of the same
/// moment. The dependencies are the smallest set that orders all conflicting accesses. Throws
/// ConfigError when a unit is called twice in a micro-batch, or no unit has a trainable parameter.
Schedule compile(const ScheduleInput& input);

/// The slot of the i-th called unit.
inline int slot_of_call(int call, int slots) { return call % slots; }

}  // namespace fsdp::plan
