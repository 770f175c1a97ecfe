#include "libfsdp/io/pickle.h"

#include <bit>
#include <cstring>
#include <unordered_map>

#include "libfsdp/base/error.h"

namespace fsdp::io {

/// The stack machine that a pickle is a program for, without the power to call anything.
class PickleMachine {
 public:
  PickleMachine(std::span<const std::byte> bytes,
                const std::function<bool(const std::string&)>& is_allowed)
      : bytes_(bytes), is_allowed_(is_allowed) {}

  Pickle run() {
    while (!stopped_) step(static_cast<uint8_t>(take(1)[0]));
    return std::move(result_);
  }

 private:
  using Kind = Pickle::Kind;
  using Ref = Pickle::Ref;
  using Node = Pickle::Node;

  [[noreturn]] static void fail(std::string_view why) {
    throw ModelError(cat("the pickle is malformed: ", why));
  }

  std::span<const std::byte> take(uint64_t bytes) {
    if (bytes > bytes_.size() - at_) fail("it ends early");
    const auto part = bytes_.subspan(at_, bytes);
    at_ += bytes;
    return part;
  }
  template <class T>
  T number() {
    T value;
    std::memcpy(&value, take(sizeof(T)).data(), sizeof(T));
    return value;
  }
  std::string text(uint64_t bytes) {
    const auto part = take(bytes);
    return {reinterpret_cast<const char*>(part.data()), part.size()};
  }
  std::string line() {
    std::string text;
    for (char c; (c = static_cast<char>(take(1)[0])) != '\n';) text += c;
    return text;
  }

  Ref add(Node node) {
    if (result_.nodes_.size() >= kMaxNodes) fail("too many values");
    result_.nodes_.push_back(std::move(node));
    return static_cast<Ref>(result_.nodes_.size() - 1);
  }
  void push(Node node) { stack_.push_back(add(std::move(node))); }
  void push_text(Kind kind, std::string text) { push({.kind = kind, .text = std::move(text)}); }
  void push_int(int64_t value) { push({.kind = Kind::kInt, .integer = value}); }
  Ref pop() {
    if (stack_.size() <= floor()) fail("it takes from an empty stack");
    const Ref top = stack_.back();
    stack_.pop_back();
    return top;
  }
  size_t floor() const { return marks_.empty() ? 0 : marks_.back(); }
  Node& top() {
    if (stack_.size() <= floor()) fail("it looks at an empty stack");
    return result_.nodes_[stack_.back()];
  }
  std::vector<Ref> pop_to_mark() {
    if (marks_.empty()) fail("a mark is missing");
    const auto from = stack_.begin() + static_cast<std::ptrdiff_t>(marks_.back());
    std::vector<Ref> items(from, stack_.end());
    stack_.erase(from, stack_.end());
    marks_.pop_back();
    return items;
  }

  void push_tuple(size_t n) {
    std::vector<Ref> items(n);
    for (size_t i = n; i-- > 0;) items[i] = pop();
    push({.kind = Kind::kTuple, .items = std::move(items)});
  }
  void push_global(const std::string& name) {
    if (!is_allowed_(name))
      throw ModelError(cat("the pickle asks for '", name.substr(0, 200),
                           "', which is not accepted: only tensors and what describes them are"));
    push_text(Kind::kGlobal, name);
  }
  void call() {
    const Ref arguments = pop(), callee = pop();
    if (result_.nodes_[callee].kind != Kind::kGlobal) fail("it calls what is no global");
    push({.kind = Kind::kCall, .items = {callee, arguments}});
  }
  /// Adds items to the list or dict (also a called OrderedDict) that is on top.
  void extend(const std::vector<Ref>& items, Kind kind) {
    if (kind == Kind::kDict && items.size() % 2 != 0) fail("a key without a value");
    Node& target = top();
    if (target.kind == Kind::kCall && kind == Kind::kDict) {
      // What is set on an object of a mapping type becomes its state.
      if (target.items.size() == 2) {
        const Ref state = add({.kind = Kind::kDict});
        top().items.push_back(state);
      }
      Node& state = result_.nodes_[top().items[2]];
      if (state.kind != Kind::kDict) fail("items of an object that is no dict");
      state.items.insert(state.items.end(), items.begin(), items.end());
      return;
    }
    if (target.kind != kind) fail("items of another type than what they are added to");
    target.items.insert(target.items.end(), items.begin(), items.end());
  }
  void build() {
    const Ref state = pop();
    Node& target = top();
    // Attributes of an OrderedDict (torch's _metadata) are of no interest.
    if (target.kind == Kind::kCall && target.items.size() == 2) target.items.push_back(state);
  }
  void memoize(uint64_t key) {
    top();
    memo_[key] = stack_.back();
  }
  void recall(uint64_t key) {
    const auto found = memo_.find(key);
    if (found == memo_.end()) fail("it recalls what was not kept");
    stack_.push_back(found->second);
  }
  void push_long(size_t bytes) {
    if (bytes > 8) fail("an integer of more than 64 bits");
    const auto digits = take(bytes);
    uint64_t value = 0;
    for (size_t i = 0; i < bytes; ++i) value |= static_cast<uint64_t>(digits[i]) << (8 * i);
    if (bytes > 0 && bytes < 8 && (static_cast<uint8_t>(digits[bytes - 1]) & 0x80) != 0)
      value |= ~uint64_t{0} << (8 * bytes);
    push_int(static_cast<int64_t>(value));
  }
  void push_big_endian_double() {
    push({.kind = Kind::kFloat,
          .number = std::bit_cast<double>(__builtin_bswap64(number<uint64_t>()))});
  }
  void stack_global() {
    const Ref name = pop(), module = pop();
    const Node &n = result_.nodes_[name], &m = result_.nodes_[module];
    if (n.kind != Kind::kString || m.kind != Kind::kString) fail("a global without a name");
    push_global(m.text + " " + n.text);
  }

  void step(uint8_t code);
  bool step_value(uint8_t code);
  bool step_container(uint8_t code);

  static constexpr size_t kMaxNodes = 50'000'000;
  std::span<const std::byte> bytes_;
  const std::function<bool(const std::string&)>& is_allowed_;
  size_t at_ = 0;
  std::vector<Ref> stack_;
  std::vector<size_t> marks_;
  std::unordered_map<uint64_t, Ref> memo_;
  Pickle result_;
  bool stopped_ = false;
};

/// Values that stand by themselves.
bool PickleMachine::step_value(uint8_t code) {
  switch (code) {
    case 'N':
      push({});
      return true;
    case 0x88:
      push({.kind = Kind::kBool, .integer = 1});
      return true;
    case 0x89:
      push({.kind = Kind::kBool, .integer = 0});
      return true;
    case 'J':
      push_int(number<int32_t>());
      return true;
    case 'K':
      push_int(number<uint8_t>());
      return true;
    case 'M':
      push_int(number<uint16_t>());
      return true;
    case 0x8a:
      push_long(number<uint8_t>());
      return true;
    case 'G':
      push_big_endian_double();
      return true;
    case 'X':
      push_text(Kind::kString, text(number<uint32_t>()));
      return true;
    case 0x8c:
      push_text(Kind::kString, text(number<uint8_t>()));
      return true;
    case 0x8d:
      push_text(Kind::kString, text(number<uint64_t>()));
      return true;
    case 'U':
      push_text(Kind::kString, text(number<uint8_t>()));
      return true;
    case 'T':
      push_text(Kind::kString, text(number<uint32_t>()));
      return true;
    case 'C':
      push_text(Kind::kBytes, text(number<uint8_t>()));
      return true;
    case 'B':
      push_text(Kind::kBytes, text(number<uint32_t>()));
      return true;
    default:
      return false;
  }
}

bool PickleMachine::step_container(uint8_t code) {
  switch (code) {
    case ')':
      push_tuple(0);
      return true;
    case 0x85:
      push_tuple(1);
      return true;
    case 0x86:
      push_tuple(2);
      return true;
    case 0x87:
      push_tuple(3);
      return true;
    case 't':
      push({.kind = Kind::kTuple, .items = pop_to_mark()});
      return true;
    case ']':
      push({.kind = Kind::kList});
      return true;
    case '}':
      push({.kind = Kind::kDict});
      return true;
    case 'l':
      push({.kind = Kind::kList, .items = pop_to_mark()});
      return true;
    case 'a': {
      const Ref item = pop();
      extend({item}, Kind::kList);
      return true;
    }
    case 'e':
      extend(pop_to_mark(), Kind::kList);
      return true;
    case 's': {
      const Ref value = pop(), key = pop();
      extend({key, value}, Kind::kDict);
      return true;
    }
    case 'u':
      extend(pop_to_mark(), Kind::kDict);
      return true;
    default:
      return false;
  }
}

void PickleMachine::step(uint8_t code) {
  if (step_value(code) || step_container(code)) return;
  switch (code) {
    case 0x80:
      if (number<uint8_t>() > 5) fail("a protocol above 5");
      return;
    case 0x95:
      take(8);
      return;  // A frame: only a hint for buffering.
    case '(':
      marks_.push_back(stack_.size());
      return;
    case '0':
      pop();
      return;
    case '1':
      pop_to_mark();
      return;
    case 'q':
      memoize(number<uint8_t>());
      return;
    case 'r':
      memoize(number<uint32_t>());
      return;
    case 0x94:
      memoize(memo_.size());
      return;
    case 'h':
      recall(number<uint8_t>());
      return;
    case 'j':
      recall(number<uint32_t>());
      return;
    case 'c': {
      const std::string module = line();
      push_global(module + " " + line());
      return;
    }
    case 0x93:
      stack_global();
      return;
    case 'R':
    case 0x81:
      call();
      return;
    case 'b':
      build();
      return;
    case 'Q': {
      const Ref identifier = pop();
      push({.kind = Kind::kPersistent, .items = {identifier}});
      return;
    }
    case '.':
      result_.root_ = pop();
      stopped_ = true;
      return;
    default:
      throw ModelError(cat("the pickle uses operation ", static_cast<int>(code),
                           ", which no tensor file needs"));
  }
}

Pickle Pickle::parse(std::span<const std::byte> bytes,
                     const std::function<bool(const std::string&)>& is_allowed) {
  return PickleMachine(bytes, is_allowed).run();
}

const Pickle::Node* Pickle::find(const Node& dict, std::string_view key) const {
  const Node* target = &dict;
  if (target->kind == Kind::kCall && target->items.size() > 2) target = &nodes_[target->items[2]];
  if (target->kind != Kind::kDict) return nullptr;
  for (size_t i = 0; i + 1 < target->items.size(); i += 2) {
    const Node& name = nodes_[target->items[i]];
    if (name.kind == Kind::kString && name.text == key) return &nodes_[target->items[i + 1]];
  }
  return nullptr;
}

const Pickle::Node& Pickle::at(const Node& dict, std::string_view key) const {
  if (const Node* found = find(dict, key)) return *found;
  throw ModelError(cat("the pickle has no '", key, "' where it belongs"));
}

bool Pickle::is_call(const Node& node, std::string_view global) const {
  return node.kind == Kind::kCall && nodes_[node.items[0]].text == global;
}

std::vector<int64_t> Pickle::integers(const Node& node) const {
  const Node* tuple = &node;
  if (is_call(node, "torch Size")) tuple = &item(nodes_[node.items[1]], 0);
  if (tuple->kind != Kind::kTuple && tuple->kind != Kind::kList)
    throw ModelError("the pickle has no list of integers where it belongs");
  std::vector<int64_t> values;
  for (const Ref ref : tuple->items) values.push_back(integer(nodes_[ref]));
  return values;
}

const std::string& Pickle::string(const Node& node) const {
  if (node.kind == Kind::kString) return node.text;
  throw ModelError("the pickle has no text where it belongs");
}

int64_t Pickle::integer(const Node& node) const {
  if (node.kind == Kind::kInt) return node.integer;
  throw ModelError("the pickle has no integer where it belongs");
}

const Pickle::Node& Pickle::item(const Node& node, size_t i) const {
  if (i < node.items.size()) return nodes_[node.items[i]];
  throw ModelError("the pickle has too few values where it belongs");
}

}  // namespace fsdp::io
