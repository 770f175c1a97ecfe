// Whether a sanitizer watches this build: it has an allocator of its own, and takes its time.
#pragma once

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define FSDP_TEST_SANITIZED 1
#else
#define FSDP_TEST_SANITIZED 0
#endif

namespace fsdp::testing {

constexpr bool kSanitized = FSDP_TEST_SANITIZED != 0;

}  // namespace fsdp::testing
