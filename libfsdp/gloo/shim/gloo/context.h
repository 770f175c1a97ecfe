// LibTorch's wheel holds gloo's code but not its headers. These stand for the few names that
// ProcessGroupGloo.hpp mentions: enough to compile that header, never to make or derive from an
// object of gloo's own.
#pragma once

#include <chrono>
#include <memory>

namespace gloo {

namespace transport {

class Device;

class UnboundBuffer {
 public:
  virtual ~UnboundBuffer();
};

}  // namespace transport

class Context {
 public:
  void setTimeout(std::chrono::milliseconds timeout);
};

}  // namespace gloo
