#include "libfsdp/base/fields.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <array>
#include <fstream>

#include "libfsdp/base/error.h"

namespace fsdp {
namespace {

enum class Mode { kSlow, kQuick };
constexpr std::array<std::pair<Mode, std::string_view>, 2> names_of(Mode) {
  return {{{Mode::kSlow, "slow"}, {Mode::kQuick, "quick"}}};
}

struct Options {
  bool packing = false;
  bool shuffle = true;
  int64_t batch = 8;
  double learning_rate = 5e-5;
  std::string dtype = "float32";
  std::filesystem::path config;
  std::vector<std::string> stop;
  std::optional<int64_t> limit;
  Mode mode = Mode::kSlow;

  template <class V>
  void fields(V& v) {
    v.group("First");
    v("packing", packing, "Packs.");
    v("shuffle", shuffle, "Shuffles.");
    v("batch", batch, "Batch size.", {.aliases = {"batch_size"}, .min = 1, .max = 100});
    v.group("Second");
    v("learning_rate", learning_rate, "Step size.", {.min = 0, .above_min = true});
    v("dtype", dtype, "Type.", {.choices = {"float32", "bfloat16"}});
    v("config", config, "A yaml file.");
    v("stop", stop, "Texts.");
    v("limit", limit, "Limit.");
    v("mode", mode, "Mode.");
    v.refused({"fp16", "half"}, "there is no loss scaler");
  }
};

struct Loaded {
  Options options;
  Origins origins;
};

Loaded load(const std::vector<std::string>& arguments) {
  Loaded loaded;
  loaded.origins = load_options(fields_of(loaded.options), arguments, "tool run");
  return loaded;
}

std::string refusal(const std::vector<std::string>& arguments) {
  try {
    load(arguments);
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "accepted";
}

/// A yaml file that lives as long as the object.
class YamlFile {
 public:
  explicit YamlFile(const std::string& text) {
    path_ = std::filesystem::temp_directory_path() /
            cat("fields_test_", ::getpid(), "_", ++count_, ".yaml");
    std::ofstream(path_, std::ios::binary) << text;
  }
  ~YamlFile() { std::filesystem::remove(path_); }
  std::string path() const { return path_.string(); }
  std::string name() const { return path_.filename().string(); }

 private:
  static inline int count_ = 0;
  std::filesystem::path path_;
};

#define EXPECT_MENTIONS(text, part) EXPECT_NE((text).find(part), std::string::npos) << (text)

TEST(FieldsTest, DefaultsStayWithoutArguments) {
  const auto loaded = load({});
  EXPECT_EQ(loaded.options.batch, 8);
  EXPECT_TRUE(loaded.options.shuffle);
  EXPECT_FALSE(loaded.origins.given("batch"));
}

TEST(FieldsTest, FlagsAreReadInEverySpelling) {
  const auto options =
      load({"--packing", "--shuffle", "False", "--batch-size=16", "--learning-rate", "1e-3",
            "--dtype", "bfloat16", "--stop", "a,b", "--limit=7", "--mode", "quick"})
          .options;
  EXPECT_TRUE(options.packing);
  EXPECT_FALSE(options.shuffle);
  EXPECT_EQ(options.batch, 16);
  EXPECT_EQ(options.learning_rate, 1e-3);
  EXPECT_EQ(options.dtype, "bfloat16");
  EXPECT_EQ(options.stop, (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(options.limit, 7);
  EXPECT_EQ(options.mode, Mode::kQuick);
  EXPECT_FALSE(load({"--no_shuffle"}).options.shuffle);
}

TEST(FieldsTest, NegativeNumbersAreValuesNotFlags) {
  EXPECT_MENTIONS(refusal({"--batch", "-1"}), "expected at least 1");
}

TEST(FieldsTest, AnUnknownFlagNamesItsNearestNeighbour) {
  const auto text = refusal({"--lerning_rate", "1"});
  EXPECT_MENTIONS(text, "--lerning_rate (command line)");
  EXPECT_MENTIONS(text, "Did you mean --learning_rate?");
  EXPECT_MENTIONS(text, "tool run");
  EXPECT_MENTIONS(refusal({"--zzzzzzzzzzzz", "1"}), "--help lists them");
}

TEST(FieldsTest, WrongValuesAreRefusedWithWhatIsExpected) {
  EXPECT_MENTIONS(refusal({"--batch", "many"}), "got 'many', expected an integer");
  EXPECT_MENTIONS(refusal({"--batch", "1.5"}), "expected an integer");
  EXPECT_MENTIONS(refusal({"--batch", "101"}), "expected at most 100");
  EXPECT_MENTIONS(refusal({"--batch", "99999999999999999999"}), "can represent");
  EXPECT_MENTIONS(refusal({"--learning_rate", "0"}), "a number above 0");
  EXPECT_MENTIONS(refusal({"--learning_rate", "nan"}), "expected a number");
  EXPECT_MENTIONS(refusal({"--dtype", "bfloat17"}), "did you mean bfloat16?");
  EXPECT_MENTIONS(refusal({"--mode", "fast"}), "one of slow, quick");
  EXPECT_MENTIONS(refusal({"--packing=maybe"}), "true or false");
  EXPECT_MENTIONS(refusal({"--batch"}), "needs a value");
  EXPECT_MENTIONS(refusal({"--batch", "1", "--batch", "2"}), "given twice");
  EXPECT_MENTIONS(refusal({"run.yaml"}), "--config");
}

TEST(FieldsTest, KnownNamesThatCannotBeHonouredSayWhy) {
  EXPECT_MENTIONS(refusal({"--fp16", "--packing"}),
                  "--fp16 (command line) cannot be honoured: there is no loss scaler.");
  const YamlFile file("half: true\n");
  EXPECT_MENTIONS(refusal({"--config", file.path()}), "no loss scaler");
}

TEST(FieldsTest, FlagsWinOverYamlAndYamlOverDefaults) {
  const YamlFile file(
      "batch: 3\nlearning-rate: 1e-2\nstop: [x, 'y,z']\npacking: yes\nlimit: null\n");
  const auto loaded = load({"--config", file.path(), "--batch", "4"});
  EXPECT_EQ(loaded.options.batch, 4);
  EXPECT_EQ(loaded.options.learning_rate, 1e-2);
  EXPECT_EQ(loaded.options.stop, (std::vector<std::string>{"x", "y,z"}));
  EXPECT_TRUE(loaded.options.packing);
  EXPECT_FALSE(loaded.options.limit.has_value());
  EXPECT_EQ(loaded.origins.describe("batch"), "--batch (command line)");
  EXPECT_MENTIONS(loaded.origins.describe("learning_rate"), file.name() + ":2");
}

TEST(FieldsTest, YamlErrorsNameFileAndLine) {
  const auto refused = [](const std::string& text) {
    const YamlFile file(text);
    const auto message = refusal({"--config", file.path()});
    EXPECT_MENTIONS(message, file.name());
    return message;
  };
  EXPECT_MENTIONS(refused("batch: 1\nbatchs: 2\n"),
                  ":2) is not an option of 'tool run'. Did you mean --batch?");
  EXPECT_MENTIONS(refused("batch: 1\n\nbatch_size: 2\n"), ":3 gives 'batch' a second time");
  EXPECT_MENTIONS(refused("batch: many\n"), ":1): got 'many'");
  EXPECT_MENTIONS(refused("stop:\n  deep: 1\n"), ":2 nests a map");
  EXPECT_MENTIONS(refused("stop: [[1]]\n"), "nests a list");
  EXPECT_MENTIONS(refused("batch: &a 1\n"), "anchor");
  EXPECT_MENTIONS(refused("batch: [1, 2]\n"), "expected an integer");
  EXPECT_MENTIONS(refused("batch: 1\n--- \nbatch: 2\n"), "second document");
  EXPECT_MENTIONS(refused("- batch\n"), "not a map");
  EXPECT_MENTIONS(refused("just words\n"), "not a map");
  EXPECT_MENTIONS(refused("batch: [1\n"), "not valid yaml");
  EXPECT_MENTIONS(refused("config: other.yaml\n"), "another configuration file");
  EXPECT_MENTIONS(refused(std::string("batch: 1\0", 9)), "NUL");
}

TEST(FieldsTest, HostileYamlEndsInAnError) {
  std::string bomb = "a: &a [x]\n";
  const YamlFile aliases(bomb);
  EXPECT_MENTIONS(refusal({"--config", aliases.path()}), ":1");
  const YamlFile deep("stop: " + std::string(100000, '['));
  EXPECT_MENTIONS(refusal({"--config", deep.path()}), "not valid yaml");
  const YamlFile large(std::string(2 << 20, ' '));
  EXPECT_MENTIONS(refusal({"--config", large.path()}), "larger than 1 MiB");
  EXPECT_MENTIONS(refusal({"--config", "/nonexistent/x.yaml"}), "is not a file");
  EXPECT_MENTIONS(refusal({"--config", "/"}), "is not a file");
}

TEST(FieldsTest, AnEmptyYamlChangesNothing) {
  const YamlFile file("# nothing\n");
  EXPECT_EQ(load({"--config", file.path()}).options.batch, 8);
}

TEST(FieldsTest, HelpShowsEveryOptionWithinItsWidth) {
  Options options;
  const auto fields = fields_of(options);
  const auto text = help_text(fields, 80);
  for (const auto& field : fields) {
    EXPECT_EQ(text.find("--" + field.name) != std::string::npos, field.refusal.empty())
        << field.name;
  }
  EXPECT_MENTIONS(text, "First:\n");
  EXPECT_MENTIONS(text, "[5e-05]");
  EXPECT_MENTIONS(text, "float32|bfloat16");
  for (size_t begin = 0; begin < text.size();) {
    const auto end = text.find('\n', begin);
    EXPECT_LE(end - begin, 80U);
    begin = end + 1;
  }
}

TEST(FieldsTest, JsonAndMarkdownShowTheResolvedValues) {
  Options options;
  options.stop = {"say \"hi\"\n"};
  options.learning_rate = 0.1;
  const auto fields = fields_of(options);
  const auto json = fields_json(fields);
  EXPECT_MENTIONS(json, "\"learning_rate\": 0.1,");
  EXPECT_MENTIONS(json, "[\"say \\\"hi\\\"\\u000a\"]");
  EXPECT_MENTIONS(json, "\"limit\": null");
  EXPECT_MENTIONS(help_markdown(fields), "| `--dtype` | float32\\|bfloat16 | float32 | Type. |");
}

TEST(FieldsTest, NearestNameGivesNoHintForStrangers) {
  const std::vector<std::string> known = {"learning_rate", "weight_decay"};
  EXPECT_EQ(nearest_name(known, "weigth_decay"), "weight_decay");
  EXPECT_EQ(nearest_name(known, "foo"), "");
}

}  // namespace
}  // namespace fsdp
