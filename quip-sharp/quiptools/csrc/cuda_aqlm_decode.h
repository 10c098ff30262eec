// Which codes make up a group of an AQLM matrix, and what they stand for. Runs on the device and, for the tests, on the
// host. The layout is that of cpu_aqlm.h.
#pragma once

#include "cuda_decode.h"

namespace quiptools {

struct CudaAQLM {
  const uint8_t* codes;   // (rows, bytes)
  const float* codebooks; // (count, 1 << bits, group)
  int bits, count, group; // of a code; codebooks; weights to a group
  int64_t rows, columns, bytes, groups;
};

// Code n of a row whose bytes begin at `row`: no byte behind the last one that it needs is read.
QUIPTOOLS_BOTH uint32_t code_at(const uint8_t* row, int64_t n, int bits) {
  if (bits == 8) return row[n];
  int64_t bit = n * bits;
  int shift = static_cast<int>(bit % 8);
  const uint8_t* place = row + bit / 8;
  uint32_t found = place[0];
  if (shift + bits > 8) found |= static_cast<uint32_t>(place[1]) << 8;
  if (shift + bits > 16) found |= static_cast<uint32_t>(place[2]) << 16;
  return found >> shift & ((1u << bits) - 1);
}

// The codeword that code `k` of group g of a row picks, `group` numbers of `codebooks`.
QUIPTOOLS_BOTH const float* word_at(const CudaAQLM& m, const float* codebooks, const uint8_t* row, int64_t g, int k) {
  int64_t entry = (static_cast<int64_t>(k) << m.bits) + code_at(row, g * m.count + k, m.bits);
  return codebooks + entry * m.group;
}

} // namespace quiptools
