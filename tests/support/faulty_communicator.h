// A communicator that calls a function at chosen places of a training run: where tests make a rank
// fail.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "libfsdp/comm/communicator.h"

namespace fsdp::testing {

/// Memory that the run has allocated, kept also when the run has ended.
struct NamedMemory {
  std::shared_ptr<void> owner;
  std::string label;
  std::byte* data = nullptr;
  size_t bytes = 0;
};

/// Passes everything on to `inner`. `at_place(place, step)` is called before: a phase that the rank
/// reports ("load", "forward", ...), the start of a "reduce", the wait for its result
/// ("reduce wait"), the "packet"; and after the packet ("optimizer").
class FaultyCommunicator final : public comm::Communicator {
 public:
  using AtPlace = std::function<void(const std::string& place, int64_t step)>;
  FaultyCommunicator(comm::Communicator& inner, AtPlace at_place)
      : inner_(inner), at_place_(std::move(at_place)) {
    world_ = inner.world();
  }

  int rank() const override { return inner_.rank(); }
  int size() const override { return inner_.size(); }
  int ranks_per_host() const override { return inner_.ranks_per_host(); }
  kernels::Compute& compute() override { return inner_.compute(); }
  void allow_any_order(bool allowed) override { inner_.allow_any_order(allowed); }
  std::shared_ptr<comm::SymmetricMemory> allocate(size_t bytes, std::string_view label) override {
    auto memory = inner_.allocate(bytes, label);
    memory_.push_back({memory, std::string(label), memory->local(), bytes});
    return memory;
  }
  bool can_share(const comm::Group& group) const override { return inner_.can_share(group); }
  std::shared_ptr<comm::SharedMemory> allocate_shared(const comm::Group& group, size_t bytes,
                                                      std::string_view label) override {
    auto memory = inner_.allocate_shared(group, bytes, label);
    memory_.push_back({memory, std::string(label), memory->data(), bytes});
    return memory;
  }
  comm::Ticket begin_gather(const comm::Group& group, comm::SymmetricSpan source,
                            std::byte* destination, comm::Tag tag) override {
    return inner_.begin_gather(group, source, destination, tag);
  }
  comm::Ticket begin_fold(const comm::Group& group, comm::SymmetricSpan source, DType dtype,
                          int64_t begin, std::span<float> destination, bool accumulate,
                          comm::Tag tag) override {
    last_source_ = {source.memory->local() + source.offset, source.bytes};
    at_place_("reduce", tag.step);
    const comm::Ticket ticket =
        inner_.begin_fold(group, source, dtype, begin, destination, accumulate, tag);
    if (oldest_fold_.sequence == 0) oldest_fold_ = ticket;
    last_fold_step_ = tag.step;
    return ticket;
  }
  comm::Ticket begin_fence(const comm::Group& group, comm::Tag tag) override {
    return inner_.begin_fence(group, tag);
  }
  void finish(comm::Ticket ticket) override {
    at_wait(ticket);
    inner_.finish(ticket);
  }
  void wait_released(comm::Ticket ticket) override {
    at_wait(ticket);
    inner_.wait_released(ticket);
  }
  void exchange(const void* mine, size_t bytes, void* all, comm::Tag tag) override {
    const bool packet = std::string_view(tag.what) == "step packet";
    if (packet) at_place_("packet", tag.step);
    inner_.exchange(mine, bytes, all, tag);
    if (packet) at_place_("optimizer", tag.step);
  }
  void broadcast(void* data, size_t bytes, int root, comm::Tag tag) override {
    inner_.broadcast(data, bytes, root, tag);
  }
  void barrier(comm::Tag tag) override { inner_.barrier(tag); }
  void abort(std::string_view reason) noexcept override { inner_.abort(reason); }
  std::string failure() override { return inner_.failure(); }
  void report_progress(int64_t step, std::string_view phase) override {
    inner_.report_progress(step, phase);
    at_place_(std::string(phase), step);
  }
  void report_unit(int32_t unit) override { inner_.report_unit(unit); }
  void name_units(std::span<const std::string> names) override { inner_.name_units(names); }

  const std::vector<NamedMemory>& memory() const { return memory_; }
  /// What this rank brings to the fold whose "reduce" was told last.
  std::span<std::byte> last_source() const { return last_source_; }

 private:
  void at_wait(comm::Ticket ticket) {
    if (oldest_fold_.sequence == 0 || ticket.sequence < oldest_fold_.sequence) return;
    oldest_fold_ = {};
    at_place_("reduce wait", last_fold_step_);
  }

  comm::Communicator& inner_;
  AtPlace at_place_;
  std::vector<NamedMemory> memory_;
  std::span<std::byte> last_source_;
  comm::Ticket oldest_fold_;  // Not yet waited for.
  int64_t last_fold_step_ = -1;
};

}  // namespace fsdp::testing
