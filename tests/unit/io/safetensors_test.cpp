#include "libfsdp/io/safetensors.h"

#include <rapidcheck.h>

#include <cstring>
#include <numeric>

#include "libfsdp/base/error.h"
#include "tests/unit/io/expect_error.h"
#include "tests/unit/io/temp_dir.h"

namespace fsdp::io {
namespace {

/// File bytes: length, header, then `data_bytes` bytes 0, 1, 2, ...
std::string file_bytes(std::string_view header, size_t data_bytes = 0) {
  const uint64_t length = header.size();
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &length, 8);
  bytes += header;
  for (size_t i = 0; i < data_bytes; ++i) bytes += static_cast<char>(i);
  return bytes;
}

SafetensorsFile open_bytes(std::string_view bytes) {
  const TempDir dir;
  return SafetensorsFile::open(dir.write("a.safetensors", bytes));
}

SafetensorsFile open_header(std::string_view header, size_t data_bytes = 0) {
  return open_bytes(file_bytes(header, data_bytes));
}

TEST(SafetensorsTest, ReadsEntriesAndAnyRange) {
  const auto file = open_header(
      R"({"__metadata__":{"format":"pt"},"b":{"dtype":"U8","shape":[3],"data_offsets":[8,11]},)"
      R"("a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}   )",
      11);
  ASSERT_EQ(file.entries().size(), 2U);
  EXPECT_EQ(file.entries()[0].name, "a");
  EXPECT_EQ(file.find("a")->dtype, DType::kF32);
  EXPECT_EQ(file.find("a")->shape, (std::vector<int64_t>{1, 2}));
  EXPECT_EQ(file.find("a")->numel, 2);
  EXPECT_EQ(file.find("c"), nullptr);
  EXPECT_EQ(file.metadata().at("format"), "pt");
  std::vector<std::byte> part(2);
  file.read(*file.find("b"), 1, part);
  EXPECT_EQ(part, (std::vector<std::byte>{std::byte{9}, std::byte{10}}));
  EXPECT_ERROR(file.read(*file.find("b"), 2, part), InternalError, "outside a tensor");
}

TEST(SafetensorsTest, AcceptsEmptyFilesScalarsEmptyTensorsAndPadding) {
  EXPECT_TRUE(open_header("{}").entries().empty());
  EXPECT_TRUE(open_header("  {}").entries().empty());
  EXPECT_TRUE(open_header("{}      ").entries().empty());
  EXPECT_TRUE(open_header(R"({"__metadata__":null})").metadata().empty());
  EXPECT_EQ(
      open_header(R"({"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}})", 4).entries()[0].numel,
      1);
  EXPECT_EQ(
      open_header(R"({"a":{"dtype":"I32","shape":[2,0],"data_offsets":[0,0]}})").entries()[0].numel,
      0);
}

TEST(SafetensorsTest, KeepsElementTypesThatItCannotComputeWithByName) {
  const auto file = open_header(R"({"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}})", 1);
  EXPECT_EQ(file.entries()[0].dtype_name, "F4");
  EXPECT_FALSE(file.entries()[0].dtype.has_value());
}

struct BadHeader {
  std::string_view name;
  std::string_view header;
  size_t data_bytes;
  std::string_view message;
};

class SafetensorsBadHeaderTest : public ::testing::TestWithParam<BadHeader> {};

TEST_P(SafetensorsBadHeaderTest, IsRefused) {
  const BadHeader& bad = GetParam();
  EXPECT_ERROR(open_header(bad.header, bad.data_bytes), ModelError, bad.message);
}

INSTANTIATE_TEST_SUITE_P(
    Headers, SafetensorsBadHeaderTest,
    ::testing::Values(
        BadHeader{"Empty", "", 0, "unexpected end of input"},
        BadHeader{"NotJson", "{x}", 0, "parse error"},
        BadHeader{"NotUtf8", "{\"\xff\":1}", 0, "ill-formed UTF-8"},
        BadHeader{"NotAnObject", "[1]", 0, "expected an object"},
        BadHeader{"TrailingNul", std::string_view("{}\0", 3), 0, "NUL byte"},
        BadHeader{"RepeatedTensor",
                  R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                  R"("a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
                  2, "\"a\" occurs twice"},
        BadHeader{"RepeatedField",
                  R"({"a":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}})", 0,
                  "\"dtype\" occurs twice"},
        BadHeader{"MetadataNotText", R"({"__metadata__":{"a":1}})", 0, "expected a string"},
        BadHeader{"NulInName", R"({"a\u0000b":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})", 0,
                  "NUL"},
        BadHeader{"UnknownType", R"({"a":{"dtype":"F128","shape":[1],"data_offsets":[0,16]}})", 16,
                  "unknown dtype 'F128'"},
        BadHeader{"MissingField", R"({"a":{"dtype":"U8","shape":[1]}})", 1,
                  "\"data_offsets\" is missing"},
        BadHeader{"NegativeDim", R"({"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}})", 1,
                  "negative"},
        BadHeader{"FloatDim", R"({"a":{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}})", 1,
                  "expected an integer"},
        BadHeader{"OneOffset", R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0]}})", 1,
                  "[begin, end]"},
        BadHeader{"BackwardOffsets", R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[1,0]}})", 1,
                  "0 <= begin <= end"},
        BadHeader{"WrongSize", R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", 4,
                  "takes 8 bytes, data_offsets give 4"},
        BadHeader{"OverflowOfElements",
                  R"({"a":{"dtype":"F32","shape":[2,4611686018427387904],"data_offsets":[0,0]}})",
                  0, "overflows"},
        BadHeader{"OverflowHiddenByZero",
                  R"({"a":{"dtype":"F32","shape":[4611686018427387904,4,0],"data_offsets":[0,0]}})",
                  0, "overflows"},
        BadHeader{"OverflowOfBits",
                  R"({"a":{"dtype":"F32","shape":[2305843009213693952],"data_offsets":[0,0]}})", 0,
                  "overflows"},
        BadHeader{"DimBeyond64Bits",
                  R"({"a":{"dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,0]}})", 0,
                  "expected an integer"},
        BadHeader{"MisalignedF4", R"({"a":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}})", 1,
                  "do not fill whole bytes"},
        BadHeader{"Hole",
                  R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                  R"("b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}})",
                  3, "contiguous"},
        BadHeader{"FirstNotAtZero", R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})", 2,
                  "contiguous"},
        BadHeader{"Overlap",
                  R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
                  R"("b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})",
                  3, "contiguous"},
        BadHeader{"Truncated", R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})", 3,
                  "truncated"},
        BadHeader{"TrailingBytes", R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})", 5,
                  "belong to no tensor"}),
    [](const auto& info) { return std::string(info.param.name); });

TEST(SafetensorsTest, RefusesBadLengths) {
  EXPECT_ERROR(open_bytes("1234567"), ModelError, "at least 8");
  EXPECT_ERROR(open_bytes(std::string("\x01\xe1\xf5\x05\0\0\0\0", 8)), ModelError,
               "limit is 100000000");
  EXPECT_ERROR(open_bytes(std::string("\0\0\0\0\0\0\0\x80", 8)), ModelError, "limit is 100000000");
  EXPECT_ERROR(open_bytes(std::string("\xff\xff\xff\xff\xff\xff\xff\xff{}", 10)), ModelError,
               "limit");
  EXPECT_ERROR(open_bytes(std::string("\x03\0\0\0\0\0\0\0{}", 10)), ModelError, "truncated");
  const std::string dims = "[1" + std::string(128, ' ').replace(0, 128, [] {
    std::string ones;
    for (int i = 0; i < 64; ++i) ones += ",1";
    return ones;
  }()) + "]";
  EXPECT_ERROR(
      open_header(R"({"a":{"dtype":"U8","shape":)" + dims + R"(,"data_offsets":[0,1]}})", 1),
      ModelError, "65 dimensions");
}

TEST(SafetensorsTest, RefusesABoolThatIsNeitherZeroNorOne) {
  const auto file = open_header(R"({"a":{"dtype":"BOOL","shape":[3],"data_offsets":[0,3]}})", 3);
  std::vector<std::byte> data(2);
  file.read(*file.find("a"), 0, data);
  EXPECT_ERROR(file.read(*file.find("a"), 1, data), ModelError, "neither 0 nor 1");
}

TEST(SafetensorsTest, NoPrefixOrByteFlipOfAFileCrashesTheReader) {
  const std::string good = file_bytes(
      R"({"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}})",
      8);
  const TempDir dir;
  const std::string path = dir / "a";
  EXPECT_TRUE(rc::check([&] {
    std::string bytes = good.substr(0, *rc::gen::inRange<size_t>(0, good.size() + 1));
    if (!bytes.empty())
      bytes[*rc::gen::inRange<size_t>(0, bytes.size())] = *rc::gen::arbitrary<char>();
    dir.write("a", bytes);
    try {
      const auto file = SafetensorsFile::open(path);
      for (const TensorEntry& entry : file.entries()) RC_ASSERT(entry.begin + entry.bytes <= 200);
    } catch (const ModelError&) {
    }
  }));
}

TEST(SafetensorsLayoutTest, WritesTheBytesOfTheReferenceWriter) {
  // Widest type first, then name; compact JSON; padded to 8.
  const std::vector<TensorSpec> specs = {
      {"b", DType::kBF16, {2}}, {"a", DType::kBF16, {1}}, {"z", DType::kF32, {1}}};
  const auto layout = SafetensorsLayout::plan(specs);
  std::string expected =
      R"({"__metadata__":{"format":"pt"},"z":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
      R"("a":{"dtype":"BF16","shape":[1],"data_offsets":[4,6]},)"
      R"("b":{"dtype":"BF16","shape":[2],"data_offsets":[6,10]}})";
  expected.resize((expected.size() + 7) / 8 * 8, ' ');
  EXPECT_EQ(layout.header, file_bytes(expected));
  EXPECT_EQ(layout.entries[0].begin, static_cast<int64_t>(layout.header.size()) + 6);
  EXPECT_EQ(layout.file_bytes, static_cast<int64_t>(layout.header.size()) + 10);
}

TEST(SafetensorsLayoutTest, RefusesNamesThatRepeat) {
  const std::vector<TensorSpec> specs = {{"a", DType::kBF16, {2}}, {"a", DType::kF32, {1}}};
  EXPECT_ERROR(SafetensorsLayout::plan(specs), ConfigError, "'a' is to be written twice");
}

TEST(SafetensorsLayoutTest, WhatIsWrittenIsReadBack) {
  EXPECT_TRUE(rc::check([] {
    std::vector<TensorSpec> specs;
    std::vector<std::vector<std::byte>> data;
    const auto count = *rc::gen::inRange(0, 6);
    for (int i = 0; i < count; ++i) {
      // No BOOL: its bytes would have to be 0 or 1.
      const auto dtype = static_cast<DType>(*rc::gen::inRange(0, 9));
      const auto shape = *rc::gen::container<std::vector<int64_t>>(rc::gen::inRange<int64_t>(0, 4));
      RC_PRE(shape.size() < 6U);
      const auto numel =
          std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
      specs.push_back({"t\"é" + std::to_string(i), dtype, shape});
      data.emplace_back(static_cast<size_t>(numel) * dtype_bytes(dtype),
                        static_cast<std::byte>(*rc::gen::arbitrary<uint8_t>()));
    }
    const TempDir dir;
    const std::vector<std::span<const std::byte>> spans(data.begin(), data.end());
    write_safetensors(dir / "a", specs, spans);
    RC_ASSERT(dir.num_files() == 1U);
    const auto file = SafetensorsFile::open(dir / "a");
    for (size_t i = 0; i < specs.size(); ++i) {
      const TensorEntry* entry = file.find(specs[i].name);
      RC_ASSERT(entry != nullptr);
      RC_ASSERT(entry->shape == specs[i].shape);
      RC_ASSERT(entry->dtype == specs[i].dtype);
      std::vector<std::byte> read(data[i].size());
      file.read(*entry, 0, read);
      RC_ASSERT(read == data[i]);
    }
  }));
}

}  // namespace
}  // namespace fsdp::io
