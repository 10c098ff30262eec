// Where the window of a trellis's weight lies, and what it stands for. Runs on the device and, for the tests, on the host.
// The layout is that of cpu_trellis_product.h.
#pragma once

#include "cuda_decode.h"

namespace quiptools {

constexpr int kCudaStrip = 256; // rows of one sequence
constexpr int kCudaWay = 4;     // columns whose bytes are interleaved
constexpr int kMostStates = 12; // bits of a window
constexpr float kCudaTableUnit = 1.0f / 64;

struct CudaTrellis {
  const uint8_t* codes;
  const int8_t* table;
  const uint8_t* masks; // or null: the table goes by window
  int rate, states, mask_count;
  int64_t rows, columns;
};

// One strip and four columns of it, fewer at the end.
struct CudaGroup {
  const uint8_t* bytes; // of the group, or of the strip where streams are no whole bytes
  int64_t first_bit;    // of the group's first stream, in that case
  int way, stream_bits;
  bool whole_bytes;
};

QUIPTOOLS_BOTH CudaGroup group_of(const CudaTrellis& m, int64_t strip, int64_t g) {
  CudaGroup group;
  int64_t left = m.rows - strip * kCudaStrip, columns_left = m.columns - g * kCudaWay;
  int rows = static_cast<int>(left < kCudaStrip ? left : kCudaStrip);
  group.way = static_cast<int>(columns_left < kCudaWay ? columns_left : kCudaWay);
  group.stream_bits = rows * m.rate;
  group.whole_bytes = rows % 8 == 0;
  group.bytes = m.codes + strip * (kCudaStrip / 8) * m.rate * m.columns;
  group.first_bit = g * kCudaWay * group.stream_bits;
  if (group.whole_bytes) group.bytes += group.first_bit / 8;
  return group;
}

// Byte b of the stream of column j, which goes on from its beginning where it ends.
QUIPTOOLS_BOTH uint32_t stream_byte(const CudaGroup& group, int j, int b) {
  if (group.whole_bytes) return group.bytes[group.way * (b % (group.stream_bits / 8)) + j];
  uint32_t found = 0;
  for (int i = 0; i < 8; i++) {
    int64_t bit = group.first_bit + static_cast<int64_t>(j) * group.stream_bits + (8 * b + i) % group.stream_bits;
    found |= static_cast<uint32_t>(group.bytes[bit / 8] >> bit % 8 & 1) << i;
  }
  return found;
}

// The windows of four columns in row `row` of the strip; those of columns that there are not are of no meaning.
QUIPTOOLS_BOTH void windows_of(const CudaTrellis& m, const CudaGroup& group, int row, uint32_t windows[kCudaWay]) {
  int bit = row * m.rate, first = bit / 8, shift = bit % 8;
  for (int j = 0; j < kCudaWay; j++) {
    uint32_t found = 0;
    if (j < group.way) {
      found = stream_byte(group, j, first) | stream_byte(group, j, first + 1) << 8;
      if (m.states > 8) found |= stream_byte(group, j, first + 2) << 16;
    }
    windows[j] = found >> shift & ((1u << m.states) - 1);
  }
}

// The table's entry of a window: by its number, whose bit i is the parity of the window's bits in masks[i].
QUIPTOOLS_BOTH int8_t entry_of(const CudaTrellis& m, uint32_t window) {
  if (!m.masks) return m.table[window];
  uint32_t number = 0;
  for (int i = 0; i < m.mask_count; i++) {
    uint32_t parity = window & m.masks[i];
    parity ^= parity >> 4;
    parity ^= parity >> 2;
    parity ^= parity >> 1;
    number |= (parity & 1) << i;
  }
  return m.table[number];
}

} // namespace quiptools
