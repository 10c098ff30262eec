// Products of whole numbers with AVX2.
//
// The parity map that turns a window into the number of its entry is linear, so that the number is the exclusive or of
// what the halves of two bytes add to it: two to four shuffles of 16 entries, whose tables have the window's offset in
// them. Nothing is shifted; eight bytes of four columns, the beginnings of eight windows of one offset, are done at once.
#include "integer_kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define QUIPTOOLS_ISA avx2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#include "integer_source.h"

namespace quiptools {
namespace avx2 {
namespace {

#define INLINE inline __attribute__((always_inline))

INLINE __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
INLINE void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
INLINE __m256i twice(const void* p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}

// Rows are decoded in blocks: eight beginnings of windows a register, kPhases bytes further on each, and kWindows
// windows from each beginning. Row kWindows * i + w of a block is window w of beginning i.
template <int rate>
struct Block {
  static constexpr int kPhases = rate == 3 ? 3 : 1;
  static constexpr int kWindows = 8 * kPhases / rate;
  static constexpr int kRows = 8 * kWindows;
  static constexpr int kLength = 32 * kPhases; // bytes
  // Which beginning is in a lane: reading every third word keeps it in the lane where it lay.
  static constexpr int beginning(int lane) { return rate == 3 ? lane * 3 % 8 : lane; }
};

// The bytes of phase `phase` of all beginnings; those behind the block's end come from `after` if it is the last one.
template <int rate, bool last>
INLINE __m256i bytes_of_phase(const uint8_t* bytes, const uint8_t* after, int phase) {
  const uint8_t* p = bytes + 4 * phase;
  __m256i found;
  if (rate == 3) {
    found = _mm256_blend_epi32(load(p), load(p + 32), 0b10010010);
    found = _mm256_blend_epi32(found, load(p + 64), 0b00100100);
  } else {
    found = load(p);
  }
  if (!last || phase < Block<rate>::kPhases) return found;
  int32_t next;
  __builtin_memcpy(&next, after, 4);
  return _mm256_blend_epi32(found, _mm256_set1_epi32(next), rate == 3 ? 0b00100000 : 0b10000000);
}

// Calls f(w, weights) for the windows w of a block: weights, with kBias, of its eight beginnings by four columns.
template <int rate, bool wide, bool last, class F>
INLINE void for_windows(const TrellisCode& code, const uint8_t* bytes, const uint8_t* after, const F& f) {
  constexpr int kPhases = Block<rate>::kPhases, kWindows = Block<rate>::kWindows;
  const __m256i nibble = _mm256_set1_epi8(15), bias = _mm256_set1_epi8(-128);
  // The table's bias is taken off, since signs turn about 0.
  const __m256i first = _mm256_xor_si256(twice(code.table), bias), second = _mm256_xor_si256(twice(code.table + 16), bias);
  __m256i low[kPhases + 1], high[kPhases + 1];
  for (int p = 0; p <= kPhases; p++) {
    __m256i found = bytes_of_phase<rate, last>(bytes, after, p);
    low[p] = _mm256_and_si256(found, nibble);
    high[p] = _mm256_and_si256(_mm256_srli_epi16(found, 4), nibble);
  }
#pragma GCC unroll 8
  for (int w = 0; w < kWindows; w++) {
    int p = w * rate / 8, shift = w * rate % 8;
    __m256i number = _mm256_shuffle_epi8(twice(code.halves[w][1]), high[p]);
    if (shift < 4) number = _mm256_xor_si256(number, _mm256_shuffle_epi8(twice(code.halves[w][0]), low[p]));
    if (shift > 0) number = _mm256_xor_si256(number, _mm256_shuffle_epi8(twice(code.halves[w][2]), low[p + 1]));
    if (shift > 4) number = _mm256_xor_si256(number, _mm256_shuffle_epi8(twice(code.halves[w][3]), high[p + 1]));
    __m256i value = _mm256_shuffle_epi8(first, number); // 0 where bit 7 is set
    if (wide) value = _mm256_or_si256(value, _mm256_shuffle_epi8(second, _mm256_xor_si256(number, bias)));
    value = _mm256_sign_epi8(value, _mm256_slli_epi16(number, 2));
    f(w, _mm256_xor_si256(value, bias));
  }
}

template <int rate, bool wide>
void decode_rate(const TrellisCode& code, const uint8_t* bytes, const uint8_t* after, int64_t chunks, uint8_t* out,
                 int64_t stride) {
  using B = Block<rate>;
  int64_t rows = chunks * kChunk, row = 0;
  for (; row + B::kRows <= rows; row += B::kRows, bytes += B::kLength) {
    auto put = [&](int w, __m256i weights) {
      alignas(32) uint32_t lanes[8];
      store(lanes, weights);
      for (int lane = 0; lane < 8; lane++) {
        int64_t r = row + B::kWindows * B::beginning(lane) + w;
        __builtin_memcpy(out + r / kChunk * stride + r % kChunk * kWay, lanes + lane, 4);
      }
    };
    if (row + B::kRows == rows) {
      for_windows<rate, wide, true>(code, bytes, after, put);
    } else {
      for_windows<rate, wide, false>(code, bytes, after, put);
    }
  }
  if (row < rows) decode_windows(code, bytes, after, (rows - row) / kChunk, out + row / kChunk * stride, stride);
}

// Calls f<rate, wide>(code, arguments...).
#define FOR_RATES(f, ...)                                                                           \
  switch (code.rate) {                                                                              \
    case 1: return wide ? f<1, true>(code, __VA_ARGS__) : f<1, false>(code, __VA_ARGS__);           \
    case 2: return wide ? f<2, true>(code, __VA_ARGS__) : f<2, false>(code, __VA_ARGS__);           \
    case 3: return wide ? f<3, true>(code, __VA_ARGS__) : f<3, false>(code, __VA_ARGS__);           \
    default: return wide ? f<4, true>(code, __VA_ARGS__) : f<4, false>(code, __VA_ARGS__);          \
  }

// Whether the shuffles of this file decode it; else the plain loop does.
bool has_shuffles(const TrellisCode& code) { return code.linear && code.antisymmetric && code.rate <= 4; }

void decode(const TrellisCode& code, const uint8_t* bytes, const uint8_t* after, int64_t chunks, uint8_t* out,
            int64_t stride) {
  if (!has_shuffles(code)) return decode_windows(code, bytes, after, chunks, out, stride);
  bool wide = code.entries > 32;
  FOR_RATES(decode_rate, bytes, after, chunks, out, stride)
}

// Adds weights . x of four columns to the eight sums at `sums`.
INLINE void add(__m256i weights, __m256i x, int32_t* sums) {
  __m256i pairs = _mm256_maddubs_epi16(weights, x);
  store(sums, _mm256_add_epi32(load(sums), _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
}

INLINE __m256i four(const int8_t* x) {
  int32_t bytes;
  __builtin_memcpy(&bytes, x, 4);
  return _mm256_set1_epi32(bytes);
}

template <int rate, bool wide>
void vector_rate(const TrellisCode& code, const uint8_t* bytes, int64_t groups, const int8_t* high, const int8_t* low,
                 int32_t* sums) {
  using B = Block<rate>;
  constexpr int kBlocks = kStrip / B::kRows;
  alignas(32) int32_t tops[kStrip] = {}, rests[kStrip] = {}; // as they are decoded: window, then lane
  for (int64_t g = 0; g < groups; g++, bytes += kBlocks * B::kLength) {
    __m256i top = four(high + kWay * g), rest = four(low + kWay * g);
    for (int b = 0; b < kBlocks; b++) {
      const uint8_t* place = bytes + b * B::kLength;
      auto sum = [&](int w, __m256i weights) {
        add(weights, top, tops + b * B::kRows + 8 * w);
        add(weights, rest, rests + b * B::kRows + 8 * w);
      };
      if (b + 1 < kBlocks) {
        for_windows<rate, wide, false>(code, place, bytes, sum);
      } else {
        for_windows<rate, wide, true>(code, place, bytes, sum);
      }
    }
  }
  for (int b = 0; b < kBlocks; b++) {
    for (int w = 0; w < B::kWindows; w++) {
      for (int lane = 0; lane < 8; lane++) {
        int row = b * B::kRows + B::kWindows * B::beginning(lane) + w, from = b * B::kRows + 8 * w + lane;
        sums[row] += tops[from];
        sums[kStrip + row] += rests[from];
      }
    }
  }
}

bool vector(const TrellisCode& code, const uint8_t* bytes, int64_t groups, const int8_t* high, const int8_t* low,
            int32_t* sums) {
  if (!has_shuffles(code)) return false;
  bool wide = code.entries > 32;
  auto run = [&] { FOR_RATES(vector_rate, bytes, groups, high, low, sums) };
  run();
  return true;
}

template <int count>
INLINE void multiply_some(const uint8_t* tile, int64_t groups, const int8_t* x, int64_t x_stride, int32_t* sums) {
  const __m256i one = _mm256_set1_epi16(1);
  __m256i total[count][2];
  for (int v = 0; v < count; v++)
    for (int half = 0; half < 2; half++) total[v][half] = load(sums + v * kStrip + 8 * half);
  for (int64_t g = 0; g < groups; g++) {
    __m256i first = load(tile + g * kBytes), second = load(tile + g * kBytes + 32);
    for (int v = 0; v < count; v++) {
      __m256i xs = four(x + v * x_stride + kWay * g);
      total[v][0] = _mm256_add_epi32(total[v][0], _mm256_madd_epi16(_mm256_maddubs_epi16(first, xs), one));
      total[v][1] = _mm256_add_epi32(total[v][1], _mm256_madd_epi16(_mm256_maddubs_epi16(second, xs), one));
    }
  }
  for (int v = 0; v < count; v++)
    for (int half = 0; half < 2; half++) store(sums + v * kStrip + 8 * half, total[v][half]);
}

void multiply(const uint8_t* tile, int64_t stride, int64_t chunks, int64_t groups, const int8_t* x, int64_t x_stride,
              int64_t vectors, int32_t* sums) {
  for (int64_t c = 0; c < chunks; c++) {
    int64_t v = 0;
    for (; v + 4 <= vectors; v += 4)
      multiply_some<4>(tile + c * stride, groups, x + v * x_stride, x_stride, sums + v * kStrip + c * kChunk);
    for (; v < vectors; v++)
      multiply_some<1>(tile + c * stride, groups, x + v * x_stride, x_stride, sums + v * kStrip + c * kChunk);
  }
}

constexpr IntegerKernels kKernels{round_activations, decode, vector, multiply, finish, nullptr};

} // namespace
} // namespace avx2

const IntegerKernels* avx2_integer_kernels() { return &avx2::kKernels; }

} // namespace quiptools

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace quiptools {
const IntegerKernels* avx2_integer_kernels() { return nullptr; }
} // namespace quiptools

#endif
