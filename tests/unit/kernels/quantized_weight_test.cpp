// Against bitsandbytes bit for bit, and ranges against the whole.
#include "libfsdp/kernels/quantized_weight.h"

#include <gtest/gtest.h>

#include <unistd.h>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>

#include "libfsdp/base/error.h"
#include "tests/unit/kernels/random_floats.h"

namespace fsdp::kernels {
namespace {

constexpr DType kTypes[] = {DType::kF32, DType::kBF16, DType::kF16};
constexpr FourBitCode kCodes[] = {FourBitCode::kNf4, FourBitCode::kFp4};
using Bytes = std::vector<std::byte>;
using Record = std::vector<Bytes>;

template <class T>
std::vector<T> as(const Bytes& bytes) {
  std::vector<T> values(bytes.size() / sizeof(T));
  if (!bytes.empty()) std::memcpy(values.data(), bytes.data(), values.size() * sizeof(T));
  return values;
}

template <class T>
Bytes bytes_of(const std::vector<T>& values) {
  const auto* const begin = reinterpret_cast<const std::byte*>(values.data());
  return {begin, begin + values.size() * sizeof(T)};
}

testing::AssertionResult same(const Bytes& got, const Bytes& expected) {
  if (got == expected) return testing::AssertionSuccess();
  if (got.size() != expected.size()) return testing::AssertionFailure() << "sizes differ";
  const auto at = std::mismatch(got.begin(), got.end(), expected.begin()).first - got.begin();
  return testing::AssertionFailure()
         << "byte " << at << " of " << got.size() << " is "
         << static_cast<int>(got[static_cast<size_t>(at)]) << ", expected "
         << static_cast<int>(expected[static_cast<size_t>(at)]);
}

size_t blocks(int64_t n, int64_t blocksize) {
  return static_cast<size_t>((n + blocksize - 1) / blocksize);
}

/// What bitsandbytes_oracle.py writes: kinds of records.
class Oracle {
 public:
  enum Kind { kTables, kFourBit, kMeans, kAbsmaxCodes, kInt8 };

  Oracle() {
    const auto path = std::filesystem::temp_directory_path() /
                      cat("fsdp-quantized-weight-", static_cast<int64_t>(getpid()));
    const std::string line = cat("\"" FSDP_TEST_PYTHON "\" \"" FSDP_TEST_ORACLE "\" \"",
                                 path.string(), "\" 2>/dev/null");
    if (std::system(line.c_str()) == 0) {
      std::ifstream in(path, std::ios::binary);
      kinds_.resize(5);
      for (auto& kind : kinds_) {
        for (Record record = read(in); !record.empty(); record = read(in)) kind.push_back(record);
      }
    }
    std::filesystem::remove(path);
  }
  const std::vector<Record>& of(Kind kind) const { return kinds_.at(kind); }
  bool is_ready() const { return !kinds_.empty(); }

 private:
  static int64_t number(std::istream& in) {
    int64_t value = 0;
    in.read(reinterpret_cast<char*>(&value), sizeof value);
    return value;
  }
  static Record read(std::istream& in) {
    Record record(static_cast<size_t>(number(in)));
    for (Bytes& bytes : record) {
      bytes.resize(static_cast<size_t>(number(in)));
      in.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    }
    return record;
  }
  std::vector<std::vector<Record>> kinds_;
};

class BitsandbytesTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    if (std::filesystem::exists(FSDP_TEST_PYTHON)) oracle_ = std::make_unique<Oracle>();
  }
  static void TearDownTestSuite() { oracle_.reset(); }
  void SetUp() override {
    if (oracle_ == nullptr) GTEST_SKIP() << "no Python at " FSDP_TEST_PYTHON;
    ASSERT_TRUE(oracle_->is_ready()) << "the oracle failed";
  }
  static inline std::unique_ptr<Oracle> oracle_;
};

TEST_F(BitsandbytesTest, TablesAreTheSame) {
  const Record& tables = oracle_->of(Oracle::kTables).at(0);
  for (const FourBitCode code : kCodes) {
    EXPECT_EQ(
        std::memcmp(four_bit_table(code).values, tables[static_cast<size_t>(code)].data(), 64), 0);
  }
  EXPECT_EQ(std::memcmp(signed_dynamic_map().values, tables[2].data(), 1024), 0);
}

struct FourBitHead {
  DType dtype;
  FourBitCode code;
  int64_t blocksize, numel;
};
FourBitHead head_of(const Record& record) {
  const auto head = as<int64_t>(record[0]);
  return {kTypes[head[0]], kCodes[head[1]], head[2], head[3]};
}
std::ostream& operator<<(std::ostream& out, const FourBitHead& head) {
  return out << dtype_name(head.dtype) << " code " << static_cast<int>(head.code) << " blocks of "
             << head.blocksize << ", numel " << head.numel;
}

TEST_F(BitsandbytesTest, FourBitCodesAndScalesAreTheSame) {
  const auto& records = oracle_->of(Oracle::kFourBit);
  ASSERT_GT(records.size(), 150U);
  for (const Record& record : records) {
    const FourBitHead head = head_of(record);
    SCOPED_TRACE(testing::Message() << head);
    std::vector<uint8_t> packed(static_cast<size_t>(head.numel + 1) / 2);
    std::vector<float> absmax(blocks(head.numel, head.blocksize));
    quantize_4bit(record[1].data(), head.dtype, head.numel, head.code, head.blocksize,
                  packed.data(), absmax.data());
    EXPECT_TRUE(same(bytes_of(packed), record[2]));
    if (record.size() == 7) {
      EXPECT_TRUE(same(bytes_of(absmax), record[3]));
      continue;
    }
    const auto n = static_cast<int64_t>(absmax.size());
    const float offset = mean_absmax(absmax.data(), n);
    std::vector<uint8_t> codes(absmax.size());
    std::vector<float> nested(blocks(n, kAbsmaxBlock));
    quantize_absmax(absmax.data(), n, offset, codes.data(), nested.data());
    EXPECT_TRUE(same(bytes_of(codes), record[7]));
    EXPECT_TRUE(same(bytes_of(nested), record[8]));
    EXPECT_EQ(offset, as<float>(record[9]).at(0));
    dequantize_absmax(codes.data(), nested.data(), offset, 0, n, absmax.data());
    EXPECT_TRUE(same(bytes_of(absmax), record[3]));
  }
}

TEST_F(BitsandbytesTest, FourBitWeightsReadTheSame) {
  for (const Record& record : oracle_->of(Oracle::kFourBit)) {
    const FourBitHead head = head_of(record);
    SCOPED_TRACE(testing::Message() << head);
    const auto absmax = as<float>(record[3]);
    for (size_t to = 0; to < 3; ++to) {
      Bytes values(static_cast<size_t>(head.numel) * dtype_bytes(kTypes[to]));
      dequantize_4bit(reinterpret_cast<const uint8_t*>(record[2].data()), absmax.data(), head.numel,
                      head.code, head.blocksize, values.data(), kTypes[to]);
      EXPECT_TRUE(same(values, record[4 + to])) << dtype_name(kTypes[to]);
    }
  }
}

TEST_F(BitsandbytesTest, MeansOfScalesAreTorchs) {
  const auto& records = oracle_->of(Oracle::kMeans);
  ASSERT_GT(records.size(), 70U);
  for (const Record& record : records) {
    const auto values = as<float>(record[0]);
    EXPECT_EQ(mean_absmax(values.data(), static_cast<int64_t>(values.size())),
              as<float>(record[1]).at(0))
        << values.size();
  }
}

TEST_F(BitsandbytesTest, CodesOfScalesAreTheSameBesideEveryBorder) {
  for (const Record& record : oracle_->of(Oracle::kAbsmaxCodes)) {
    const auto values = as<float>(record[0]);
    const auto n = static_cast<int64_t>(values.size());
    std::vector<uint8_t> codes(values.size());
    std::vector<float> absmax(blocks(n, kAbsmaxBlock));
    quantize_absmax(values.data(), n, 0, codes.data(), absmax.data());
    EXPECT_TRUE(same(bytes_of(codes), record[1]));
    EXPECT_TRUE(same(bytes_of(absmax), record[2]));
  }
}

TEST_F(BitsandbytesTest, Int8IsTheSame) {
  const auto& records = oracle_->of(Oracle::kInt8);
  ASSERT_EQ(records.size(), 12U);
  for (const Record& record : records) {
    const auto head = as<int64_t>(record[0]);
    const int64_t rows = head[1];
    const int64_t columns = head[2];
    std::vector<int8_t> codes(static_cast<size_t>(rows * columns));
    std::vector<float> absmax(static_cast<size_t>(rows));
    quantize_int8(record[1].data(), kTypes[head[0]], rows, columns, codes.data(), absmax.data());
    EXPECT_TRUE(same(bytes_of(codes), record[2]));
    EXPECT_TRUE(same(bytes_of(absmax), record[3]));
    for (size_t to = 0; to < 3; ++to) {
      Bytes values(codes.size() * dtype_bytes(kTypes[to]));
      dequantize_int8(codes.data(), absmax.data(), columns, 0, rows * columns, values.data(),
                      kTypes[to]);
      EXPECT_TRUE(same(values, record[4 + to])) << rows << "x" << columns << " " << to;
    }
  }
}

/// A weight in 4 bits with double quantisation, in parts cut at multiples of 256 elements.
TEST(QuantizedRangesTest, PartsOfAWeightAreQuantisedAndReadAsInTheWhole) {
  constexpr int64_t kNumel = 64 * 700 + 21;
  const std::vector<float> values = random_floats(kNumel, 3);
  std::vector<uint8_t> packed(kNumel / 2 + 1);
  std::vector<float> absmax(blocks(kNumel, 64));
  quantize_4bit(values.data(), DType::kF32, kNumel, FourBitCode::kNf4, 64, packed.data(),
                absmax.data());
  const auto scales = static_cast<int64_t>(absmax.size());
  std::vector<uint8_t> codes(absmax.size());
  std::vector<float> nested(blocks(scales, kAbsmaxBlock));
  quantize_absmax(absmax.data(), scales, 0.25F, codes.data(), nested.data());
  std::vector<float> read_scales(absmax.size());
  dequantize_absmax(codes.data(), nested.data(), 0.25F, 0, scales, read_scales.data());
  std::vector<float> whole(kNumel);
  dequantize_4bit(packed.data(), read_scales.data(), kNumel, FourBitCode::kNf4, 64, whole.data(),
                  DType::kF32);
  for (const int64_t begin : {int64_t{0}, int64_t{256}, int64_t{64 * 255}, int64_t{64 * 511}}) {
    for (const int64_t end : {begin + 256, begin + 64 * 100, kNumel}) {
      const int64_t n = end - begin;
      std::vector<uint8_t> part(static_cast<size_t>(n + 1) / 2);
      std::vector<float> part_absmax(blocks(n, 64));
      quantize_4bit(values.data() + begin, DType::kF32, n, FourBitCode::kNf4, 64, part.data(),
                    part_absmax.data());
      EXPECT_TRUE(std::equal(part.begin(), part.end(), packed.begin() + begin / 2));
      const int64_t block = begin / 64;
      EXPECT_TRUE(std::equal(part_absmax.begin(), part_absmax.end(), absmax.begin() + block));
      dequantize_absmax(codes.data() + block, nested.data() + block / kAbsmaxBlock, 0.25F,
                        block % kAbsmaxBlock, static_cast<int64_t>(part_absmax.size()),
                        part_absmax.data());
      std::vector<float> part_values(static_cast<size_t>(n));
      dequantize_4bit(part.data(), part_absmax.data(), n, FourBitCode::kNf4, 64, part_values.data(),
                      DType::kF32);
      EXPECT_TRUE(std::equal(part_values.begin(), part_values.end(), whole.begin() + begin))
          << begin << " " << end;
    }
  }
}

TEST(QuantizedRangesTest, AnyLengthFromABlockReadsAsInTheWhole) {
  constexpr int64_t kNumel = 64 * 3;
  std::vector<uint8_t> packed(kNumel / 2);
  for (size_t i = 0; i < packed.size(); ++i) packed[i] = static_cast<uint8_t>(i * 37);
  const std::vector<float> absmax = {1, 0.3F, 7e-3F};
  for (const DType dtype : kTypes) {
    const size_t item = dtype_bytes(dtype);
    Bytes whole(kNumel * item);
    dequantize_4bit(packed.data(), absmax.data(), kNumel, FourBitCode::kFp4, 64, whole.data(),
                    dtype);
    for (int64_t n = 0; n <= kNumel; ++n) {
      Bytes part(static_cast<size_t>(n) * item + 8, std::byte{0x5a});
      dequantize_4bit(packed.data(), absmax.data(), n, FourBitCode::kFp4, 64, part.data(), dtype);
      EXPECT_EQ(std::memcmp(part.data(), whole.data(), static_cast<size_t>(n) * item), 0) << n;
      for (size_t i = static_cast<size_t>(n) * item; i < part.size(); ++i)
        EXPECT_EQ(part[i], std::byte{0x5a}) << "behind the end of " << n;
    }
  }
}

TEST(QuantizedRangesTest, AnyRangeOfInt8RowsReadsAsInTheWhole) {
  constexpr int64_t kRows = 5;
  constexpr int64_t kColumns = 37;
  const std::vector<float> values = random_floats(kRows * kColumns, 8);
  std::vector<int8_t> codes(values.size());
  std::vector<float> absmax(kRows);
  std::vector<float> bounded = values;
  for (float& value : bounded) value = std::fmin(std::fmax(value, -9.0F), 9.0F);
  quantize_int8(bounded.data(), DType::kF32, kRows, kColumns, codes.data(), absmax.data());
  std::vector<float> whole(values.size());
  dequantize_int8(codes.data(), absmax.data(), kColumns, 0, kRows * kColumns, whole.data(),
                  DType::kF32);
  for (int64_t i = 0; i < kRows * kColumns; ++i)
    EXPECT_NEAR(whole[static_cast<size_t>(i)], bounded[static_cast<size_t>(i)],
                absmax[static_cast<size_t>(i / kColumns)] / 250);
  for (int64_t begin = 0; begin < kRows * kColumns; begin += 11) {
    for (int64_t end = begin; end <= kRows * kColumns; end += 13) {
      std::vector<float> part(static_cast<size_t>(end - begin));
      dequantize_int8(codes.data() + begin, absmax.data() + begin / kColumns, kColumns,
                      begin % kColumns, end - begin, part.data(), DType::kF32);
      EXPECT_TRUE(std::equal(part.begin(), part.end(), whole.begin() + begin));
    }
  }
}

TEST(QuantizedRangesTest, AnElementThatIsNotFiniteShowsInTheScale) {
  for (const float bad : {INFINITY, -INFINITY, NAN}) {
    std::vector<float> values(192, 1.0F);
    values[70] = bad;
    std::vector<uint8_t> packed(96);
    std::vector<float> absmax(3);
    quantize_4bit(values.data(), DType::kF32, 192, FourBitCode::kNf4, 64, packed.data(),
                  absmax.data());
    EXPECT_EQ(absmax[0], 1.0F);
    EXPECT_FALSE(std::isfinite(absmax[1]));
    EXPECT_EQ(absmax[2], 1.0F);
    std::vector<int8_t> codes(192);
    quantize_int8(values.data(), DType::kF32, 3, 64, codes.data(), absmax.data());
    EXPECT_FALSE(std::isfinite(absmax[1]));
  }
  std::vector<float> large(64, 70000.0F);  // Too large for a half.
  std::vector<int8_t> codes(64);
  float absmax = 0;
  quantize_int8(large.data(), DType::kF32, 1, 64, codes.data(), &absmax);
  EXPECT_FALSE(std::isfinite(absmax));
}

}  // namespace
}  // namespace fsdp::kernels
