// Splits a template into tokens, with Jinja2's trim_blocks and lstrip_blocks switched on.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "libfsdp/text/jinja_value.h"

namespace fsdp::text::jinja {

enum class TokenKind : uint8_t {
  kText,
  kPrintBegin,
  kPrintEnd,
  kBlockBegin,
  kBlockEnd,
  kName,
  kString,
  kNumber,
  kOperator,
  kEnd,
};

struct Token {
  TokenKind kind;
  int line;
  std::string text;  // of a string: after unescaping
  Value value;       // of a number
};

/// All tokens, the last one kEnd. Throws TemplateError that names the line.
std::vector<Token> tokenize(std::string_view source);

}  // namespace fsdp::text::jinja
