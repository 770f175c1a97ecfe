// Expressions. Precedences and oddities are Jinja2's: a filter or test binds tighter than
// arithmetic, unary minus tighter than **, and ** groups from the left.
#include <algorithm>

#include "libfsdp/text/jinja_parser_base.h"

namespace fsdp::text::jinja {
namespace {

constexpr int kMaxNesting = 100;  // brackets inside brackets
constexpr int kMaxDepth = 400;    // of the tree; long chains of operators are deep as well

bool is_constant_name(const std::string& name) {
  return name == "true" || name == "True" || name == "false" || name == "False" || name == "none" ||
         name == "None";
}

}  // namespace

class ExprParser::Nesting {
 public:
  explicit Nesting(ExprParser& parser) : parser_(parser) {
    if (++parser_.nesting_ > kMaxNesting) parser_.fail("the expression is nested too deeply");
  }
  ~Nesting() { --parser_.nesting_; }
  Nesting(const Nesting&) = delete;
  Nesting& operator=(const Nesting&) = delete;

 private:
  ExprParser& parser_;
};

Token ExprParser::take() {
  Token token = current();
  if (at_ + 1 < tokens_.size()) ++at_;
  return token;
}

bool ExprParser::is_operator(std::string_view text) const {
  return current().kind == TokenKind::kOperator && current().text == text;
}

bool ExprParser::is_name(std::string_view text) const {
  return current().kind == TokenKind::kName && current().text == text;
}

bool ExprParser::skip_operator(std::string_view text) {
  if (!is_operator(text)) return false;
  take();
  return true;
}

bool ExprParser::skip_name(std::string_view text) {
  if (!is_name(text)) return false;
  take();
  return true;
}

void ExprParser::expect_operator(std::string_view text) {
  if (!skip_operator(text)) fail(cat("expected '", text, "', got ", describe(current())));
}

void ExprParser::expect(TokenKind kind, std::string_view what) {
  if (current().kind != kind) fail(cat("expected ", what, ", got ", describe(current())));
  take();
}

std::string ExprParser::expect_name() {
  if (current().kind != TokenKind::kName) fail(cat("expected a name, got ", describe(current())));
  return take().text;
}

void ExprParser::fail(const std::string& what) const { fail_at(current().line, what); }

void ExprParser::fail_at(int line, const std::string& what) const {
  throw TemplateError(cat("line ", line, ": ", what));
}

std::string ExprParser::describe(const Token& token) {
  switch (token.kind) {
    case TokenKind::kText:
    case TokenKind::kPrintBegin:
    case TokenKind::kBlockBegin:
      return "text";
    case TokenKind::kPrintEnd:
      return "'}}'";
    case TokenKind::kBlockEnd:
      return "'%}'";
    case TokenKind::kEnd:
      return "the end of the template";
    case TokenKind::kString:
      return cat("the string '", token.text, "'");
    default:
      return cat("'", token.text, "'");
  }
}

ExprPtr ExprParser::make(ExprKind kind, int line, std::string name) const {
  auto node = std::make_unique<Expr>();
  node->kind = kind;
  node->line = line;
  node->name = std::move(name);
  return node;
}

void ExprParser::add(Expr& parent, ExprPtr part) const {
  if (part) {
    parent.depth = std::max(parent.depth, part->depth + 1);
    if (parent.depth > kMaxDepth) fail("the expression is too long");
  }
  parent.parts.push_back(std::move(part));
}

ExprPtr ExprParser::binary(ExprKind kind, std::string op, ExprPtr left, ExprPtr right,
                           int line) const {
  auto node = make(kind, line, std::move(op));
  add(*node, std::move(left));
  add(*node, std::move(right));
  return node;
}

ExprPtr ExprParser::parse_expression(bool conditional) {
  const Nesting nesting(*this);
  return conditional ? parse_conditional() : parse_or();
}

ExprPtr ExprParser::parse_conditional() {
  int line = current().line;
  auto node = parse_or();
  while (skip_name("if")) {
    auto conditional = make(ExprKind::kConditional, line);
    add(*conditional, parse_or());
    add(*conditional, std::move(node));
    add(*conditional, skip_name("else") ? parse_expression() : nullptr);
    node = std::move(conditional);
    line = current().line;
  }
  return node;
}

ExprPtr ExprParser::parse_or() {
  const int line = current().line;
  auto node = parse_and();
  while (skip_name("or")) node = binary(ExprKind::kOr, "or", std::move(node), parse_and(), line);
  return node;
}

ExprPtr ExprParser::parse_and() {
  const int line = current().line;
  auto node = parse_not();
  while (skip_name("and")) node = binary(ExprKind::kAnd, "and", std::move(node), parse_not(), line);
  return node;
}

ExprPtr ExprParser::parse_not() {
  if (!is_name("not")) return parse_compare();
  const Nesting nesting(*this);
  auto node = make(ExprKind::kNot, take().line);
  add(*node, parse_not());
  return node;
}

/// The comparison operator that stands here ("in" and "not in" too), or nothing.
std::string ExprParser::take_comparison() {
  for (const std::string_view op : {"==", "!=", "<=", ">=", "<", ">"}) {
    if (skip_operator(op)) return std::string(op);
  }
  if (skip_name("in")) return "in";
  if (is_name("not") && ahead().kind == TokenKind::kName && ahead().text == "in") {
    take();
    take();
    return "not in";
  }
  return "";
}

ExprPtr ExprParser::parse_compare() {
  const int line = current().line;
  auto first = parse_sum();
  std::string op = take_comparison();
  if (op.empty()) return first;
  auto node = make(ExprKind::kCompare, line);
  add(*node, std::move(first));
  for (; !op.empty(); op = take_comparison()) {
    node->ops.push_back(op);
    add(*node, parse_sum());
  }
  return node;
}

ExprPtr ExprParser::parse_sum() {
  const int line = current().line;
  auto node = parse_concat();
  while (is_operator("+") || is_operator("-")) {
    std::string op = take().text;
    node = binary(ExprKind::kBinary, std::move(op), std::move(node), parse_concat(), line);
  }
  return node;
}

ExprPtr ExprParser::parse_concat() {
  const int line = current().line;
  auto first = parse_product();
  if (!is_operator("~")) return first;
  auto node = make(ExprKind::kConcat, line);
  add(*node, std::move(first));
  while (skip_operator("~")) add(*node, parse_product());
  return node;
}

ExprPtr ExprParser::parse_product() {
  const int line = current().line;
  auto node = parse_power();
  while (is_operator("*") || is_operator("/") || is_operator("//") || is_operator("%")) {
    std::string op = take().text;
    node = binary(ExprKind::kBinary, std::move(op), std::move(node), parse_power(), line);
  }
  return node;
}

ExprPtr ExprParser::parse_power() {
  const int line = current().line;
  auto node = parse_unary(true);
  while (skip_operator("**")) {
    node = binary(ExprKind::kBinary, "**", std::move(node), parse_unary(true), line);
  }
  return node;
}

ExprPtr ExprParser::parse_unary(bool with_filter) {
  const Nesting nesting(*this);
  ExprPtr node;
  if (is_operator("-") || is_operator("+")) {
    const Token sign = take();
    node = make(sign.text == "-" ? ExprKind::kNegate : ExprKind::kPlus, sign.line);
    add(*node, parse_unary(false));
  } else {
    node = parse_primary();
  }
  node = parse_postfix(std::move(node));
  return with_filter ? parse_filter_expression(std::move(node)) : std::move(node);
}

ExprPtr ExprParser::parse_primary(bool namespaces) {
  const Token& token = current();
  const int line = token.line;
  if (token.kind == TokenKind::kName) return parse_name(namespaces);
  if (token.kind == TokenKind::kNumber) {
    auto node = make(ExprKind::kLiteral, line);
    node->value = take().value;
    return node;
  }
  if (token.kind == TokenKind::kString) {
    std::string text;
    while (current().kind == TokenKind::kString)
      text += take().text;  // neighbours join, as in Python
    auto node = make(ExprKind::kLiteral, line);
    node->value = Value(std::move(text));
    return node;
  }
  if (skip_operator("(")) {
    auto node = parse_tuple({.parenthesised = true});
    expect_operator(")");
    return node;
  }
  if (is_operator("[")) return parse_list();
  if (is_operator("{")) return parse_dict();
  fail(cat("unexpected ", describe(token)));
}

void ExprParser::note_mention(const std::string& name) const {
  if (mentions_varargs_.empty()) return;
  if (name == "varargs") *mentions_varargs_.back() = true;
  if (name == "kwargs") *mentions_kwargs_.back() = true;
  if (name == "caller") *mentions_caller_.back() = true;
}

ExprPtr ExprParser::parse_name(bool namespaces) {
  const Token token = take();
  if (is_constant_name(token.text)) {
    auto node = make(ExprKind::kLiteral, token.line);
    const char first = static_cast<char>(token.text[0] | 0x20);
    node->value = first == 'n' ? Value::none() : Value(first == 't');
    return node;
  }
  if (namespaces && skip_operator(".")) {
    auto node = make(ExprKind::kNamespace, token.line, token.text);
    node->ops.push_back(expect_name());
    return node;
  }
  note_mention(token.text);
  return make(ExprKind::kName, token.line, token.text);
}

bool ExprParser::ends_tuple(const TupleRules& rules) const {
  const TokenKind kind = current().kind;
  if (kind == TokenKind::kPrintEnd || kind == TokenKind::kBlockEnd || is_operator(")")) return true;
  return !rules.end_name.empty() && is_name(rules.end_name);
}

ExprPtr ExprParser::parse_tuple(const TupleRules& rules) {
  const int line = current().line;
  std::vector<ExprPtr> parts;
  bool is_tuple = false;
  while (!ends_tuple(rules)) {
    parts.push_back(rules.names_only ? parse_primary(rules.namespaces)
                                     : parse_expression(rules.conditional));
    if (!skip_operator(",")) break;
    is_tuple = true;
  }
  if (!is_tuple && !parts.empty()) return std::move(parts.front());
  if (!is_tuple && !rules.parenthesised)
    fail(cat("expected an expression, got ", describe(current())));
  auto node = make(ExprKind::kTuple, line);
  for (auto& part : parts) add(*node, std::move(part));
  return node;
}

ExprPtr ExprParser::parse_target(bool namespaces, std::string_view end_name) {
  auto target = parse_tuple({.names_only = true, .namespaces = namespaces, .end_name = end_name});
  const auto assignable = [](const Expr& node) {
    return node.kind == ExprKind::kName || node.kind == ExprKind::kNamespace;
  };
  bool good = assignable(*target);
  if (target->kind == ExprKind::kTuple) {
    good = std::all_of(target->parts.begin(), target->parts.end(),
                       [&](const auto& p) { return assignable(*p); });
  }
  if (!good)
    fail_at(target->line,
            "only names, tuples of names and attributes of namespaces can be assigned to");
  return target;
}

ExprPtr ExprParser::parse_list() {
  auto node = make(ExprKind::kList, take().line);
  while (!is_operator("]")) {
    add(*node, parse_expression());
    if (!skip_operator(",")) break;
  }
  expect_operator("]");
  return node;
}

ExprPtr ExprParser::parse_dict() {
  auto node = make(ExprKind::kDict, take().line);
  while (!is_operator("}")) {
    add(*node, parse_expression());
    expect_operator(":");
    add(*node, parse_expression());
    if (!skip_operator(",")) break;
  }
  expect_operator("}");
  return node;
}

ExprPtr ExprParser::parse_postfix(ExprPtr node) {
  while (true) {
    if (is_operator(".")) {
      node = parse_attribute(std::move(node));
    } else if (is_operator("[")) {
      node = parse_item(std::move(node));
    } else if (is_operator("(")) {
      node = parse_call(std::move(node));
    } else {
      return node;
    }
  }
}

ExprPtr ExprParser::parse_filter_expression(ExprPtr node) {
  while (true) {
    if (is_operator("|")) {
      node = parse_filters(std::move(node), false);
    } else if (is_name("is")) {
      node = parse_test(std::move(node));
    } else if (is_operator("(")) {
      node = parse_call(std::move(node));
    } else {
      return node;
    }
  }
}

ExprPtr ExprParser::parse_attribute(ExprPtr node) {
  const int line = take().line;
  if (current().kind == TokenKind::kNumber) {
    auto item = make(ExprKind::kItem, line);
    add(*item, std::move(node));
    add(*item, parse_primary());
    return item;
  }
  auto attribute = make(ExprKind::kAttribute, line, expect_name());
  add(*attribute, std::move(node));
  return attribute;
}

ExprPtr ExprParser::parse_item(ExprPtr node) {
  const int line = take().line;
  const auto ends = [this] { return is_operator(":") || is_operator("]"); };
  ExprPtr first = ends() ? nullptr : parse_expression();
  if (first && !is_operator(":")) {
    expect_operator("]");
    auto item = make(ExprKind::kItem, line);
    add(*item, std::move(node));
    add(*item, std::move(first));
    return item;
  }
  expect_operator(":");
  auto slice = make(ExprKind::kSlice, line);
  add(*slice, std::move(node));
  add(*slice, std::move(first));
  add(*slice, ends() ? nullptr : parse_expression());
  add(*slice, skip_operator(":") && !ends() ? parse_expression() : nullptr);
  expect_operator("]");
  return slice;
}

ExprPtr ExprParser::parse_call(ExprPtr node) {
  auto call = make(ExprKind::kCall, current().line);
  add(*call, std::move(node));
  parse_arguments(*call);
  return call;
}

void ExprParser::parse_arguments(Expr& call) {
  CallSyntax& out = call.arguments;
  const auto deepen = [&](ExprPtr part) {
    call.depth = std::max(call.depth, part->depth + 1);
    if (call.depth > kMaxDepth) fail("the expression is too long");
    return part;
  };
  expect_operator("(");
  while (!is_operator(")")) {
    if (skip_operator("*")) {
      if (out.star || out.double_star) fail("invalid syntax of a call");
      out.star = deepen(parse_expression());
    } else if (skip_operator("**")) {
      if (out.double_star) fail("invalid syntax of a call");
      out.double_star = deepen(parse_expression());
    } else if (current().kind == TokenKind::kName && ahead().kind == TokenKind::kOperator &&
               ahead().text == "=") {
      std::string name = take().text;
      take();
      out.named.emplace_back(std::move(name), deepen(parse_expression()));
    } else {
      if (out.star || out.double_star || !out.named.empty())
        fail("an argument by position follows one by name");
      out.positional.push_back(deepen(parse_expression()));
    }
    if (!skip_operator(",")) break;
  }
  expect_operator(")");
}

ExprPtr ExprParser::parse_filters(ExprPtr node, bool starts_with_name) {
  while (starts_with_name || skip_operator("|")) {
    starts_with_name = false;
    const int line = current().line;
    auto filter = make(ExprKind::kFilter, line, expect_name());
    add(*filter, std::move(node));
    if (is_operator("(")) parse_arguments(*filter);
    node = std::move(filter);
  }
  return node;
}

/// `x is divisibleby 3`: one argument may follow without brackets.
bool ExprParser::starts_bare_argument() const {
  switch (current().kind) {
    case TokenKind::kString:
    case TokenKind::kNumber:
      return true;
    case TokenKind::kName:
      return !is_name("else") && !is_name("or") && !is_name("and");
    default:
      return is_operator("[") || is_operator("{");
  }
}

ExprPtr ExprParser::parse_test(ExprPtr node) {
  const int line = take().line;
  const bool negated = skip_name("not");
  auto test = make(ExprKind::kTest, line, expect_name());
  add(*test, std::move(node));
  if (is_operator("(")) {
    parse_arguments(*test);
  } else if (starts_bare_argument()) {
    if (is_name("is")) fail("tests cannot be chained with 'is'");
    auto argument = parse_postfix(parse_primary());
    test->depth = std::max(test->depth, argument->depth + 1);
    test->arguments.positional.push_back(std::move(argument));
  }
  if (!negated) return test;
  auto inverse = make(ExprKind::kNot, line);
  add(*inverse, std::move(test));
  return inverse;
}

}  // namespace fsdp::text::jinja
