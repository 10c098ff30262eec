// Codewords of half precision times activations, compiled once for each instruction set with F16C and FMA.
#pragma once

namespace quiptools::QUIPTOOLS_ISA {
namespace {

INLINE __m256 codeword(const uint16_t* words, int64_t place) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(words + 8 * place)));
}

// Four chains of sums: each step waits for a codeword out of the second-level cache, and others go on meanwhile.
template <int64_t count>
INLINE __m256 codewords(const float* x, const uint16_t* words, int64_t size, const uint16_t* codes, int64_t groups) {
  __m256 sums[4] = {};
  int64_t k = 0;
  for (; k + 4 <= groups; k += 4, x += 32, codes += 4 * count) {
#pragma GCC unroll 4
    for (int g = 0; g < 4; g++) {
      const __m256 v = _mm256_loadu_ps(x + 8 * g);
#pragma GCC unroll 2
      for (int m = 0; m < count; m++)
        sums[(g * count + m) % 4] = _mm256_fmadd_ps(v, codeword(words + 8 * m * size, codes[g * count + m]), sums[(g * count + m) % 4]);
    }
  }
  for (; k < groups; k++, x += 8)
    for (int m = 0; m < count; m++)
      sums[m] = _mm256_fmadd_ps(_mm256_loadu_ps(x), codeword(words + 8 * m * size, *codes++), sums[m]);
  return _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3]));
}

// The same for any number of codebooks.
INLINE __m256 any_codewords(const float* x, const uint16_t* words, int64_t size, const uint16_t* codes, int64_t groups,
                            int64_t count) {
  __m256 even = {}, odd = {};
  for (int64_t k = 0; k < groups; k++, x += 8) {
    const __m256 v = _mm256_loadu_ps(x);
    int64_t m = 0;
    for (; m + 2 <= count; m += 2, codes += 2) {
      even = _mm256_fmadd_ps(v, codeword(words, m * size + codes[0]), even);
      odd = _mm256_fmadd_ps(v, codeword(words, (m + 1) * size + codes[1]), odd);
    }
    if (m < count) even = _mm256_fmadd_ps(v, codeword(words, m * size + *codes++), even);
  }
  return _mm256_add_ps(even, odd);
}

float dot(const float* x, const uint16_t* words, int64_t size, const uint16_t* codes, int64_t groups, int64_t count) {
  __m256 sums = count == 1   ? codewords<1>(x, words, size, codes, groups)
                : count == 2 ? codewords<2>(x, words, size, codes, groups)
                             : any_codewords(x, words, size, codes, groups, count);
  float found[8];
  _mm256_storeu_ps(found, sums);
  return ((found[0] + found[4]) + (found[2] + found[6])) + ((found[1] + found[5]) + (found[3] + found[7]));
}

// Codes of 12 bits, two in three bytes, as numbers of 16: whole groups of eight, of which there are `count`; four bytes
// beyond the last are read.
void unpack12(const uint8_t* packed, int64_t count, uint16_t* codes) {
  const __m128i pairs = _mm_setr_epi8(0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11);
  for (int64_t n = 0; n < count; n++, packed += 12, codes += 8) {
    __m128i words = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)), pairs);
    __m128i even = _mm_and_si128(words, _mm_set1_epi16(0xFFF)), odd = _mm_srli_epi16(words, 4);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm_blend_epi16(even, odd, 0xAA));
  }
}

} // namespace
} // namespace quiptools::QUIPTOOLS_ISA
