// E8 codes to bytes with AVX-512 VBMI and GFNI. The absolute values of a point of E8P12 are 1/2, 3/2 or 5/2: two bits each,
// 16 bits a pattern, 256 patterns in eight registers. Signs are a mask of 64 bits for eight codes.
#include "e8p_bytes.h"

#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // of GCC 12 about its own intrinsics
#endif

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,gfni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,gfni")
#endif

namespace quiptools {
namespace {

#define INLINE inline __attribute__((always_inline))

struct Orders {
  alignas(64) uint16_t words[4][32]; // eight codes of one group, each four times: group 0, rows 0 to 7; rows 8 to 15; group 1
  alignas(64) uint8_t uppers[64];    // the upper bytes of all codes in that order
  alignas(64) uint32_t halves[2][16];
  constexpr Orders() : words(), uppers(), halves() {
    for (int part = 0; part < 4; part++) {
      for (int i = 0; i < 32; i++) words[part][i] = uint16_t(2 * (part % 2 * 8 + i / 4) + part / 2);
      for (int i = 0; i < 8; i++) uppers[8 * part + i] = uint8_t(2 * (2 * (part % 2 * 8 + i) + part / 2) + 1);
    }
    for (int half = 0; half < 2; half++)
      for (int i = 0; i < 16; i++) halves[half][i] = uint32_t(2 * i + half);
  }
};
constexpr Orders kOrders;

// The codes of two groups and 16 rows as words, a row's two side by side; zeros where there is no row.
INLINE __m512i codes_of(const uint16_t* codes, int64_t stride, __mmask16 rows, bool both) {
  __m512i places = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                      _mm512_set1_epi32(static_cast<int>(stride)));
  if (both) return _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), rows, places, codes, 2);
  alignas(64) uint16_t single[32] = {};
  for (int r = 0; r < 16; r++)
    if (rows >> r & 1) single[2 * r] = codes[r * stride];
  return _mm512_load_si512(single);
}

struct Patterns {
  __m512i packed[8];
  INLINE explicit Patterns(const uint16_t* table) {
    for (int i = 0; i < 8; i++) packed[i] = _mm512_loadu_si512(table + 32 * i);
  }
  INLINE __m512i operator()(__m512i codes) const {
    __m512i found[4];
    for (int i = 0; i < 4; i++) found[i] = _mm512_permutex2var_epi16(packed[2 * i], codes, packed[2 * i + 1]);
    __mmask32 odd = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(0x40)), upper = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(0x80));
    return _mm512_mask_blend_epi16(upper, _mm512_mask_blend_epi16(odd, found[0], found[1]),
                                   _mm512_mask_blend_epi16(odd, found[2], found[3]));
  }
};

// Eight codes' bytes to the chunks that they belong to.
INLINE void put(__m512i first_rows, __m512i last_rows, uint8_t* out) {
  for (int half = 0; half < 2; half++)
    _mm512_storeu_si512(out + half * kBytes,
                        _mm512_permutex2var_epi32(first_rows, _mm512_load_si512(kOrders.halves[half]), last_rows));
}

template <bool add>
void e8p_groups(const E8Tables& tables, const uint16_t* codes, int64_t stride, int64_t rows, int64_t count, uint8_t* out) {
  const Patterns patterns(tables.patterns);
  const __m512i parity = _mm512_set1_epi64(0xFF), fields = _mm512_set1_epi16(0x5555); // parity to bit 7
  const __m512i shifts = _mm512_set1_epi64(0x0E0C0A0806040200), three = _mm512_set1_epi8(3);
  const __m512i sizes = _mm512_set1_epi32(0x000A0602); // of 0, 1, 2 in quarters
  const __mmask16 there = __mmask16((1u << rows) - 1);
  for (int64_t g = 0; g < count; g += 2, out += 4 * kBytes) {
    bool both = g + 1 < count;
    __m512i word = codes_of(codes + g, stride, there, both), packed = patterns(word);
    __m512i odd = _mm512_gf2p8affine_epi64_epi8(_mm512_and_si512(packed, fields), parity, 0);
    odd = _mm512_xor_si512(odd, _mm512_slli_epi16(odd, 8));
    __m512i signs = _mm512_and_si512(word, _mm512_set1_epi16(0x7F00));
    odd = _mm512_xor_si512(odd, _mm512_gf2p8affine_epi64_epi8(signs, parity, 0));
    signs = _mm512_or_si512(signs, _mm512_and_si512(odd, _mm512_set1_epi16(int16_t(0x8000))));
    __m512i lowered = _mm512_srai_epi16(word, 15), uppers = _mm512_load_si512(kOrders.uppers);
    alignas(64) uint64_t negative[8], down[8];
    _mm512_store_si512(negative, _mm512_permutexvar_epi8(uppers, signs));
    _mm512_store_si512(down, _mm512_permutexvar_epi8(uppers, lowered));
    __m512i bytes[4];
#pragma GCC unroll 4
    for (int part = 0; part < 4; part++) {
      __m512i eight = _mm512_permutexvar_epi16(_mm512_load_si512(kOrders.words[part]), packed);
      eight = _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, eight), three);
      __m512i size = _mm512_shuffle_epi8(sizes, eight);
      __m512i middle = _mm512_mask_blend_epi8(down[part], _mm512_set1_epi8(1), _mm512_set1_epi8(-1));
      __m512i value = _mm512_mask_sub_epi8(_mm512_add_epi8(middle, size), negative[part], middle, size);
      bytes[part] = value;
    }
    for (int group = 0; group < (both ? 2 : 1); group++) {
      uint8_t* place = out + 2 * group * kBytes;
      __m512i first = bytes[2 * group], last = bytes[2 * group + 1];
      if (add) { // a residual in quarters of what is there
        for (int half = 0; half < 2; half++) {
          __m512i before = _mm512_xor_si512(_mm512_loadu_si512(place + half * kBytes), _mm512_set1_epi8(-128));
          before = _mm512_add_epi8(before, before);
          before = _mm512_add_epi8(before, before);
          __m512i value = _mm512_permutex2var_epi32(first, _mm512_load_si512(kOrders.halves[half]), last);
          _mm512_storeu_si512(place + half * kBytes, _mm512_xor_si512(_mm512_add_epi8(before, value), _mm512_set1_epi8(-128)));
        }
      } else {
        put(_mm512_xor_si512(first, _mm512_set1_epi8(-128)), _mm512_xor_si512(last, _mm512_set1_epi8(-128)), place);
      }
    }
  }
}

void e8p(const E8Tables& tables, const uint16_t* codes, int64_t stride, int64_t rows, int64_t count, bool add, uint8_t* out) {
  if (add) return e8p_groups<true>(tables, codes, stride, rows, count, out);
  e8p_groups<false>(tables, codes, stride, rows, count, out);
}

// The points of one code for each of 16 rows.
INLINE void put_points(const E8Tables& tables, __m512i codes, uint8_t* out) {
  put(_mm512_i32gather_epi64(_mm512_castsi512_si256(codes), tables.points, 8),
      _mm512_i32gather_epi64(_mm512_extracti64x4_epi64(codes, 1), tables.points, 8), out);
}

void e8(const E8Tables& tables, const uint8_t* codes, int64_t stride, int64_t rows, int64_t count, uint8_t* out) {
  const __m512i byte = _mm512_set1_epi32(0xFF);
  const __mmask16 there = __mmask16((1u << rows) - 1);
  const __m512i places = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                            _mm512_set1_epi32(static_cast<int>(stride)));
  int64_t g = 0;
  for (; g + 4 <= count; g += 4, out += 8 * kBytes) { // a word of each row holds the codes of four groups
    __m512i word = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there, places, codes + g, 1);
    put_points(tables, _mm512_and_si512(word, byte), out);
    put_points(tables, _mm512_and_si512(_mm512_srli_epi32(word, 8), byte), out + 2 * kBytes);
    put_points(tables, _mm512_and_si512(_mm512_srli_epi32(word, 16), byte), out + 4 * kBytes);
    put_points(tables, _mm512_srli_epi32(word, 24), out + 6 * kBytes);
  }
  for (; g < count; g++, out += 2 * kBytes) {
    alignas(64) uint32_t single[16] = {};
    for (int64_t r = 0; r < rows; r++) single[r] = codes[r * stride + g];
    put_points(tables, _mm512_load_si512(single), out);
  }
}

constexpr E8Bytes kE8Bytes{e8p, e8};

} // namespace

const E8Bytes* vbmi_e8_bytes() { return &kE8Bytes; }

} // namespace quiptools

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace quiptools {
const E8Bytes* vbmi_e8_bytes() { return nullptr; }
} // namespace quiptools

#endif
