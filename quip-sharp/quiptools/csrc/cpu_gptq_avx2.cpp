// GPTQ's products with AVX2.
#include "gptq_kernels.h"
#include "integer_kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define QUIPTOOLS_ISA avx2
#define INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
#endif

namespace quiptools::avx2 {
namespace {

constexpr int64_t kLanes = 8, kMostVectors = 4;
typedef uint32_t Words __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef float Floats __attribute__((vector_size(32)));

INLINE Ints dot(Ints sums, Words bytes, const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  __m256i pairs = _mm256_maddubs_epi16((__m256i)bytes, _mm256_set1_epi32(four));
  return sums + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

template <int bits>
INLINE Ints bytes_of(const uint8_t* packed) {
  uint64_t word = 0;
  __builtin_memcpy(&word, packed, bits);
  word = _pdep_u64(word, ((1u << bits) - 1) * 0x0101010101010101u);
  return (Ints)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(word)));
}

INLINE Floats halves(const uint16_t* h) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(h)));
}

} // namespace
} // namespace quiptools::avx2

#include "gptq_source.h"

namespace quiptools {
const GPTQKernels* avx2_gptq_kernels() { return &avx2::kKernels; }
} // namespace quiptools

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace quiptools {
const GPTQKernels* avx2_gptq_kernels() { return nullptr; }
} // namespace quiptools

#endif
