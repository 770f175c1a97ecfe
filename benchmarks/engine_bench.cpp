// What the engine itself costs: host time per unit and step, and how it grows with units, ranks and
// parameters. No peers run: a fake transport completes every collective at once, so that what is
// left is our own time.
//
//   engine_bench [rounds]
//
// Host time is that of a step of the sharded model minus that of the same modules without sharding,
// run in turns; the median over rounds. Prints markdown.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/nn/modules/linear.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "libfsdp/comm/fake.h"
#include "libfsdp/shard/sharded.h"

namespace {

using fsdp::ShardOptions;

struct ChainImpl : torch::nn::Module {
  ChainImpl(int units, int64_t width) {
    for (int i = 0; i < units; ++i) {
      layers.emplace_back(torch::nn::LinearOptions(width, width));
      register_module("layer" + std::to_string(i), layers.back());
    }
  }
  at::Tensor forward(at::Tensor x) {
    for (auto& layer : layers) x = layer->forward(x);
    return x.sum();
  }
  std::vector<fsdp::Unit<torch::nn::Linear>> layers;
};
TORCH_MODULE(Chain);

double seconds_of(const std::function<void()>& run) {
  const auto begin = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<long>(values.size() / 2),
                   values.end());
  return values[values.size() / 2];
}

struct Measured {
  double construct_ms = 0;
  double first_step_ms = 0;  // With the compilation of the schedule.
  double plain_ms = 0;
  double sharded_ms = 0;
  int64_t collectives = 0;  // Of one step.
  double transient_mib = 0;
  double resident_mib = 0;
};

Measured measure(int units, int64_t width, int ranks, const ShardOptions& options, int rounds) {
  Measured result;
  auto comm = std::shared_ptr<fsdp::comm::FakeCommunicator>(
      fsdp::comm::make_fake(0, ranks, {.can_share = false, .repeat_own_data = false}));
  const bool with_plain = units * width * width < 200'000'000;
  Chain plain(units, with_plain ? width : 8);
  std::unique_ptr<fsdp::Sharded<Chain>> sharded;
  result.construct_ms = 1e3 * seconds_of([&] {
                          sharded = std::make_unique<fsdp::Sharded<Chain>>(
                              fsdp::fully_shard(Chain(units, width), comm, options));
                        });
  const at::Tensor x = at::ones({1, width});
  const auto plain_step = [&] {
    plain->forward(with_plain ? x : at::ones({1, 8})).backward();
    for (at::Tensor& parameter : plain->parameters()) parameter.mutable_grad() = at::Tensor();
  };
  // Without tokens nothing is updated: an optimizer is no part of the engine's own time.
  const auto sharded_step = [&] {
    fsdp::Step step = sharded->begin_step(1);
    step.backward((*sharded)(x), 0);
    step.finish({.learning_rate = 0.0});
  };
  result.first_step_ms = 1e3 * seconds_of(sharded_step);
  std::vector<double> plain_ms, sharded_ms;
  for (int round = -2; round < rounds; ++round) {
    comm->reset_counts();
    const double a = 1e3 * seconds_of(plain_step);
    const double b = 1e3 * seconds_of(sharded_step);
    if (round < 0) continue;
    plain_ms.push_back(a);
    sharded_ms.push_back(b);
  }
  result.plain_ms = with_plain ? median(plain_ms) : std::nan("");
  result.sharded_ms = median(sharded_ms);
  result.collectives = comm->total().collectives;
  const fsdp::engine::Storage& storage = sharded->core().executor().storage();
  result.transient_mib = static_cast<double>(storage.transient_bytes()) / (1 << 20);
  result.resident_mib =
      static_cast<double>(storage.allocated_bytes() - storage.transient_bytes()) / (1 << 20);
  return result;
}

// Slope of log(y) over log(x): 1 = grows in proportion.
double exponent(const std::vector<std::pair<double, double>>& points) {
  double sx = 0, sy = 0, sxx = 0, sxy = 0;
  for (const auto& [x, y] : points) {
    sx += std::log(x);
    sy += std::log(y);
    sxx += std::log(x) * std::log(x);
    sxy += std::log(x) * std::log(y);
  }
  const auto n = static_cast<double>(points.size());
  return (n * sxy - sx * sy) / (n * sxx - sx * sx);
}

double us_per_unit(const Measured& m, int units) {
  return (m.sharded_ms - m.plain_ms) * 1e3 / units;
}

ShardOptions slot_options() {
  ShardOptions options;
  options.placement.force_slot_home = true;
  options.optimizer.kind = fsdp::optim::OptimizerKind::kSgd;
  return options;
}

void host_time(int rounds) {
  std::printf(
      "## Host time of the engine, 64 units of Linear(8, 8)\n\n"
      "| placement | plain ms/step | sharded ms/step | engine us per unit and step |\n"
      "|---|--:|--:|--:|\n");
  const auto row = [&](const char* name, int ranks, const ShardOptions& options) {
    const Measured m = measure(64, 8, ranks, options, rounds);
    std::printf("| %s | %.3f | %.3f | %.1f |\n", name, m.plain_ms, m.sharded_ms,
                us_per_unit(m, 64));
  };
  row("one rank, resident", 1, [] {
    ShardOptions options = slot_options();
    options.placement.force_slot_home = false;
    return options;
  }());
  row("2 slots, 8 ranks", 8, slot_options());
  ShardOptions recompute = slot_options();
  recompute.activation_checkpointing = true;
  row("2 slots, 8 ranks, recompute", 8, recompute);
}

void growth_in_units(int rounds) {
  std::printf(
      "\n## Units (Linear(8, 8), 8 ranks, 2 slots)\n\n| units | construct ms | first step ms "
      "| engine us per unit and step | collectives a step |\n|--:|--:|--:|--:|--:|\n");
  std::vector<std::pair<double, double>> engine, first;
  for (const int units : {8, 16, 32, 64, 128, 256, 512}) {
    const Measured m = measure(units, 8, 8, slot_options(), rounds);
    std::printf("| %d | %.2f | %.2f | %.1f | %lld |\n", units, m.construct_ms, m.first_step_ms,
                us_per_unit(m, units), static_cast<long long>(m.collectives));
    engine.emplace_back(units, m.sharded_ms - m.plain_ms);
    first.emplace_back(units, m.first_step_ms);
  }
  std::printf("\nGrows with units^%.2f a step, units^%.2f in the first step.\n", exponent(engine),
              exponent(first));
}

void growth_in_ranks(int rounds) {
  std::printf(
      "\n## Ranks (64 units of Linear(64, 64), 2 slots)\n\n| ranks | engine us per unit and "
      "step | resident MiB a rank | transient MiB a rank |\n|--:|--:|--:|--:|\n");
  std::vector<std::pair<double, double>> resident;
  for (const int ranks : {1, 2, 4, 8, 64, 512, 4096}) {
    const Measured m = measure(64, 64, ranks, slot_options(), rounds);
    std::printf("| %d | %.1f | %.3f | %.3f |\n", ranks, us_per_unit(m, 64), m.resident_mib,
                m.transient_mib);
    if (ranks <= 8) resident.emplace_back(ranks, m.resident_mib);
  }
  std::printf("\nResident bytes grow with ranks^%.2f up to 8 ranks.\n", exponent(resident));
}

void growth_in_parameters(int rounds) {
  std::printf(
      "\n## Parameters (32 units, 2 slots)\n\n| parameters | ranks | construct s | resident MiB a "
      "rank | transient MiB a rank |\n|--:|--:|--:|--:|--:|\n");
  std::vector<std::pair<double, double>> transient;
  for (const auto& [width, ranks] :
       {std::pair<int64_t, int>{176, 8}, {560, 8}, {1768, 32}, {5592, 128}}) {
    const Measured m = measure(32, width, ranks, slot_options(), std::min(rounds, 5));
    const double parameters = 32.0 * static_cast<double>(width * (width + 1));
    std::printf("| %.3g | %d | %.2f | %.1f | %.1f |\n", parameters, ranks, m.construct_ms / 1e3,
                m.resident_mib, m.transient_mib);
    transient.emplace_back(parameters, m.transient_mib);
  }
  std::printf("\nTransient bytes grow with parameters^%.2f.\n", exponent(transient));
}

}  // namespace

int main(int argc, char** argv) {
  at::set_num_threads(1);
  const int rounds = argc > 1 ? std::max(1, std::atoi(argv[1])) : 51;
  host_time(rounds);
  growth_in_units(rounds);
  growth_in_ranks(rounds);
  growth_in_parameters(rounds);
}
