// One record of a data file, of whichever known kind, checked.
#pragma once

#include <string>

#include "libfsdp/io/json.h"
#include "libfsdp/text/chat.h"

namespace fsdp::text {

struct Record {
  enum class Kind {
    kConversation,  ///< to be rendered by the chat template
    kCompletion,    ///< prompt, then completion, as plain text
    kText,          ///< all of it is trained on
  };
  Kind kind = Kind::kText;
  Conversation conversation;
  std::string prompt;
  std::string text;  ///< of kText; the completion of kCompletion
};

/// Reads a record by its keys, the first of these that is there:
///   messages               list of {role, content}; optional tools
///   prompt, completion     both strings or both lists of messages; only the completion is trained
///   on dialogue, summary      as a prompt that asks for a summary, and its completion text
/// With `has_template` strings of a prompt and completion become a turn of the user and one of the
/// assistant. Throws DataError (without file and line) for missing and mistyped keys.
Record parse_record(const io::Json& json, bool has_template);

}  // namespace fsdp::text
