// The CPU kernels, compiled once per instruction set: the including file sets the target, and defines
// QUIPTOOLS_ISA (a namespace, so that no two sets share a function) and QUIPTOOLS_LANES (floats to a register, 8 or 16).
//
// GCC's vector types keep it one source: on a CPU without wide registers the compiler splits them.
// What makes it fast: a point of E8P12 is two table rows and one exclusive or, since a row of 8 floats from a table of
// 8 KB, which stays in the first-level cache, comes in one load; the table row of a code is found for 16 codes at once.

#include "cpu_kernels.h"

namespace quiptools::QUIPTOOLS_ISA {
namespace {

#define INLINE inline __attribute__((always_inline))

constexpr int64_t kLanes = QUIPTOOLS_LANES;
constexpr int64_t kAtOnce = kLanes / kGroup; // groups to a register
constexpr int64_t kBlock = 16;               // codes whose table rows are found at once
constexpr int64_t kChunk = 32;               // groups of a decoded panel

typedef float Floats8 __attribute__((vector_size(32)));
typedef float Floats __attribute__((vector_size(4 * QUIPTOOLS_LANES)));
typedef int32_t Ints8 __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(4 * QUIPTOOLS_LANES)));
typedef uint16_t Shorts __attribute__((vector_size(2 * QUIPTOOLS_LANES)));
typedef float Unaligned8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float Unaligned __attribute__((vector_size(4 * QUIPTOOLS_LANES), aligned(4), may_alias));
typedef uint16_t UnalignedShorts __attribute__((vector_size(2 * QUIPTOOLS_LANES), aligned(2), may_alias));

INLINE Floats8 load8(const float* p) { return *reinterpret_cast<const Unaligned8*>(p); }
INLINE Floats load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
INLINE void store8(float* p, Floats8 v) { *reinterpret_cast<Unaligned8*>(p) = v; }
INLINE void store(float* p, Floats v) { *reinterpret_cast<Unaligned*>(p) = v; }
INLINE Floats8 xor8(Floats8 a, Floats8 b) { return (Floats8)((Ints8)a ^ (Ints8)b); }

INLINE float sum8(Floats8 v) {
  float half[4];
  for (int i = 0; i < 4; i++) half[i] = v[i] + v[i + 4];
  return (half[0] + half[2]) + (half[1] + half[3]);
}

// A register of kAtOnce groups from its groups, and the sum of one.
#if QUIPTOOLS_LANES == 16
INLINE Floats join(const Floats8* part) {
  return __builtin_shufflevector(part[0], part[1], 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
INLINE float sum(Floats v) {
  Floats8 low = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
  return sum8(low + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
}
#else
INLINE Floats join(const Floats8* part) { return part[0]; }
INLINE float sum(Floats v) { return sum8(v); }
#endif

// Row s holds the sign bits of the eight coordinates whose signs 0 to 6 are the bits of s; the last is their parity.
struct Signs {
  alignas(64) uint32_t row[128][kGroup];
  constexpr Signs() : row() {
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
constexpr Signs kSigns;

// Where the table rows of kBlock codes begin, as offsets in floats.
template <Book book>
struct Offsets;

template <>
struct Offsets<Book::none> {
  INLINE void find(const Matrix&, const void*, int64_t, int64_t) {}
  INLINE Floats8 point(const Matrix&, int64_t) const { return Floats8{}; }
  INLINE float shift(int64_t) const { return 0; }
};

template <>
struct Offsets<Book::e8> {
  alignas(32) uint16_t row[kBlock];
  INLINE void find(const Matrix&, const void* codes, int64_t at, int64_t count) {
    const uint8_t* c = static_cast<const uint8_t*>(codes) + at;
    for (int64_t i = 0; i < count; i++) row[i] = uint16_t(c[i] << 3);
  }
  INLINE Floats8 point(const Matrix& m, int64_t i) const { return load8(m.points + row[i]); }
  INLINE float shift(int64_t) const { return 0; }
};

template <>
struct Offsets<Book::e8p> {
  alignas(32) uint16_t pattern[kBlock], sign[kBlock], last[kBlock];
  INLINE void find(const Matrix&, const void* codes, int64_t at, int64_t count) {
    const uint16_t* c = static_cast<const uint16_t*>(codes) + at;
    for (int64_t i = 0; i < count; i++) {
      pattern[i] = uint16_t((c[i] & 0xFF) << 3);
      sign[i] = uint16_t(c[i] >> 5 & 0x3F8);
      last[i] = c[i] >> 15;
    }
  }
  // The point before its shift.
  INLINE Floats8 point(const Matrix& m, int64_t i) const {
    const float* signs = reinterpret_cast<const float*>(kSigns.row);
    return xor8(load8(m.patterns + pattern[i]), load8(signs + sign[i]));
  }
  INLINE float shift(int64_t i) const { return 0.25f - 0.5f * float(last[i]); }
};

// Both stages of kBlock codes of one row.
template <Book A, Book B>
struct Block {
  Offsets<A> first;
  Offsets<B> second;

  INLINE void find(const Matrix& m, int64_t at, int64_t count) {
    first.find(m, m.codes, at, count);
    second.find(m, m.residual, at, count);
  }
  INLINE Floats8 unshifted(const Matrix& m, int64_t i) const {
    Floats8 w = first.point(m, i);
    if (B != Book::none) w += second.point(m, i) * m.residual_scale;
    return w;
  }
  INLINE Floats8 weights(const Matrix& m, int64_t i) const {
    Floats8 w = unshifted(m, i);
    if (A == Book::e8p || B == Book::e8p) w += first.shift(i) + m.residual_scale * second.shift(i);
    return w;
  }
};

// `count` groups of a row, from the one numbered `at` among all of the matrix.
template <Book A, Book B>
INLINE void decode_groups(const Matrix& m, int64_t at, int64_t count, float* out) {
  Block<A, B> block;
  int64_t g = 0;
  for (; g + kBlock <= count; g += kBlock) {
    block.find(m, at + g, kBlock);
    for (int64_t i = 0; i < kBlock; i++) store8(out + (g + i) * kGroup, block.weights(m, i));
  }
  for (; g < count; g++) {
    block.find(m, at + g, 1);
    store8(out + g * kGroup, block.weights(m, 0));
  }
}

template <Book A, Book B>
void decode_rows(const Matrix& m, int64_t begin, int64_t end, float* out) {
  for (int64_t r = begin; r < end; r++) {
    decode_groups<A, B>(m, r * m.groups, m.groups, out + (r - begin) * m.groups * kGroup);
  }
}

// Sign bits of the shifts of kLanes codes: set where the shift is -1/4.
INLINE Words shift_bits(const void* codes, int64_t at) {
  Shorts c = *reinterpret_cast<const UnalignedShorts*>(static_cast<const uint16_t*>(codes) + at);
  return __builtin_convertvector(c, Words) << 16 & 0x80000000u;
}

INLINE Floats flip(Floats v, Words bits) { return (Floats)((Words)v ^ bits); }

// One vector, `rows` rows at a time: points are multiplied as they are decoded and never stored. The shifts are taken
// out of the points: they add +- a quarter of the sum of x's group, 8 or 16 groups to an instruction.
template <Book A, Book B, int rows>
INLINE void multiply_rows(const Matrix& m, const float* x, const float* quarter_sums, int64_t row, float* y) {
  Floats total[rows] = {}, shifts[rows] = {};
  Floats8 rest[rows] = {};
  Block<A, B> block[rows];
  int64_t g = 0;
  for (; g + kBlock <= m.groups; g += kBlock) {
    for (int r = 0; r < rows; r++) block[r].find(m, (row + r) * m.groups + g, kBlock);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kBlock; i += kAtOnce) {
      Floats xs = load(x + (g + i) * kGroup);
      for (int r = 0; r < rows; r++) {
        Floats8 part[kAtOnce];
        for (int64_t k = 0; k < kAtOnce; k++) part[k] = block[r].unshifted(m, i + k);
        total[r] += join(part) * xs;
      }
    }
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      Floats sums = load(quarter_sums + g + i);
      for (int r = 0; r < rows; r++) {
        int64_t at = (row + r) * m.groups + g + i;
        if (A == Book::e8p) shifts[r] += flip(sums, shift_bits(m.codes, at));
        if (B == Book::e8p) shifts[r] += flip(sums, shift_bits(m.residual, at)) * m.residual_scale;
      }
    }
  }
  for (; g < m.groups; g++) {
    Floats8 xs = load8(x + g * kGroup);
    for (int r = 0; r < rows; r++) {
      block[r].find(m, (row + r) * m.groups + g, 1);
      rest[r] += block[r].weights(m, 0) * xs;
    }
  }
  for (int r = 0; r < rows; r++) y[row + r] = sum(total[r] + shifts[r]) + sum8(rest[r]);
}

// acc[r * stride + b] += the product of a decoded row and a vector over `count` groups, for 2 rows and `batch` vectors.
template <int batch>
INLINE void multiply_panel(const float* w, int64_t w_stride, const float* x, int64_t x_stride, int64_t width,
                           Floats* acc, int64_t stride) {
  Floats total[2][batch];
  for (int r = 0; r < 2; r++)
    for (int b = 0; b < batch; b++) total[r][b] = acc[r * stride + b];
  for (int64_t k = 0; k < width; k += kLanes) {
    Floats w0 = load(w + k), w1 = load(w + w_stride + k);
    for (int b = 0; b < batch; b++) {
      Floats xs = load(x + b * x_stride + k);
      total[0][b] += w0 * xs;
      total[1][b] += w1 * xs;
    }
  }
  for (int r = 0; r < 2; r++)
    for (int b = 0; b < batch; b++) acc[r * stride + b] = total[r][b];
}

// Several vectors: a panel of kRowBlock rows by kChunk groups is decoded into the first-level cache and multiplied
// with all of them.
template <Book A, Book B>
void multiply_batch(const Matrix& m, const float* x, int64_t batch, int64_t row, int64_t count, int64_t rows,
                    float* y) {
  alignas(64) float panel[kRowBlock][kChunk * kGroup];
  alignas(64) float edge[kPanelBatch][kLanes];
  Floats acc[kRowBlock][kPanelBatch] = {};
  int64_t columns = m.groups * kGroup;
  if (count < kRowBlock)
    for (auto& decoded : panel)
      for (float& value : decoded) value = 0;
  for (int64_t g = 0; g < m.groups; g += kChunk) {
    int64_t groups = m.groups - g < kChunk ? m.groups - g : kChunk;
    for (int64_t r = 0; r < count; r++) decode_groups<A, B>(m, (row + r) * m.groups + g, groups, panel[r]);
    int64_t width = groups * kGroup / kLanes * kLanes;
    for (int64_t r = 0; r < count; r += 2) {
      const float* xs = x + g * kGroup;
      int64_t b = 0;
      for (; b + 4 <= batch; b += 4)
        multiply_panel<4>(panel[r], kChunk * kGroup, xs + b * columns, columns, width, &acc[r][b], kPanelBatch);
      switch (batch - b) {
        case 3:
          multiply_panel<3>(panel[r], kChunk * kGroup, xs + b * columns, columns, width, &acc[r][b], kPanelBatch);
          break;
        case 2:
          multiply_panel<2>(panel[r], kChunk * kGroup, xs + b * columns, columns, width, &acc[r][b], kPanelBatch);
          break;
        case 1:
          multiply_panel<1>(panel[r], kChunk * kGroup, xs + b * columns, columns, width, &acc[r][b], kPanelBatch);
      }
    }
    if (width < groups * kGroup) { // an odd group at the end of wide registers
      for (int64_t b = 0; b < batch; b++)
        for (int64_t i = 0; i < kLanes; i++)
          edge[b][i] = i < kGroup ? x[b * columns + g * kGroup + width + i] : 0;
      for (int64_t r = 0; r < count; r++) {
        for (int64_t i = kGroup; i < kLanes; i++) panel[r][width + i] = 0;
        for (int64_t b = 0; b < batch; b++) acc[r][b] += load(panel[r] + width) * load(edge[b]);
      }
    }
  }
  for (int64_t b = 0; b < batch; b++)
    for (int64_t r = 0; r < count; r++) y[b * rows + row + r] = sum(acc[r][b]);
}

template <Book A, Book B>
void multiply(const Matrix& m, const float* x, const float* quarter_sums, int64_t batch, int64_t begin, int64_t end,
              int64_t rows, float* y) {
  for (int64_t row = begin; row < end; row += kRowBlock) {
    int64_t count = end - row < kRowBlock ? end - row : kRowBlock;
    if (batch > 1) {
      multiply_batch<A, B>(m, x, batch, row, count, rows, y);
      continue;
    }
    int64_t r = row;
    for (; r + 4 <= row + count; r += 4) multiply_rows<A, B, 4>(m, x, quarter_sums, r, y);
    for (; r < row + count; r++) multiply_rows<A, B, 1>(m, x, quarter_sums, r, y);
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
             int64_t rows, float* y) {
  FOR_BOOKS(multiply, m, x, quarter_sums, batch, begin, end, rows, y);
}

// Butterflies within a register of eight: distance 1, 2 and 4.
INLINE Floats8 butterflies8(Floats8 v) {
  const Floats8 one = {1, -1, 1, -1, 1, -1, 1, -1}, two = {1, 1, -1, -1, 1, 1, -1, -1}, four = {1, 1, 1, 1, -1, -1, -1, -1};
  v = __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6) + v * one;
  v = __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5) + v * two;
  return __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3) + v * four;
}

void sylvester(float* x, int64_t count, int64_t power) {
  for (int64_t n = 0; n < count; n++, x += power) {
    int64_t distance = 1;
    if (power >= 8) {
      for (int64_t i = 0; i < power; i += 8) store8(x + i, butterflies8(load8(x + i)));
      distance = 8;
    }
    // Two levels to a pass over memory.
    for (; distance >= 8 && distance * 4 <= power; distance *= 4) {
      for (int64_t i = 0; i < power; i += 4 * distance) {
        for (int64_t k = i; k < i + distance; k += 8) {
          Floats8 a = load8(x + k), b = load8(x + k + distance);
          Floats8 c = load8(x + k + 2 * distance), d = load8(x + k + 3 * distance);
          Floats8 ab = a + b, a_b = a - b, cd = c + d, c_d = c - d;
          store8(x + k, ab + cd);
          store8(x + k + distance, a_b + c_d);
          store8(x + k + 2 * distance, ab - cd);
          store8(x + k + 3 * distance, a_b - c_d);
        }
      }
    }
    for (; distance < power; distance *= 2) {
      for (int64_t i = 0; i < power; i += 2 * distance) {
        for (int64_t k = i; k < i + distance; k++) {
          float a = x[k], b = x[k + distance];
          x[k] = a + b;
          x[k + distance] = a - b;
        }
      }
    }
  }
}

template <int rows>
INLINE void dense_rows(const float* matrix, const float* x, float* out, int64_t order, int64_t inner, int64_t i) {
  int64_t k = 0;
  for (; k + 16 <= inner; k += 16) {
    Floats8 low[rows] = {}, high[rows] = {};
    for (int64_t j = 0; j < order; j++) {
      Floats8 a = load8(x + j * inner + k), b = load8(x + j * inner + k + 8);
      for (int r = 0; r < rows; r++) {
        float weight = matrix[(i + r) * order + j];
        low[r] += a * weight;
        high[r] += b * weight;
      }
    }
    for (int r = 0; r < rows; r++) {
      store8(out + (i + r) * inner + k, low[r]);
      store8(out + (i + r) * inner + k + 8, high[r]);
    }
  }
  for (; k < inner; k++) {
    float total[rows] = {};
    for (int64_t j = 0; j < order; j++)
      for (int r = 0; r < rows; r++) total[r] += matrix[(i + r) * order + j] * x[j * inner + k];
    for (int r = 0; r < rows; r++) out[(i + r) * inner + k] = total[r];
  }
}

void dense(const float* matrix, const float* x, float* out, int64_t order, int64_t inner, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + 4 <= end; i += 4) dense_rows<4>(matrix, x, out, order, inner, i);
  for (; i < end; i++) dense_rows<1>(matrix, x, out, order, inner, i);
}

} // namespace

constexpr Kernels kKernels{QUIPTOOLS_NAME, decode, product, sylvester, dense};

} // namespace quiptools::QUIPTOOLS_ISA
