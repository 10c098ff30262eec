// AQLM's products on plain pointers: what is faster with the instructions of one set than in plain C++.
#pragma once

#include <cstdint>

#include "instruction_sets.h"

namespace quiptools {

constexpr int64_t kEntries = 256;   // of a table: codes of 8 bits
constexpr int64_t kPlaces = 64;     // tables that share a step, and a register of codes: 64 * 255 < 2^16, no sum overflows
constexpr int64_t kOutputsTogether = 256; // outputs that are looked up together: four registers of codes
constexpr float kMiddle = 32768;    // what a table's whole numbers are raised by, so that they have no sign

// The tables of one vector: of the codewords' products with it whole numbers of 16 bits in steps of their block of
// kPlaces, the low bytes of a table's entries before the high ones.
struct Planes {
  uint8_t* bytes; // (places, 2, kEntries)
  float* steps;   // (blocks)
};

struct AQLMKernels {
  // Rounds the tables of places [first, first + here), here <= kPlaces, into `planes`, where theirs begin. Place n
  // holds the products of x + n / count * width with the codewords of codebook n % count; words (count, width,
  // kEntries); room for kPlaces * kEntries numbers.
  void (*tabulate)(const float* x, const float* words, int64_t width, int64_t count, int64_t first, int64_t here,
                   const Planes& planes, float* room);

  // y[v * stride + r] for r in [0, rows), rows <= kOutputsTogether: the sum of what the codes (rows, places), `bytes` apart, look up
  // in the tables of vector v.
  void (*look_up)(const uint8_t* codes, int64_t bytes, int64_t rows, int64_t places, const Planes* planes, int64_t batch,
                  int64_t stride, float* y);

  // The sum over groups k and codebooks m of the inner product of x + 8 k with the codeword of 8 numbers of half
  // precision at words + (m * size + codes[k * count + m]) * 8.
  float (*dot)(const float* x, const uint16_t* words, int64_t size, const uint16_t* codes, int64_t groups, int64_t count);

  // 8 * count codes of 12 bits; reads four bytes beyond them.
  void (*unpack12)(const uint8_t* packed, int64_t count, uint16_t* codes);
};

// Null where a set has nothing of its own; a function is null where it has not that.
const AQLMKernels* aqlm_kernels(Isa isa);
const AQLMKernels* avx2_aqlm(); // null where this compiler does not target x86
const AQLMKernels* vbmi_aqlm(); // the same

} // namespace quiptools
