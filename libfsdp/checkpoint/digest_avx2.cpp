// Compiled for AVX2. Nothing is included but xxHash, whose functions are all static here: an inline
// function of another header, compiled in this file, could be linked into code for older
// processors.
#define XXH_INLINE_ALL
#include <xxhash.h>

namespace fsdp::checkpoint {

void update_digest_avx2(void* state, const void* data, unsigned long bytes) {
  XXH3_128bits_update(static_cast<XXH3_state_t*>(state), data, bytes);
}

}  // namespace fsdp::checkpoint
