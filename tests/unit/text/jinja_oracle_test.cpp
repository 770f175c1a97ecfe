// The engine against transformers' own Jinja2 environment, over the templates and expressions in
// jinja_corpus/.
#include <gtest/gtest.h>

#include <cstdio>
#include <sstream>
#include <string>
#include <vector>

#include "libfsdp/text/jinja.h"

namespace fsdp::text::jinja {
namespace {

struct OracleCase {
  std::string name, source, text, error;
  Value context;
  bool fails = false;
  std::vector<ByteSpan> spans;
};

std::string run(const std::string& command) {
  std::string out;
  FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return out;
  char buffer[1 << 16];
  for (size_t n = 0; (n = fread(buffer, 1, sizeof(buffer), pipe)) > 0;) out.append(buffer, n);
  return pclose(pipe) == 0 ? out : "";
}

OracleCase read_case(const std::string& line) {
  const Value row = Value::from_json(line);
  OracleCase out;
  out.name = row.find("name")->string();
  out.source = row.find("template")->string();
  out.context = *row.find("context");
  out.fails = row.find("error") != nullptr;
  if (out.fails) {
    out.error = row.find("error")->string();
    return out;
  }
  out.text = row.find("text")->string();
  for (const Value& span : row.find("spans")->items()) {
    out.spans.push_back({static_cast<size_t>(span.items()[0].integer()),
                         static_cast<size_t>(span.items()[1].integer())});
  }
  return out;
}

const std::vector<OracleCase>& oracle_cases() {
  static const std::vector<OracleCase> kCases = [] {
    const std::string folder = FSDP_TEST_DIR;
    std::istringstream lines(run(std::string(FSDP_PYTHON) + " " + folder + "/jinja_oracle.py " +
                                 folder + "/jinja_corpus"));
    std::vector<OracleCase> cases;
    for (std::string line; std::getline(lines, line);) cases.push_back(read_case(line));
    return cases;
  }();
  return kCases;
}

RenderOptions fixed_time() {
  RenderOptions options;
  options.now = std::tm{};
  options.now->tm_year = 124;
  options.now->tm_mon = 6;
  options.now->tm_mday = 26;
  options.now->tm_hour = 13;
  options.now->tm_min = 5;
  options.now->tm_sec = 9;
  options.now->tm_wday = 5;
  return options;
}

TEST(JinjaOracleTest, TheCorpusIsRenderedByPython) {
  EXPECT_GT(oracle_cases().size(), 350U) << "is the .venv there? " << FSDP_PYTHON;
}

TEST(JinjaOracleTest, TextAndAnswerSpansEqualJinja2AndItsFailuresFailHereToo) {
  for (const OracleCase& expected : oracle_cases()) {
    SCOPED_TRACE(expected.name + "\n" + expected.source.substr(0, 400));
    try {
      const RenderResult got = Template(expected.source).render(expected.context, fixed_time());
      ASSERT_FALSE(expected.fails)
          << "Jinja2 says: " << expected.error << "\nwe print: " << got.text;
      EXPECT_EQ(got.text, expected.text);
      EXPECT_EQ(got.generations, expected.spans);
    } catch (const TemplateError& error) {
      EXPECT_TRUE(expected.fails) << error.what() << "\nJinja2 prints: " << expected.text;
      EXPECT_NE(std::string(error.what()).find("line "), std::string::npos) << error.what();
    }
  }
}

}  // namespace
}  // namespace fsdp::text::jinja
