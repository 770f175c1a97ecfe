#include "libfsdp/text/jinja_interpreter.h"

#include <algorithm>

#include "libfsdp/text/jinja_runtime.h"

namespace fsdp::text::jinja {
namespace {

class MacroObject : public Object {
 public:
  MacroObject(Interpreter& interpreter, const Stmt& macro, ScopePtr closure)
      : interpreter_(interpreter), macro_(macro), closure_(std::move(closure)) {}
  bool callable() const override { return true; }
  Value call(const Arguments& arguments) override {
    return interpreter_.call_macro(macro_, closure_, arguments);
  }
  Value attribute(const std::string& name) const override {
    return name == "name" ? Value(macro_.text) : Object::attribute(name);
  }
  std::string repr() const override { return cat("<Macro '", macro_.text, "'>"); }

 private:
  Interpreter& interpreter_;
  const Stmt& macro_;
  ScopePtr closure_;
};

class GlobalObject : public Object {
 public:
  GlobalObject(Interpreter& interpreter, GlobalFunction function, std::string name)
      : interpreter_(interpreter), function_(function), name_(std::move(name)) {}
  bool callable() const override { return true; }
  Value call(const Arguments& arguments) override { return function_(interpreter_, arguments); }
  std::string repr() const override { return cat("<function ", name_, ">"); }

 private:
  Interpreter& interpreter_;
  GlobalFunction function_;
  std::string name_;
};

/// The variable `loop`.
class LoopObject : public Object, public std::enable_shared_from_this<LoopObject> {
 public:
  LoopObject(Interpreter& interpreter, const Stmt& stmt, ScopePtr closure, Value::List items,
             int depth)
      : interpreter_(interpreter),
        stmt_(stmt),
        closure_(std::move(closure)),
        items_(std::move(items)),
        depth_(depth) {}

  const Value::List& items() const { return items_; }
  void set_index(size_t index) { index_ = index; }

  Value attribute(const std::string& name) const override {
    const auto index = static_cast<int64_t>(index_);
    const auto length = static_cast<int64_t>(items_.size());
    if (name == "index") return index + 1;
    if (name == "index0") return index;
    if (name == "revindex") return length - index;
    if (name == "revindex0") return length - index - 1;
    if (name == "first") return index == 0;
    if (name == "last") return index + 1 == length;
    if (name == "length") return length;
    if (name == "depth") return depth_ + 1;
    if (name == "depth0") return depth_;
    if (name == "previtem")
      return index == 0 ? Value::undefined("there is no previous item") : items_[index_ - 1];
    if (name == "nextitem")
      return index + 1 == length ? Value::undefined("there is no next item") : items_[index_ + 1];
    if (name == "cycle" || name == "changed") {
      return Value(std::make_shared<Method>(shared_from_this(), name == "cycle"));
    }
    return Object::attribute(name);
  }
  bool callable() const override { return stmt_.recursive; }
  Value call(const Arguments& arguments) override {
    if (!stmt_.recursive) return Object::call(arguments);
    ArgReader args("loop", arguments);
    const Value items = args.require("iterable");
    args.finish();
    return interpreter_.call_loop(stmt_, closure_, items, depth_ + 1);
  }
  std::string repr() const override {
    return cat("<LoopContext ", index_ + 1, "/", items_.size(), ">");
  }

 private:
  class Method : public Object {
   public:
    Method(std::shared_ptr<const LoopObject> loop, bool is_cycle)
        : loop_(std::move(loop)), is_cycle_(is_cycle) {}
    bool callable() const override { return true; }
    Value call(const Arguments& arguments) override {
      return is_cycle_ ? cycle(arguments) : changed(arguments);
    }
    std::string repr() const override { return "<method of loop>"; }

   private:
    Value cycle(const Arguments& arguments) const {
      if (arguments.positional.empty())
        throw TemplateError("loop.cycle: no items for cycling given");
      return arguments.positional[loop_->index_ % arguments.positional.size()];
    }
    Value changed(const Arguments& arguments) const {
      const Value now = Value::sequence(arguments.positional, SequenceKind::kTuple);
      const bool same = equal(loop_->last_, now);
      loop_->last_ = now;
      return !same;
    }
    std::shared_ptr<const LoopObject> loop_;
    bool is_cycle_;
  };

  Interpreter& interpreter_;
  const Stmt& stmt_;
  ScopePtr closure_;
  Value::List items_;
  int depth_;
  size_t index_ = 0;
  mutable Value last_;
};

}  // namespace

Value* Scope::find(const std::string& name) {
  for (auto& [key, value] : names) {
    if (key == name) return &value;
  }
  return nullptr;
}

void Scope::set(const std::string& name, Value value) {
  if (Value* found = find(name)) {
    *found = std::move(value);
  } else {
    names.emplace_back(name, std::move(value));
  }
}

NamespaceObject::NamespaceObject(std::vector<std::pair<std::string, Value>> values) {
  for (auto& [name, value] : values) set(name, std::move(value));
}

Value NamespaceObject::attribute(const std::string& name) const {
  const Value* found = scope_.find(name);
  return found != nullptr ? *found : Object::attribute(name);
}

void NamespaceObject::set(const std::string& name, Value value) {
  if (name.starts_with("_"))
    throw TemplateError(cat("a namespace cannot hold '", name, "': it begins with '_'"));
  scope_.set(name, std::move(value));
}

std::string NamespaceObject::repr() const { return "<Namespace>"; }

Interpreter::Interpreter(const Syntax& syntax, const Value& context, const RenderOptions& options)
    : syntax_(syntax), options_(options), scope_(std::make_shared<Scope>()) {
  if (!context.is_mapping()) throw TemplateError("the context of a template must be a dict");
  for (const auto& [name, value] : context.pairs())
    scope_->names.emplace_back(to_text(name), value);
}

Interpreter::~Interpreter() {
  for (auto& scope : closures_) scope->names.clear();
  for (auto& object : namespaces_) object->clear();
}

RenderResult Interpreter::run() {
  exec(syntax_.body);
  result_.text = std::move(root_output_);
  return std::move(result_);
}

Interpreter::Flow Interpreter::exec(const Block& block) {
  const Depth depth(*this);
  for (const Stmt& stmt : block) {
    charge(1);
    line_ = stmt.line;
    const Flow flow = exec(stmt);
    if (flow != Flow::kNext) return flow;
  }
  return Flow::kNext;
}

Interpreter::Flow Interpreter::exec(const Stmt& stmt) {
  switch (stmt.kind) {
    case StmtKind::kText:
      print(stmt.text);
      break;
    case StmtKind::kPrint:
      print(to_text(eval(*stmt.exprs[0])));
      break;
    case StmtKind::kIf:
      return exec_if(stmt);
    case StmtKind::kFor:
      return exec_for(stmt, eval(*stmt.exprs[0]), 0);
    case StmtKind::kSet:
      assign(*stmt.target, eval(*stmt.exprs[0]));
      break;
    case StmtKind::kSetBlock:
      exec_set_block(stmt);
      break;
    case StmtKind::kMacro:
      scope_->set(stmt.text, make_macro(stmt));
      break;
    case StmtKind::kCallBlock:
      exec_call_block(stmt);
      break;
    case StmtKind::kFilter: {
      const Value text(capture(stmt.blocks[0]));
      print(to_text(eval_filter(*stmt.exprs[0], &text)));
      break;
    }
    case StmtKind::kWith:
      exec_with(stmt);
      break;
    case StmtKind::kGeneration:
      exec_generation(stmt);
      break;
    case StmtKind::kBreak:
      return Flow::kBreak;
    case StmtKind::kContinue:
      return Flow::kContinue;
  }
  return Flow::kNext;
}

Interpreter::Flow Interpreter::exec_if(const Stmt& stmt) {
  for (size_t i = 0; i < stmt.exprs.size(); ++i) {
    if (eval(*stmt.exprs[i]).truthy()) return exec(stmt.blocks[i]);
  }
  return stmt.blocks.size() > stmt.exprs.size() ? exec(stmt.blocks.back()) : Flow::kNext;
}

void Interpreter::exec_set_block(const Stmt& stmt) {
  const Value text(capture(stmt.blocks[0]));
  assign(*stmt.target, stmt.exprs[0] ? eval_filter(*stmt.exprs[0], &text) : text);
}

void Interpreter::exec_call_block(const Stmt& stmt) {
  const Expr& call_expr = *stmt.exprs[0];
  const Value callee = eval(*call_expr.parts[0]);
  Arguments arguments = eval_arguments(call_expr.arguments);
  arguments.named.emplace_back("caller", make_macro(stmt));
  print(to_text(call(callee, arguments)));
}

void Interpreter::exec_with(const Stmt& stmt) {
  Value::List values;
  for (const auto& expr : stmt.exprs) values.push_back(eval(*expr));
  const ScopeSwap swap(*this, scope_);
  for (size_t i = 0; i < values.size(); ++i) scope_->set(stmt.parameters[i], values[i]);
  exec(stmt.blocks[0]);
}

void Interpreter::exec_generation(const Stmt& stmt) {
  const ScopeSwap swap(*this, scope_);
  const size_t begin = output_->size();
  exec(stmt.blocks[0]);
  if (output_ == &root_output_) {
    result_.generations.push_back({begin, output_->size()});
  } else {
    result_.generations_exact = false;
  }
}

Value::List Interpreter::loop_items(const Stmt& stmt, const Value& items) {
  Value::List all = items.iterate();
  charge(static_cast<int64_t>(all.size()));
  if (!stmt.exprs[1]) return all;
  Value::List kept;
  for (auto& item : all) {
    const ScopeSwap swap(*this, scope_);
    assign(*stmt.target, item);
    if (eval(*stmt.exprs[1]).truthy()) kept.push_back(std::move(item));
  }
  return kept;
}

Interpreter::Flow Interpreter::exec_for(const Stmt& stmt, const Value& items, int depth) {
  const auto loop =
      std::make_shared<LoopObject>(*this, stmt, scope_, loop_items(stmt, items), depth);
  for (size_t i = 0; i < loop->items().size(); ++i) {
    charge(1);
    const ScopeSwap swap(*this, scope_);
    loop->set_index(i);
    scope_->set("loop", Value(loop));
    assign(*stmt.target, loop->items()[i]);
    if (exec(stmt.blocks[0]) == Flow::kBreak) break;
  }
  if (loop->items().empty() && stmt.blocks.size() > 1) {
    const ScopeSwap swap(*this, scope_);
    return exec(stmt.blocks[1]);
  }
  return Flow::kNext;
}

Value Interpreter::call_loop(const Stmt& loop, const ScopePtr& closure, const Value& items,
                             int depth) {
  const Depth guard(*this);
  const ScopeSwap swap(*this, closure);
  std::string text;
  std::string* const saved = std::exchange(output_, &text);
  exec_for(loop, items, depth);
  output_ = saved;
  return text;
}

Value Interpreter::make_macro(const Stmt& stmt) {
  closures_.push_back(scope_);
  return Value(std::make_shared<MacroObject>(*this, stmt, scope_));
}

Value Interpreter::make_namespace(std::vector<std::pair<std::string, Value>> values) {
  namespaces_.push_back(std::make_shared<NamespaceObject>(std::move(values)));
  return Value(namespaces_.back());
}

Value Interpreter::make_global(GlobalFunction function, const std::string& name) {
  return Value(std::make_shared<GlobalObject>(*this, function, name));
}

void Interpreter::bind_parameters(const Stmt& macro, Scope& scope, const Arguments& arguments) {
  ArgReader args(macro.text, arguments);
  const size_t first_default = macro.parameters.size() - macro.defaults.size();
  for (size_t i = 0; i < macro.parameters.size(); ++i) {
    const std::string& name = macro.parameters[i];
    if (args.has(name)) {
      scope.set(name, args.require(name));
    } else if (i >= first_default) {
      scope.set(name, eval(*macro.defaults[i - first_default]));
    } else {
      scope.set(name, Value::undefined(cat("parameter '", name, "' was not provided")));
    }
  }
  if (macro.takes_varargs) scope.set("varargs", Value::sequence(args.rest(), SequenceKind::kTuple));
  const bool declares_caller = std::find(macro.parameters.begin(), macro.parameters.end(),
                                         "caller") != macro.parameters.end();
  auto named =
      macro.takes_caller || macro.takes_kwargs ? args.rest_named() : decltype(args.rest_named()){};
  if (macro.takes_caller && !declares_caller) {
    const auto found =
        std::find_if(named.begin(), named.end(), [](const auto& p) { return p.first == "caller"; });
    scope.set("caller",
              found != named.end() ? found->second : Value::undefined("No caller defined"));
    if (found != named.end()) named.erase(found);
  }
  if (macro.takes_kwargs) {
    Value::Dict pairs;
    for (auto& [name, value] : named) pairs.emplace_back(name, value);
    scope.set("kwargs", Value::mapping(std::move(pairs)));
  } else if (!named.empty()) {
    throw TemplateError(cat(macro.text, ": unknown argument '", named.front().first, "'"));
  }
  args.finish();
}

Value Interpreter::call_macro(const Stmt& macro, const ScopePtr& closure,
                              const Arguments& arguments) {
  const Depth guard(*this);
  const ScopeSwap swap(*this, closure);
  bind_parameters(macro, *scope_, arguments);
  const int line = line_;
  Value text(capture(macro.blocks[0]));
  line_ = line;
  return text;
}

std::string Interpreter::capture(const Block& block) {
  std::string text;
  std::string* const saved = std::exchange(output_, &text);
  const ScopeSwap swap(*this, scope_);
  exec(block);
  output_ = saved;
  charge(static_cast<int64_t>(text.size() / 16));
  return text;
}

void Interpreter::print(std::string_view text) {
  charge(static_cast<int64_t>(text.size() / 16));
  append_bounded(*output_, text);
}

void Interpreter::assign(const Expr& target, const Value& value) {
  if (target.kind == ExprKind::kName) return scope_->set(target.name, value);
  if (target.kind == ExprKind::kNamespace) {
    Value* found = nullptr;
    for (Scope* at = scope_.get(); at != nullptr && found == nullptr; at = at->parent.get())
      found = at->find(target.name);
    auto* object = found && found->is_object()
                       ? dynamic_cast<NamespaceObject*>(found->object().get())
                       : nullptr;
    if (object == nullptr)
      throw TemplateError(
          cat("'", target.name, "' is not a namespace, its attributes cannot be set"));
    return object->set(target.ops[0], value);
  }
  const Value::List items = value.iterate();
  if (items.size() != target.parts.size()) {
    throw TemplateError(
        cat("cannot unpack ", items.size(), " values into ", target.parts.size(), " names"));
  }
  for (size_t i = 0; i < items.size(); ++i) assign(*target.parts[i], items[i]);
}

}  // namespace fsdp::text::jinja
