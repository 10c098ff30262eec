// The nearest sums of two codewords for x86 CPUs with AVX2.
#include "cpu_nearest.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define QUIPTOOLS_ISA avx2
#define QUIPTOOLS_LANES 8
#include "cpu_nearest_source.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace quiptools {
NearestPairs avx2_nearest() { return avx2::nearest_pairs; }
} // namespace quiptools

#else

namespace quiptools {
NearestPairs avx2_nearest() { return nullptr; }
} // namespace quiptools

#endif
