// How the CPU loops are compiled: once per instruction set, chosen when the program starts. For our
// .cpp files.
#pragma once

// A sanitizer's runtime is not up yet when the loader runs the functions that choose, so it gets
// one version.
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define FSDP_CPU_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FSDP_CPU_CLONES
#endif
