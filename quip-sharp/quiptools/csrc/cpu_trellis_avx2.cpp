// The search of the trellis for x86 CPUs with AVX2.
#include "cpu_trellis.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define QUIPTOOLS_ISA avx2
#define QUIPTOOLS_LANES 8
#include "cpu_trellis_source.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace quiptools {
const TrellisSearch* avx2_trellis() { return &avx2::kTrellis; }
} // namespace quiptools

#else

namespace quiptools {
const TrellisSearch* avx2_trellis() { return nullptr; }
} // namespace quiptools

#endif
