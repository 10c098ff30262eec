// The nearest sums of two codewords for x86 CPUs with AVX-512.
#include "cpu_nearest.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif

#define QUIPTOOLS_ISA avx512
#define QUIPTOOLS_LANES 16
#include "cpu_nearest_source.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace quiptools {
NearestPairs avx512_nearest() { return avx512::nearest_pairs; }
} // namespace quiptools

#else

namespace quiptools {
NearestPairs avx512_nearest() { return nullptr; }
} // namespace quiptools

#endif
