// The kernels for x86 CPUs with AVX-512 (F, BW, DQ, VL). The target is set here and not for the whole library, which runs on any CPU.
#include "cpu_kernels.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#endif

#define QUIPTOOLS_ISA avx512
#define QUIPTOOLS_LANES 16
#define QUIPTOOLS_LANE_SHIFTS 1
#include "cpu_kernels_source.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace quiptools {
const Kernels* avx512_kernels() { return &avx512::kKernels; }
} // namespace quiptools

#else

namespace quiptools {
const Kernels* avx512_kernels() { return nullptr; }
} // namespace quiptools

#endif
