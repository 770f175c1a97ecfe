// Quantised files of our own making, whole and damaged.
#include <cstring>
#include <memory>

#include "libfsdp/base/error.h"
#include "libfsdp/checkpoint/quantized_reader.h"
#include "tests/unit/io/expect_error.h"
#include "tests/unit/io/temp_dir.h"

namespace fsdp::checkpoint {
namespace {

using Bytes = std::vector<std::byte>;
struct Tensor {
  io::TensorSpec spec;
  Bytes bytes;
};
using Tensors = std::vector<Tensor>;

const std::string kWeight = "model.layers.0.mlp.up_proj.weight";

class QuantizedTensorsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::vector<float> values(64 * 20);
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i % 37) - 18;
    write("base", {{{kWeight, DType::kF32, {20, 64}}, as_bytes(values.data(), values.size() * 4)}});
  }
  static Bytes as_bytes(const void* data, size_t size) {
    const auto* const begin = static_cast<const std::byte*>(data);
    return {begin, begin + size};
  }
  void write(const std::string& name, const Tensors& tensors) {
    std::filesystem::create_directories(dir_ / name);
    std::vector<io::TensorSpec> specs;
    std::vector<std::span<const std::byte>> data;
    for (const Tensor& tensor : tensors) {
      specs.push_back(tensor.spec);
      data.emplace_back(tensor.bytes);
    }
    io::write_safetensors(dir_ / name + "/model.safetensors", specs, data);
  }
  std::shared_ptr<StoredReader> open(const std::string& name) {
    return std::make_shared<StoredReader>(StoredTensors::open(dir_ / name));
  }
  Tensors quantized(const QuantizeOptions& options) {
    const auto reader =
        std::make_shared<QuantizedReader>(open("base"), options, std::vector<std::string>{kWeight});
    Tensors tensors;
    for (const TensorPart& part : quantized_state(reader).tensors) {
      Tensor tensor{{part.name, part.dtype, part.shape}, {}};
      tensor.bytes.resize(static_cast<size_t>(part.numel) * dtype_bytes(part.dtype));
      part.read(0, tensor.bytes);
      tensors.push_back(std::move(tensor));
    }
    return tensors;
  }
  /// Opens the files after `change` of the part whose name ends so; "" = the weight.
  template <class Change>
  void open_changed(Tensors tensors, const std::string& suffix, const Change& change) {
    for (Tensor& tensor : tensors) {
      if (tensor.spec.name.ends_with(suffix.empty() ? kWeight : suffix)) change(tensor);
    }
    std::erase_if(tensors, [](const Tensor& tensor) { return tensor.spec.name.empty(); });
    write("changed", tensors);
    QuantizedReader reader(open("changed"));
    const QuantizedWeight& weight = reader.weight(kWeight);
    std::vector<float> scales(static_cast<size_t>(weight.num_scales()));
    reader.read(weight, 0, weight.numel, {}, scales);
  }
  static auto replace_text(const std::string& from, const std::string& to) {
    return [=](Tensor& tensor) {
      std::string text(reinterpret_cast<const char*>(tensor.bytes.data()), tensor.bytes.size());
      text.replace(text.find(from), from.size(), to);
      tensor.bytes = as_bytes(text.data(), text.size());
      tensor.spec.shape = {static_cast<int64_t>(text.size())};
    };
  }
  static void set_nan(Tensor& tensor) { std::memset(tensor.bytes.data(), 0xff, 4); }
  static void remove(Tensor& tensor) { tensor.spec.name.clear(); }

  const io::TempDir dir_;
};

TEST_F(QuantizedTensorsTest, DamagedFourBitWeightsAreRefused) {
  const Tensors whole = quantized({.kind = io::QuantKind::kNf4, .double_quant = true});
  ASSERT_EQ(whole.size(), 6U);
  const std::string state = "bitsandbytes__nf4";
  open_changed(whole, "", [](Tensor&) {});
  const auto refused = [&](const std::string& part, const auto& change, const std::string& text) {
    SCOPED_TRACE(text);
    EXPECT_ERROR(open_changed(whole, part, change), ModelError, text);
  };
  refused(".absmax", remove, ".absmax' is missing");
  refused(".nested_absmax", remove, ".nested_absmax' is missing");
  refused(".quant_map", remove, "quant_map' is missing");
  refused(".nested_absmax", set_nan, "is not finite");
  refused(".nested_quant_map", set_nan, "entry 0 of");
  refused(
      ".absmax", [](Tensor& t) { t.spec.dtype = DType::kI8; }, "is I8 [20]; expected U8 [20]");
  refused(
      "",
      [](Tensor& t) {
        t.spec.shape = {1, 640};
      },
      "its codes are U8 [1, 640]");
  refused(state, replace_text("nf4", "fp4"), "its name says nf4");
  refused(state, replace_text("64", "60"), "'blocksize' is 60");
  refused(state, replace_text("[20", "[21"), "expected U8 [672, 1] (of shape [21, 64])");
  refused(state, replace_text("[20", "[-2"), "the size -2");
  refused(state, replace_text("[20", "[9000000000000000000"), "overflows");
  refused(state, replace_text("\"dtype\"", "\"dtipe\""), "unknown member 'dtipe'");
  refused(state, replace_text("float32", "int8"), "'dtype' is 'int8'");
  refused(state, replace_text("256", "128"), "'nested_blocksize' is 128");
  refused(state, replace_text("{", ""), "bitsandbytes__nf4");
}

TEST_F(QuantizedTensorsTest, DamagedInt8WeightsAreRefused) {
  const Tensors whole = quantized({.kind = io::QuantKind::kInt8});
  open_changed(whole, "", [](Tensor&) {});
  const auto refused = [&](const std::string& part, const auto& change, const std::string& text) {
    SCOPED_TRACE(text);
    EXPECT_ERROR(open_changed(whole, part, change), ModelError, text);
  };
  refused("SCB", set_nan, "is not finite");
  refused("SCB", remove, "is not a quantised weight");
  refused("", remove, "is missing");
  refused(
      "_format", [](Tensor& t) { t.bytes[0] = std::byte{1}; }, "expected 0 (rows)");
  refused(
      "", [](Tensor& t) { t.spec.shape = {1280}; }, "expected I8 [rows, columns]");
}

TEST_F(QuantizedTensorsTest, ElementsThatAreNotFiniteAreNotQuantised) {
  Bytes values(64 * 20 * 4);
  const float bad = 1e5F;
  std::memcpy(values.data() + 64 * 4 * 7, &bad, 4);
  write("base", {{{kWeight, DType::kF32, {20, 64}}, values}});
  EXPECT_ERROR(quantized({.kind = io::QuantKind::kInt8}), ModelError, "above 65504");
  EXPECT_NO_THROW(quantized({}));
  std::memset(values.data() + 64 * 4 * 7, 0xff, 4);
  write("base", {{{kWeight, DType::kF32, {20, 64}}, values}});
  EXPECT_ERROR(quantized({}), ModelError, "elements from 448 on is an infinity or a NaN");
}

TEST_F(QuantizedTensorsTest, ConfigurationsOfOthersAreRefused) {
  const auto parse = [](const std::string& text) {
    return io::QuantizationConfig::from_model_config(
        io::Json::parse("{\"quantization_config\": " + text + "}", "c"), "c");
  };
  EXPECT_FALSE(parse("null").has_value());
  EXPECT_EQ(parse("{\"load_in_8bit\": true}")->kind, io::QuantKind::kInt8);
  EXPECT_ERROR(parse("{\"quant_method\": \"gptq\"}"), ModelError, "quantised by 'gptq'");
  EXPECT_ERROR(parse("{}"), ModelError, "got neither");
  EXPECT_ERROR(parse("{\"load_in_4bit\": true, \"bnb_4bit_quant_type\": \"af4\"}"), ModelError,
               "'af4'");
}

}  // namespace
}  // namespace fsdp::checkpoint
