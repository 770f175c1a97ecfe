// A communicator that calls a function at chosen places of a training run: where tests make a rank
// fail.
#pragma once

#include <functional>
#include <string>

#include "libfsdp/comm/communicator.h"

namespace fsdp::testing {

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
  std::shared_ptr<comm::SymmetricMemory> allocate(size_t bytes, std::string_view label) override {
    return inner_.allocate(bytes, label);
  }
  bool can_share(const comm::Group& group) const override { return inner_.can_share(group); }
  std::shared_ptr<comm::SharedMemory> allocate_shared(const comm::Group& group, size_t bytes,
                                                      std::string_view label) override {
    return inner_.allocate_shared(group, bytes, label);
  }
  comm::Ticket begin_gather(const comm::Group& group, comm::SymmetricSpan source,
                            std::byte* destination, comm::Tag tag) override {
    return inner_.begin_gather(group, source, destination, tag);
  }
  comm::Ticket begin_fold(const comm::Group& group, comm::SymmetricSpan source, DType dtype,
                          int64_t begin, std::span<float> destination, bool accumulate,
                          comm::Tag tag) override {
    at_place_("reduce", tag.step);
    last_fold_ = inner_.begin_fold(group, source, dtype, begin, destination, accumulate, tag);
    last_fold_step_ = tag.step;
    return last_fold_;
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
  void report_progress(int64_t step, std::string_view phase) override {
    inner_.report_progress(step, phase);
    at_place_(std::string(phase), step);
  }
  void report_unit(int32_t unit) override { inner_.report_unit(unit); }
  void name_units(std::span<const std::string> names) override { inner_.name_units(names); }

 private:
  void at_wait(comm::Ticket ticket) {
    if (last_fold_.sequence != 0 && ticket.sequence >= last_fold_.sequence)
      at_place_("reduce wait", last_fold_step_);
  }

  comm::Communicator& inner_;
  AtPlace at_place_;
  comm::Ticket last_fold_;
  int64_t last_fold_step_ = -1;
};

}  // namespace fsdp::testing
