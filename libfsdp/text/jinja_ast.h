// Syntax tree of a chat template.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "libfsdp/text/jinja_value.h"

namespace fsdp::text::jinja {

struct Expr;
using ExprPtr = std::unique_ptr<Expr>;

enum class ExprKind : uint8_t {
  kLiteral,      // value
  kName,         // name
  kList,         // parts
  kTuple,        // parts
  kDict,         // parts: key, value, key, value, ...
  kAttribute,    // parts[0] . name
  kItem,         // parts[0] [ parts[1] ]
  kSlice,        // parts[0] [ parts[1] : parts[2] : parts[3] ], absent bounds are null
  kCall,         // parts[0] ( arguments )
  kFilter,       // parts[0] | name ( arguments ); parts[0] is null in a filter block
  kTest,         // parts[0] is name ( arguments )
  kNot,          // not parts[0]
  kNegate,       // - parts[0]
  kPlus,         // + parts[0]
  kBinary,       // parts[0] op parts[1], op = name: + - * / // % **
  kConcat,       // parts[0] ~ parts[1] ~ ...
  kCompare,      // parts[0] op0 parts[1] op1 parts[2] ..., operators = ops
  kAnd,          // parts[0] and parts[1]
  kOr,           // parts[0] or parts[1]
  kConditional,  // parts[1] if parts[0] else parts[2] (may be null)
  kNamespace,    // name . attribute, only as a target of set; attribute = ops[0]
};

struct CallSyntax {
  std::vector<ExprPtr> positional;
  std::vector<std::pair<std::string, ExprPtr>> named;
  ExprPtr star;         // *args
  ExprPtr double_star;  // **kwargs
};

struct Expr {
  ExprKind kind;
  int line;
  int depth = 1;  // 1 + depth of the deepest part; bounded by the parser
  std::string name;
  Value value;
  std::vector<ExprPtr> parts;
  std::vector<std::string> ops;
  CallSyntax arguments;
};

struct Stmt;
using Block = std::vector<Stmt>;

enum class StmtKind : uint8_t {
  kText,        // text
  kPrint,       // {{ exprs[0] }}
  kIf,          // blocks[i] under exprs[i]; one block more than exprs is the else
  kFor,         // target in exprs[0] if exprs[1] (may be null): blocks[0], else blocks[1]
  kSet,         // target = exprs[0]
  kSetBlock,    // target = blocks[0], through the filters exprs[0] (may be null)
  kMacro,       // text = name, parameters, exprs = defaults of the last ones, blocks[0]
  kCallBlock,   // exprs[0] = the call; parameters, defaults, blocks[0] make its caller
  kFilter,      // exprs[0] applied to blocks[0]
  kWith,        // parameters = exprs: blocks[0]
  kGeneration,  // blocks[0] is the assistant's answer
  kBreak,
  kContinue,
};

struct Stmt {
  StmtKind kind;
  int line;
  std::string text;
  ExprPtr target;
  std::vector<ExprPtr> exprs;
  std::vector<std::string> parameters;
  std::vector<ExprPtr> defaults;
  std::vector<Block> blocks;
  bool recursive = false;      // kFor
  bool takes_varargs = false;  // kMacro: the body mentions varargs / kwargs / caller
  bool takes_kwargs = false;
  bool takes_caller = false;
};

struct Syntax {
  Block body;
  bool has_generation = false;
};

}  // namespace fsdp::text::jinja
