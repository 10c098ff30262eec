// Products of activations with matrices of bytes, in whole numbers: what both codebooks share. A matrix is decoded a
// strip of kStrip rows and a block of columns at a time, into a tile that stays in the second-level cache.
#pragma once

#include <cstdint>
#include <span>

#include "integer_kernels.h"

namespace quiptools {

// A matrix whose weights are whole numbers from -128 to 127, but for a unit.
struct ByteMatrix {
  int64_t rows, columns;
  float unit;
  ByteMatrix(int64_t rows, int64_t columns, float unit) : rows(rows), columns(columns), unit(unit) {}
  virtual ~ByteMatrix() = default;

  // Groups [begin, begin + count) of kWay columns, of strip number `strip`: the chunk of rows i of group begin + g goes to
  // tile + i * stride + g * kBytes, with kBias added.
  virtual void decode(int64_t strip, int64_t begin, int64_t count, uint8_t* tile, int64_t stride) const = 0;

  // See IntegerKernels::vector, where planes begin at column 0: how many groups, from `begin` on, it has done.
  virtual int64_t vector(int64_t strip, int64_t begin, int64_t end, const int8_t* high, const int8_t* low,
                         int32_t* sums) const {
    return 0;
  }
};

// y (batch, rows) = x (batch, columns) times the sum of these matrices, all of one shape, `panel` vectors at a time. x is rounded to 14 bits and a
// sign, one step a vector: the same bytes on any number of threads and any instruction set.
void multiply_bytes(std::span<const ByteMatrix* const> terms, const IntegerKernels& kernels, const float* x,
                    int64_t batch, int64_t panel, float* y);

} // namespace quiptools
