// Registers of floats, and what is done with activations: the transform's parts, signs, half precision. Compiled once per
// instruction set: the including file defines QUIPTOOLS_ISA (a namespace) and QUIPTOOLS_LANES (floats to a register, 8 or
// 16), and includes this through cpu_kernels_source.h. GCC's vector types keep it one source: on a CPU without wide
// registers the compiler splits them.
#pragma once

#include "cpu_kernels.h"

namespace quiptools::QUIPTOOLS_ISA {
namespace {

#define INLINE inline __attribute__((always_inline))

constexpr int64_t kLanes = QUIPTOOLS_LANES;

typedef float Floats8 __attribute__((vector_size(32)));
typedef float Floats __attribute__((vector_size(4 * QUIPTOOLS_LANES)));
typedef uint32_t Words8 __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(4 * QUIPTOOLS_LANES)));
typedef float Unaligned8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float Unaligned __attribute__((vector_size(4 * QUIPTOOLS_LANES), aligned(4), may_alias));

INLINE Floats8 load8(const float* p) { return *reinterpret_cast<const Unaligned8*>(p); }
INLINE Floats load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
INLINE void store8(float* p, Floats8 v) { *reinterpret_cast<Unaligned8*>(p) = v; }
INLINE void store(float* p, Floats v) { *reinterpret_cast<Unaligned*>(p) = v; }

// Butterflies within a register: distance 1, 2, 4 (and 8 where it holds 16).
#if QUIPTOOLS_LANES == 16
INLINE Floats butterflies(Floats v) {
  const Floats one = {1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1};
  const Floats two = {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1};
  const Floats four = {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1};
  const Floats eight = {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1};
  v = __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14) + v * one;
  v = __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13) + v * two;
  v = __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11) + v * four;
  return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7) + v * eight;
}
#else
INLINE Floats butterflies(Floats v) {
  const Floats one = {1, -1, 1, -1, 1, -1, 1, -1}, two = {1, 1, -1, -1, 1, 1, -1, -1}, four = {1, 1, 1, 1, -1, -1, -1, -1};
  v = __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6) + v * one;
  v = __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5) + v * two;
  return __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3) + v * four;
}
#endif

// All butterflies of `levels` distances from `distance` on, in one pass over memory.
template <int levels>
INLINE void pass(float* x, int64_t power, int64_t distance) {
  constexpr int kCount = 1 << levels;
  for (int64_t i = 0; i < power; i += kCount * distance) {
    for (int64_t k = i; k < i + distance; k += kLanes) {
      Floats v[kCount];
#pragma GCC unroll 8
      for (int n = 0; n < kCount; n++) v[n] = load(x + k + n * distance);
#pragma GCC unroll 3
      for (int half = 1; half < kCount; half *= 2)
#pragma GCC unroll 8
        for (int n = 0; n < kCount; n++)
          if (!(n & half)) {
            Floats sum = v[n] + v[n + half];
            v[n + half] = v[n] - v[n + half];
            v[n] = sum;
          }
#pragma GCC unroll 8
      for (int n = 0; n < kCount; n++) store(x + k + n * distance, v[n]);
    }
  }
}

void sylvester(float* x, int64_t count, int64_t power) {
  for (int64_t n = 0; n < count; n++, x += power) {
    if (power < kLanes) {
      for (int64_t distance = 1; distance < power; distance *= 2) {
        for (int64_t i = 0; i < power; i += 2 * distance) {
          for (int64_t k = i; k < i + distance; k++) {
            float a = x[k], b = x[k + distance];
            x[k] = a + b;
            x[k + distance] = a - b;
          }
        }
      }
      continue;
    }
    for (int64_t i = 0; i < power; i += kLanes) store(x + i, butterflies(load(x + i)));
    int64_t distance = kLanes;
    for (; distance * 8 <= power; distance *= 8) pass<3>(x, power, distance);
    if (distance * 4 <= power) {
      pass<2>(x, power, distance);
    } else if (distance * 2 <= power) {
      pass<1>(x, power, distance);
    }
  }
}

// Columns [k, k + registers * floats of V) of `rows` rows of the product.
template <class V, int rows, int registers>
INLINE void dense_columns(const float* matrix, const float* x, float* out, int64_t order, int64_t inner, int64_t k) {
  constexpr int64_t kFloats = sizeof(V) / sizeof(float);
  V total[rows][registers] = {};
  for (int64_t j = 0; j < order; j++) {
    for (int n = 0; n < registers; n++) {
      V a;
      __builtin_memcpy(&a, x + j * inner + k + n * kFloats, sizeof a);
      for (int r = 0; r < rows; r++) total[r][n] += a * matrix[r * order + j];
    }
  }
  for (int r = 0; r < rows; r++)
    for (int n = 0; n < registers; n++) __builtin_memcpy(out + r * inner + k + n * kFloats, &total[r][n], sizeof(V));
}

template <int rows>
INLINE void dense_rows(const float* matrix, const float* x, float* out, int64_t order, int64_t inner, int64_t i) {
  int64_t k = 0;
  matrix += i * order;
  out += i * inner;
  for (; k + 2 * kLanes <= inner; k += 2 * kLanes)
    dense_columns<Floats, rows, 2>(matrix, x, out, order, inner, k);
  for (; k + kLanes <= inner; k += kLanes) dense_columns<Floats, rows, 1>(matrix, x, out, order, inner, k);
  if (k + 8 <= inner) {
    dense_columns<Floats8, rows, 1>(matrix, x, out, order, inner, k);
    k += 8;
  }
  for (; k < inner; k++) {
    float total[rows] = {};
    for (int64_t j = 0; j < order; j++)
      for (int r = 0; r < rows; r++) total[r] += matrix[r * order + j] * x[j * inner + k];
    for (int r = 0; r < rows; r++) out[r * inner + k] = total[r];
  }
}

void dense(const float* matrix, const float* x, float* out, int64_t order, int64_t inner, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + 4 <= end; i += 4) dense_rows<4>(matrix, x, out, order, inner, i);
  for (; i < end; i++) dense_rows<1>(matrix, x, out, order, inner, i);
}

void signs(const uint8_t* packed, int64_t n, float* out) {
  const Words8 places = {31, 30, 29, 28, 27, 26, 25, 24};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) store8(out + i, (Floats8)((uint32_t{packed[i / 8]} << places & 0x80000000u) | 0x3F800000u));
  for (; i < n; i++) out[i] = packed[i / 8] >> i % 8 & 1 ? -1.0f : 1.0f;
}

void load_floats(const float* x, const float* factors, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i++) out[i] = x[i] * factors[i];
}

void load_bfloat16(const uint16_t* x, const float* factors, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits = uint32_t(x[i]) << 16;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    out[i] = value * factors[i];
  }
}

void store_bfloat16(const float* x, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits;
    __builtin_memcpy(&bits, x + i, 4);
    uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    out[i] = uint16_t((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
  }
}

} // namespace
} // namespace quiptools::QUIPTOOLS_ISA
