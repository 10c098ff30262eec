// Products of activations and weights of 8 bits on plain pointers: one table of functions per instruction set.
//
// Activations are rounded to whole numbers of 14 bits and a sign, at most kLargest in size, and split into two planes,
// q = 128 high + low with |high|, |low| <= 64. Weights are bytes with kBias added. All sums are whole numbers of 32 bits,
// so that their order does not matter: the same bytes on any number of threads and any instruction set. A plane of 7
// bits keeps the sum of two products within 16 bits, 2 * 255 * 64 < 2^15, which AVX2's multiply-add asks for.
#pragma once

#include <cstdint>

#include "instruction_sets.h"

namespace quiptools {

constexpr int kBias = 128;
constexpr float kTableUnit = 1.0f / 64;       // of a trellis's table
constexpr int kRadix = 128;                   // of a high plane's numbers
constexpr int kLargest = kRadix * 64 + 63;    // of a rounded activation
constexpr int64_t kMostColumns = 1 << 16;     // 2^16 * 255 * 64 < 2^31: no sum of 32 bits overflows
constexpr int64_t kChunk = 16;                // rows that are decoded at once
constexpr int64_t kWay = 4;                   // columns that are decoded at once, and lie together
constexpr int64_t kBytes = kChunk * kWay;     // a decoded chunk: byte 4 r + c is row r, column c
constexpr int64_t kStrip = 256;               // rows of one sequence of the trellis
constexpr int64_t kSlack = 64;                // bytes after a group that a kernel may read

// How windows of a stream become weights.
struct TrellisCode {
  int rate;                // bits a weight, 1 to 6
  int states;              // bits of a window, 8 to 12
  bool linear;             // table by index, the index a GF(2)-linear map of a window of 8 bits; else table by window
  uint64_t map;            // its rows as vgf2p8affineqb wants them: byte 7 - i picks the bits whose parity is bit i
  int entries;             // of the table
  const uint8_t* table;    // with kBias added: 64 entries if linear, else 2^states
  uint8_t windows[256];    // if linear: the entry of each window
  bool antisymmetric;      // if linear: the table's second half is the first with its signs turned
  // If linear, for shuffles of 16 entries: what the parts of window number w (of those that begin in `rate` bytes) add to
  // its entry's number: the low and high half of the byte in which it begins, and of the next. Bits 0 to 3 and 7: the
  // number in the table's first half; bit 5: whether the sign turns; bit 4 is always set.
  uint8_t halves[8][4][16];
};

struct IntegerKernels {
  // Rounds a vector of n numbers: planes of `padded` >= n bytes, zeros behind n, their sums; returns the step, by which
  // the whole numbers are to be multiplied.
  float (*round)(const float* x, int64_t n, int64_t padded, int8_t* high, int8_t* low, int32_t* sums);

  // A group of kWay columns, bytes interleaved, to `chunks` chunks, kBytes at out + i * stride each. What follows the
  // group's bytes in the stream (8 bytes) is at `after`; kSlack bytes behind the group may be read.
  void (*decode)(const TrellisCode& code, const uint8_t* bytes, const uint8_t* after, int64_t chunks, uint8_t* out,
                 int64_t stride);

  // One vector and `groups` groups of whole strips, one after the other: adds the products of both planes to
  // sums[row] (high) and sums[kStrip + row] (low). False, and nothing done, for codes that this is not made for.
  bool (*vector)(const TrellisCode& code, const uint8_t* bytes, int64_t groups, const int8_t* high, const int8_t* low,
                 int32_t* sums);

  // sums[v * kStrip + 16 i + r] += x[v] . (row r of chunk i) for `vectors` vectors of `groups` * kWay bytes at
  // x + v * x_stride; decoded chunks are those of group g at tile + i * stride + g * kBytes. groups: a multiple of 16.
  void (*multiply)(const uint8_t* tile, int64_t stride, int64_t chunks, int64_t groups, const int8_t* x,
                   int64_t x_stride, int64_t vectors, int32_t* sums);

  // Sums of both planes of a vector, each less its bias, as floats: out[r] = scale * (kRadix * high[r] + low[r]), or
  // added to what is there.
  void (*finish)(const int32_t* high, const int32_t* low, int64_t n, int32_t high_bias, int32_t low_bias, float scale,
                 bool add, float* out);

  // Decoded chunks, kBytes each, as columns of bfloat16, in kTableUnit, without the bias: out[j * stride + 16 i + r] is row r, column j
  // of chunk i. Null where there is no fast way.
  void (*spread)(const uint8_t* decoded, int64_t chunks, int64_t stride, uint16_t* out);
};

const IntegerKernels& integer_kernels(Isa isa);
const IntegerKernels& portable_integer_kernels();
const IntegerKernels* avx2_integer_kernels(); // null where this compiler does not target x86
const IntegerKernels* vbmi_integer_kernels();
const IntegerKernels* amx_integer_kernels();

} // namespace quiptools
