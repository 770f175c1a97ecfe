// A unit: a module whose parameters are gathered together, around its call.
//
//   fsdp::Unit<Block> block(options...);   // instead of: Block block(options...);
//
// The implementation is the user's with a hook mixed in: parameter names, registration, Sequential
// and ModuleList work as before, and until fully_shard() installs a runtime it is just the module.
#pragma once

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <tuple>
#include <utility>
#include <vector>

#include "libfsdp/shard/unit_call.h"

namespace fsdp {

/// Marks units in a module tree; found by dynamic_cast over named_modules().
class UnitHook {
 public:
  virtual ~UnitHook() = default;
  /// The runtime that surrounds this unit's calls, or null. Not owned.
  UnitRuntime* runtime() const { return runtime_; }
  void set_runtime(UnitRuntime* runtime) { runtime_ = runtime; }

 private:
  UnitRuntime* runtime_ = nullptr;
};

/// Implementation behind Unit<Holder>: `Impl` with its one non-template `forward` surrounded by the
/// runtime.
///
/// Shapes, arguments and results are Impl's. Only at::Tensor arguments (also in std::vector,
/// std::tuple, std::pair and std::optional) carry gradients under activation checkpointing; the
/// others are copied and used again. forward() takes all arguments; a Unit that is called like a
/// function, unit(x), may leave the last ones to their defaults.
template <class Impl, class Forward = decltype(&Impl::forward)>
class UnitImpl;

#define FSDP_DEFINE_UNIT_IMPL(CONST)                                                          \
  template <class Impl, class Owner, class R, class... Args>                                  \
  class UnitImpl<Impl, R (Owner::*)(Args...) CONST> : public Impl, public UnitHook {          \
   public:                                                                                    \
    using Impl::Impl;                                                                         \
    R forward(Args... args) {                                                                 \
      if (!runtime()) return Impl::forward(std::forward<Args>(args)...);                      \
      return detail::call_unit<R>(                                                            \
          *runtime(), [this](auto&... values) -> R { return Impl::forward(values...); },      \
          std::tuple<std::decay_t<Args>...>(std::forward<Args>(args)...));                    \
    }                                                                                         \
    /* forward() whose last arguments have their defaults: a pointer to a member has none. */ \
    template <class... Given>                                                                 \
    R forward_with_defaults(Given&&... given) {                                               \
      if (!runtime()) return Impl::forward(std::forward<Given>(given)...);                    \
      return detail::call_unit<R>(                                                            \
          *runtime(), [this](auto&... values) -> R { return Impl::forward(values...); },      \
          std::tuple<std::decay_t<Given>...>(std::forward<Given>(given)...));                 \
    }                                                                                         \
  }
FSDP_DEFINE_UNIT_IMPL();
FSDP_DEFINE_UNIT_IMPL(const);
#undef FSDP_DEFINE_UNIT_IMPL

/// Holder of a unit around the module behind `Holder` (a TORCH_MODULE, stock or your own);
/// constructed like it.
template <class Holder>
class Unit : public torch::nn::ModuleHolder<UnitImpl<typename Holder::ContainedType>> {
 public:
  using torch::nn::ModuleHolder<UnitImpl<typename Holder::ContainedType>>::ModuleHolder;
  using Impl = UnitImpl<typename Holder::ContainedType>;

  /// forward(arguments...); the last ones may be left to their defaults.
  template <class... Arguments>
  auto operator()(Arguments&&... arguments) {
    Impl& unit = *this->get();
    if constexpr (requires { unit.forward(std::forward<Arguments>(arguments)...); }) {
      return unit.forward(std::forward<Arguments>(arguments)...);
    } else {
      return unit.forward_with_defaults(std::forward<Arguments>(arguments)...);
    }
  }
};

}  // namespace fsdp
