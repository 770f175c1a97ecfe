// Statements.
#include "libfsdp/text/jinja_parser.h"

#include <algorithm>

#include "libfsdp/text/jinja_parser_base.h"

namespace fsdp::text::jinja {
namespace {

constexpr int kMaxBlocks = 60;  // blocks inside blocks

class Parser : public ExprParser {
 public:
  using ExprParser::ExprParser;

  Syntax parse() {
    syntax_.body = parse_block({}, "");
    return std::move(syntax_);
  }

 private:
  using Names = std::initializer_list<std::string_view>;

  /// Statements up to a tag with one of `ends` (left unread after "{%"), or the end of the
  /// template.
  Block parse_block(Names ends, std::string_view opened_by) {
    if (++depth_ > kMaxBlocks) fail("blocks are nested too deeply");
    const int begin = current().line;
    Block block;
    while (current().kind != TokenKind::kEnd) {
      if (current().kind == TokenKind::kText) {
        block.push_back({.kind = StmtKind::kText, .line = current().line, .text = current().text});
        take();
      } else if (current().kind == TokenKind::kPrintBegin) {
        block.push_back(parse_print());
      } else {
        take();  // {%
        if (std::any_of(ends.begin(), ends.end(), [this](auto end) { return is_name(end); })) {
          --depth_;
          return block;
        }
        block.push_back(parse_statement());
        expect(TokenKind::kBlockEnd, "'%}'");
      }
    }
    if (ends.size() > 0)
      fail_at(begin, cat("'", opened_by, "' is not closed: '", *(ends.end() - 1), "' is missing"));
    --depth_;
    return block;
  }

  /// A block that `end` closes.
  Block parse_body(std::string_view end, std::string_view opened_by) {
    expect(TokenKind::kBlockEnd, "'%}'");
    Block block = parse_block({end}, opened_by);
    take();
    return block;
  }

  Stmt make(StmtKind kind) const { return {.kind = kind, .line = current().line}; }

  Stmt parse_print() {
    Stmt stmt = make(StmtKind::kPrint);
    take();
    stmt.exprs.push_back(parse_tuple({}));
    expect(TokenKind::kPrintEnd, "'}}'");
    return stmt;
  }

  Stmt parse_statement() {
    if (current().kind != TokenKind::kName)
      fail(cat("expected a statement, got ", describe(current())));
    const std::string name = current().text;
    if (name == "if") return parse_if();
    if (name == "for") return parse_for();
    if (name == "set") return parse_set();
    if (name == "macro") return parse_macro();
    if (name == "call") return parse_call_block();
    if (name == "filter") return parse_filter_block();
    if (name == "with") return parse_with();
    if (name == "generation") return parse_generation();
    if (name == "break" || name == "continue") return parse_jump();
    if (name.starts_with("end") || name == "else" || name == "elif") {
      fail(cat("'", name, "' closes nothing that is open here"));
    }
    fail(cat(
        "unknown statement '", name,
        "'; known are: if, for, set, macro, call, filter, with, generation, break, continue, raw"));
  }

  Stmt parse_if() {
    Stmt stmt = make(StmtKind::kIf);
    std::string word = take().text;
    while (word == "if" || word == "elif") {
      stmt.exprs.push_back(parse_tuple({.conditional = false}));
      expect(TokenKind::kBlockEnd, "'%}'");
      stmt.blocks.push_back(parse_block({"elif", "else", "endif"}, "if"));
      word = take().text;
    }
    if (word == "else") stmt.blocks.push_back(parse_body("endif", "else"));
    return stmt;
  }

  Stmt parse_for() {
    Stmt stmt = make(StmtKind::kFor);
    take();
    stmt.target = parse_target(false, "in");
    if (!skip_name("in")) fail(cat("expected 'in', got ", describe(current())));
    stmt.exprs.push_back(parse_tuple({.conditional = false, .end_name = "recursive"}));
    stmt.exprs.push_back(skip_name("if") ? parse_expression() : nullptr);
    stmt.recursive = skip_name("recursive");
    expect(TokenKind::kBlockEnd, "'%}'");
    ++loops_;
    stmt.blocks.push_back(parse_block({"else", "endfor"}, "for"));
    --loops_;
    if (take().text == "else") stmt.blocks.push_back(parse_body("endfor", "else"));
    return stmt;
  }

  Stmt parse_set() {
    Stmt stmt = make(StmtKind::kSet);
    take();
    stmt.target = parse_target(true, "");
    if (skip_operator("=")) {
      stmt.exprs.push_back(parse_tuple({}));
      return stmt;
    }
    stmt.kind = StmtKind::kSetBlock;
    stmt.exprs.push_back(parse_filters(nullptr, false));
    stmt.blocks.push_back(parse_body("endset", "set"));
    return stmt;
  }

  void parse_signature(Stmt& stmt) {
    expect_operator("(");
    while (!is_operator(")")) {
      stmt.parameters.push_back(expect_name());
      if (skip_operator("=")) {
        stmt.defaults.push_back(parse_expression());
      } else if (!stmt.defaults.empty()) {
        fail("a parameter without a default follows one with a default");
      }
      if (!skip_operator(",")) break;
    }
    expect_operator(")");
  }

  /// The body of a macro or call block; notes whether it mentions varargs, kwargs, caller.
  void parse_macro_body(Stmt& stmt, std::string_view end, std::string_view opened_by) {
    mentions_varargs_.push_back(&stmt.takes_varargs);
    mentions_kwargs_.push_back(&stmt.takes_kwargs);
    mentions_caller_.push_back(&stmt.takes_caller);
    const int loops = std::exchange(loops_, 0);
    stmt.blocks.push_back(parse_body(end, opened_by));
    loops_ = loops;
    mentions_varargs_.pop_back();
    mentions_kwargs_.pop_back();
    mentions_caller_.pop_back();
  }

  Stmt parse_macro() {
    Stmt stmt = make(StmtKind::kMacro);
    take();
    stmt.text = expect_name();
    parse_signature(stmt);
    parse_macro_body(stmt, "endmacro", "macro");
    return stmt;
  }

  Stmt parse_call_block() {
    Stmt stmt = make(StmtKind::kCallBlock);
    take();
    stmt.text = "caller";
    if (is_operator("(")) parse_signature(stmt);
    stmt.exprs.push_back(parse_expression());
    if (stmt.exprs[0]->kind != ExprKind::kCall)
      fail_at(stmt.line, "expected a call of a macro after 'call'");
    parse_macro_body(stmt, "endcall", "call");
    return stmt;
  }

  Stmt parse_filter_block() {
    Stmt stmt = make(StmtKind::kFilter);
    take();
    stmt.exprs.push_back(parse_filters(nullptr, true));
    stmt.blocks.push_back(parse_body("endfilter", "filter"));
    return stmt;
  }

  Stmt parse_with() {
    Stmt stmt = make(StmtKind::kWith);
    take();
    while (current().kind == TokenKind::kName) {
      stmt.parameters.push_back(expect_name());
      expect_operator("=");
      stmt.exprs.push_back(parse_expression());
      if (!skip_operator(",")) break;
    }
    stmt.blocks.push_back(parse_body("endwith", "with"));
    return stmt;
  }

  Stmt parse_generation() {
    Stmt stmt = make(StmtKind::kGeneration);
    take();
    syntax_.has_generation = true;
    const int loops = std::exchange(loops_, 0);
    stmt.blocks.push_back(parse_body("endgeneration", "generation"));
    loops_ = loops;
    return stmt;
  }

  Stmt parse_jump() {
    Stmt stmt = make(current().text == "break" ? StmtKind::kBreak : StmtKind::kContinue);
    if (loops_ == 0) fail(cat("'", current().text, "' stands outside of a loop"));
    take();
    return stmt;
  }

  Syntax syntax_;
  int depth_ = 0;
  int loops_ = 0;  // loops around, within the current macro
};

}  // namespace

Syntax parse(std::string_view source) { return Parser(tokenize(source)).parse(); }

}  // namespace fsdp::text::jinja
