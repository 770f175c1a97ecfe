#include "libfsdp/text/record.h"

#include <string_view>

namespace fsdp::text {
namespace {

using io::Json;
using jinja::Value;

std::string_view kind_name(const Json& value) {
  constexpr std::string_view kNames[] = {"null",     "a boolean", "an integer", "a number",
                                         "a string", "a list",    "an object"};
  return kNames[static_cast<size_t>(value.kind())];
}

[[noreturn]] void fail_type(std::string_view key, std::string_view expected, const Json& got) {
  throw DataError(cat("'", key, "' must be ", expected, ", got ", kind_name(got)));
}

const Json& require(const Json& json, std::string_view key, std::string_view beside) {
  const Json* found = json.find(key);
  if (found == nullptr) throw DataError(cat("the record has '", beside, "' but no '", key, "'"));
  return *found;
}

std::string require_string(const Json& json, std::string_view key, std::string_view beside) {
  const Json& value = require(json, key, beside);
  if (!value.is_string()) fail_type(key, "a string", value);
  return value.as_string();
}

/// A message has a role; its content is text, or a list of parts, or absent beside calls of tools.
void check_message(const Json& message, const std::string& where) {
  if (!message.is_object()) fail_type(where, "an object with 'role' and 'content'", message);
  const Json* role = message.find("role");
  if (role == nullptr) throw DataError(cat("'", where, "' has no 'role'"));
  if (!role->is_string()) fail_type(where + ".role", "a string", *role);
  const Json* content = message.find("content");
  const bool may_be_absent = message.contains("tool_calls");
  if (content == nullptr || content->is_null()) {
    if (may_be_absent) return;
    if (content == nullptr) throw DataError(cat("'", where, "' has no 'content'"));
  }
  if (!content->is_string() && !content->is_array())
    fail_type(where + ".content", "a string", *content);
}

Value::List parse_messages(const Json& list, std::string_view key) {
  if (!list.is_array()) fail_type(key, "a list of messages", list);
  if (list.empty()) throw DataError(cat("'", key, "' is an empty list"));
  Value::List out;
  for (const Json& message : list.elements()) {
    check_message(message, cat(key, "[", out.size(), "]"));
    out.push_back(Value::from_json(message));
  }
  return out;
}

Record from_messages(const Json& json) {
  Record record{.kind = Record::Kind::kConversation};
  record.conversation.messages =
      Value::sequence(parse_messages(*json.find("messages"), "messages"));
  if (const Json* tools = json.find("tools")) {
    if (!tools->is_null() && !tools->is_array()) fail_type("tools", "a list", *tools);
    record.conversation.tools = Value::from_json(*tools);
  }
  return record;
}

Record from_strings(std::string prompt, std::string completion, bool has_template) {
  if (has_template) {
    return {.kind = Record::Kind::kConversation,
            .conversation = make_conversation(prompt, completion)};
  }
  return {.kind = Record::Kind::kCompletion,
          .prompt = std::move(prompt),
          .text = std::move(completion)};
}

Record from_prompt(const Json& json, bool has_template) {
  const Json& prompt = require(json, "prompt", "completion");
  const Json& completion = require(json, "completion", "prompt");
  if (prompt.is_string() && completion.is_string()) {
    return from_strings(prompt.as_string(), completion.as_string(), has_template);
  }
  if (!prompt.is_string() && !prompt.is_array())
    fail_type("prompt", "a string or a list of messages", prompt);
  if (prompt.is_array() != completion.is_array()) {
    fail_type("completion",
              prompt.is_array() ? "a list of messages, as 'prompt' is" : "a string, as 'prompt' is",
              completion);
  }
  Record record{.kind = Record::Kind::kConversation};
  Value::List messages = parse_messages(prompt, "prompt");
  record.conversation.first_answer = messages.size();
  for (Value& message : parse_messages(completion, "completion"))
    messages.push_back(std::move(message));
  record.conversation.messages = Value::sequence(std::move(messages));
  return record;
}

/// The wording is llama-recipes', so that models tuned there and here see the same prompt.
std::string summary_prompt(const std::string& dialogue) {
  return "Summarize this dialog:\n" + dialogue + "\n---\nSummary:\n";
}

[[noreturn]] void fail_unknown(const Json& json) {
  std::string keys;
  for (const auto& member : json.items()) {
    if (keys.size() > 200) {
      keys += ", ...";
      break;
    }
    keys += (keys.empty() ? "'" : ", '") + member.key + "'";
  }
  throw DataError(
      cat("no known keys; known are: messages; prompt and completion; dialogue and summary; text. "
          "The record has ",
          keys.empty() ? "none" : keys));
}

}  // namespace

Record parse_record(const io::Json& json, bool has_template) {
  if (!json.is_object()) fail_type("record", "a JSON object", json);
  if (json.contains("messages")) return from_messages(json);
  if (json.contains("prompt") || json.contains("completion"))
    return from_prompt(json, has_template);
  if (json.contains("dialogue") || json.contains("summary")) {
    const std::string dialogue = require_string(json, "dialogue", "summary");
    return from_strings(summary_prompt(dialogue), require_string(json, "summary", "dialogue"),
                        has_template);
  }
  if (json.contains("text")) return {.text = require_string(json, "text", "text")};
  fail_unknown(json);
}

}  // namespace fsdp::text
