// E8 codes as bytes, for products in whole numbers: all coordinates are quarters.
#pragma once

#include <cstdint>

#include "integer_kernels.h"

namespace quiptools {

struct E8Tables {
  uint16_t patterns[256]; // of E8P12: bits 2 i and 2 i + 1 are coordinate i, less 1/2
  uint64_t points[256];   // of the small codebook: bytes in quarters, with kBias added
};

// `count` groups of kGroup columns of up to kChunk rows, whose codes are `stride` apart: the chunks of group g, two of kWay
// columns, go to out + 2 g * kBytes, with kBias added.
struct E8Bytes {
  // add: 4 times what is there, in units of 1/16, and these points in the same units.
  void (*e8p)(const E8Tables& tables, const uint16_t* codes, int64_t stride, int64_t rows, int64_t count, bool add,
              uint8_t* out);
  void (*e8)(const E8Tables& tables, const uint8_t* codes, int64_t stride, int64_t rows, int64_t count, uint8_t* out);
};

const E8Bytes* vbmi_e8_bytes(); // null where this compiler does not target x86

} // namespace quiptools
