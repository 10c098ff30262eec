// AQLM's products with AVX-512 and VBMI: a permutation looks 64 codes up in 128 entries of a byte at once.
#include "aqlm_kernels.h"

#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // of GCC 12 about its own intrinsics
#endif

#include <immintrin.h>

#include <algorithm>
#include <limits>

#define QUIPTOOLS_ISA vbmi
#define INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")
#endif

#include "aqlm_dot_source.h"

namespace quiptools::vbmi {
namespace {

constexpr int64_t kParts = kOutputsTogether / 64; // registers of codes to a table
constexpr int64_t kAhead = 2; // tiles whose codes are asked for: rows are too far apart for the processor to foresee them
static_assert(kPlaces == 64);

void tabulate(const float* x, const float* words, int64_t width, int64_t count, int64_t first, int64_t here,
              const Planes& planes, float* room) {
  constexpr int kTogether = 8; // registers of products: enough that no sum waits for the one before
  __m512 most = _mm512_setzero_ps(), zero = most; // zero stays it while all is finite
  for (int64_t p = 0; p < here; p++) {
    const float* from = x + (first + p) / count * width;
    const float* codebook = words + (first + p) % count * width * kEntries;
    for (int64_t n = 0; n < kEntries; n += 16 * kTogether) {
      __m512 products[kTogether] = {};
      for (int64_t a = 0; a < width; a++) {
        const __m512 factor = _mm512_set1_ps(from[a]);
#pragma GCC unroll 8
        for (int t = 0; t < kTogether; t++)
          products[t] = _mm512_fmadd_ps(factor, _mm512_loadu_ps(codebook + a * kEntries + n + 16 * t), products[t]);
      }
#pragma GCC unroll 8
      for (int t = 0; t < kTogether; t++) {
        most = _mm512_max_ps(most, _mm512_abs_ps(products[t]));
        zero = _mm512_fmadd_ps(products[t], _mm512_setzero_ps(), zero);
        _mm512_storeu_ps(room + p * kEntries + n + 16 * t, products[t]);
      }
    }
  }
  const float largest = _mm512_reduce_max_ps(most), spoilt = _mm512_reduce_add_ps(zero);
  const float step = spoilt == 0 ? std::max(largest / (kMiddle - 1), std::numeric_limits<float>::min()) : spoilt;
  const __m512 factor = _mm512_set1_ps(1 / step), middle = _mm512_set1_ps(kMiddle);
  *planes.steps = step;
  uint8_t* to = planes.bytes;
  for (int64_t p = 0; p < here; p++, to += 2 * kEntries) {
    for (int64_t n = 0; n < kEntries; n += 16) {
      const __m512 product = _mm512_loadu_ps(room + p * kEntries + n);
      const __m512i whole = _mm512_cvtps_epi32(_mm512_fmadd_ps(product, factor, middle));
      const __m128i low = _mm512_cvtepi32_epi8(whole), high = _mm512_cvtepi32_epi8(_mm512_srli_epi32(whole, 8));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + n), low);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + kEntries + n), high);
    }
  }
}

// The 64 x 64 bytes of `rows` registers, turned: byte r of out + p * kOutputsTogether is byte p of row r.
INLINE void turn(const __m512i* rows, uint8_t* out) {
  __m512i half[64];
  // Within each 16 bytes of 16 rows at a time, by the stages of a transposition.
  for (int part = 0; part < 4; part++) {
    __m512i a[16], b[16];
    for (int n = 0; n < 16; n++) a[n] = rows[16 * part + n];
    auto stage = [](const __m512i* from, __m512i* to) {
      for (int n = 0; n < 8; n++) {
        to[2 * n] = _mm512_unpacklo_epi8(from[n], from[n + 8]);
        to[2 * n + 1] = _mm512_unpackhi_epi8(from[n], from[n + 8]);
      }
    };
    stage(a, b);
    stage(b, a);
    stage(a, b);
    stage(b, a);
    for (int n = 0; n < 16; n++) half[16 * part + n] = a[n];
  }
  // half[16 * part + n], quarter q: place 16 q + n of the rows of that part.
  for (int n = 0; n < 16; n++) {
    __m512i a = half[n], b = half[16 + n], c = half[32 + n], d = half[48 + n];
    __m512i ab = _mm512_shuffle_i32x4(a, b, 0x44), cd = _mm512_shuffle_i32x4(c, d, 0x44);
    __m512i ef = _mm512_shuffle_i32x4(a, b, 0xEE), gh = _mm512_shuffle_i32x4(c, d, 0xEE);
    auto keep = [&](int q, __m512i v) { _mm512_storeu_si512(out + (16 * q + n) * kOutputsTogether, v); };
    keep(0, _mm512_shuffle_i32x4(ab, cd, 0x88));
    keep(1, _mm512_shuffle_i32x4(ab, cd, 0xDD));
    keep(2, _mm512_shuffle_i32x4(ef, gh, 0x88));
    keep(3, _mm512_shuffle_i32x4(ef, gh, 0xDD));
  }
}

// Sums of bytes: of both of each 16 bits as they are, and of the upper ones.
struct Sums {
  __m512i both, odd;

  INLINE void add(__m512i bytes) {
    both = _mm512_add_epi16(both, bytes);
    odd = _mm512_add_epi16(odd, _mm512_srli_epi16(bytes, 8));
  }
  INLINE __m512i even() const { return _mm512_sub_epi16(both, _mm512_slli_epi16(odd, 8)); }
};

INLINE __m512i entries(__m512i codes, __mmask64 upper, const __m512i* table) {
  return _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(table[0], codes, table[1]),
                                _mm512_permutex2var_epi8(table[2], codes, table[3]));
}

// to (32) += step * (low + 256 * high - offset)
INLINE void add_steps(__m512i low, __m512i high, float step, float offset, float* to) {
  for (int half = 0; half < 2; half++) {
    auto wide = [&](__m512i v) {
      return _mm512_cvtepu16_epi32(half ? _mm512_extracti64x4_epi64(v, 1) : _mm512_castsi512_si256(v));
    };
    __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(wide(low), _mm512_slli_epi32(wide(high), 8)));
    __m512 old = _mm512_loadu_ps(to + 16 * half);
    sum = _mm512_sub_ps(sum, _mm512_set1_ps(offset));
    _mm512_storeu_ps(to + 16 * half, _mm512_fmadd_ps(sum, _mm512_set1_ps(step), old));
  }
}

void look_up(const uint8_t* codes, int64_t bytes, int64_t rows, int64_t places, const Planes* planes, int64_t batch,
             int64_t stride, float* y) {
  alignas(64) uint8_t tile[kPlaces * kOutputsTogether];
  alignas(64) float sums[8][kOutputsTogether]; // of a part's even outputs, then of its odd ones
  for (int64_t v = 0; v < batch; v++) std::fill_n(sums[v], kOutputsTogether, 0.0f);
  for (int64_t first = 0; first < places; first += kPlaces) {
    const int64_t here = std::min(kPlaces, places - first);
    const __mmask64 valid = here == 64 ? ~__mmask64{0} : (__mmask64{1} << here) - 1;
    for (int64_t part = 0; part < kParts; part++) {
      __m512i lines[64];
      for (int64_t r = 0; r < 64; r++) {
        lines[r] = _mm512_maskz_loadu_epi8(valid, codes + std::min(64 * part + r, rows - 1) * bytes + first);
      }
      turn(lines, tile + 64 * part);
    }
    // Codes of later tiles are asked for one place at a time, as fast as memory brings them; also where nothing lies:
    // that does no harm.
    const uint8_t* later = codes + first + kAhead * kPlaces;
    if (first + kAhead * kPlaces >= places) later += kOutputsTogether * bytes - places;
    auto ask = [&](int64_t r) {
      for (int64_t part = 0; part < kParts; part++)
        _mm_prefetch(reinterpret_cast<const char*>(later + (64 * part + r) * bytes), _MM_HINT_T1);
    };
    for (int64_t r = here; r < kPlaces; r++) ask(r);
    for (int64_t v = 0; v < batch; v++) {
      Sums low[kParts] = {}, high[kParts] = {};
      for (int64_t p = 0; p < here; p++) {
        __m512i table[8];
        for (int n = 0; n < 8; n++) table[n] = _mm512_loadu_si512(planes[v].bytes + (first + p) * 2 * kEntries + 64 * n);
        if (v == 0) ask(p);
        for (int64_t part = 0; part < kParts; part++) {
          __m512i found = _mm512_load_si512(tile + p * kOutputsTogether + 64 * part);
          __mmask64 upper = _mm512_movepi8_mask(found);
          low[part].add(entries(found, upper, table));
          high[part].add(entries(found, upper, table + 4));
        }
      }
      const float step = planes[v].steps[first / kPlaces], offset = kMiddle * here;
      for (int64_t part = 0; part < kParts; part++) {
        add_steps(low[part].even(), high[part].even(), step, offset, sums[v] + 64 * part);
        add_steps(low[part].odd, high[part].odd, step, offset, sums[v] + 64 * part + 32);
      }
    }
  }
  for (int64_t v = 0; v < batch; v++)
    for (int64_t r = 0; r < rows; r++) y[v * stride + r] = sums[v][r / 64 * 64 + (r & 1) * 32 + r % 64 / 2];
}

} // namespace
} // namespace quiptools::vbmi

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace quiptools {
const AQLMKernels* vbmi_aqlm() {
  static const AQLMKernels kernels{vbmi::tabulate, vbmi::look_up, vbmi::dot, vbmi::unpack12};
  return &kernels;
}
} // namespace quiptools

#else

namespace quiptools {
const AQLMKernels* vbmi_aqlm() { return nullptr; }
} // namespace quiptools

#endif
