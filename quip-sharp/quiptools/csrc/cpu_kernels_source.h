// The CPU kernels, compiled once per instruction set: the including file sets the target, and defines
// QUIPTOOLS_ISA (a namespace, so that no two sets share a function), QUIPTOOLS_LANES (floats to a register, 8 or 16) and
// QUIPTOOLS_LANE_SHIFTS (1 where one instruction shifts each lane by an amount of its own; else signs are a table).
//
// GCC's vector types keep it one source: on a CPU without wide registers the compiler splits them.
// What makes it fast: a point of E8P12 is a row of 8 floats with its signs flipped. The row comes in one load from a table
// of 8 KB, which stays in the first-level cache; where it begins is found for 16 codes at once. So is the eighth sign, and
// then one word, shifted in each lane by an amount of its own, holds all signs of two codes.

#include "cpu_kernels.h"

#include "cpu_vectors_source.h"

namespace quiptools::QUIPTOOLS_ISA {
namespace {

constexpr int64_t kAtOnce = kLanes / kGroup; // groups to a register

typedef uint16_t Codes __attribute__((vector_size(2 * kBlock), may_alias));
typedef uint16_t UnalignedCodes __attribute__((vector_size(2 * kBlock), aligned(2), may_alias));
typedef uint32_t UnalignedWords8 __attribute__((vector_size(32), aligned(2), may_alias));

INLINE Floats8 flip8(Floats8 v, Words8 signs) { return (Floats8)((Words8)v ^ signs); }
INLINE Floats flip(Floats v, Floats signs) { return (Floats)((Words)v ^ (Words)signs); }

INLINE float sum8(Floats8 v) {
  float half[4];
  for (int i = 0; i < 4; i++) half[i] = v[i] + v[i + 4];
  return (half[0] + half[2]) + (half[1] + half[3]);
}

// The table rows at kAtOnce offsets in one register, and the sum of one.
#if QUIPTOOLS_LANES == 16
INLINE Floats rows_at(const float* table, const uint16_t* offset) {
  return __builtin_shufflevector(load8(table + offset[0]), load8(table + offset[1]), 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10,
                                 11, 12, 13, 14, 15);
}
INLINE float sum(Floats v) {
  Floats8 low = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
  return sum8(low + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
}
#else
INLINE Floats rows_at(const float* table, const uint16_t* offset) { return load8(table + offset[0]); }
INLINE float sum(Floats v) { return sum8(v); }
#endif

// The signs of the kBlock codes c, as sign bits of floats.
#if QUIPTOOLS_LANE_SHIFTS
struct Signs {
  alignas(32) uint16_t word[kBlock]; // bits 8 to 15: the signs of the eight coordinates
  INLINE void find(Codes c) {
    Codes parity = c << 1 & 0xFE00; // seven signs at the top: bit 15 becomes the exclusive or of all
    parity ^= parity << 4;
    parity ^= parity << 2;
    parity ^= parity << 1;
    *reinterpret_cast<Codes*>(word) = (c & 0x7FFF) | (parity & 0x8000);
  }
  INLINE uint32_t pair(int64_t i) const { // the words of the codes 2 k and 2 k + 1, one of which is i
    uint32_t both;
    __builtin_memcpy(&both, word + (i & ~1), 4);
    return both;
  }
  INLINE Words8 of8(int64_t i) const {
    const Words8 even = {23, 22, 21, 20, 19, 18, 17, 16}, odd = {7, 6, 5, 4, 3, 2, 1, 0};
    return pair(i) << (i & 1 ? odd : even) & 0x80000000u;
  }
#if QUIPTOOLS_LANES == 16
  INLINE Floats of(int64_t i) const {
    const Words both = {23, 22, 21, 20, 19, 18, 17, 16, 7, 6, 5, 4, 3, 2, 1, 0};
    return (Floats)(pair(i) << both & 0x80000000u);
  }
#else
  INLINE Floats of(int64_t i) const { return (Floats)of8(i); }
#endif
};
#else
// Row s holds the sign bits of the eight coordinates whose signs 0 to 6 are the bits of s; the last is their parity.
struct SignRows {
  alignas(64) uint32_t row[128][kGroup];
  constexpr SignRows() : row() {
    for (uint32_t s = 0; s < 128; s++) {
      uint32_t parity = 0;
      for (int i = 0; i < 7; i++) {
        row[s][i] = (s >> i & 1) << 31;
        parity ^= s >> i & 1;
      }
      row[s][7] = parity << 31;
    }
  }
};
constexpr SignRows kSignRows;

struct Signs {
  alignas(32) uint16_t offset[kBlock];
  INLINE void find(Codes c) { *reinterpret_cast<Codes*>(offset) = c >> 5 & 0x3F8; }
  INLINE Floats of(int64_t i) const { return rows_at(reinterpret_cast<const float*>(kSignRows.row), offset + i); }
  INLINE Words8 of8(int64_t i) const { return (Words8)load8(reinterpret_cast<const float*>(kSignRows.row) + offset[i]); }
};
#endif

// kBlock codes of one row: where their table rows begin, as offsets in floats.
template <Book book>
struct Block;

template <>
struct Block<Book::none> {
  INLINE void find(const void*, int64_t, int64_t) {}
  INLINE Floats8 point(const Matrix&, int64_t) const { return Floats8{}; }
  INLINE Floats unshifted(const Matrix&, int64_t) const { return Floats{}; }
  INLINE Floats times(const Matrix&, int64_t, Floats) const { return Floats{}; }
};

template <>
struct Block<Book::e8> {
  alignas(32) uint16_t row[kBlock];
  INLINE void find(const void* codes, int64_t at, int64_t count) {
    const uint8_t* c = static_cast<const uint8_t*>(codes) + at;
    for (int64_t i = 0; i < count; i++) row[i] = uint16_t(c[i] << 3);
  }
  INLINE Floats8 point(const Matrix& m, int64_t i) const { return load8(m.points + row[i]); }
  INLINE Floats unshifted(const Matrix& m, int64_t i) const { return rows_at(m.points, row + i); }
  INLINE Floats times(const Matrix& m, int64_t i, Floats xs) const { return xs * unshifted(m, i); }
};

template <>
struct Block<Book::e8p> {
  alignas(32) uint16_t pattern[kBlock], negative[kBlock];
  Signs signs;
  INLINE void find(const void* codes, int64_t at, int64_t count) {
    const uint16_t* c = static_cast<const uint16_t*>(codes) + at;
    Codes v = {};
    if (count == kBlock) {
      v = *reinterpret_cast<const UnalignedCodes*>(c);
    } else {
      for (int64_t i = 0; i < count; i++) v[i] = c[i];
    }
    *reinterpret_cast<Codes*>(pattern) = (v & 0xFF) << 3;
    *reinterpret_cast<Codes*>(negative) = v >> 15;
    signs.find(v);
    // Without this GCC takes the vectors apart in registers, lane by lane, which is slower than to store and load them.
    asm volatile("" : "+m"(pattern), "+m"(signs));
  }
  INLINE Floats8 point(const Matrix& m, int64_t i) const {
    return flip8(load8(m.patterns + pattern[i]), signs.of8(i)) + (0.25f - 0.5f * float(negative[i]));
  }
  INLINE Floats unshifted(const Matrix& m, int64_t i) const { return flip(rows_at(m.patterns, pattern + i), signs.of(i)); }
  // `unshifted` times xs, with the signs on the vector, so that the product takes its other operand from memory.
  INLINE Floats times(const Matrix& m, int64_t i, Floats xs) const {
    return flip(xs, signs.of(i)) * rows_at(m.patterns, pattern + i);
  }
};

// `count` groups of a row, from the one numbered `at` among all of the matrix.
template <Book A, Book B>
INLINE void decode_groups(const Matrix& m, int64_t at, int64_t count, float* out) {
  Block<A> first;
  Block<B> second;
  for (int64_t g = 0; g < count; g += kBlock) {
    bool whole = g + kBlock <= count;
    int64_t codes = whole ? kBlock : count - g;
    if (whole) { // the compiler unrolls what has a fixed count
      first.find(m.codes, at + g, kBlock);
      second.find(m.residual, at + g, kBlock);
    } else {
      first.find(m.codes, at + g, codes);
      second.find(m.residual, at + g, codes);
    }
    for (int64_t i = 0; i < codes; i++) {
      Floats8 weights = first.point(m, i);
      if (B != Book::none) weights += second.point(m, i) * m.residual_scale;
      store8(out + (g + i) * kGroup, weights);
    }
  }
}

template <Book A, Book B>
void decode_rows(const Matrix& m, int64_t begin, int64_t end, float* out) {
  for (int64_t r = begin; r < end; r++) {
    decode_groups<A, B>(m, r * m.groups, m.groups, out + (r - begin) * m.groups * kGroup);
  }
}

// What the shifts of kBlock codes of E8P12 add to the product: +- a quarter of the sum of each group of x.
INLINE Floats8 shifts(const void* codes, int64_t at, Floats8 even_sums, Floats8 odd_sums) {
  Words8 pairs = *reinterpret_cast<const UnalignedWords8*>(static_cast<const uint16_t*>(codes) + at);
  return flip8(even_sums, pairs << 16 & 0x80000000u) + flip8(odd_sums, pairs & 0x80000000u);
}

// One vector, `rows` rows at a time: points are multiplied as they are decoded and never stored.
template <Book A, Book B, int rows>
INLINE void multiply_vector(const Matrix& m, const float* x, const float* quarter_sums, int64_t row, float* y) {
  Floats total[rows] = {}, residual[rows] = {};
  Floats8 rest[rows] = {}, residual_rest[rows] = {};
  Block<A> first[rows];
  Block<B> second[rows];
  int64_t g = 0;
  for (; g + kBlock <= m.groups; g += kBlock) {
    Floats8 even_sums = load8(quarter_sums + g), odd_sums = load8(quarter_sums + g + kBlock / 2);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
      int64_t at = (row + r) * m.groups + g;
      // A row is too short for the hardware to see where it goes on: ask for the rows that come next.
      __builtin_prefetch(static_cast<const char*>(m.codes) + (at + rows * m.groups) * (A == Book::e8 ? 1 : 2));
      if (B != Book::none)
        __builtin_prefetch(static_cast<const char*>(m.residual) + (at + rows * m.groups) * (B == Book::e8 ? 1 : 2));
      first[r].find(m.codes, at, kBlock);
      second[r].find(m.residual, at, kBlock);
      if (A == Book::e8p) rest[r] += shifts(m.codes, at, even_sums, odd_sums);
      if (B == Book::e8p) residual_rest[r] += shifts(m.residual, at, even_sums, odd_sums);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < kBlock; i += kAtOnce) {
      Floats xs = load(x + (g + i) * kGroup);
      for (int r = 0; r < rows; r++) {
        total[r] += first[r].times(m, i, xs);
        if (B != Book::none) residual[r] += second[r].times(m, i, xs);
      }
    }
  }
  for (; g < m.groups; g++) {
    Floats8 xs = load8(x + g * kGroup);
    for (int r = 0; r < rows; r++) {
      int64_t at = (row + r) * m.groups + g;
      first[r].find(m.codes, at, 1);
      second[r].find(m.residual, at, 1);
      rest[r] += first[r].point(m, 0) * xs;
      if (B != Book::none) residual_rest[r] += second[r].point(m, 0) * xs;
    }
  }
  for (int r = 0; r < rows; r++) {
    y[row + r] = sum(total[r]) + sum8(rest[r]);
    if (B != Book::none) y[row + r] += m.residual_scale * (sum(residual[r]) + sum8(residual_rest[r]));
  }
}

// `batch` vectors, `rows` rows at a time: a point is decoded once and multiplied with all of them.
template <Book A, Book B, int rows, int batch>
INLINE void multiply_rows(const Matrix& m, const float* x, const float* quarter_sums, int64_t row, int64_t stride,
                          float* y) {
  Floats total[rows][batch] = {};
  Floats8 rest[rows][batch] = {};
  Block<A> first[rows];
  Block<B> second[rows];
  int64_t columns = m.groups * kGroup, g = 0;
  for (; g + kBlock <= m.groups; g += kBlock) {
    for (int r = 0; r < rows; r++) {
      int64_t at = (row + r) * m.groups + g;
      first[r].find(m.codes, at, kBlock);
      second[r].find(m.residual, at, kBlock);
      for (int b = 0; b < batch; b++) {
        const float* sums = quarter_sums + b * m.groups + g;
        Floats8 even_sums = load8(sums), odd_sums = load8(sums + kBlock / 2);
        if (A == Book::e8p) rest[r][b] += shifts(m.codes, at, even_sums, odd_sums);
        if (B == Book::e8p) rest[r][b] += shifts(m.residual, at, even_sums, odd_sums) * m.residual_scale;
      }
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < kBlock; i += kAtOnce) {
      for (int r = 0; r < rows; r++) {
        Floats weights = first[r].unshifted(m, i);
        if (B != Book::none) weights += second[r].unshifted(m, i) * m.residual_scale;
        for (int b = 0; b < batch; b++) total[r][b] += weights * load(x + b * columns + (g + i) * kGroup);
      }
    }
  }
  for (; g < m.groups; g++) {
    for (int r = 0; r < rows; r++) {
      float weights[kGroup];
      decode_groups<A, B>(m, (row + r) * m.groups + g, 1, weights);
      for (int b = 0; b < batch; b++) rest[r][b] += load8(weights) * load8(x + b * columns + g * kGroup);
    }
  }
  for (int r = 0; r < rows; r++)
    for (int b = 0; b < batch; b++) y[b * stride + row + r] = sum(total[r][b]) + sum8(rest[r][b]);
}

// The rows [row, end) and `batch` vectors. A function of its own, which the compiler optimises by itself.
template <Book A, Book B, int batch>
__attribute__((noinline)) void multiply_block(const Matrix& m, const float* x, const float* quarter_sums, int64_t row,
                                              int64_t end, int64_t stride, float* y) {
  if (batch == 1) {
    for (; row + 4 <= end; row += 4) multiply_vector<A, B, 4>(m, x, quarter_sums, row, y);
    for (; row < end; row++) multiply_vector<A, B, 1>(m, x, quarter_sums, row, y);
  } else {
    for (; row + 2 <= end; row += 2) multiply_rows<A, B, 2, batch>(m, x, quarter_sums, row, stride, y);
    if (row < end) multiply_rows<A, B, 1, batch>(m, x, quarter_sums, row, stride, y);
  }
}

template <Book A, Book B>
void multiply(const Matrix& m, const float* x, const float* quarter_sums, int64_t batch, int64_t begin, int64_t end,
              int64_t stride, float* y) {
  for (int64_t row = begin; row < end; row += kRowBlock) {
    int64_t last = end - row < kRowBlock ? end : row + kRowBlock, columns = m.groups * kGroup;
    for (int64_t b = 0; b < batch;) {
      const float *xs = x + b * columns, *sums = quarter_sums + b * m.groups;
      float* out = y + b * stride;
      if (batch - b >= 4) {
        multiply_block<A, B, 4>(m, xs, sums, row, last, stride, out);
        b += 4;
      } else if (batch - b >= 2) {
        multiply_block<A, B, 2>(m, xs, sums, row, last, stride, out);
        b += 2;
      } else {
        multiply_block<A, B, 1>(m, xs, sums, row, last, stride, out);
        b += 1;
      }
    }
  }
}

// Calls f<A, B>(arguments...) for the matrix's codebooks.
#define FOR_BOOKS(f, m, ...)                                                                           \
  if (m.book == Book::e8) return f<Book::e8, Book::none>(m, __VA_ARGS__);                              \
  if (m.residual_book == Book::none) return f<Book::e8p, Book::none>(m, __VA_ARGS__);                  \
  if (m.residual_book == Book::e8) return f<Book::e8p, Book::e8>(m, __VA_ARGS__);                      \
  return f<Book::e8p, Book::e8p>(m, __VA_ARGS__)

void decode(const Matrix& m, int64_t begin, int64_t end, float* out) { FOR_BOOKS(decode_rows, m, begin, end, out); }

void product(const Matrix& m, const float* x, const float* quarter_sums, int64_t batch, int64_t begin, int64_t end,
             int64_t stride, float* y) {
  FOR_BOOKS(multiply, m, x, quarter_sums, batch, begin, end, stride, y);
}

} // namespace

constexpr Kernels kKernels{decode,      product,       sylvester, dense, signs,
                           load_floats, load_bfloat16, store_bfloat16};

} // namespace quiptools::QUIPTOOLS_ISA
