// AnyPrecision and 8-bit AdamW, and parameters of 16 bits: what does not need an oracle.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "libfsdp/base/checked.h"
#include "libfsdp/base/error.h"
#include "libfsdp/optim/optimizer.h"

namespace fsdp::optim {
namespace {

constexpr int64_t kFirst = 4096 + 512 + 40;  // Two parameters, of 8-bit and of fp32 state,
constexpr int64_t kSecondAt = 4864;          // the second of which starts on 256 elements.
constexpr int64_t kSecond = 777;
constexpr int64_t kNumel = 5888;  // A multiple of 256.
const std::vector<ParamGroup> kGroups = {{"decay", 1.0, 0.1}, {"no decay", 0.5, 0.0}};

std::vector<float> random_values(int64_t n, uint64_t seed, float scale) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> values(static_cast<size_t>(n));
  for (float& value : values) value = normal(random);
  return values;
}

/// The parts of the two parameters in elements [begin, end) of the bucket, in a shard that starts
/// at `begin`.
std::vector<GroupSegment> segments_of(int64_t begin, int64_t end) {
  std::vector<GroupSegment> segments;
  const auto add = [&](int64_t at, int64_t numel, int group, uint64_t parameter) {
    const int64_t first = std::max(begin, at);
    const int64_t last = std::min(end, at + numel);
    if (first >= last) return;
    segments.push_back({.begin = first - begin,
                        .end = last - begin,
                        .group = group,
                        .parameter = parameter,
                        .param_at = first - at,
                        .param_numel = numel});
  };
  add(0, kFirst, 0, 17);
  add(kSecondAt, kSecond, 1, 99);
  return segments;
}

/// Bits of a whole bucket after some steps over shards of `shard_numel` elements, each with an
/// optimizer of its own; the state is appended, element by element.
struct RunResult {
  std::vector<uint16_t> parameter;
  std::vector<std::vector<float>> state;
  bool operator==(const RunResult&) const = default;
};

void append_state(const StateTensor& tensor, int64_t shard_at, std::vector<float>& out) {
  const auto count = static_cast<int64_t>(tensor.values.size() / dtype_bytes(tensor.dtype));
  for (int64_t i = 0; i < count * tensor.elements_per_value; ++i) {
    const int64_t at = shard_at + tensor.begin + i;
    if (at >= kNumel) break;
    const std::byte* value =
        tensor.values.data() +
        static_cast<size_t>(i / tensor.elements_per_value) * dtype_bytes(tensor.dtype);
    out[static_cast<size_t>(at)] =
        tensor.dtype == DType::kU8     ? static_cast<float>(std::to_integer<int>(*value))
        : tensor.dtype == DType::kBF16 ? bf16_to_float(*reinterpret_cast<const uint16_t*>(value))
                                       : *reinterpret_cast<const float*>(value);
  }
}

RunResult run(const OptimizerOptions& options, int64_t shard_numel) {
  const std::vector<float> start = random_values(kNumel, 1, 1.0F);
  RunResult result;
  result.parameter.resize(kNumel);
  convert_floats(start.data(), DType::kF32, result.parameter.data(), DType::kBF16, kNumel);
  result.state.assign(4, std::vector<float>(kNumel));
  for (int64_t at = 0; at < kNumel; at += shard_numel) {
    const int64_t numel = std::min(shard_numel, kNumel - at);
    const std::vector<GroupSegment> segments = segments_of(at, at + numel);
    const auto optimizer = make_optimizer(options, numel, segments);
    for (int64_t step = 1; step <= 5; ++step) {
      const std::vector<float> gradient =
          random_values(kNumel, 100 + static_cast<uint64_t>(step), 0.01F);
      optimizer->update({.high = result.parameter.data() + at,
                         .gradient = gradient.data() + at,
                         .numel = numel,
                         .segments = segments,
                         .groups = kGroups},
                        {.learning_rate = 1e-3, .step = step, .seed = 5});
    }
    for (const StateTensor& tensor : optimizer->state_tensors()) {
      size_t place = 0;
      for (const std::string_view name : {"exp_avg", "exp_avg_sq", "compensation"}) {
        if (tensor.name == name) append_state(tensor, at, result.state[place]);
        ++place;
      }
      place = 0;
      for (const std::string_view name : {"state1", "absmax1", "state2", "absmax2"}) {
        if (tensor.name == name) append_state(tensor, at, result.state[place]);
        ++place;
      }
    }
  }
  return result;
}

std::vector<OptimizerOptions> all_options() {
  std::vector<OptimizerOptions> all;
  for (const bool stochastic : {false, true}) {
    all.push_back({.kind = OptimizerKind::kAdamW, .stochastic_rounding = stochastic});
    all.push_back({.kind = OptimizerKind::kAdamW8bit, .stochastic_rounding = stochastic});
    all.push_back({.kind = OptimizerKind::kAnyPrecisionAdamW,
                   .stochastic_rounding = stochastic,
                   .variance_dtype = DType::kBF16});
  }
  all.push_back({.kind = OptimizerKind::kAnyPrecisionAdamW,
                 .momentum_dtype = DType::kBF16,
                 .use_kahan_summation = true});
  return all;
}

TEST(LowPrecisionTest, BitsDoNotDependOnHowTheBucketIsCut) {
  for (const OptimizerOptions& options : all_options()) {
    const RunResult whole = run(options, kNumel);
    for (const int64_t shard_numel : {256, 512, 1280, 3072, 4864}) {
      EXPECT_TRUE(run(options, shard_numel) == whole)
          << static_cast<int>(options.kind) << options.stochastic_rounding << ' ' << shard_numel;
    }
  }
}

TEST(LowPrecisionTest, SeedStepAndParameterChangeRandomRounding) {
  const auto rounded = [&](uint64_t seed, uint64_t parameter, int64_t step) {
    std::vector<uint16_t> bits(256, 0x3f80);
    const std::vector<float> gradient(256, 1.0F);
    const std::vector<GroupSegment> segments = {{.end = 256, .group = 1, .parameter = parameter}};
    // Momentum from zero at any step: the same exact result, rounded in different ways.
    const auto optimizer =
        make_optimizer({.kind = OptimizerKind::kSgd, .stochastic_rounding = true}, 256);
    optimizer->update({.high = bits.data(),
                       .gradient = gradient.data(),
                       .numel = 256,
                       .segments = segments,
                       .groups = kGroups},
                      {.learning_rate = 0x1p-8, .step = step, .seed = seed});
    return bits;
  };
  const std::vector<uint16_t> first = rounded(1, 1, 1);
  EXPECT_EQ(rounded(1, 1, 1), first);
  EXPECT_NE(rounded(2, 1, 1), first);
  EXPECT_NE(rounded(1, 2, 1), first);
  EXPECT_NE(rounded(1, 1, 2), first);
}

// A change of 1/64 of the distance between neighbours, 640 times: to nearest it is lost each time.
TEST(LowPrecisionTest, SmallUpdatesSurviveKahanAndRandomRounding) {
  constexpr int kSteps = 640;
  constexpr int64_t kElements = 256;
  const auto mean_after = [&](const OptimizerOptions& options) {
    std::vector<uint16_t> bits(kElements, 0x3f80);  // 1.0; the neighbour above is 2^-7 away.
    const std::vector<float> gradient(kElements, -1.0F);
    const std::vector<GroupSegment> segments = {{.end = kElements, .group = 1}};
    const auto optimizer = make_optimizer(options, kElements);
    for (int64_t step = 1; step <= kSteps; ++step) {
      optimizer->update({.high = bits.data(),
                         .gradient = gradient.data(),
                         .numel = kElements,
                         .segments = segments,
                         .groups = kGroups},  // Half the rate.
                        {.learning_rate = 2 * 0x1p-13, .step = step});
    }
    double sum = 0;
    for (const uint16_t value : bits) sum += bf16_to_float(value);
    return sum / kElements;
  };
  constexpr double kExact = 1 + kSteps * 0x1p-13;  // AdamW moves by the rate when gradients agree.
  EXPECT_EQ(mean_after({.kind = OptimizerKind::kAnyPrecisionAdamW}), 1.0);
  EXPECT_NEAR(mean_after({.kind = OptimizerKind::kAnyPrecisionAdamW, .use_kahan_summation = true}),
              kExact, 0x1p-7);
  // Of one element: sqrt(640 p (1 - p)) 2^-7 with p = 1/64; of the mean of 256 a sixteenth, and
  // five of them.
  const double deviation = std::sqrt(kSteps * (1.0 / 64) * (63.0 / 64)) * 0x1p-7 / 16;
  for (const OptimizerKind kind : {OptimizerKind::kAnyPrecisionAdamW, OptimizerKind::kAdamW}) {
    EXPECT_NEAR(mean_after({.kind = kind, .stochastic_rounding = true}), kExact, 5 * deviation);
  }
}

TEST(LowPrecisionTest, ACopyIsTheMasterRounded) {
  for (const DType dtype : {DType::kBF16, DType::kF16}) {
    for (const OptimizerKind kind :
         {OptimizerKind::kAdamW, OptimizerKind::kSgd, OptimizerKind::kAdamW8bit}) {
      const std::vector<GroupSegment> segments = segments_of(0, kNumel);
      const auto with_copy = make_optimizer({.kind = kind}, kNumel, segments);
      const auto without = make_optimizer({.kind = kind}, kNumel, segments);
      std::vector<float> master = random_values(kNumel, 3, 1.0F);
      std::vector<float> alone = master;
      std::vector<uint16_t> copy(kNumel);
      const std::vector<float> gradient = random_values(kNumel, 4, 1.0F);
      const UpdateScalars scalars{.learning_rate = 0.1};
      with_copy->update({.master = master.data(),
                         .copy = copy.data(),
                         .copy_dtype = dtype,
                         .gradient = gradient.data(),
                         .numel = kNumel,
                         .segments = segments,
                         .groups = kGroups},
                        scalars);
      without->update({.master = alone.data(),
                       .gradient = gradient.data(),
                       .numel = kNumel,
                       .segments = segments,
                       .groups = kGroups},
                      scalars);
      EXPECT_EQ(master, alone);
      std::vector<uint16_t> expected(kNumel);
      convert_floats(master.data(), DType::kF32, expected.data(), dtype, kNumel);
      for (const GroupSegment& segment : segments) {
        EXPECT_TRUE(std::equal(expected.begin() + segment.begin, expected.begin() + segment.end,
                               copy.begin() + segment.begin));
      }
      EXPECT_EQ(copy[kFirst], 0);  // What no segment covers is not written.
    }
  }
}

TEST(QuantizedStateTest, BytesAreExactlyWhatIsAllocated) {
  for (const OptimizerOptions& options : all_options()) {
    const std::vector<GroupSegment> segments = segments_of(0, kNumel);
    const auto optimizer = make_optimizer(options, kNumel, segments);
    int64_t bytes = 0;
    for (const StateTensor& state : optimizer->state_tensors())
      bytes += round_up(static_cast<int64_t>(state.values.size()), 64);
    EXPECT_EQ(state_bytes(options, kNumel, segments), bytes);
  }
  constexpr int64_t kMillion = 1 << 20;
  EXPECT_EQ(state_bytes({.kind = OptimizerKind::kAdamW8bit}, kMillion),
            kMillion * 2 + kMillion / 256 * 8);
  EXPECT_EQ(state_bytes({.kind = OptimizerKind::kAnyPrecisionAdamW,
                         .momentum_dtype = DType::kBF16,
                         .variance_dtype = DType::kBF16,
                         .use_kahan_summation = true},
                        kMillion),
            6 * kMillion);
}

TEST(QuantizedStateTest, SmallParametersKeepFullState) {
  const auto optimizer =
      make_optimizer({.kind = OptimizerKind::kAdamW8bit}, kNumel, segments_of(0, kNumel));
  const auto states = optimizer->state_tensors();
  ASSERT_EQ(states.size(), 6U);
  EXPECT_EQ(states[0].dtype, DType::kU8);
  EXPECT_EQ(states[1].elements_per_value, 256);
  EXPECT_EQ(states[1].values.size(), (static_cast<size_t>(kFirst) + 255) / 256 * sizeof(float));
  EXPECT_EQ(states[4].dtype, DType::kF32);
  EXPECT_EQ(states[4].begin, kSecondAt);
  // The piece of a large parameter that a rank owns may be small.
  const auto piece = make_optimizer(
      {.kind = OptimizerKind::kAdamW8bit}, 256,
      std::vector<GroupSegment>{{.begin = 0, .end = 256, .param_at = 512, .param_numel = 100000}});
  EXPECT_EQ(piece->state_tensors()[0].dtype, DType::kU8);
}

TEST(QuantizedStateTest, RefusesSegmentsThatCutBlocks) {
  const OptimizerOptions options{.kind = OptimizerKind::kAdamW8bit};
  const std::vector<GroupSegment> segments = {{.end = 8192}};
  const auto optimizer = make_optimizer(options, 8192, segments);
  std::vector<float> master(8192);
  const std::vector<float> gradient(8192);
  const auto update = [&](int64_t begin, int64_t end) {
    const std::vector<GroupSegment> part = {{.begin = begin, .end = end}};
    optimizer->update({.master = master.data(),
                       .gradient = gradient.data(),
                       .numel = 8192,
                       .segments = part,
                       .groups = kGroups},
                      {.learning_rate = 1});
  };
  EXPECT_NO_THROW(update(256, 1024));
  EXPECT_THROW(update(100, 1024), InternalError);
  EXPECT_THROW(update(100, 100 + 256), InternalError);
  EXPECT_THROW(update(0, 1000), InternalError);
  const auto make = [&](std::vector<GroupSegment> parts) {
    return make_optimizer(options, 8192, parts);
  };
  EXPECT_THROW(make({{.end = 512, .param_at = 100}}), InternalError);
  EXPECT_THROW(make({{.end = 512}, {.begin = 256, .end = 600}}), InternalError);
  EXPECT_THROW(make({{.end = 8193}}), InternalError);
}

TEST(LowPrecisionTest, RefusesOptionsThatContradict) {
  const OptimizerKind any = OptimizerKind::kAnyPrecisionAdamW;
  EXPECT_THROW(make_optimizer({.kind = any, .momentum_dtype = DType::kF16}, 0), ConfigError);
  EXPECT_THROW(make_optimizer({.use_kahan_summation = true}, 0), ConfigError);
  EXPECT_THROW(
      make_optimizer({.kind = any, .stochastic_rounding = true, .use_kahan_summation = true}, 0),
      ConfigError);
  EXPECT_EQ(optimizer_kind_from_name("anyprecision"), any);
  EXPECT_EQ(optimizer_kind_from_name("adamw_bnb_8bit"), OptimizerKind::kAdamW8bit);
  std::vector<uint16_t> bits(256);
  const std::vector<float> gradient(256);
  const std::vector<GroupSegment> segments = {{.end = 256}};
  EXPECT_THROW(make_optimizer({.kind = any}, 256)
                   ->update({.high = bits.data(),
                             .remainder = bits.data(),
                             .gradient = gradient.data(),
                             .numel = 256,
                             .segments = segments,
                             .groups = kGroups},
                            {.learning_rate = 1}),
               ConfigError);
}

}  // namespace
}  // namespace fsdp::optim
