// The system calls of a test program that change files: logged, or made to fail at a chosen call.
//
// Linking the library fsdp_test_system_calls puts its functions in front of the C library's (open,
// pwrite, fsync, rename, ...) and of operator new, for the program's own code and for the libraries
// it loads.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace fsdp::testing {

enum class CallKind : uint8_t {
  kOpen,      ///< open, openat, also those that make a file
  kMkdir,     ///< mkdir
  kWrite,     ///< write, pwrite
  kRead,      ///< pread
  kAllocate,  ///< fallocate, ftruncate
  kSync,      ///< fsync, fdatasync
  kRename,    ///< rename, renameat2
  kUnlink,    ///< unlink, unlinkat, rmdir
  kNew,       ///< operator new
};
std::string_view name_of(CallKind kind);

/// What goes wrong.
struct Fault {
  CallKind kind = CallKind::kWrite;
  int64_t nth = 0;          ///< Which call of that kind, from 0.
  int code = 0;             ///< errno; 0 = the call does less than asked, and succeeds.
  bool persistent = false;  ///< All later calls of the kind fail too.
};

/// While it lives, calls of this thread, and of threads that inherit() it, fail as told.
/// Calls below `directory` only (and operator new, everywhere).
class FaultScope {
 public:
  FaultScope(Fault fault, std::string directory);
  FaultScope(const FaultScope&) = delete;
  FaultScope& operator=(const FaultScope&) = delete;
  ~FaultScope();
  /// Whether the fault has happened.
  bool happened() const;
  /// The same fault in another thread: call it there with the value that current() gave here.
  static void* current();
  static void inherit(void* scope);

 private:
  void* previous_;
};

/// One call that changed a file or a directory below the logged directory, and succeeded.
struct LoggedCall {
  enum class Kind : uint8_t {
    kMakeFile,  ///< `path` names a new file `inode`
    kMakeDirectory,
    kWrite,     ///< `data` at `offset` of file `inode`
    kResize,    ///< file `inode` has `offset` bytes
    kSyncFile,  ///< file `inode`
    kSyncDirectory,
    kRename,    ///< `path` to `to`
    kExchange,  ///< `path` with `to`
    kRemove,    ///< the name `path`, of a file or an empty directory
    kMark,      ///< `path` is what the test says has happened
  };
  Kind kind = Kind::kMark;
  std::string path;
  std::string to;
  ino_t inode = 0;
  int64_t offset = 0;
  std::string data;
};

/// Logs what all threads do below `directory` (a real path), from now to take_log().
void start_log(const std::string& directory);
void log_mark(const std::string& text);
std::vector<LoggedCall> take_log();

}  // namespace fsdp::testing
