// Marks a function that is compiled a second time for AVX2, where that is worth it and possible.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
#define MECO_VECTOR_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define MECO_VECTOR_CLONES
#endif
