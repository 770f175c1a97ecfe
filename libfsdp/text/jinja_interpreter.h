// Evaluates the syntax tree of a template. Internal to jinja*.cpp.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "libfsdp/text/jinja.h"
#include "libfsdp/text/jinja_ast.h"

namespace fsdp::text::jinja {

/// Names of one block; lookups go on in the parent.
struct Scope {
  std::shared_ptr<Scope> parent;
  std::vector<std::pair<std::string, Value>> names;

  Value* find(const std::string& name);
  void set(const std::string& name, Value value);
};
using ScopePtr = std::shared_ptr<Scope>;

class NamespaceObject : public Object {
 public:
  explicit NamespaceObject(std::vector<std::pair<std::string, Value>> values);
  Value attribute(const std::string& name) const override;
  void set(const std::string& name, Value value);
  void clear() { scope_.names.clear(); }
  std::string repr() const override;

 private:
  mutable Scope scope_;
};

class Interpreter;

/// Filters, tests and global functions by name; nullptr for unknown ones. Defined in
/// jinja_filters.cpp and jinja_globals.cpp.
using FilterFunction = Value (*)(Interpreter&, const Value& subject, const Arguments&);
using TestFunction = bool (*)(Interpreter&, const Value& subject, const Arguments&);
using GlobalFunction = Value (*)(Interpreter&, const Arguments&);
FilterFunction find_filter(const std::string& name);
TestFunction find_test(const std::string& name);
GlobalFunction find_global(const std::string& name);

class Interpreter {
 public:
  Interpreter(const Syntax& syntax, const Value& context, const RenderOptions& options);
  ~Interpreter();
  Interpreter(const Interpreter&) = delete;
  Interpreter& operator=(const Interpreter&) = delete;

  RenderResult run();
  /// Line of what is being evaluated, for messages.
  int line() const { return line_; }

  void charge(int64_t steps);
  Value apply_filter(const std::string& name, const Value& subject, const Arguments& arguments);
  bool apply_test(const std::string& name, const Value& subject, const Arguments& arguments);
  Value call(const Value& callee, const Arguments& arguments);
  /// Body of a macro: what it prints.
  Value call_macro(const Stmt& macro, const ScopePtr& closure, const Arguments& arguments);
  /// A recursive loop over `items` one level deeper: what it prints.
  Value call_loop(const Stmt& loop, const ScopePtr& closure, const Value& items, int depth);
  Value make_namespace(std::vector<std::pair<std::string, Value>> values);
  const RenderOptions& options() const { return options_; }

 private:
  enum class Flow { kNext, kBreak, kContinue };
  class Depth;
  class ScopeSwap;

  Flow exec(const Block& block);
  Flow exec(const Stmt& stmt);
  Flow exec_if(const Stmt& stmt);
  void exec_set_block(const Stmt& stmt);
  void exec_call_block(const Stmt& stmt);
  void exec_with(const Stmt& stmt);
  void exec_generation(const Stmt& stmt);
  Flow exec_for(const Stmt& stmt, const Value& items, int depth);
  Value::List loop_items(const Stmt& stmt, const Value& items);
  Value make_macro(const Stmt& stmt);
  Value make_global(GlobalFunction function, const std::string& name);
  void bind_parameters(const Stmt& macro, Scope& scope, const Arguments& arguments);
  void assign(const Expr& target, const Value& value);
  void print(std::string_view text);
  std::string capture(const Block& block);

  Value eval(const Expr& expr);
  Value eval_uncounted(const Expr& expr);
  Value eval_name(const Expr& expr);
  Value eval_dict(const Expr& expr);
  Value eval_concat(const Expr& expr);
  Value eval_compare(const Expr& expr);
  Value eval_slice(const Expr& expr);
  Value eval_filter(const Expr& expr, const Value* block_text);
  Value::List eval_parts(const Expr& expr);
  Arguments eval_arguments(const CallSyntax& syntax);
  void charge_for(const Value& value);

  const Syntax& syntax_;
  const RenderOptions& options_;
  ScopePtr scope_;
  std::string root_output_;
  std::string* output_ = &root_output_;
  RenderResult result_;
  int64_t steps_ = 0;
  int depth_ = 0;
  int line_ = 1;
  // Macros and namespaces can form cycles of shared pointers; these are emptied at the end.
  std::vector<ScopePtr> closures_;
  std::vector<std::shared_ptr<NamespaceObject>> namespaces_;
};

/// Bounds the recursion of the evaluation.
class Interpreter::Depth {
 public:
  explicit Depth(Interpreter& interpreter) : interpreter_(interpreter) {
    if (++interpreter_.depth_ > interpreter_.options_.max_depth) {
      --interpreter_.depth_;
      throw TemplateError(
          cat("evaluation is nested more than ", interpreter_.options_.max_depth, " deep"));
    }
  }
  ~Depth() { --interpreter_.depth_; }
  Depth(const Depth&) = delete;
  Depth& operator=(const Depth&) = delete;

 private:
  Interpreter& interpreter_;
};

/// A new scope below `parent` for the lifetime of this object.
class Interpreter::ScopeSwap {
 public:
  ScopeSwap(Interpreter& interpreter, ScopePtr parent)
      : interpreter_(interpreter), saved_(interpreter.scope_) {
    interpreter_.scope_ = std::make_shared<Scope>(Scope{std::move(parent), {}});
  }
  ~ScopeSwap() { interpreter_.scope_ = saved_; }
  ScopeSwap(const ScopeSwap&) = delete;
  ScopeSwap& operator=(const ScopeSwap&) = delete;

 private:
  Interpreter& interpreter_;
  ScopePtr saved_;
};

}  // namespace fsdp::text::jinja
