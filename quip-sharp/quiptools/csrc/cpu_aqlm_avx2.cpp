// AQLM's products with AVX2.
#include "aqlm_kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define QUIPTOOLS_ISA avx2
#define INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "aqlm_dot_source.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace quiptools {
const AQLMKernels* avx2_aqlm() {
  static const AQLMKernels kernels{nullptr, nullptr, avx2::dot, avx2::unpack12};
  return &kernels;
}
} // namespace quiptools

#else

namespace quiptools {
const AQLMKernels* avx2_aqlm() { return nullptr; }
} // namespace quiptools

#endif
