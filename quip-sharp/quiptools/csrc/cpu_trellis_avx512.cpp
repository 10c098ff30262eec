// The search of the trellis for x86 CPUs with AVX-512.
#include "cpu_trellis.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif

#define QUIPTOOLS_ISA avx512
#define QUIPTOOLS_LANES 16
#include "cpu_trellis_source.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace quiptools {
const TrellisSearch* avx512_trellis() { return &avx512::kTrellis; }
} // namespace quiptools

#else

namespace quiptools {
const TrellisSearch* avx512_trellis() { return nullptr; }
} // namespace quiptools

#endif
