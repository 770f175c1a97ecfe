#include "libfsdp/text/chat.h"

#include <gtest/gtest.h>

#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "tests/unit/text/fake_encoder.h"

namespace fsdp::text {
namespace {

Conversation conversation(const std::string& messages) {
  return {.messages = jinja::Value::from_json(messages)};
}

ChatTemplate corpus_template(const std::string& name) {
  std::ifstream file(std::string(FSDP_TEST_DIR) + "/jinja_corpus/" + name);
  std::stringstream source;
  source << file.rdbuf();
  return ChatTemplate(source.str(), {{"bos_token", "<s>"}, {"eos_token", "</s>"}});
}

std::vector<std::string> answers(const ChatTemplate& chat, const Conversation& talk) {
  const ChatText text = chat.render_answers(talk);
  EXPECT_EQ(text.text, chat.render(talk, false));
  std::vector<std::string> out;
  for (const ByteSpan span : text.answers)
    out.push_back(text.text.substr(span.begin, span.end - span.begin));
  return out;
}

using Strings = std::vector<std::string>;
const char* const kTwoTurns =
    R"([{"role":"user","content":"A"},{"role":"assistant","content":"é B"},{"role":"user","content":"C"},{"role":"assistant","content":"D"}])";

TEST(ChatTest, GenerationPromptIsAddedOnRequest) {
  const ChatTemplate chat(kChatMl, {});
  const auto talk = conversation(R"([{"role":"user","content":"Hi"}])");
  EXPECT_EQ(chat.render(talk, false), "<|im_start|>user\nHi<|im_end|>\n");
  EXPECT_EQ(chat.render(talk, true), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
}

TEST(ChatTest, AnswersEndWithTheMarkerOfTheTurnAndNotWithTheNewlineBehindIt) {
  EXPECT_EQ(answers(ChatTemplate(kChatMl, {}), conversation(kTwoTurns)),
            (Strings{"é B<|im_end|>", "D<|im_end|>"}));
  EXPECT_EQ(answers(corpus_template("gemma.jinja"), conversation(kTwoTurns)),
            (Strings{"é B<end_of_turn>", "D<end_of_turn>"}));
  EXPECT_EQ(answers(corpus_template("llama31.jinja"), conversation(kTwoTurns)),
            (Strings{"é B<|eot_id|>", "D<|eot_id|>"}));
  EXPECT_EQ(answers(corpus_template("mistral.jinja"), conversation(kTwoTurns)),
            (Strings{" é B</s>", " D</s>"}));
  EXPECT_EQ(answers(corpus_template("llama2.jinja"), conversation(kTwoTurns)),
            (Strings{" é B </s>", " D </s>"}));
  EXPECT_EQ(answers(corpus_template("zephyr.jinja"), conversation(kTwoTurns)),
            (Strings{"é B</s>", "D</s>"}));
  EXPECT_EQ(answers(corpus_template("qwen25.jinja"), conversation(kTwoTurns)),
            (Strings{"é B<|im_end|>", "D<|im_end|>"}));
}

TEST(ChatTest, GenerationBlocksSayWhatAnAnswerIs) {
  EXPECT_EQ(answers(corpus_template("chatml_generation.jinja"), conversation(kTwoTurns)),
            (Strings{"é B<|im_end|>", "D<|im_end|>"}));
  const ChatTemplate odd(
      "{% for m in messages %}{{ m.role }}:{% generation %}{{ m.content }}{% endgeneration %}\n{% "
      "endfor %}",
      {});
  EXPECT_EQ(answers(odd, conversation(kTwoTurns)), (Strings{"A", "é B", "C", "D"}));
}

TEST(ChatTest, AnswersAreFoundWhereTheLastTurnIsWrittenInAnotherWay) {
  // Thoughts are written in the last turn only.
  EXPECT_EQ(answers(corpus_template("qwen3.jinja"), conversation(kTwoTurns)),
            (Strings{"é B<|im_end|>", "<think>\n\n</think>\n\nD<|im_end|>"}));
}

TEST(ChatTest, TheGenerationPromptMayHoldMoreThanTheText) {
  const ChatTemplate thinks(
      "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}{% if "
      "add_generation_prompt %}<assistant>[think]{% "
      "endif %}",
      {});
  EXPECT_EQ(answers(thinks, conversation(kTwoTurns)), (Strings{"é B<end>", "D<end>"}));
}

TEST(ChatTest, WhiteSpaceOfTheContentItselfIsKept) {
  const ChatTemplate bare(
      "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if "
      "add_generation_prompt "
      "%}assistant: {% endif %}",
      {});
  EXPECT_EQ(
      answers(
          bare,
          conversation(R"([{"role":"user","content":"A"},{"role":"assistant","content":"B\n "}])")),
      Strings{"B\n "});
}

TEST(ChatTest, MessagesBeforeTheFirstAnswerArePrompt) {
  auto talk = conversation(kTwoTurns);
  talk.first_answer = 2;
  EXPECT_EQ(answers(ChatTemplate(kChatMl, {}), talk), Strings{"D<|im_end|>"});
  EXPECT_EQ(answers(corpus_template("chatml_generation.jinja"), talk), Strings{"D<|im_end|>"});
}

TEST(ChatTest, ATemplateThatRewritesEarlierTurnsIsAnErrorThatSaysWhatToDo) {
  const ChatTemplate rewrites(
      "{{ messages | length }}:{% for m in messages %}{{ m.content }};{% endfor %}", {});
  try {
    rewrites.render_answers(conversation(kTwoTurns));
    FAIL();
  } catch (const jinja::TemplateError& error) {
    EXPECT_NE(std::string(error.what()).find("{% generation %}"), std::string::npos)
        << error.what();
  }
}

TEST(ChatTest, ToolsReachTheTemplate) {
  Conversation talk = conversation(R"([{"role":"user","content":"A"}])");
  const ChatTemplate lists("{{ tools | tojson }}", {});
  EXPECT_EQ(lists.render(talk, false), "null");
  talk.tools = jinja::Value::from_json(R"([{"name":"f"}])");
  EXPECT_EQ(lists.render(talk, false), R"([{"name": "f"}])");
}

}  // namespace
}  // namespace fsdp::text
