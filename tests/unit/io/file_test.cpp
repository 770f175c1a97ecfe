#include "libfsdp/io/file.h"

#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <vector>

#include "libfsdp/base/error.h"
#include "tests/unit/io/expect_error.h"
#include "tests/unit/io/temp_dir.h"

namespace fsdp::io {
namespace {

TEST(FileTest, ReadsARangeAndNamesPathAndOffsetPastTheEnd) {
  const TempDir dir;
  const std::string path = dir.write("a", "0123456789");
  const File file = File::open_read(path);
  EXPECT_EQ(file.size(), 10);
  std::string part(4, ' ');
  file.read_at(3, std::as_writable_bytes(std::span(part.data(), part.size())));
  EXPECT_EQ(part, "3456");
  auto past = [&] { file.read_at(8, std::as_writable_bytes(std::span(part.data(), part.size()))); };
  EXPECT_ERROR(past(), ModelError, path + ": the file ends at offset 10, 2 bytes early");
}

TEST(FileTest, RefusesWhatIsNoRegularFile) {
  const TempDir dir;
  EXPECT_ERROR(File::open_read(dir.path()), ModelError, "got a directory");
  EXPECT_ERROR(File::open_read(dir / "absent"), ModelError, "No such file");
  ASSERT_EQ(::mkfifo((dir / "fifo").c_str(), 0600), 0);
  EXPECT_ERROR(File::open_read(dir / "fifo"), ModelError, "expected a regular file");
}

TEST(FileTest, CreateRefusesAnExistingFile) {
  const TempDir dir;
  const std::string path = dir.write("a", "old");
  EXPECT_ERROR(File::create(path), ConfigError, "File exists");
  EXPECT_EQ(read_text(path), "old");
}

TEST(FileTest, AFullDiskIsAHostResourceErrorBeforeAnythingIsWritten) {
  // A limit on the file's size fails the same calls as a full disk, with EFBIG in ENOSPC's place.
  const TempDir dir;
  struct rlimit old_limit;
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &old_limit), 0);
  const auto old_handler = std::signal(SIGXFSZ, SIG_IGN);
  struct rlimit limit = old_limit;
  limit.rlim_cur = 4096;
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &limit), 0);
  const File file = File::create(dir / "a");
  EXPECT_ERROR(file.allocate(8192), HostResourceError, "Hint: free some space");
  const std::vector<std::byte> data(8192);
  EXPECT_ERROR(file.write_at(0, data), HostResourceError, "write at offset 4096");
  ::setrlimit(RLIMIT_FSIZE, &old_limit);
  std::signal(SIGXFSZ, old_handler);
}

TEST(FileTest, DevFullIsAHostResourceError) {
  const File file = File::open_write("/dev/full");
  EXPECT_ERROR(file.write_at(0, std::as_bytes(std::span("abc"))), HostResourceError,
               "No space left");
}

TEST(AtomicFileTest, AppearsOnlyAtCommitAndLeavesNothingWithoutIt) {
  const TempDir dir;
  const std::string path = dir.write("a", "old");
  {
    AtomicFile file(path);
    file.write("new");
    EXPECT_EQ(read_text(path), "old");
  }
  EXPECT_EQ(read_text(path), "old");
  EXPECT_EQ(dir.num_files(), 1U);
  AtomicFile file(path);
  file.write("ne");
  file.write("w");
  file.commit();
  EXPECT_EQ(read_text(path), "new");
  EXPECT_EQ(dir.num_files(), 1U);
}

TEST(AtomicFileTest, AProcessThatDiesWhileItWritesLeavesNothing) {
  const TempDir dir;
  const pid_t child = fork();
  if (child == 0) {
    AtomicFile file(dir.write("a", "old"));
    file.write("new");
    file.file().sync();
    _exit(0);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(dir.num_files(), 1U);  // Not on a file system without O_TMPFILE.
}

TEST(AtomicFileTest, TemporaryNamesDiffer) { EXPECT_NE(temporary_name("a"), temporary_name("a")); }

}  // namespace
}  // namespace fsdp::io
