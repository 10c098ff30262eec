// GPTQ's products with AVX-512 and VNNI.
#include "gptq_kernels.h"
#include "integer_kernels.h"

#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // of GCC 12 about its own intrinsics
#endif

#include <immintrin.h>

#define QUIPTOOLS_ISA vbmi
#define INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif

namespace quiptools::vbmi {
namespace {

constexpr int64_t kLanes = 16, kMostVectors = 8;
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));

INLINE Ints dot(Ints sums, Words bytes, const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)bytes, _mm512_set1_epi32(four));
}

template <int bits>
INLINE Ints bytes_of(const uint8_t* packed) {
  uint64_t first = 0, second = 0;
  __builtin_memcpy(&first, packed, bits);
  __builtin_memcpy(&second, packed + bits, bits);
  constexpr uint64_t kMask = ((1u << bits) - 1) * 0x0101010101010101u;
  return (Ints)_mm512_cvtepu8_epi32(_mm_set_epi64x(static_cast<long long>(_pdep_u64(second, kMask)),
                                                   static_cast<long long>(_pdep_u64(first, kMask))));
}

INLINE Floats halves(const uint16_t* h) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(h)));
}

} // namespace
} // namespace quiptools::vbmi

#include "gptq_source.h"

namespace quiptools {
const GPTQKernels* vbmi_gptq_kernels() { return &vbmi::kKernels; }
} // namespace quiptools

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace quiptools {
const GPTQKernels* vbmi_gptq_kernels() { return nullptr; }
} // namespace quiptools

#endif
