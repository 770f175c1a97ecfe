// Token cursor and expression grammar, shared by the two halves of the parser. Internal to
// jinja_parser*.cpp.
#pragma once

#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include "libfsdp/text/jinja_ast.h"
#include "libfsdp/text/jinja_lexer.h"

namespace fsdp::text::jinja {

class ExprParser {
 public:
  explicit ExprParser(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}

 protected:
  struct TupleRules {
    bool names_only = false;  // targets of for and set
    bool conditional = true;  // may `a if b else c` stand here
    bool parenthesised = false;
    bool namespaces = false;
    std::string_view end_name = {};
  };

  const Token& current() const { return tokens_[at_]; }
  const Token& ahead() const { return tokens_[std::min(at_ + 1, tokens_.size() - 1)]; }
  Token take();
  bool is_operator(std::string_view text) const;
  bool is_name(std::string_view text) const;
  bool skip_operator(std::string_view text);
  bool skip_name(std::string_view text);
  void expect_operator(std::string_view text);
  void expect(TokenKind kind, std::string_view what);
  std::string expect_name();
  [[noreturn]] void fail(const std::string& what) const;
  [[noreturn]] void fail_at(int line, const std::string& what) const;
  static std::string describe(const Token& token);

  ExprPtr parse_expression(bool conditional = true);
  ExprPtr parse_tuple(const TupleRules& rules);
  ExprPtr parse_target(bool namespaces, std::string_view end_name);
  ExprPtr parse_filters(ExprPtr node, bool starts_with_name);

  std::vector<bool*> mentions_varargs_, mentions_kwargs_, mentions_caller_;  // of the macros around

 private:
  class Nesting;
  ExprPtr make(ExprKind kind, int line, std::string name = {}) const;
  void add(Expr& parent, ExprPtr part) const;
  ExprPtr binary(ExprKind kind, std::string op, ExprPtr left, ExprPtr right, int line) const;
  ExprPtr parse_conditional();
  ExprPtr parse_or();
  ExprPtr parse_and();
  ExprPtr parse_not();
  ExprPtr parse_compare();
  std::string take_comparison();
  ExprPtr parse_sum();
  ExprPtr parse_concat();
  ExprPtr parse_product();
  ExprPtr parse_power();
  ExprPtr parse_unary(bool with_filter);
  ExprPtr parse_primary(bool namespaces = false);
  ExprPtr parse_name(bool namespaces);
  ExprPtr parse_list();
  ExprPtr parse_dict();
  ExprPtr parse_postfix(ExprPtr node);
  ExprPtr parse_filter_expression(ExprPtr node);
  ExprPtr parse_attribute(ExprPtr node);
  ExprPtr parse_item(ExprPtr node);
  ExprPtr parse_call(ExprPtr node);
  ExprPtr parse_test(ExprPtr node);
  bool starts_bare_argument() const;
  void parse_arguments(Expr& call);
  bool ends_tuple(const TupleRules& rules) const;
  void note_mention(const std::string& name) const;

  std::vector<Token> tokens_;
  size_t at_ = 0;
  int nesting_ = 0;
};

}  // namespace fsdp::text::jinja
