#include "libfsdp/plan/layout.h"

#include <gtest/gtest.h>

#include <map>
#include <random>

#include "libfsdp/base/checked.h"

namespace fsdp::plan {
namespace {

int between(std::mt19937& random, int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(random);
}

std::vector<int64_t> random_shape(std::mt19937& random) {
  switch (between(random, 0, 5)) {
    case 0:
      return {};
    case 1:
      return {between(random, 0, 2), 0, 7};
    case 2:
      return {between(random, 1, 3)};
    case 3:
      return {between(random, 1, 2000)};
    default:
      return {between(random, 1, 40), between(random, 1, 60)};
  }
}

std::vector<UnitSpec> random_units(std::mt19937& random) {
  std::vector<UnitSpec> units(static_cast<size_t>(between(random, 1, 6)));
  for (size_t u = 0; u < units.size(); ++u) {
    units[u].name = cat("u", u);
    units[u].parent = u < 2 ? 0 : between(random, 0, static_cast<int>(u) - 1);
    const int params = between(random, 0, 8);
    for (int p = 0; p < params; ++p) {
      units[u].params.push_back({.name = cat("u", u, ".p", p),
                                 .shape = random_shape(random),
                                 .dtype = between(random, 0, 1) ? DType::kF32 : DType::kBF16,
                                 .trainable = between(random, 0, 2) != 0});
      if (between(random, 0, 3) == 0) units[u].params.back().reduce_dtype = DType::kF32;
    }
  }
  return units;
}

void expect_segments_in_order(const Layout& layout, const Bucket& bucket) {
  int64_t end = 0;
  for (const Segment& segment : bucket.segments) {
    const ParamSpec& param = layout.param(bucket, segment);
    EXPECT_EQ(segment.begin % kQuantumNumel, 0) << param.name;
    EXPECT_EQ(segment.begin, round_up(end, kQuantumNumel))
        << param.name << " does not lie end to end";
    EXPECT_EQ(segment.numel, param.numel()) << param.name;
    EXPECT_EQ(param.dtype, bucket.dtype) << param.name;
    EXPECT_EQ(param.trainable, bucket.trainable) << param.name;
    EXPECT_EQ(param.reduce_dtype.value_or(param.dtype), bucket.reduce_dtype) << param.name;
    end = segment.begin + segment.numel;
  }
  EXPECT_EQ(bucket.numel, end);
}

void expect_even_parts(const Layout& layout, const Bucket& bucket) {
  EXPECT_EQ(bucket.shard_numel % kShardQuantumNumel, 0);
  EXPECT_EQ(bucket.padded_numel, bucket.shard_numel * layout.mesh.shard);
  EXPECT_GE(bucket.padded_numel, bucket.numel);
  EXPECT_LT(bucket.padded_numel, bucket.numel + kShardQuantumNumel * layout.mesh.shard)
      << "too much padding";
}

void expect_every_parameter_once(const Layout& layout) {
  std::map<std::string, int> seen;
  for (const Bucket& bucket : layout.buckets) {
    for (const Segment& segment : bucket.segments) ++seen[layout.param(bucket, segment).name];
  }
  size_t params = 0;
  for (const UnitSpec& unit : layout.units) {
    params += unit.params.size();
    for (const ParamSpec& param : unit.params) EXPECT_EQ(seen[param.name], 1) << param.name;
  }
  EXPECT_EQ(seen.size(), params);
}

// Marks what each rank's slices cover, and checks that parameter, bucket and shard positions agree.
void expect_every_element_owned_once(const Layout& layout) {
  std::map<std::string, std::vector<int>> owners;
  for (int coordinate = 0; coordinate < layout.mesh.shard; ++coordinate) {
    for (const ShardSlice& slice : slices_of(layout, coordinate)) {
      const Bucket& bucket = layout.buckets[static_cast<size_t>(slice.bucket)];
      const Segment& segment = bucket.segments[static_cast<size_t>(slice.segment)];
      EXPECT_GT(slice.numel, 0);
      EXPECT_GE(slice.shard_at, 0);
      EXPECT_LE(slice.shard_at + slice.numel, bucket.shard_numel);
      EXPECT_EQ(coordinate * bucket.shard_numel + slice.shard_at, segment.begin + slice.param_at);
      EXPECT_EQ(slice.shard_at % kQuantumNumel, 0) << "a quantum is cut";
      EXPECT_EQ(slice.param_at % kQuantumNumel, 0) << "a quantum is cut";
      std::vector<int>& marks = owners[layout.param(bucket, segment).name];
      marks.resize(static_cast<size_t>(segment.numel));
      for (int64_t i = slice.param_at; i < slice.param_at + slice.numel; ++i)
        ++marks.at(static_cast<size_t>(i));
    }
  }
  for (const UnitSpec& unit : layout.units) {
    for (const ParamSpec& param : unit.params) {
      EXPECT_EQ(owners[param.name], std::vector<int>(static_cast<size_t>(param.numel()), 1))
          << param.name;
    }
  }
}

void expect_sums(const Layout& layout) {
  ASSERT_EQ(layout.of_unit.size(), layout.units.size());
  size_t listed = 0;
  for (size_t u = 0; u < layout.units.size(); ++u) {
    int64_t bytes = 0;
    int64_t trainable = 0;
    int64_t gradients = 0;
    bool frozen_seen = false;
    for (const int b : layout.of_unit[u]) {
      const Bucket& bucket = layout.buckets[static_cast<size_t>(b)];
      EXPECT_EQ(bucket.unit, static_cast<int>(u));
      EXPECT_FALSE(bucket.trainable && frozen_seen)
          << "a frozen bucket lies between trainable ones";
      frozen_seen = frozen_seen || !bucket.trainable;
      bytes += bucket.padded_numel * static_cast<int64_t>(dtype_bytes(bucket.dtype));
      trainable += bucket.trainable ? bucket.padded_numel : 0;
      if (bucket.trainable) {
        gradients += bucket.padded_numel * static_cast<int64_t>(dtype_bytes(bucket.reduce_dtype));
      }
      ++listed;
    }
    EXPECT_EQ(layout.unit_bytes(static_cast<int>(u)), bytes);
    EXPECT_EQ(layout.trainable_numel(static_cast<int>(u)), trainable);
    EXPECT_EQ(layout.gradient_bytes(static_cast<int>(u)), gradients);
  }
  EXPECT_EQ(listed, layout.buckets.size());
}

TEST(LayoutTest, RandomModelsAreCutWithoutGapOrOverlap) {
  for (unsigned seed = 0; seed < 200; ++seed) {
    std::mt19937 random(seed);
    const Mesh mesh{between(random, 1, 2), between(random, 1, 5)};
    SCOPED_TRACE(cat("seed ", seed, ", shard axis ", mesh.shard));
    const Layout layout = make_layout(random_units(random), mesh);
    for (const Bucket& bucket : layout.buckets) {
      expect_segments_in_order(layout, bucket);
      expect_even_parts(layout, bucket);
    }
    expect_every_parameter_once(layout);
    expect_every_element_owned_once(layout);
    expect_sums(layout);
    if (HasFailure()) return;
  }
}

TEST(LayoutTest, ATinyBucketLeavesLaterRanksEmpty) {
  const Layout layout = make_layout({{"", {{"w", {300}}}}}, {1, 4});
  EXPECT_EQ(layout.buckets.at(0).shard_numel, 256);
  ASSERT_EQ(slices_of(layout, 0).size(), 1U);
  EXPECT_EQ(slices_of(layout, 0)[0].numel, 256);
  ASSERT_EQ(slices_of(layout, 1).size(), 1U);
  EXPECT_EQ(slices_of(layout, 1)[0].numel, 44);
  EXPECT_EQ(slices_of(layout, 1)[0].param_at, 256);
  EXPECT_TRUE(slices_of(layout, 2).empty());
  EXPECT_TRUE(slices_of(layout, 3).empty());
}

TEST(LayoutTest, ScalarsAndEmptyParametersAreLegal) {
  const Layout layout =
      make_layout({{"", {{"scalar", {}}, {"empty", {3, 0}}, {"w", {2}}}}}, {1, 2});
  const Bucket& bucket = layout.buckets.at(0);
  ASSERT_EQ(bucket.segments.size(), 3U);
  EXPECT_EQ(bucket.segments[0].numel, 1);
  EXPECT_EQ(bucket.segments[1].numel, 0);
  EXPECT_EQ(bucket.segments[1].begin, 256);
  EXPECT_EQ(bucket.segments[2].begin, 256) << "what is empty takes no room";
  ASSERT_EQ(slices_of(layout, 0).size(), 1U) << "the scalar";
  ASSERT_EQ(slices_of(layout, 1).size(), 1U);
  EXPECT_EQ(slices_of(layout, 1)[0].segment, 2);
}

TEST(LayoutTest, OnlyEmptyParametersMakeAnEmptyBucket) {
  const Layout layout = make_layout({{"", {{"empty", {0}}}}}, {1, 3});
  EXPECT_EQ(layout.buckets.at(0).shard_numel, 0);
  EXPECT_EQ(layout.unit_bytes(0), 0);
  EXPECT_TRUE(slices_of(layout, 0).empty());
}

TEST(LayoutTest, DtypeAndTrainabilityPartBuckets) {
  const Layout layout = make_layout({{"",
                                      {{"frozen", {8}, DType::kBF16, false},
                                       {"a", {8}, DType::kBF16},
                                       {"norm", {8}, DType::kF32},
                                       {"b", {8}, DType::kBF16}}}},
                                    {1, 1});
  ASSERT_EQ(layout.buckets.size(), 3U);
  EXPECT_EQ(layout.buckets[0].segments.size(), 2U);
  EXPECT_EQ(layout.buckets[0].dtype, DType::kBF16);
  EXPECT_EQ(layout.buckets[1].dtype, DType::kF32);
  EXPECT_FALSE(layout.buckets[2].trainable);
}

TEST(LayoutTest, AReduceDtypeOfItsOwnPartsBuckets) {
  const Layout layout = make_layout({{"",
                                      {{"a", {8}, DType::kBF16},
                                       {"router", {8}, DType::kBF16, true, 0, DType::kF32},
                                       {"b", {8}, DType::kBF16, true, 0, DType::kBF16}}}},
                                    {1, 2});
  ASSERT_EQ(layout.buckets.size(), 2U);
  EXPECT_EQ(layout.buckets[0].segments.size(), 2U) << "bf16 without and with saying so";
  EXPECT_EQ(layout.buckets[0].gradient_bytes(), 512 * 2);
  EXPECT_EQ(layout.buckets[1].dtype, DType::kBF16);
  EXPECT_EQ(layout.buckets[1].reduce_dtype, DType::kF32);
  EXPECT_EQ(layout.buckets[1].padded_bytes(), 512 * 2);
  EXPECT_EQ(layout.buckets[1].gradient_bytes(), 512 * 4);
  EXPECT_EQ(layout.gradient_bytes(0), 512 * 6);
}

TEST(LayoutTest, UnitsLieInsideEachOther) {
  const Layout layout = make_layout(
      {{"", {}}, {"a", {}}, {"a.b", {}, 1}, {"a.b.c", {}, 2}, {"d", {}}, {"a.e", {}, 1}}, {1, 2});
  EXPECT_EQ(layout.nesting_depth(), 3);
  for (int unit = 0; unit < 6; ++unit) {
    EXPECT_TRUE(layout.contains(0, unit)) << unit;
    EXPECT_TRUE(layout.contains(unit, unit)) << unit;
  }
  EXPECT_TRUE(layout.contains(1, 3));
  EXPECT_TRUE(layout.contains(2, 3));
  EXPECT_FALSE(layout.contains(3, 2));
  EXPECT_FALSE(layout.contains(4, 3));
  EXPECT_FALSE(layout.contains(2, 5));
  EXPECT_EQ(make_layout({{"", {}}}, {1, 1}).nesting_depth(), 0);
}

TEST(LayoutTest, AUnitInsideALaterOneIsRefused) {
  for (const int parent : {1, 2, -1}) {
    EXPECT_THROW(make_layout({{"", {}}, {"a", {}, parent}, {"b", {}}}, {1, 1}), ConfigError)
        << parent;
  }
}

TEST(LayoutTest, TwoParametersOfOneNameAreRefused) {
  EXPECT_THROW(make_layout({{"", {{"w", {1}}}}, {"a", {{"w", {1}}}}}, {1, 1}), ConfigError);
}

TEST(LayoutTest, SizesThatOverflowAreRefused) {
  EXPECT_THROW(make_layout({{"", {{"w", {int64_t{1} << 40, int64_t{1} << 40}}}}}, {1, 1}),
               ConfigError);
  EXPECT_THROW(make_layout({{"", {{"a", {int64_t{1} << 62}}, {"b", {int64_t{1} << 62}}}}}, {1, 1}),
               ConfigError);
}

}  // namespace
}  // namespace fsdp::plan
