// What the oracle cannot say: limits, messages, and that hostile templates end in an error instead
// of a crash.
#include "libfsdp/text/jinja.h"

#include <gtest/gtest.h>

#include <string>

namespace fsdp::text::jinja {
namespace {

Value context() {
  return Value::from_json(R"({"messages": [{"role": "user", "content": "hi"}], "n": 3})");
}

std::string render(const std::string& source) { return Template(source).render(context()).text; }

std::string error_of(const std::string& source) {
  try {
    return "no error, but: " + render(source).substr(0, 100);
  } catch (const TemplateError& error) {
    return error.what();
  }
}

TEST(JinjaTest, MessagesNameTemplateAndLine) {
  EXPECT_EQ(error_of("a\n{% if n %}\n{{ n | nope }}\n{% endif %}"),
            "chat template, line 3: unknown filter 'nope'");
  EXPECT_EQ(error_of("a\n{% if n %}\n"),
            "chat template, line 2: 'if' is not closed: 'endif' is missing");
  EXPECT_EQ(error_of("\n\n{{ nobody.x }}"), "chat template, line 3: 'nobody' is undefined");
  EXPECT_EQ(error_of("{% frobnicate %}"),
            "chat template, line 1: unknown statement 'frobnicate'; known are: if, for, set, "
            "macro, call, filter, with, "
            "generation, break, continue, raw");
  EXPECT_EQ(error_of("{{ messages.append(1) }}"),
            "chat template, line 1: 'append' is not available: lists and dicts are immutable in "
            "chat templates");
}

TEST(JinjaTest, RaiseExceptionIsTheTemplatesOwnError) {
  try {
    render("{{ raise_exception('roles must alternate') }}");
    FAIL();
  } catch (const TemplateError& error) {
    EXPECT_TRUE(error.raised_by_template());
    EXPECT_NE(std::string(error.what()).find("roles must alternate"), std::string::npos);
  }
  try {
    render("{{ n.x.y }}");
    FAIL();
  } catch (const TemplateError& error) {
    EXPECT_FALSE(error.raised_by_template());
  }
}

TEST(JinjaTest, EndlessWorkEndsAtTheStepLimit) {
  const std::string loops =
      "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{{ a }}{% "
      "endfor %}{% endfor %}"
      "{% endfor %}";
  EXPECT_NE(error_of(loops).find("steps"), std::string::npos);
}

TEST(JinjaTest, MemoryIsBounded) {
  const std::string doubling =
      "{% set ns = namespace(s='xxxxxxxxxxxxxxxx') %}{% for i in range(99) %}{% set ns.s = ns.s "
      "~ ns.s %}{% endfor %}{{ ns.s | length }}";
  EXPECT_NE(error_of(doubling).find("steps"), std::string::npos) << error_of(doubling);
  EXPECT_NE(error_of("{{ 'x' * 9999999999 }}").find("string"), std::string::npos);
  EXPECT_NE(error_of("{{ ([1] * 999999) * 999999 }}").find("list"), std::string::npos);
  EXPECT_NE(error_of("{{ 'a'.ljust(99999999999) }}").find("string"), std::string::npos);
  EXPECT_NE(error_of("{% set ns = namespace(l=[1]) %}{% for i in range(99) %}{% set ns.l = [ns.l, "
                     "ns.l] %}{% endfor %}")
                .find("too large"),
            std::string::npos);
}

TEST(JinjaTest, DeepNestingIsAnErrorAndNotACrash) {
  EXPECT_NE(error_of("{{ " + std::string(100000, '(') + "1" + std::string(100000, ')') + " }}")
                .find("nested"),
            std::string::npos);
  std::string chain = "{{ 1";
  for (int i = 0; i < 100000; ++i) chain += "+1";
  EXPECT_NE(error_of(chain + " }}").find("too long"), std::string::npos);
  std::string blocks;
  for (int i = 0; i < 10000; ++i) blocks += "{% if n %}";
  EXPECT_NE(error_of(blocks).find("nested"), std::string::npos);
  EXPECT_NE(error_of("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}").find("nested"),
            std::string::npos);
  EXPECT_NE(error_of("{% set ns = namespace(l=[]) %}{% for i in range(9999) %}{% set ns.l = [ns.l] "
                     "%}{% endfor %}")
                .find("nested"),
            std::string::npos);
  EXPECT_THROW(Value::from_json(std::string(100000, '[')), TemplateError);
  EXPECT_THROW(Value::from_json(std::string(1000, '[') + std::string(1000, ']')), TemplateError);
}

TEST(JinjaTest, CyclesThroughNamespacesAndMacrosAreReleased) {
  // Under AddressSanitizer a leak fails the test.
  EXPECT_EQ(
      render("{% set ns = namespace() %}{% set ns.me = ns %}{% set ns.l = [ns] %}{% macro m() %}{% "
             "endmacro %}"
             "{% set ns.m = m %}{% for i in range(2) %}{% set ns.loop = loop.cycle %}{% endfor %}"
             "{{ ns.me.me is defined }}{{ ns.loop(1, 2) }}"),
      "True2");
}

TEST(JinjaTest, ATemplateRendersAgainAndAgain) {
  const Template source(
      "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ "
      "ns.n }}");
  EXPECT_EQ(source.render(context()).text, "1");
  EXPECT_EQ(source.render(context()).text, "1");
}

TEST(JinjaTest, AnswersInsideMacrosAreReportedAsNotLocated) {
  EXPECT_TRUE(Template("{% generation %}a{% endgeneration %}").render(context()).generations_exact);
  EXPECT_FALSE(
      Template("{% macro m() %}{% generation %}a{% endgeneration %}{% endmacro %}{{ m() }}")
          .render(context())
          .generations_exact);
}

TEST(JinjaTest, RandomDamageOfATemplateNeverCrashes) {
  const std::string source =
      "{%- for m in messages %}{% if loop.first and m['role'] != 'x' %}{{ m.content | trim ~ "
      "'<|e|>\\n' }}{% else %}{# c "
      "#}{{ {'a': [1, 2][::-1]}['a'] | tojson(indent=2) }}{% endif %}{% endfor %}{% set x = "
      "namespace(a=1) %}";
  uint64_t state = 12345;
  const auto next = [&state] {
    return (state = state * 6364136223846793005ULL + 1442695040888963407ULL) >> 33;
  };
  const std::string alphabet = "{}%#()[]'\"|.,:~-+*/\\ \nabif_019<=>";
  for (int round = 0; round < 20000; ++round) {
    std::string damaged = source;
    for (uint64_t edits = 1 + next() % 4; edits > 0; --edits) {
      const size_t at = next() % damaged.size();
      if (next() % 2 == 0) {
        damaged[at] = alphabet[next() % alphabet.size()];
      } else {
        damaged.erase(at, 1 + next() % 5);
      }
    }
    RenderOptions options;
    options.max_steps = 10000;
    try {
      Template(damaged).render(context(), options);
    } catch (const TemplateError&) {
    }
  }
}

}  // namespace
}  // namespace fsdp::text::jinja
