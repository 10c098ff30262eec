// The kernels for x86 CPUs with AVX2 and FMA. The target is set here and not for the whole library, which runs on any CPU.
#include "cpu_kernels.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define QUIPTOOLS_ISA avx2
#define QUIPTOOLS_LANES 8
#define QUIPTOOLS_LANE_SHIFTS 1
#include "cpu_kernels_source.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace quiptools {
const Kernels* avx2_kernels() { return &avx2::kKernels; }
} // namespace quiptools

#else

namespace quiptools {
const Kernels* avx2_kernels() { return nullptr; }
} // namespace quiptools

#endif
