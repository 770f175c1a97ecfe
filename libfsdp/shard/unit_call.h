// What surrounds one call of a unit: parameters in and out of reach, the gate for backward,
// recomputation.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include <functional>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "libfsdp/shard/random.h"

namespace fsdp {

/// The engine's side of a unit. One per unit and rank; used by the thread that runs the module.
class UnitRuntime {
 public:
  virtual ~UnitRuntime() = default;
  /// Recompute the forward in backward instead of keeping activations (mode A).
  virtual bool checkpointing() const = 0;
  /// The parameters are readable from here until leave_forward. Collective over the shard group
  /// when it must gather.
  virtual void enter_forward() = 0;
  virtual void leave_forward() noexcept = 0;
  /// While it is so, units inside are not checkpointed themselves: they are run again with this
  /// one.
  virtual void set_recomputing(bool recomputing) = 0;
  /// The parameters are readable, and gradients are collected, until another unit's enter_backward.
  virtual void enter_backward() = 0;
  /// Whether `tensor` shares memory with gathered parameters.
  virtual bool is_parameter_memory(const at::Tensor& tensor) const = 0;
};

/// Customisation point: appends pointers to the tensors inside a result or an argument.
/// Overload it (in the type's own namespace) for structs that hold tensors.
inline void collect_tensors(at::Tensor& value, std::vector<at::Tensor*>& out) {
  out.push_back(&value);
}
template <class T>
requires(std::is_arithmetic_v<T> || std::is_enum_v<T> ||
         std::is_pointer_v<T>) void collect_tensors(T&, std::vector<at::Tensor*>&) {}
template <class T>
void collect_tensors(std::shared_ptr<const T>&, std::vector<at::Tensor*>&) {}
template <class T>
void collect_tensors(std::vector<T>& values, std::vector<at::Tensor*>& out);
template <class T>
void collect_tensors(std::optional<T>& value, std::vector<at::Tensor*>& out);
template <class... T>
void collect_tensors(std::tuple<T...>& values, std::vector<at::Tensor*>& out);
template <class A, class B>
void collect_tensors(std::pair<A, B>& values, std::vector<at::Tensor*>& out);

template <class T>
void collect_tensors(std::vector<T>& values, std::vector<at::Tensor*>& out) {
  for (T& value : values) collect_tensors(value, out);
}
template <class T>
void collect_tensors(std::optional<T>& value, std::vector<at::Tensor*>& out) {
  if (value) collect_tensors(*value, out);
}
template <class... T>
void collect_tensors(std::tuple<T...>& values, std::vector<at::Tensor*>& out) {
  std::apply([&out](auto&... value) { (collect_tensors(value, out), ...); }, values);
}
template <class A, class B>
void collect_tensors(std::pair<A, B>& values, std::vector<at::Tensor*>& out) {
  collect_tensors(values.first, out);
  collect_tensors(values.second, out);
}

namespace detail {

/// Enters a unit's forward, and leaves it at the end of the scope, also when the module throws.
class ForwardScope {
 public:
  explicit ForwardScope(UnitRuntime& runtime) : runtime_(runtime) { runtime_.enter_forward(); }
  ~ForwardScope() { runtime_.leave_forward(); }
  ForwardScope(const ForwardScope&) = delete;
  ForwardScope& operator=(const ForwardScope&) = delete;

 private:
  UnitRuntime& runtime_;
};

/// Inside of a checkpointed unit's forward, the first one and the one that is run again.
class RecomputeScope {
 public:
  explicit RecomputeScope(UnitRuntime& runtime) : runtime_(runtime) {
    runtime_.set_recomputing(true);
  }
  ~RecomputeScope() { runtime_.set_recomputing(false); }
  RecomputeScope(const RecomputeScope&) = delete;
  RecomputeScope& operator=(const RecomputeScope&) = delete;

 private:
  UnitRuntime& runtime_;
};

/// Clones results that share memory with parameters: the memory is reused after the call.
void detach_from_parameters(const UnitRuntime& runtime, const std::vector<at::Tensor*>& results);

/// Makes backward through any of `results` call runtime.enter_backward() once, before the unit's
/// own nodes run.
void gate(UnitRuntime& runtime, const std::vector<at::Tensor*>& results);

/// Runs `recompute` without a graph now, and again with one in backward. Its argument are the
/// values of `inputs`, its result the unit's result tensors. Returns the latter, tied into the
/// graph.
using Recompute = std::function<std::vector<at::Tensor>(const std::vector<at::Tensor>&)>;
std::vector<at::Tensor> checkpoint(UnitRuntime& runtime, const std::vector<at::Tensor>& inputs,
                                   Recompute recompute);

template <class T>
std::vector<at::Tensor*> tensors_in(T& value) {
  std::vector<at::Tensor*> tensors;
  collect_tensors(value, tensors);
  return tensors;
}

/// The defined ones: an argument or a result may be left undefined, and stays so in a
/// recomputation.
inline std::vector<size_t> defined_in(const std::vector<at::Tensor*>& tensors) {
  std::vector<size_t> defined;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i]->defined()) defined.push_back(i);
  }
  return defined;
}

inline std::vector<at::Tensor*> pick(const std::vector<at::Tensor*>& tensors,
                                     const std::vector<size_t>& indices) {
  std::vector<at::Tensor*> picked;
  picked.reserve(indices.size());
  for (const size_t index : indices) picked.push_back(tensors[index]);
  return picked;
}

inline std::vector<at::Tensor> values_of(const std::vector<at::Tensor*>& tensors) {
  std::vector<at::Tensor> values;
  values.reserve(tensors.size());
  for (const at::Tensor* tensor : tensors) values.push_back(*tensor);
  return values;
}

inline void assign(const std::vector<at::Tensor*>& tensors, const std::vector<at::Tensor>& values) {
  for (size_t i = 0; i < tensors.size(); ++i) *tensors[i] = values[i];
}

template <class R>
struct FirstResult {
  std::optional<R> value;
  std::vector<size_t> defined;  // Of its tensors.
};

template <class R, class Call, class Arguments>
R call_checkpointed(UnitRuntime& runtime, Call call, Arguments arguments) {
  auto result = std::make_shared<FirstResult<R>>();
  const std::vector<size_t> given = defined_in(tensors_in(arguments));
  const std::vector<at::Tensor> inputs = values_of(pick(tensors_in(arguments), given));
  auto recompute = [&runtime, call, arguments, given, result, defined = std::vector<size_t>()](
                       const std::vector<at::Tensor>& values) mutable {
    assign(pick(tensors_in(arguments), given), values);
    R fresh = std::apply(call, arguments);
    assign(pick(tensors_in(arguments), given),
           std::vector<at::Tensor>(values.size()));  // Keep nothing alive between the calls.
    const std::vector<at::Tensor*> tensors = tensors_in(fresh);
    if (result) defined = defined_in(tensors);
    detach_from_parameters(runtime, tensors);
    std::vector<at::Tensor> outputs = values_of(pick(tensors, defined));
    if (result) {
      result->value.emplace(std::move(fresh));
      result->defined = defined;
      result.reset();  // Only the first run hands its result out.
    }
    return outputs;
  };
  assign(pick(tensors_in(arguments), given), std::vector<at::Tensor>(inputs.size()));
  const std::vector<at::Tensor> outputs = checkpoint(runtime, inputs, std::move(recompute));
  assign(pick(tensors_in(*result->value), result->defined), outputs);
  return std::move(*result->value);
}

template <class R, class Call, class Arguments>
R call_unit(UnitRuntime& runtime, Call call, Arguments arguments) {
  if (runtime.checkpointing() && at::GradMode::is_enabled()) {
    return call_checkpointed<R>(runtime, std::move(call), std::move(arguments));
  }
  const ForwardScope scope(runtime);
  const RandomScope::UnitCall random;
  R result = std::apply(call, arguments);
  const std::vector<at::Tensor*> tensors = tensors_in(result);
  detach_from_parameters(runtime, tensors);
  if (at::GradMode::is_enabled()) gate(runtime, tensors);
  return result;
}

}  // namespace detail
}  // namespace fsdp
