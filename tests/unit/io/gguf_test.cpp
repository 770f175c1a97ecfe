#include "libfsdp/io/gguf.h"

#include <rapidcheck.h>

#include <numeric>

#include "libfsdp/base/dtype.h"
#include "libfsdp/base/error.h"
#include "tests/unit/io/expect_error.h"
#include "tests/unit/io/gguf_builder.h"
#include "tests/unit/io/temp_dir.h"

namespace fsdp::io {
namespace {

constexpr uint32_t kF32 = 0, kQ8_0 = 8;
constexpr uint64_t kHuge = uint64_t{1} << 62;

GgufFile open_bytes(const std::string& bytes) {
  const TempDir dir;
  return GgufFile::open(dir.write("a.gguf", bytes));
}

/// One F32 tensor [2, 3] with elements 0..5, and some metadata.
std::string good_file() {
  GgufBytes bytes;
  bytes.header(1, 5).text_key("s", "text").uint_key("u", 4000000000U).float_key("f", 1e-5F);
  bytes.text("b").number<uint32_t>(7).number<uint8_t>(1);
  bytes.text("a").number<uint32_t>(9).number<uint32_t>(8).number<uint64_t>(2).text("x").text("");
  bytes.tensor("t", {3, 2}, kF32, 0).pad();
  for (int i = 0; i < 6; ++i) bytes.number(static_cast<float>(i));
  return bytes.str();
}

TEST(GgufTest, ReadsMetadataAndAnyRangeOfATensor) {
  const auto file = open_bytes(good_file());
  EXPECT_EQ(file.metadata().dump(),
            R"({"s":"text","u":4000000000,"f":1e-05,"b":true,"a":["x",""]})");
  ASSERT_EQ(file.tensors().size(), 1U);
  EXPECT_EQ(file.find("t")->shape, (std::vector<int64_t>{2, 3}));
  std::vector<float> values(3);
  file.read(*file.find("t"), 2, values);
  EXPECT_EQ(values, (std::vector<float>{2, 3, 4}));
  EXPECT_ERROR(file.read(*file.find("t"), 4, values), InternalError, "outside");
}

TEST(GgufTest, EveryPrefixIsRefused) {
  const std::string good = good_file();
  for (size_t size = 0; size < good.size(); ++size)
    EXPECT_THROW(open_bytes(good.substr(0, size)), ModelError) << size;
}

TEST(GgufTest, NoFlippedByteCrashesTheReader) {
  EXPECT_TRUE(rc::check([] {
    std::string bytes = good_file();
    for (int i = 0; i < 2; ++i)
      bytes[*rc::gen::inRange<size_t>(0, bytes.size())] = *rc::gen::arbitrary<char>();
    try {
      const auto file = open_bytes(bytes);
      for (const GgufTensor& tensor : file.tensors()) {
        std::vector<float> values(static_cast<size_t>(tensor.numel));
        RC_ASSERT(values.size() < 100U);
      }
    } catch (const ModelError&) {
    }
  }));
}

TEST(GgufTest, RefusesWrongMagicVersionsAndCounts) {
  EXPECT_ERROR(open_bytes("GGML1234567890"), ModelError, "does not begin with GGUF");
  EXPECT_ERROR(open_bytes(GgufBytes().header(0, 0, 1).str()), ModelError,
               "version 1 is not supported");
  EXPECT_ERROR(open_bytes(GgufBytes().header(0, 0, 0x03000000).str()), ModelError, "little-endian");
  EXPECT_ERROR(open_bytes(GgufBytes().header(kHuge, 0).str()), ModelError,
               "the list of tensors claims");
  EXPECT_ERROR(open_bytes(GgufBytes().header(0, kHuge).str()), ModelError, "the metadata claims");
  EXPECT_EQ(open_bytes(GgufBytes().header(0, 0, 2).str()).tensors().size(), 0U);
}

TEST(GgufTest, RefusesBadMetadata) {
  const auto with_key = [](const GgufBytes& key) {
    return open_bytes(GgufBytes().header(0, 1).raw(key.str()).str());
  };
  EXPECT_ERROR(with_key(GgufBytes().number(kHuge).raw("12345")), ModelError, "a key claims");
  EXPECT_ERROR(with_key(GgufBytes().text("k").number<uint32_t>(8).number(kHuge).raw("12")),
               ModelError, "key \"k\": a string claims");
  EXPECT_ERROR(
      with_key(GgufBytes().text("k").number<uint32_t>(9).number<uint32_t>(0).number(kHuge)),
      ModelError, "an array claims");
  EXPECT_ERROR(with_key(GgufBytes().text("k").number<uint32_t>(13).number<uint64_t>(0)), ModelError,
               "value type 13 is unknown");
  EXPECT_ERROR(with_key(GgufBytes().uint_key("general.alignment", 48)), ModelError,
               "expected a power of two");
  EXPECT_ERROR(with_key(GgufBytes().uint_key("general.alignment", 0)), ModelError,
               "expected a power of two");
  GgufBytes deep;
  deep.text("k").number<uint32_t>(9);
  for (int i = 0; i < 1000; ++i) deep.number<uint32_t>(9).number<uint64_t>(1);
  EXPECT_ERROR(with_key(deep), ModelError, "nest deeper");
  EXPECT_ERROR(open_bytes(GgufBytes().header(0, 2).uint_key("k", 1).uint_key("k", 2).str()),
               ModelError, "\"k\" occurs twice");
}

TEST(GgufTest, RefusesBadTensors) {
  const auto with_tensor = [](std::vector<uint64_t> dims, uint32_t type, uint64_t offset) {
    return open_bytes(GgufBytes()
                          .header(1, 0)
                          .tensor("t", dims, type, offset)
                          .pad()
                          .raw(std::string(64, 'x'))
                          .str());
  };
  EXPECT_EQ(with_tensor({4, 4}, kF32, 0).tensors()[0].bytes, 64);
  EXPECT_ERROR(with_tensor({4, 5}, kF32, 0), ModelError, "truncated");
  EXPECT_ERROR(with_tensor({4}, kF32, 64), ModelError, "truncated");
  EXPECT_ERROR(with_tensor({4}, kF32, 4), ModelError, "not a multiple of the alignment 32");
  EXPECT_ERROR(with_tensor({4}, kF32, ~uint64_t{31}), ModelError,
               "not a multiple of the alignment");
  EXPECT_ERROR(with_tensor({4}, kF32, kHuge * 2 - 32), ModelError, "overflows");
  EXPECT_ERROR(with_tensor({4}, 99, 0), ModelError, "tensor type 99 is not supported");
  EXPECT_ERROR(with_tensor({16}, kQ8_0, 0), ModelError, "do not fill blocks of 32 (Q8_0)");
  EXPECT_ERROR(with_tensor({1, 1, 1, 1, 1}, kF32, 0), ModelError, "5 dimensions");
  EXPECT_ERROR(with_tensor({~uint64_t{0}}, kF32, 0), ModelError, "is too large");
  EXPECT_ERROR(with_tensor({kHuge, 4}, kF32, 0), ModelError, "overflows");
  EXPECT_ERROR(with_tensor({kHuge, 4, 0}, kF32, 0), ModelError, "overflows");
  EXPECT_ERROR(with_tensor({kHuge}, kF32, 0), ModelError, "overflows");
  const auto two = [](std::string_view second, uint64_t offset) {
    return open_bytes(GgufBytes()
                          .header(2, 0)
                          .tensor("t", {16}, kF32, 0)
                          .tensor(second, {4}, kF32, offset)
                          .pad()
                          .raw(std::string(96, 'x'))
                          .str());
  };
  EXPECT_EQ(two("u", 64).tensors().size(), 2U);
  EXPECT_ERROR(two("u", 32), ModelError, "tensors \"t\" and \"u\" overlap");
  EXPECT_ERROR(two("t", 64), ModelError, "tensor \"t\" occurs twice");
}

TEST(GgufTest, RangesThatCutBlocksEqualTheWholeTensor) {
  constexpr int64_t kBlocks = 5;
  GgufBytes bytes;
  bytes.header(1, 0).tensor("t", {32, kBlocks}, kQ8_0, 0).pad();
  for (int i = 0; i < kBlocks; ++i) {
    bytes.number(float_to_f16(0.5F * static_cast<float>(i + 1)));
    for (int j = 0; j < 32; ++j) bytes.number(static_cast<int8_t>(j - 16));
  }
  const auto file = open_bytes(bytes.str());
  std::vector<float> whole(32 * kBlocks);
  file.read(file.tensors()[0], 0, whole);
  EXPECT_EQ(whole[0], -8.0F);
  EXPECT_EQ(whole[33], -15.0F);
  EXPECT_TRUE(rc::check([&] {
    const auto at = *rc::gen::inRange<size_t>(0, whole.size());
    std::vector<float> part(*rc::gen::inRange<size_t>(0, whole.size() - at + 1));
    file.read(file.tensors()[0], static_cast<int64_t>(at), part);
    RC_ASSERT(
        std::equal(part.begin(), part.end(), whole.begin() + static_cast<std::ptrdiff_t>(at)));
  }));
}

std::vector<float> decode(GgufType type, const GgufBytes& block, size_t numel) {
  std::vector<float> out(numel);
  gguf_decode(type, std::as_bytes(std::span(block.str().data(), block.str().size())), out);
  return out;
}

/// `count` bytes that are all `value`, but `first` in front.
std::string bytes_of(size_t count, uint8_t value, uint8_t first) {
  std::string bytes(count, static_cast<char>(value));
  bytes[0] = static_cast<char>(first);
  return bytes;
}

TEST(GgufDecodeTest, BlocksOf32MatchHandComputedValues) {
  // Nibbles: byte 0 is 0xF3 (element 0: 3, element 16: 15), the others 0x28 (low 8, high 2).
  const std::string nibbles = bytes_of(16, 0x28, 0xF3);
  const auto q4_0 =
      decode(GgufType::kQ4_0, GgufBytes().number(float_to_f16(0.5F)).raw(nibbles), 32);
  EXPECT_EQ(q4_0[0], -2.5F);  // (3 - 8) / 2
  EXPECT_EQ(q4_0[1], 0.0F);
  EXPECT_EQ(q4_0[16], 3.5F);
  EXPECT_EQ(q4_0[31], -3.0F);
  GgufBytes with_minimum;
  with_minimum.number(float_to_f16(0.5F)).number(float_to_f16(-1.0F)).raw(nibbles);
  const auto q4_1 = decode(GgufType::kQ4_1, with_minimum, 32);
  EXPECT_EQ(q4_1[0], 0.5F);  // 3 / 2 - 1
  EXPECT_EQ(q4_1[1], 3.0F);
  EXPECT_EQ(q4_1[16], 6.5F);
  // Fifth bits of elements 0 and 31.
  const auto q5_0 =
      decode(GgufType::kQ5_0,
             GgufBytes().number(float_to_f16(0.5F)).number<uint32_t>(0x80000001U).raw(nibbles), 32);
  EXPECT_EQ(q5_0[0], 1.5F);   // (19 - 16) / 2
  EXPECT_EQ(q5_0[1], -4.0F);  // (8 - 16) / 2
  EXPECT_EQ(q5_0[16], -0.5F);
  EXPECT_EQ(q5_0[31], 1.0F);  // (18 - 16) / 2
  GgufBytes q5_1_block;
  q5_1_block.number(float_to_f16(0.5F))
      .number(float_to_f16(-1.0F))
      .number<uint32_t>(0x80000001U)
      .raw(nibbles);
  const auto q5_1 = decode(GgufType::kQ5_1, q5_1_block, 32);
  EXPECT_EQ(q5_1[0], 8.5F);
  EXPECT_EQ(q5_1[31], 8.0F);
  const auto q8_0 = decode(
      GgufType::kQ8_0, GgufBytes().number(float_to_f16(0.25F)).raw(bytes_of(32, 0xFF, 0x80)), 32);
  EXPECT_EQ(q8_0[0], -32.0F);
  EXPECT_EQ(q8_0[1], -0.25F);
}

/// 12 bytes of scales and minima: group g has scale g + 1 and minimum 2 g, but group 5 has 40
/// and 50.
std::string packed_scales() {
  int scale[8], minimum[8];
  for (int g = 0; g < 8; ++g) scale[g] = g + 1, minimum[g] = 2 * g;
  scale[5] = 40, minimum[5] = 50;
  std::string bytes(12, '\0');
  for (size_t g = 0; g < 4; ++g) {
    bytes[g] = static_cast<char>(scale[g] | (scale[g + 4] >> 4) << 6);
    bytes[g + 4] = static_cast<char>(minimum[g] | (minimum[g + 4] >> 4) << 6);
    bytes[g + 8] = static_cast<char>((scale[g + 4] & 15) | (minimum[g + 4] & 15) << 4);
  }
  return bytes;
}

TEST(GgufDecodeTest, BlocksOf256MatchHandComputedValues) {
  GgufBytes q4;
  q4.number(float_to_f16(2.0F)).number(float_to_f16(0.5F)).raw(packed_scales());
  for (int pair = 0; pair < 4; ++pair) q4.raw(bytes_of(32, 0x31, 0xE7));
  const auto q4_k = decode(GgufType::kQ4_K, q4, 256);
  EXPECT_EQ(q4_k[0], 14.0F);                      // 2 * 1 * 7
  EXPECT_EQ(q4_k[1], 2.0F);                       // 2 * 1 * 1
  EXPECT_EQ(q4_k[32], 2.0F * 2 * 14 - 0.5F * 2);  // Group 1, high half of byte 0.
  EXPECT_EQ(q4_k[33], 2.0F * 2 * 3 - 0.5F * 2);
  EXPECT_EQ(q4_k[160], 2.0F * 40 * 14 - 0.5F * 50);  // Group 5.
  EXPECT_EQ(q4_k[255], 2.0F * 8 * 3 - 0.5F * 14);
  GgufBytes q5;
  q5.number(float_to_f16(2.0F)).number(float_to_f16(0.5F)).raw(packed_scales());
  q5.raw(bytes_of(32, 0x20, 0x01));  // Fifth bit: element 0 of group 0, elements 1.. of group 5.
  for (int pair = 0; pair < 4; ++pair) q5.raw(bytes_of(32, 0x31, 0xE7));
  const auto q5_k = decode(GgufType::kQ5_K, q5, 256);
  EXPECT_EQ(q5_k[0], 2.0F * 23);
  EXPECT_EQ(q5_k[1], 2.0F * 1);
  EXPECT_EQ(q5_k[160], 2.0F * 40 * 14 - 0.5F * 50);
  EXPECT_EQ(q5_k[161], 2.0F * 40 * 19 - 0.5F * 50);
  GgufBytes q6;
  q6.raw(bytes_of(128, 0x21, 0xF3))
      .raw(bytes_of(64, 0xE4, 0xE4));  // Top bits: 0, 1, 2, 3 for the four runs.
  for (int group = 0; group < 16; ++group) q6.number(static_cast<int8_t>(group - 8));
  q6.number(float_to_f16(0.5F));
  const auto q6_k = decode(GgufType::kQ6_K, q6, 256);
  EXPECT_EQ(q6_k[0], 0.5F * -8 * (3 - 32));
  EXPECT_EQ(q6_k[17], 0.5F * -7 * (1 - 32));
  EXPECT_EQ(q6_k[32], 0.5F * -6 * (1 + 16 - 32));
  EXPECT_EQ(q6_k[64], 0.5F * -4 * (15 + 32 - 32));
  EXPECT_EQ(q6_k[127], 0.5F * -1 * (2 + 48 - 32));
  EXPECT_EQ(q6_k[255], 0.5F * 7 * (2 + 48 - 32));
}

TEST(GgufDecodeTest, PlainTypesAndHalfBlocks) {
  EXPECT_EQ(decode(GgufType::kF16, GgufBytes().number(float_to_f16(1.5F)), 1)[0], 1.5F);
  EXPECT_EQ(decode(GgufType::kBF16, GgufBytes().number(float_to_bf16(-2.5F)), 1)[0], -2.5F);
  EXPECT_EQ(decode(GgufType::kF64, GgufBytes().number(0.25), 1)[0], 0.25F);
  EXPECT_THROW(decode(GgufType::kQ8_0, GgufBytes().raw("123"), 16), InternalError);
}

}  // namespace
}  // namespace fsdp::io
