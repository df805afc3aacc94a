// A function marked CLONES is compiled once for each level of x86-64 and chosen when the program starts. What it calls
// must be INLINE: neither a template nor a lambda carries the mark.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))
