// A code to its eight numbers. Runs on the device and, for the tests, on the host.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define QUIPTOOLS_BOTH __host__ __device__ __forceinline__
#else
#define QUIPTOOLS_BOTH inline
#endif

namespace quiptools {

constexpr float kUnit = 0.25f; // all coordinates are whole multiples of it

// Eight whole numbers in units of 1/4 in two words, a byte each, the first lowest.
struct Point {
  uint32_t low, high;
};

// A row of eight floats of a table as a Point.
QUIPTOOLS_BOTH Point pack(const float* row) {
  Point p{0, 0};
  for (int i = 0; i < 4; i++) {
    p.low |= (static_cast<uint32_t>(static_cast<int>(row[i] / kUnit)) & 0xFF) << 8 * i;
    p.high |= (static_cast<uint32_t>(static_cast<int>(row[i + 4] / kUnit)) & 0xFF) << 8 * i;
  }
  return p;
}

QUIPTOOLS_BOTH float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

QUIPTOOLS_BOTH uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Number i of a Point, in units of 1/4. The byte becomes the last one of 2^23 + 128 + number, which is then taken off:
// converting integers is slow on a GPU.
QUIPTOOLS_BOTH float coordinate(const Point& p, int i) {
  uint32_t byte = (i < 4 ? p.low : p.high) >> 8 * (i & 3) & 0xFF;
  return as_float(0x4B000000u | (byte ^ 0x80)) - 8388736.0f;
}

// out += scale * the point of E8P12 with this code; `pattern` is the row of its pattern.
QUIPTOOLS_BOTH void add_e8p(uint32_t code, const Point& pattern, float scale, float* out) {
  uint32_t signs = code >> 8 & 127;
  uint32_t parity = signs ^ signs >> 4; // the last sign is the parity of the others
  parity ^= parity >> 2;
  parity ^= parity >> 1;
  signs |= (parity & 1) << 7;
  float shift = as_float(0x3F800000u | (code >> 15 & 1) << 31); // +-1
  for (int i = 0; i < 8; i++) {
    float value = as_float(as_bits(coordinate(pattern, i)) ^ (signs >> i & 1) << 31);
    out[i] += scale * kUnit * (value + shift);
  }
}

// out += scale * the point of the small codebook.
QUIPTOOLS_BOTH void add_e8(const Point& point, float scale, float* out) {
  for (int i = 0; i < 8; i++) out[i] += scale * kUnit * coordinate(point, i);
}

} // namespace quiptools
