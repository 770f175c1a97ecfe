// Conversations as text: a chat template with the variables that transformers gives it, and where
// the answers stand.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "libfsdp/text/jinja.h"

namespace fsdp::text {

struct Conversation {
  jinja::Value messages = jinja::Value::sequence({});  ///< list of dicts with "role" and "content"
  jinja::Value tools = jinja::Value::none();
  size_t first_answer = 0;  ///< assistant messages before this one belong to the prompt
};

struct ChatText {
  std::string text;
  std::vector<ByteSpan> answers;  ///< bytes that the assistant produces, in order
};

/// One turn each.
Conversation make_conversation(std::string_view user, std::string_view assistant);

/// A parsed chat template. Immutable: const functions may be called from several threads at once.
class ChatTemplate {
 public:
  /// The variables beside messages, tools, documents (none) and add_generation_prompt, e.g.
  /// {"bos_token", "<s>"}.
  using Variables = std::vector<std::pair<std::string, std::string>>;

  /// Throws jinja::TemplateError (a ModelError) that names the line.
  ChatTemplate(std::string_view source, const Variables& variables,
               std::string name = "chat template");

  /// The conversation as text; with `add_generation_prompt` what asks the assistant to speak stands
  /// at the end. Throws jinja::TemplateError.
  std::string render(const Conversation& conversation, bool add_generation_prompt) const;

  /// The conversation as text and its answers.
  ///
  /// A template with {% generation %} blocks says itself what an answer is. Otherwise an answer is
  /// what a message of the assistant adds to the text of the messages before it with their
  /// generation prompt: from the end of the prompt through the marker that ends the turn, without
  /// the white space that the template puts behind that marker. Cost:   with generation blocks one
  /// rendering, otherwise two for each answer and one. Throws: jinja::TemplateError, also when the
  /// template rewrites earlier turns so that answers cannot be found.
  ChatText render_answers(const Conversation& conversation) const;

 private:
  jinja::Value context(const jinja::Value& messages, const jinja::Value& tools,
                       bool add_generation_prompt) const;
  std::string render_first(const Conversation& conversation, size_t count,
                           bool add_generation_prompt) const;
  ByteSpan find_answer(const Conversation& conversation, size_t index,
                       const std::string& text) const;

  jinja::Template template_;
  jinja::Value::Dict variables_;
  std::string name_;
};

}  // namespace fsdp::text
