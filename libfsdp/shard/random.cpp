#include "libfsdp/shard/random.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>

#include <algorithm>
#include <cmath>
#include <mutex>

#include "libfsdp/base/error.h"
#include "libfsdp/kernels/philox.h"

namespace fsdp {
namespace {

// Two normal numbers from the uniforms 2 * pair and 2 * pair + 1 (Box-Muller).
struct NormalPair {
  double values[2];
};
NormalPair normal_pair(uint64_t key, uint64_t pair) {
  const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform_at(key, 2 * pair)));
  const double angle = 2.0 * M_PI * uniform_at(key, 2 * pair + 1);
  return {radius * std::cos(angle), radius * std::sin(angle)};
}

uint64_t derive_key(uint64_t parent, uint64_t a, uint64_t b) {
  const kernels::PhiloxWords words = kernels::philox4x32(a, b, parent);
  return uint64_t{words.word[1]} << 32 | words.word[0];
}

uint64_t key_from_default_generator() {
  at::Generator generator = at::globalContext().defaultGenerator(at::kCPU);
  const std::lock_guard lock(generator.mutex());
  return at::check_generator<at::CPUGeneratorImpl>(generator)->random64();
}

double normal_below(double x) { return 0.5 * std::erfc(-x / std::sqrt(2.0)); }

thread_local RandomScope* current_scope = nullptr;

}  // namespace

void fill_normal(uint64_t key, int64_t begin, std::span<float> out, double mean, double deviation) {
  NormalPair pair{};
  for (size_t i = 0; i < out.size(); ++i) {
    const uint64_t element = static_cast<uint64_t>(begin) + i;
    if (i == 0 || element % 2 == 0) pair = normal_pair(key, element / 2);
    out[i] = static_cast<float>(mean + deviation * pair.values[element % 2]);
  }
}

void fill_uniform(uint64_t key, int64_t begin, std::span<float> out, double low, double high) {
  const auto end = static_cast<float>(high);
  for (size_t i = 0; i < out.size(); ++i) {
    const double u = uniform_at(key, static_cast<uint64_t>(begin) + i);
    const auto value = static_cast<float>(low + (high - low) * u);
    // Rounding to float can reach the end, which does not belong to the interval.
    out[i] = value < end || low == high ? value : std::nextafter(end, static_cast<float>(low));
  }
}

void fill_truncated_normal(uint64_t key, int64_t begin, std::span<float> out, double mean,
                           double deviation, double low, double high) {
  const double probability =
      normal_below((high - mean) / deviation) - normal_below((low - mean) / deviation);
  if (!(probability >= 1e-3)) {
    throw ConfigError(cat("truncated normal: [", low, ", ", high, "] holds ", probability,
                          " of a normal with mean ", mean, " and deviation ", deviation,
                          "; expected at least 0.001"));
  }
  for (size_t i = 0; i < out.size(); ++i) {
    // Each element has a stream of its own, and takes the first number that fits.
    const uint64_t own = bits_at(key, static_cast<uint64_t>(begin) + i);
    uint64_t draw = 0;
    float value = 0;
    do {
      value = static_cast<float>(mean + deviation * normal_pair(own, draw / 2).values[draw % 2]);
      ++draw;
    } while (!(value >= low && value <= high));
    out[i] = value;
  }
}

RandomScope::RandomScope(const Site& site) : site_(site), outer_(current_scope) {
  if (site_) current_scope = this;
}

RandomScope::~RandomScope() {
  if (site_) current_scope = outer_;
}

uint64_t RandomScope::next_key() {
  if (!current_scope) return key_from_default_generator();
  return derive_key(*current_scope->site_, current_scope->next_++, 0);
}

RandomScope::Site RandomScope::next_unit_call() {
  if (!current_scope) return {};
  return derive_key(*current_scope->site_, current_scope->next_++, 1);
}

RandomScope::Site RandomScope::current_site() {
  return current_scope ? current_scope->site_ : Site();
}

bool RandomScope::active() { return current_scope != nullptr; }

RandomScope::Root::Root(uint64_t seed, int64_t step, int64_t micro_batch, int64_t call)
    : RandomScope(derive_key(
          derive_key(seed, static_cast<uint64_t>(step), static_cast<uint64_t>(micro_batch)),
          static_cast<uint64_t>(call), 2)) {}

}  // namespace fsdp
