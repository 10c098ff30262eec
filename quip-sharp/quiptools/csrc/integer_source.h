// What all instruction sets compile from the same source; the including file sets the target and the namespace ISA.
#include <cmath>
#include <cstring>

#include "integer_kernels.h"

namespace quiptools::QUIPTOOLS_ISA {
namespace {

// A multiply and an add stay two operations, so that every instruction set rounds alike.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#endif

// See IntegerKernels::round. Sizes are compared as whole numbers, which floats of one sign allow: a NaN is the largest.
float round_activations(const float* x, int64_t n, int64_t padded, int8_t* high, int8_t* low, int32_t* sums) {
  int32_t most = 0;
  for (int64_t i = 0; i < n; i++) {
    int32_t bits;
    std::memcpy(&bits, x + i, 4);
    bits &= 0x7FFFFFFF;
    most = bits > most ? bits : most;
  }
  float largest;
  std::memcpy(&largest, &most, 4);
  float step = largest / kLargest, inverse = 1 / step;
  bool is_number = step <= 3.4e38f, is_normal = is_number && inverse <= 3.4e38f;
  int64_t filled = is_normal ? n : 0;
  std::memset(high + filled, 0, padded - filled);
  std::memset(low + filled, 0, padded - filled);
  sums[0] = sums[1] = 0;
  if (!is_number) return NAN; // what is not finite makes every output so
  if (!is_normal) return 0;   // 0, or below any normal number
  // A float with 2^23 units before it has the whole number in its last bits.
  constexpr float kMagic = 12582912.0f;
  int32_t high_sum = 0, low_sum = 0;
  for (int64_t i = 0; i < n; i++) {
    float shifted = x[i] * inverse + kMagic;
    int32_t q;
    std::memcpy(&q, &shifted, 4);
    q -= 0x4B400000;
    q = q > kLargest ? kLargest : q < -kLargest ? -kLargest : q;
    int32_t top = (q + kRadix / 2) >> 7, rest = q - kRadix * top;
    high[i] = int8_t(top);
    low[i] = int8_t(rest);
    high_sum += top;
    low_sum += rest;
  }
  sums[0] = high_sum;
  sums[1] = low_sum;
  return step;
}

// See IntegerKernels::finish.
void finish(const int32_t* high, const int32_t* low, int64_t n, int32_t high_bias, int32_t low_bias, float scale,
            bool add, float* out) {
  for (int64_t i = 0; i < n; i++) {
    float value = scale * (float(high[i] - high_bias) * kRadix + float(low[i] - low_bias));
    out[i] = add ? out[i] + value : value;
  }
}

#if !defined(__clang__)
#pragma GCC pop_options
#endif

// The plain way to decode, for every rate and number of states: the reference of the others.
void decode_windows(const TrellisCode& code, const uint8_t* bytes, const uint8_t* after, int64_t chunks, uint8_t* out,
                    int64_t stride) {
  const uint8_t* table = code.linear ? code.windows : code.table;
  uint32_t mask = (1u << code.states) - 1;
  int64_t end = chunks * 2 * code.rate; // bytes of a column
  auto byte = [&](int64_t i, int64_t column) -> uint32_t {
    return i < end ? bytes[kWay * i + column] : after[kWay * (i - end) + column];
  };
  for (int64_t c = 0; c < chunks; c++) {
    for (int64_t r = 0; r < kChunk; r++) {
      int64_t bit = (c * kChunk + r) * code.rate, first = bit / 8;
      for (int64_t j = 0; j < kWay; j++) {
        uint32_t window = byte(first, j) | byte(first + 1, j) << 8;
        if (code.states > 8) window |= byte(first + 2, j) << 16;
        out[c * stride + kWay * r + j] = table[window >> bit % 8 & mask];
      }
    }
  }
}

} // namespace
} // namespace quiptools::QUIPTOOLS_ISA
