#include "libfsdp/shard/sharded_core.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <map>

#include "libfsdp/base/error.h"
#include "libfsdp/engine/shard_optimizers.h"
#include "libfsdp/plan/memory_plan.h"
#include "libfsdp/shard/dropout.h"
#include "libfsdp/shard/gradient_sink.h"
#include "libfsdp/shard/shell.h"
#include "libfsdp/shard/weight_adapter.h"

namespace fsdp {

struct ShardedCore::UnitState : UnitRuntime {
  UnitState(ShardedCore& owner, int number, std::string unit_name, UnitHook* unit_hook)
      : core(owner), index(number), name(std::move(unit_name)), hook(unit_hook) {}

  bool checkpointing() const override {
    return core.options_.activation_checkpointing && !core.recomputing_;
  }
  void set_recomputing(bool recomputing) override { core.recomputing_ = recomputing; }

  void enter_forward() override {
    core.throw_deferred();
    core.executor_->enter_forward(index, at::GradMode::is_enabled());
    ++calls;
    core.expose(*this);
  }
  void leave_forward() noexcept override {
    if (--calls == 0 && !in_backward) core.conceal(*this);
    core.executor_->leave_forward();
  }
  void enter_backward() override {
    core.executor_->enter_backward(index);
    core.conceal_what_backward_left();
    if (!std::exchange(in_backward, true)) core.in_backward_.push_back(this);
    core.expose(*this);
  }
  bool is_parameter_memory(const at::Tensor& tensor) const override {
    return tensor.has_storage() && core.executor_->storage().contains(tensor.storage().data());
  }

  ShardedCore& core;
  int index;
  std::string name;
  UnitHook* hook;
  std::vector<Parameter> parameters;
  int calls = 0;  // Under way in forward.
  bool in_backward = false;
  bool exposed = false;
};

/// Moves a finished gradient into the unit's gradient slot.
class ShardedCore::Sink : public GradientSink {
 public:
  Sink(ShardedCore& core, UnitState& unit, size_t parameter)
      : core_(core), unit_(unit), index_(parameter) {}
  void operator()(const torch::autograd::Variable&) override {
    core_.collect_gradient(unit_, parameter());
  }
  std::optional<GradientPlace> take_place(at::ScalarType type) override {
    const at::Tensor& place = parameter().place;
    if (!place.defined() || place.scalar_type() != type) return std::nullopt;
    const std::optional<bool> replaces = core_.take_place(unit_.index, parameter());
    if (!replaces) return std::nullopt;
    return GradientPlace{.tensor = parameter().place, .accumulate = !*replaces};
  }

 private:
  Parameter& parameter() { return unit_.parameters[index_]; }

  ShardedCore& core_;
  UnitState& unit_;
  size_t index_;
};

std::optional<GradientPlace> gradient_place(const at::Tensor& parameter, at::ScalarType type) {
  auto* sink =
      dynamic_cast<GradientSink*>(torch::autograd::impl::post_acc_grad_hooks(parameter).get());
  return sink ? sink->take_place(type) : std::nullopt;
}

namespace {

constexpr int64_t kChunk = int64_t{1} << 20;

void make_deterministic(const torch::nn::Module& model) {
  refuse_stock_dropout(model);
  at::set_num_threads(1);
  at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/true);
}

plan::Placement make_placement(const std::vector<plan::UnitSpec>& specs,
                               const comm::Communicator& comm, const ShardOptions& options) {
  plan::Layout tree;
  tree.units = specs;
  return plan::place(options.strategy,
                     {.ranks = comm.size(),
                      .ranks_per_host = comm.ranks_per_host(),
                      .can_share = true,
                      .units = static_cast<int>(specs.size()) - 1,
                      .nesting_depth = std::max(tree.nesting_depth(), 1),
                      .exact_order = options.deterministic},
                     options.placement);
}

plan::StateBytes state_bytes(const plan::Layout& layout, const ShardOptions& options) {
  return {.master =
              [&options](const plan::Bucket& bucket) {
                return engine::master_bytes(bucket, options.master);
              },
          .optimizer = engine::optimizer_bytes(layout, options.optimizer)};
}

}  // namespace

ShardedCore::ShardedCore(std::shared_ptr<torch::nn::Module> model,
                         std::shared_ptr<comm::Communicator> comm, const ShardOptions& options)
    : model_(std::move(model)), options_(with_environment(options)) {
  options_.validate();
  if (options_.deterministic) make_deterministic(*model_);
  refuse_meta_buffers(*model_);
  comm->allow_any_order(!options_.deterministic);
  std::vector<ModuleUnit> units = find_units(*model_, options_.in_root);
  std::vector<plan::UnitSpec> specs = specify(units, options_);
  plan::Placement placement = make_placement(specs, *comm, options_);
  if (placement.home == plan::Home::kShared &&
      !comm->can_share(placement.mesh.shard_group(comm->rank())))
    placement.home = plan::Home::kSlot;
  const plan::Layout layout = plan::make_layout(std::move(specs), placement.mesh);
  if (const int64_t budget = options_.placement.memory_budget_bytes)
    placement = plan::fit_to_budget(layout, placement, state_bytes(layout, options_), budget);
  executor_ = std::make_unique<engine::Executor>(
      layout, placement, std::move(comm),
      engine::ExecutorOptions{.poison = options_.poison,
                              .verify_plans = options_.verify_plans,
                              .recompute = options_.activation_checkpointing,
                              .master = options_.master,
                              .seed = options_.seed,
                              .optimizer = options_.optimizer,
                              .groups = options_.groups});
  if (options_.param_dtype == DType::kF16 || options_.loss_scaler)
    scaler_.emplace(options_.loss_scaler.value_or(optim::LossScalerOptions{}));
  executor_->set_collector([this](int unit) { collect_early_gradients(unit); });
  take_over(units);
  executor_->publish();
}

ShardedCore::~ShardedCore() {
  for (const auto& unit : units_) {
    if (unit->hook) unit->hook->set_runtime(nullptr);
    conceal(*unit);
    for (const Parameter& parameter : unit->parameters) {
      if (parameter.tensor.requires_grad())
        torch::autograd::impl::set_post_acc_grad_hooks(parameter.tensor, nullptr);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Taking over a module

ShardedCore::Parameter ShardedCore::make_parameter(const ModuleUnit& unit,
                                                   const ModuleParameter& found, int b,
                                                   int segment) {
  const plan::Bucket& bucket = executor_->layout().buckets[static_cast<size_t>(b)];
  const int64_t begin = bucket.segments[static_cast<size_t>(segment)].begin;
  const at::Device device = device_of(executor_->compute());
  const auto view = [&](std::byte* memory, DType dtype) {
    return view_memory(memory + begin * static_cast<int64_t>(dtype_bytes(dtype)),
                       found.tensor.sizes(), to_scalar_type(dtype), device);
  };
  Parameter parameter{.tensor = found.tensor, .bucket = b, .segment = segment};
  engine::Storage& storage = executor_->storage();
  parameter.view = view(storage.gathered(b), bucket.dtype);
  if (bucket.trainable && executor_->layout().trainable_numel(bucket.unit) > 0)
    parameter.place = view(storage.gradient(b), bucket.reduce_dtype);
  parameter.shell =
      make_shell(found.tensor.sizes(), to_scalar_type(bucket.dtype),
                 cat("parameter '", found.info.name, "' of ",
                     unit.hook ? cat("unit '", unit.name, "'") : std::string("the root unit"),
                     " is not gathered: it can be used only during its unit's call"),
                 device);
  for (const at::Tensor& data : {parameter.view, parameter.shell}) prepare_data(found.tensor, data);
  return parameter;
}

void ShardedCore::take_over(std::vector<ModuleUnit>& units) {
  const plan::Layout& layout = executor_->layout();
  for (size_t u = 0; u < units.size(); ++u) {
    ModuleUnit& found = units[u];
    units_.push_back(
        std::make_unique<UnitState>(*this, static_cast<int>(u), found.name, found.hook));
    UnitState& unit = *units_.back();
    std::vector<at::Tensor> values;
    unit.parameters.resize(found.parameters.size());
    for (const int b : layout.of_unit[u]) {
      const plan::Bucket& bucket = layout.buckets[static_cast<size_t>(b)];
      for (size_t s = 0; s < bucket.segments.size(); ++s) {
        const auto p = static_cast<size_t>(bucket.segments[s].param);
        unit.parameters[p] = make_parameter(found, found.parameters[p], b, static_cast<int>(s));
      }
    }
    for (size_t p = 0; p < unit.parameters.size(); ++p) {
      at::Tensor& tensor = unit.parameters[p].tensor;
      const at::ScalarType kept =
          at::isFloatingType(tensor.scalar_type()) ? at::kFloat : tensor.scalar_type();
      values.push_back(tensor.is_meta() ? at::Tensor()
                                        : tensor.detach().to(at::kCPU, kept).contiguous().clone());
      tensor.mutable_grad() = at::Tensor();
      replace_data(tensor, unit.parameters[p].shell);
      infos_.push_back(found.parameters[p].info);
      if (!tensor.requires_grad()) continue;
      torch::autograd::impl::set_post_acc_grad_hooks(tensor,
                                                     std::make_unique<Sink>(*this, unit, p));
    }
    fill_from_first_rank(unit, values);
    if (unit.hook) unit.hook->set_runtime(&unit);
  }
}

void ShardedCore::fill_from_first_rank(const UnitState& unit,
                                       const std::vector<at::Tensor>& values) {
  const std::vector<plan::ShardSlice> slices = plan::slices_of(
      executor_->layout(), executor_->layout().mesh.shard_coordinate(comm().rank()));
  for (size_t p = 0; p < values.size(); ++p) {
    const at::Tensor& value = values[p];
    if (!value.defined()) continue;
    comm().broadcast(value.data_ptr(), static_cast<size_t>(value.nbytes()), 0,
                     comm::make_tag("initial values"));
    const bool floats = value.scalar_type() == at::kFloat;
    for (const plan::ShardSlice& slice : slices) {
      if (slice.bucket != unit.parameters[p].bucket || slice.segment != unit.parameters[p].segment)
        continue;
      engine::Storage& storage = executor_->storage();
      const auto numel = static_cast<size_t>(slice.numel);
      if (floats) {
        storage.store(slice.bucket, slice.shard_at,
                      {value.data_ptr<float>() + slice.param_at, numel});
      } else {  // Bytes, whatever they mean.
        const auto* from = static_cast<const std::byte*>(value.data_ptr()) + slice.param_at;
        storage.home().write(storage.shard(slice.bucket) + slice.shard_at, from, numel);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Parameters in and out of reach

void ShardedCore::expose(UnitState& unit) {
  if (std::exchange(unit.exposed, true)) return;
  for (Parameter& parameter : unit.parameters) {
    parameter.tensor.set_data(parameter.view);
    parameter.version = parameter.tensor._version();
  }
}

void ShardedCore::conceal(UnitState& unit) noexcept {
  if (!std::exchange(unit.exposed, false)) return;
  for (Parameter& parameter : unit.parameters) {
    if (parameter.tensor._version() != parameter.version && deferred_error_.empty()) {
      deferred_error_ = cat(
          "a parameter of unit '", unit.name,
          "' was written in place while it was gathered: the change would be lost. Hint: change "
          "parameters through the sharded module's state.");
    }
    parameter.tensor.set_data(parameter.shell);
  }
}

void ShardedCore::conceal_what_backward_left(bool all) {
  std::erase_if(in_backward_, [&](UnitState* unit) {
    if (!all && executor_->backward_reads(unit->index)) return false;
    unit->in_backward = false;
    if (unit->calls == 0) conceal(*unit);
    return true;
  });
}

void ShardedCore::throw_deferred() {
  if (deferred_error_.empty()) return;
  throw ConfigError(std::exchange(deferred_error_, {}));
}

// ---------------------------------------------------------------------------------------------------------------------
// Gradients

std::optional<bool> ShardedCore::take_place(int unit, Parameter& parameter) {
  if (!executor_->in_backward()) {
    throw ConfigError(
        "backward outside of Step::backward. Hint: call step.backward(loss, tokens), not "
        "loss.backward().");
  }
  if (parameter.early.defined() || !executor_->gradient(unit, parameter.bucket))
    return std::nullopt;
  return executor_->gradient_arrived(parameter.bucket, parameter.segment);
}

void ShardedCore::collect_gradient(UnitState& unit, Parameter& parameter) {
  const at::Tensor gradient = parameter.tensor.grad();
  parameter.tensor.mutable_grad() = at::Tensor();
  // Undefined: a hand-written backward has written it where it belongs.
  if (!gradient.defined() || gradient.numel() == 0) return;
  const at::NoGradGuard no_graph;
  const std::optional<bool> replaces = take_place(unit.index, parameter);
  if (!replaces) {
    parameter.early = parameter.early.defined() ? parameter.early + gradient : gradient;
  } else if (*replaces) {
    parameter.place.copy_(gradient);
  } else {
    // A second gradient: of another call that was recomputed apart, or of an earlier micro-batch.
    parameter.place.add_(gradient);
  }
}

void ShardedCore::collect_early_gradients(int unit) {
  const at::NoGradGuard no_graph;
  for (Parameter& parameter : units_[static_cast<size_t>(unit)]->parameters) {
    const at::Tensor gradient = std::exchange(parameter.early, at::Tensor());
    if (!gradient.defined()) continue;
    if (take_place(unit, parameter).value()) {
      parameter.place.copy_(gradient);
    } else {
      parameter.place.add_(gradient);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// State

std::vector<OwnedSlice> ShardedCore::owned_slices() const {
  const plan::Layout& layout = executor_->layout();
  std::vector<OwnedSlice> owned;
  for (const plan::ShardSlice& slice :
       plan::slices_of(layout, layout.mesh.shard_coordinate(executor_->rank()))) {
    const plan::Bucket& bucket = layout.buckets[static_cast<size_t>(slice.bucket)];
    owned.push_back(
        {.name = layout.param(bucket, bucket.segments[static_cast<size_t>(slice.segment)]).name,
         .param_at = slice.param_at,
         .numel = slice.numel,
         .bucket = slice.bucket,
         .shard_at = slice.shard_at});
  }
  return owned;
}

bool ShardedCore::writes_state() const {
  return executor_->layout().mesh.replicate_coordinate(executor_->rank()) == 0;
}

void ShardedCore::store(const OwnedSlice& piece, int64_t at, std::span<const float> values) {
  executor_->storage().store(piece.bucket, piece.shard_at + at, values);
}

void ShardedCore::load(const OwnedSlice& piece, int64_t at, std::span<float> values) const {
  executor_->storage().load(piece.bucket, piece.shard_at + at, values);
}

// ---------------------------------------------------------------------------------------------------------------------
// A step

void ShardedCore::enter_root() {
  throw_deferred();
  executor_->enter_forward(0, at::GradMode::is_enabled());
  const int64_t micro_batch = executor_->micro_batch() * comm().size() + comm().rank();
  random_.emplace(options_.seed, executor_->step(), micro_batch, model_calls_++);
  expose(*units_[0]);
}

void ShardedCore::leave_root() noexcept {
  random_.reset();
  // In a step the root stays readable until the end of the backward.
  if (!executor_->in_step()) conceal(*units_[0]);
  executor_->leave_forward();
}

void ShardedCore::begin_step(int64_t micro_batches) {
  throw_deferred();
  executor_->begin_step(micro_batches);
  model_calls_ = 0;
}

void ShardedCore::backward(const at::Tensor& loss_sum, int64_t trainable_tokens) {
  if (loss_sum.numel() != 1 || !loss_sum.requires_grad()) {
    throw ConfigError(cat("backward: expected one number that requires grad, got shape ",
                          loss_sum.sizes(), loss_sum.requires_grad() ? "" : " without a graph"));
  }
  throw_deferred();
  executor_->start_backward(loss_sum.item<double>(), trainable_tokens);
  expose(*units_[0]);
  if (scaler_) scaler_->start(executor_->expected_tokens());
  const double scale = scaler_ ? scaler_->scale() : 1.0;
  torch::autograd::backward({loss_sum}, {at::full_like(loss_sum, scale)});
  conceal_what_backward_left(/*all=*/true);
  conceal(*units_[0]);
  executor_->finish_backward();
  model_calls_ = 0;
}

engine::StepStats ShardedCore::finish_step(engine::StepOptions options,
                                           const std::function<void()>& update) {
  throw_deferred();
  if (!scaler_) return executor_->finish_step(options, update);
  executor_->complete_gradients();  // Ranks without data hear of the tokens here.
  scaler_->start(executor_->expected_tokens());
  options.loss_scale *= scaler_->scale();
  options.skip_non_finite = true;
  const engine::StepStats stats = executor_->finish_step(options, update);
  scaler_->update(stats.skipped);
  return stats;
}

void initialize_parameters(ShardedCore& core, const FillFunction& fill) {
  std::map<std::string, const ParameterInfo*> by_name;
  for (const ParameterInfo& info : core.parameters()) by_name[info.name] = &info;
  std::vector<float> values;
  for (const OwnedSlice& piece : core.owned_slices()) {
    for (int64_t at = 0; at < piece.numel; at += kChunk) {
      values.resize(static_cast<size_t>(std::min(kChunk, piece.numel - at)));
      fill(piece.name, by_name.at(piece.name)->shape, piece.param_at + at, values);
      core.store(piece, at, values);
    }
  }
  core.publish();
}

}  // namespace fsdp
