#include "libfsdp/shard/sharded_core.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <map>

#include "libfsdp/base/error.h"
#include "libfsdp/shard/shell.h"

namespace fsdp {

struct ShardedCore::UnitState : UnitRuntime {
  UnitState(ShardedCore& owner, int number, std::string unit_name, UnitHook* unit_hook)
      : core(owner), index(number), name(std::move(unit_name)), hook(unit_hook) {}

  bool checkpointing() const override { return core.options_.activation_checkpointing; }
  void enter_forward() override {
    core.throw_deferred();
    core.executor_->enter_forward(index, at::GradMode::is_enabled());
    core.expose(*this);
  }
  void leave_forward() override {
    core.conceal(*this);
    core.executor_->leave_forward(index);
  }
  void enter_backward() override {
    if (core.exposed_in_backward_ >= 0)
      core.conceal(*core.units_[static_cast<size_t>(core.exposed_in_backward_)]);
    core.exposed_in_backward_ = -1;
    core.executor_->enter_backward(index);
    core.expose(*this);
    core.exposed_in_backward_ = index;
  }
  bool is_parameter_memory(const at::Tensor& tensor) const override {
    return tensor.has_storage() && core.executor_->storage().contains(tensor.storage().data());
  }

  ShardedCore& core;
  int index;
  std::string name;
  UnitHook* hook;
  std::vector<Parameter> parameters;
};

/// Moves a finished gradient into the unit's gradient slot.
class ShardedCore::GradientHook : public torch::autograd::PostAccumulateGradHook {
 public:
  GradientHook(ShardedCore& core, size_t unit, size_t parameter)
      : core_(core), unit_(unit), parameter_(parameter) {}
  void operator()(const torch::autograd::Variable&) override {
    core_.collect_gradient(unit_, parameter_);
  }

 private:
  ShardedCore& core_;
  size_t unit_;
  size_t parameter_;
};

namespace {

// Whether `name` lies in the module called `prefix` ("" holds everything).
bool lies_in(const std::string& name, const std::string& prefix) {
  return prefix.empty() ||
         (name.size() > prefix.size() && name[prefix.size()] == '.' && name.starts_with(prefix));
}

plan::ParamSpec specify(const std::string& name, const at::Tensor& tensor,
                        const ShardOptions& options) {
  if (!at::isFloatingType(tensor.scalar_type())) {
    throw ConfigError(
        cat("parameter '", name, "' is ", c10::toString(tensor.scalar_type()),
            ": only floating parameters can be sharded. Hint: register it as a buffer."));
  }
  return {.name = name,
          .shape = tensor.sizes().vec(),
          .dtype = options.param_dtype,
          .trainable = tensor.requires_grad(),
          .group = options.param_group ? options.param_group(name, tensor.sizes()) : 0};
}

void make_deterministic() {
  at::set_num_threads(1);
  at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/true);
}

}  // namespace

ShardedCore::ShardedCore(std::shared_ptr<torch::nn::Module> model,
                         std::shared_ptr<comm::Communicator> comm, const ShardOptions& options)
    : model_(std::move(model)), options_(with_environment(options)) {
  if (options_.param_dtype != DType::kF32 && options_.param_dtype != DType::kBF16) {
    throw ConfigError(
        cat("param_dtype ", dtype_name(options_.param_dtype), ": expected float32 or bfloat16"));
  }
  if (options_.deterministic) make_deterministic();
  refuse_meta_buffers();
  find_units();
  find_parameters();
  std::vector<plan::UnitSpec> specs;
  for (const auto& unit : units_) {
    plan::UnitSpec spec{.name = unit->name, .params = {}};
    for (const Parameter& parameter : unit->parameters) {
      spec.params.push_back(
          specify(infos_[static_cast<size_t>(parameter.segment)].name, parameter.tensor, options_));
    }
    specs.push_back(std::move(spec));
  }
  const plan::Placement placement = plan::place(
      options_.strategy, comm->size(), static_cast<int>(units_.size()) - 1, options_.placement);
  const plan::Layout layout = plan::make_layout(std::move(specs), placement.mesh);
  executor_ = std::make_unique<engine::Executor>(
      layout, placement, std::move(comm),
      engine::ExecutorOptions{
          .poison = options_.poison, .optimizer = options_.optimizer, .groups = options_.groups});
  take_over();
  install_hooks();
}

ShardedCore::~ShardedCore() {
  for (const auto& unit : units_) {
    if (unit->hook) unit->hook->set_runtime(nullptr);
    for (const Parameter& parameter : unit->parameters) {
      torch::autograd::impl::set_post_acc_grad_hooks(parameter.tensor, nullptr);
      conceal(*unit);
    }
  }
}

void ShardedCore::refuse_meta_buffers() const {
  for (const auto& buffer : model_->named_buffers()) {
    if (buffer.value().defined() && buffer.value().is_meta()) {
      throw ConfigError(
          cat("buffer '", buffer.key(),
              "' is on the meta device: nobody would fill it. Hint: build buffers on the CPU."));
    }
  }
}

void ShardedCore::find_units() {
  units_.push_back(std::make_unique<UnitState>(*this, 0, "", nullptr));
  for (const auto& entry : model_->named_modules()) {
    auto* hook = dynamic_cast<UnitHook*>(entry.value().get());
    if (!hook) continue;
    if (entry.key().empty()) {
      throw ConfigError("the model itself is a Unit: shard a module that contains units (or none)");
    }
    for (const auto& other : units_) {
      if (other->index != 0 && lies_in(entry.key(), other->name)) {
        throw ConfigError(cat("unit '", entry.key(), "' lies inside unit '", other->name,
                              "': nested units are not supported"));
      }
    }
    if (hook->runtime()) throw ConfigError(cat("unit '", entry.key(), "' has been sharded before"));
    units_.push_back(
        std::make_unique<UnitState>(*this, static_cast<int>(units_.size()), entry.key(), hook));
  }
}

void ShardedCore::find_parameters() {
  // A tensor with several names is owned by its first name's unit, or by the root when its names
  // lie in two units.
  std::map<const c10::TensorImpl*, size_t> known;
  std::vector<int> unit_of;
  std::vector<at::Tensor> tensors;
  for (const auto& entry : model_->named_parameters()) {
    int unit = 0;
    for (const auto& candidate : units_) {
      if (candidate->index != 0 && lies_in(entry.key(), candidate->name)) unit = candidate->index;
    }
    const auto [found, fresh] = known.emplace(entry.value().unsafeGetTensorImpl(), infos_.size());
    if (!fresh) {
      infos_[found->second].aliases.push_back(entry.key());
      if (unit_of[found->second] != unit) unit_of[found->second] = 0;
      continue;
    }
    infos_.push_back({.name = entry.key(),
                      .shape = entry.value().sizes().vec(),
                      .trainable = entry.value().requires_grad(),
                      .unit = {},
                      .aliases = {}});
    unit_of.push_back(unit);
    tensors.push_back(entry.value());
  }
  for (size_t i = 0; i < infos_.size(); ++i) {
    UnitState& unit = *units_[static_cast<size_t>(unit_of[i])];
    infos_[i].unit = unit.name;
    // Until the layout is made, `segment` holds the index into infos_.
    unit.parameters.push_back(
        {.tensor = tensors[i], .shell = {}, .view = {}, .segment = static_cast<int>(i)});
  }
}

void ShardedCore::take_over() {
  const plan::Layout& layout = executor_->layout();
  for (const auto& unit : units_) {
    std::vector<at::Tensor> values(unit->parameters.size());
    for (size_t i = 0; i < values.size(); ++i) {
      Parameter& parameter = unit->parameters[i];
      const std::string& name = infos_[static_cast<size_t>(parameter.segment)].name;
      if (!parameter.tensor.is_meta()) {
        values[i] = parameter.tensor.detach().to(at::kCPU, at::kFloat).contiguous().clone();
      }
      parameter.shell = make_shell(
          parameter.tensor.sizes(), to_scalar_type(options_.param_dtype),
          cat("parameter '", name, "' of ",
              unit->index ? cat("unit '", unit->name, "'") : std::string("the root unit"),
              " is not gathered: it can be used only during its unit's call"));
      parameter.tensor.mutable_grad() = at::Tensor();
      replace_data(parameter.tensor, parameter.shell);
    }
    for (const int b : layout.of_unit[static_cast<size_t>(unit->index)]) {
      const plan::Bucket& bucket = layout.buckets[static_cast<size_t>(b)];
      for (size_t s = 0; s < bucket.segments.size(); ++s) {
        Parameter& parameter = unit->parameters[static_cast<size_t>(bucket.segments[s].param)];
        parameter.bucket = b;
        parameter.segment = static_cast<int>(s);
      }
    }
    share_values(values);
    for (size_t i = 0; i < values.size(); ++i) {
      if (!values[i].defined()) continue;
      const Parameter& parameter = unit->parameters[i];
      const std::span<const float> all(values[i].data_ptr<float>(),
                                       static_cast<size_t>(values[i].numel()));
      for (const plan::ShardSlice& slice :
           plan::slices_of(layout, layout.mesh.shard_coordinate(executor_->comm().rank()))) {
        if (slice.bucket != parameter.bucket || slice.segment != parameter.segment) continue;
        executor_->storage().store(
            slice.bucket, slice.shard_at,
            all.subspan(static_cast<size_t>(slice.param_at), static_cast<size_t>(slice.numel)));
      }
    }
  }
}

void ShardedCore::share_values(const std::vector<at::Tensor>& values) {
  for (const at::Tensor& value : values) {
    if (!value.defined()) continue;
    executor_->comm().broadcast(value.data_ptr(), static_cast<size_t>(value.nbytes()), 0,
                                comm::make_tag("initial values"));
  }
}

void ShardedCore::install_hooks() {
  for (size_t u = 0; u < units_.size(); ++u) {
    if (units_[u]->hook) units_[u]->hook->set_runtime(units_[u].get());
    for (size_t p = 0; p < units_[u]->parameters.size(); ++p) {
      const at::Tensor& tensor = units_[u]->parameters[p].tensor;
      if (!tensor.requires_grad()) continue;
      torch::autograd::impl::set_post_acc_grad_hooks(tensor,
                                                     std::make_unique<GradientHook>(*this, u, p));
    }
  }
}

void ShardedCore::expose(UnitState& unit) {
  const plan::Layout& layout = executor_->layout();
  for (Parameter& parameter : unit.parameters) {
    if (!parameter.view.defined()) {
      const plan::Bucket& bucket = layout.buckets[static_cast<size_t>(parameter.bucket)];
      const int64_t offset = bucket.segments[static_cast<size_t>(parameter.segment)].begin *
                             static_cast<int64_t>(dtype_bytes(bucket.dtype));
      parameter.view = at::from_blob(
          executor_->storage().gathered(executor_->slot_of(unit.index), parameter.bucket) + offset,
          parameter.tensor.sizes(), at::TensorOptions(to_scalar_type(bucket.dtype)));
    }
    parameter.tensor.set_data(parameter.view);
    parameter.version = parameter.tensor._version();
  }
}

void ShardedCore::conceal(UnitState& unit) noexcept {
  for (Parameter& parameter : unit.parameters) {
    if (parameter.tensor.unsafeGetTensorImpl()->storage().unsafeGetStorageImpl() ==
        parameter.shell.unsafeGetTensorImpl()->storage().unsafeGetStorageImpl()) {
      continue;
    }
    if (parameter.tensor._version() != parameter.version && deferred_error_.empty()) {
      deferred_error_ = cat(
          "a parameter of unit '", unit.name,
          "' was written in place while it was gathered: the change would be lost. Hint: change "
          "parameters through the sharded module's state.");
    }
    parameter.tensor.set_data(parameter.shell);
  }
}

void ShardedCore::collect_gradient(size_t unit, size_t index) {
  Parameter& parameter = units_[unit]->parameters[index];
  const at::Tensor gradient = parameter.tensor.grad();
  parameter.tensor.mutable_grad() = at::Tensor();
  if (!executor_->in_backward()) {
    throw ConfigError(
        "backward outside of Step::backward. Hint: call step.backward(loss, tokens), not "
        "loss.backward().");
  }
  const plan::Bucket& bucket = executor_->layout().buckets[static_cast<size_t>(parameter.bucket)];
  const int64_t offset = bucket.segments[static_cast<size_t>(parameter.segment)].begin *
                         static_cast<int64_t>(dtype_bytes(bucket.dtype));
  std::byte* begin = executor_->gradient(static_cast<int>(unit), parameter.bucket) + offset;
  const at::NoGradGuard no_graph;
  const at::Tensor place =
      at::from_blob(begin, gradient.sizes(), at::TensorOptions(to_scalar_type(bucket.dtype)));
  // A second gradient in one micro-batch: a tied parameter whose uses are recomputed apart.
  if (executor_->gradient_arrived(parameter.bucket, parameter.segment)) {
    place.copy_(gradient);
  } else {
    place.add_(gradient);
  }
}

void ShardedCore::throw_deferred() {
  if (deferred_error_.empty()) return;
  throw ConfigError(std::exchange(deferred_error_, {}));
}

std::vector<OwnedSlice> ShardedCore::owned_slices() const {
  const plan::Layout& layout = executor_->layout();
  std::vector<OwnedSlice> owned;
  for (const plan::ShardSlice& slice :
       plan::slices_of(layout, layout.mesh.shard_coordinate(executor_->comm().rank()))) {
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
  return executor_->layout().mesh.replicate_coordinate(executor_->comm().rank()) == 0;
}

void ShardedCore::store(const OwnedSlice& piece, int64_t at, std::span<const float> values) {
  executor_->storage().store(piece.bucket, piece.shard_at + at, values);
}

void ShardedCore::load(const OwnedSlice& piece, int64_t at, std::span<float> values) const {
  executor_->storage().load(piece.bucket, piece.shard_at + at, values);
}

void ShardedCore::enter_root() {
  throw_deferred();
  executor_->enter_forward(0, at::GradMode::is_enabled());
  expose(*units_[0]);
}

void ShardedCore::leave_root() noexcept {
  // With a graph the root stays readable until the end of its backward.
  if (!executor_->in_step()) conceal(*units_[0]);
  executor_->leave_forward(0);
}

void ShardedCore::begin_step(int64_t micro_batches) {
  throw_deferred();
  executor_->begin_step(micro_batches);
}

void ShardedCore::backward(const at::Tensor& loss_sum, int64_t trainable_tokens) {
  if (loss_sum.numel() != 1 || !loss_sum.requires_grad()) {
    throw ConfigError(cat("backward: expected one number that requires grad, got shape ",
                          loss_sum.sizes(), loss_sum.requires_grad() ? "" : " without a graph"));
  }
  throw_deferred();
  executor_->start_backward(loss_sum.item<double>(), trainable_tokens);
  expose(*units_[0]);
  torch::autograd::backward({loss_sum});
  if (exposed_in_backward_ >= 0) conceal(*units_[static_cast<size_t>(exposed_in_backward_)]);
  exposed_in_backward_ = -1;
  conceal(*units_[0]);
  executor_->finish_backward();
}

engine::StepStats ShardedCore::finish_step(const engine::StepOptions& options) {
  throw_deferred();
  return executor_->finish_step(options);
}

void initialize_parameters(ShardedCore& core, const FillFunction& fill) {
  std::map<std::string, const ParameterInfo*> by_name;
  for (const ParameterInfo& info : core.parameters()) by_name[info.name] = &info;
  std::vector<float> values;
  for (const OwnedSlice& piece : core.owned_slices()) {
    constexpr int64_t kChunk = int64_t{1} << 20;
    for (int64_t at = 0; at < piece.numel; at += kChunk) {
      values.resize(static_cast<size_t>(std::min(kChunk, piece.numel - at)));
      fill(piece.name, by_name.at(piece.name)->shape, piece.param_at + at, values);
      core.store(piece, at, values);
    }
  }
}

}  // namespace fsdp
