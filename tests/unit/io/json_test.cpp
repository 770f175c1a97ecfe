#include "libfsdp/io/json.h"

#include <rapidcheck.h>

#include <cmath>
#include <limits>

#include "tests/unit/io/expect_error.h"
#include "tests/unit/io/temp_dir.h"

namespace fsdp::io {
namespace {

Json parse(std::string_view text) { return Json::parse(text, "doc"); }

TEST(JsonTest, ReadsEveryKindAndKeepsOrder) {
  const Json doc = parse(R"({"z":1,"a":[true,null,-2.5,"é\u00e9\n"],"m":{}})");
  EXPECT_EQ(doc.items()[0].key, "z");
  EXPECT_EQ(doc.items()[1].key, "a");
  EXPECT_EQ(doc["z"].as_int(), 1);
  EXPECT_TRUE(doc["a"][0].as_bool());
  EXPECT_TRUE(doc["a"][1].is_null());
  EXPECT_EQ(doc["a"][2].as_double(), -2.5);
  EXPECT_EQ(doc["a"][3].as_string(), "éé\n");
  EXPECT_EQ(doc["m"].size(), 0U);
  EXPECT_EQ(doc.dump(), R"({"z":1,"a":[true,null,-2.5,"éé\n"],"m":{}})");
}

TEST(JsonTest, DumpsLikePythonWithIndentTwo) {
  const Json doc = Json::object({{"a", Json::array({1, "x"})}, {"b", Json::object()}, {"c", 0.5}});
  EXPECT_EQ(doc.dump(2), "{\n  \"a\": [\n    1,\n    \"x\"\n  ],\n  \"b\": {},\n  \"c\": 0.5\n}");
}

TEST(JsonTest, KeepsTheSpellingOfNumbers) {
  const std::string text =
      R"([1e-05,10000.0,1000000000000000019884624838656,18446744073709551615])";
  EXPECT_EQ(parse(text).dump(), text);
  EXPECT_EQ(parse(text)[2].as_double(), 1e30);
}

TEST(JsonTest, DoublesReadBackToTheSameNumber) {
  EXPECT_EQ(Json(10000.0).dump(), "10000.0");
  EXPECT_EQ(Json(0.1).dump(), "0.1");
  EXPECT_EQ(Json(1e5).dump(), "100000.0");
  EXPECT_EQ(Json(1e-5).dump(), "1e-05");
  EXPECT_EQ(Json(123456789012345.6).dump(), "123456789012345.6");
  EXPECT_EQ(Json(1e22).dump(), "1e+22");
  EXPECT_EQ(Json(-0.0).dump(), "-0.0");
  EXPECT_TRUE(rc::check([](uint64_t bits) {
    const auto value = std::bit_cast<double>(bits);
    RC_PRE(std::isfinite(value));
    RC_ASSERT(std::bit_cast<uint64_t>(parse(Json(value).dump()).as_double()) == bits);
  }));
  EXPECT_THROW(Json(std::nan("")).dump(), InternalError);
}

TEST(JsonTest, StringsOfAnyBytesBelow128ReadBack) {
  EXPECT_TRUE(rc::check([](const std::string& text) {
    std::string ascii;
    for (const char c : text) ascii += static_cast<char>((c & 0x7f) == 0 ? ' ' : c & 0x7f);
    RC_ASSERT(parse(Json(ascii).dump()).as_string() == ascii);
  }));
}

TEST(JsonTest, IntegersAreExact) {
  EXPECT_EQ(parse("9223372036854775807").as_int(), std::numeric_limits<int64_t>::max());
  EXPECT_ERROR(parse("18446744073709551616").as_int(), JsonError, "expected an integer");
  EXPECT_ERROR(parse("2.0").as_int(), JsonError, "expected an integer of 64 bits, got 2.0");
  EXPECT_ERROR(parse(R"({"n":-1})").get<size_t>("n"), JsonError, "'n': integer -1 is out of range");
  EXPECT_ERROR(parse("[300]")[0].as<uint8_t>(), JsonError, "out of range");
  EXPECT_ERROR(parse(R"({"n":true})").get<int64_t>("n"), JsonError, "'n': expected an integer");
}

TEST(JsonTest, RefusesWhatPrecedentReadersLetThrough) {
  EXPECT_ERROR(parse(R"({"a":{"b":1,"c":2,"b":3}})"), JsonError, R"(doc: key "b" occurs twice)");
  EXPECT_ERROR(parse(std::string_view("{\"a\":1}\0{\"a\":2}", 15)), JsonError,
               "NUL byte at offset 7");
  EXPECT_ERROR(parse(R"({"a":1} x)"), JsonError, "doc: parse error at line 1, column 9");
  EXPECT_ERROR(parse("\"\xff\xfe\""), JsonError, "invalid string");
  EXPECT_ERROR(parse("[1e999]"), JsonError, "1e999");
  EXPECT_ERROR(parse("[NaN]"), JsonError, "parse error");
  EXPECT_ERROR(parse("[1,]"), JsonError, "parse error");
  EXPECT_ERROR(parse(""), JsonError, "unexpected end of input");
}

TEST(JsonTest, BoundsDepthAndNumberOfValues) {
  const std::string ok = std::string(64, '[') + std::string(64, ']');
  EXPECT_EQ(parse(ok).dump(), ok);
  EXPECT_ERROR(parse('[' + ok + ']'), JsonError, "nested deeper than 64");
  EXPECT_ERROR(parse(std::string(10'000'000, '[')), JsonError, "nested deeper than 64");
  EXPECT_ERROR(Json::parse("[1,2,3]", "doc", {.max_values = 3}), JsonError, "more than 3 values");
}

TEST(JsonTest, GetFallsBackOnMissingAndNullOnly) {
  const Json doc = parse(R"({"a":null,"b":[1,2],"c":"x","d":3})");
  EXPECT_EQ(doc.get<int64_t>("a", 7), 7);
  EXPECT_EQ(doc.get<int64_t>("nope", 7), 7);
  EXPECT_EQ(doc.get<std::vector<int64_t>>("b"), (std::vector<int64_t>{1, 2}));
  EXPECT_EQ(doc.get("c", "y"), "x");
  EXPECT_EQ(doc.get<double>("d", 0.0), 3.0);
  EXPECT_ERROR(doc.get<int64_t>("c", 7), JsonError,
               "'c': expected an integer of 64 bits, got \"x\"");
  EXPECT_ERROR(doc["e"], JsonError, "key \"e\" is missing");
  EXPECT_ERROR(doc["b"]["x"], JsonError, "expected an object, got [1,2]");
  EXPECT_ERROR(doc["b"][2], JsonError, "element 2 of an array of 2");
}

TEST(JsonTest, BuildsAndEdits) {
  Json doc;
  doc["a"] = 1;
  doc["b"]["c"].push_back("x");
  doc["b"]["c"].push_back(nullptr);
  doc["a"] = false;
  doc["v"] = std::vector<int>{1, 2};
  EXPECT_EQ(doc.dump(), R"({"a":false,"b":{"c":["x",null]},"v":[1,2]})");
  doc.erase("b");
  EXPECT_FALSE(doc.contains("b"));
  EXPECT_EQ(doc, parse(R"({"a":false,"v":[1,2.0]})"));
  EXPECT_FALSE(doc == parse(R"({"a":false,"v":[1,3]})"));
}

TEST(JsonTest, ReadNamesTheFile) {
  const TempDir dir;
  const std::string path = dir.write("config.json", "{");
  EXPECT_ERROR(Json::read(path), JsonError, path + ": parse error");
}

}  // namespace
}  // namespace fsdp::io
