#include "libfsdp/text/chat.h"

#include <algorithm>

#include "libfsdp/text/jinja_unicode.h"

namespace fsdp::text {
namespace {

using jinja::TemplateError;
using jinja::Value;

/// Length of the common beginning, never inside a character.
size_t common_prefix(std::string_view a, std::string_view b) {
  size_t n =
      static_cast<size_t>(std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first - a.begin());
  while (n > 0 && n < a.size() && (static_cast<unsigned char>(a[n]) & 0xC0) == 0x80) --n;
  return n;
}

std::string string_or_empty(const Value* value) {
  return value != nullptr && value->is_string() ? value->string() : "";
}

/// End of the answer `content` within text[begin, end): through the marker that ends the turn.
/// White space behind that is the template's, unless it is the content's own.
size_t trim_answer_end(std::string_view text, size_t begin, size_t end, std::string_view content) {
  const std::string_view answer = text.substr(begin, end - begin);
  const size_t without_space = begin + jinja::strip(answer, false, true).size();
  const size_t at = content.empty() ? std::string_view::npos : answer.rfind(content);
  return at == std::string_view::npos ? without_space
                                      : std::max(without_space, begin + at + content.size());
}

}  // namespace

Conversation make_conversation(std::string_view user, std::string_view assistant) {
  const auto message = [](std::string_view role, std::string_view content) {
    return Value::mapping({{"role", role}, {"content", content}});
  };
  return {.messages = Value::sequence({message("user", user), message("assistant", assistant)})};
}

ChatTemplate::ChatTemplate(std::string_view source, const Variables& variables, std::string name)
    : template_(source, name), name_(std::move(name)) {
  for (const auto& [key, value] : variables) variables_.emplace_back(key, value);
}

Value ChatTemplate::context(const Value& messages, const Value& tools,
                            bool add_generation_prompt) const {
  Value::Dict pairs = variables_;
  pairs.emplace_back("messages", messages);
  pairs.emplace_back("tools", tools);
  pairs.emplace_back("documents", Value::none());
  pairs.emplace_back("add_generation_prompt", add_generation_prompt);
  return Value::mapping(std::move(pairs));
}

std::string ChatTemplate::render(const Conversation& conversation,
                                 bool add_generation_prompt) const {
  return template_.render(context(conversation.messages, conversation.tools, add_generation_prompt))
      .text;
}

std::string ChatTemplate::render_first(const Conversation& conversation, size_t count,
                                       bool add_generation_prompt) const {
  const auto& all = conversation.messages.items();
  Value::List some(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(count));
  return template_
      .render(context(Value::sequence(std::move(some)), conversation.tools, add_generation_prompt))
      .text;
}

ByteSpan ChatTemplate::find_answer(const Conversation& conversation, size_t index,
                                   const std::string& text) const {
  const auto fail = [&](std::string_view what) {
    throw TemplateError(
        cat(name_, ": cannot tell where the answer in message ", index, " ", what,
            ", because the template rewrites earlier turns. Hint: put {% generation %} ... {% "
            "endgeneration %} around the answers in the template."));
  };
  const std::string prompt = render_first(conversation, index, true);
  // Where prompt and text part, the answer begins; they part early only in what the generation
  // prompt adds.
  const size_t begin = common_prefix(text, prompt);
  if (begin < prompt.size() &&
      begin < common_prefix(prompt, render_first(conversation, index, false)))
    fail("begins");

  const std::string through = render_first(conversation, index + 1, false);
  const std::string content = string_or_empty(conversation.messages.items()[index].find("content"));
  if (through.size() >= begin && text.starts_with(through)) {
    return {begin, trim_answer_end(text, begin, through.size(), content)};
  }
  // The last turn is written in another way than earlier ones (say, with its thoughts): go by the
  // content.
  const size_t in_text = content.empty() ? std::string::npos : text.find(content, begin);
  const size_t in_through = content.empty() ? std::string::npos : through.rfind(content);
  if (in_text == std::string::npos || in_through == std::string::npos) fail("ends");
  const std::string_view after = std::string_view(text).substr(in_text + content.size());
  const std::string_view marker =
      jinja::strip(std::string_view(through).substr(in_through + content.size()), false, true);
  if (!after.starts_with(marker)) fail("ends");
  return {begin, in_text + content.size() + marker.size()};
}

ChatText ChatTemplate::render_answers(const Conversation& conversation) const {
  auto rendered = template_.render(context(conversation.messages, conversation.tools, false));
  ChatText out{.text = std::move(rendered.text)};
  const auto& messages = conversation.messages.items();
  if (template_.has_generation() && rendered.generations_exact) {
    const size_t first = conversation.first_answer;
    const size_t prompt_end =
        first > 0 ? common_prefix(out.text, render_first(conversation, first, true)) : 0;
    for (const ByteSpan span : rendered.generations) {
      if (span.end > prompt_end)
        out.answers.push_back({std::max(span.begin, prompt_end), span.end});
    }
    return out;
  }
  for (size_t i = conversation.first_answer; i < messages.size(); ++i) {
    if (string_or_empty(messages[i].find("role")) == "assistant") {
      out.answers.push_back(find_answer(conversation, i, out.text));
    }
  }
  return out;
}

}  // namespace fsdp::text
