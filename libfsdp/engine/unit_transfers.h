// Communication and copies of units: gathers, reductions, fetches and stores, and what lies in each
// slot and stage. Knows nothing of schedules.
//
// Note [Held] A frozen bucket that has a slot for itself is gathered once, until somebody publishes
// parameters: the gather of its unit leaves it out.
#pragma once

#include <cstdint>
#include <vector>

#include "libfsdp/comm/communicator.h"
#include "libfsdp/engine/storage.h"
#include "libfsdp/plan/schedule.h"

namespace fsdp::engine {

class UnitTransfers {
 public:
  /// An operation under way; a value-initialised one is done.
  struct Begun {
    comm::Ticket ticket;
    uint64_t copy = 0;
  };

  /// `storage` and `comm` outlive this. `poison`: slots hold NaN before they are gathered into.
  UnitTransfers(Storage& storage, const plan::Placement& placement, comm::Communicator& comm,
                bool poison);

  /// The optimizer step that tags name from now on.
  void set_step(int64_t step) { step_ = step; }
  /// Slots, stages and sums of the step before count no more.
  void begin_step();

  /// Issues an operation of the streams of communication and copies. Its dependencies are the
  /// caller's.
  Begun begin(plan::OpKind kind, int unit);
  /// Lets what comes next find the operation finished, or released.
  void wait(const Begun& begun, plan::Moment moment) {
    if (begun.copy != 0) {
      storage_.copies()->order(begun.copy);
    } else if (moment == plan::Moment::kReleased) {
      comm_.wait_released(begun.ticket);
    } else {
      comm_.finish(begun.ticket);
    }
  }

  /// Whether the unit's parameters, as they are now, lie where they are used or are on their way.
  bool holds(int unit) const;
  comm::Ticket begin_gather(int unit);
  /// Gathers the unit unless holds(), and finishes its gather.
  void gather_on_demand(int unit);

  /// Whether gradients of this step lie in the unit's gradient shard or slot; begin_sums says that
  /// from now on they do.
  bool has_sums(int unit) const { return has_sums_[static_cast<size_t>(unit)] != 0; }
  void begin_sums(int unit) { has_sums_[static_cast<size_t>(unit)] = 1; }
  /// Stores the offloaded sums that lie in stages, and waits for all copies: the next schedule may
  /// have other units take turns in the stages.
  void empty_stages();

  /// Parameters have been updated, or (publish) written by somebody: what is gathered is old. All
  /// ranks see it. Collective in the shared home.
  void parameters_changed();
  void publish();
  void poison_slots();

 private:
  struct Contents {
    int unit = -1;
    int64_t version = -1;
  };

  std::vector<uint8_t> find_holdable() const;
  bool is_held(int unit) const;
  uint64_t begin_fetch(int unit);
  comm::Ticket begin_reduce(int unit);
  comm::Ticket begin_reduce_outer(int unit);
  comm::Ticket begin_gather_outer(int unit);
  uint64_t begin_fetch_sums(int unit);
  uint64_t begin_store_sums(int unit);
  uint64_t copy_sums(int unit, bool to_host);
  void poison(int slot);

  Storage& storage_;
  plan::Placement placement_;
  comm::Communicator& comm_;
  bool poison_;
  std::vector<int> shard_group_;
  std::vector<int> replica_group_;
  std::vector<int> world_;
  int64_t step_ = 1;
  int64_t version_ = 0;                      // Of the parameters.
  std::vector<Contents> contents_;           // By slot.
  std::vector<comm::Ticket> gathers_;        // By slot: the last into it.
  std::vector<uint8_t> holdable_;            // By bucket: see Note [Held].
  std::vector<uint8_t> held_;                // Likewise: it lies in its slot.
  std::vector<Contents> staged_;             // By stage.
  std::vector<comm::Ticket> stage_readers_;  // By stage: the last gather from it.
  std::vector<int> sums_in_stage_;  // By gradient stage: whose of this step; -1 = nobody's.
  std::vector<uint8_t> has_sums_;   // By unit.
};

}  // namespace fsdp::engine
