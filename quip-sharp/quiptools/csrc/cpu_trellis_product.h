// A matrix of trellis codes (casp_quip_sharp/trellis): how its bits lie, products and decoding on a CPU.
//
// Rows are cut into strips of kStrip, the last one shorter. A strip holds one cyclic stream of rate * rows bits for each
// column; weight t is the table's entry for the window of `states` bits that begins at bit rate * t. Four columns at a
// time (fewer at the end) lie with their bytes interleaved; where a stream is no whole number of bytes (a strip of rows
// that are no multiple of 8), the streams follow each other bit by bit.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "integer_kernels.h"
#include "product.h"

namespace quiptools {

struct TrellisMatrix {
  int64_t rows, columns;
  const uint8_t* codes;
  TrellisCode code;
};

class TrellisProduct : public Product {
 public:
  // codes: uint8; table: int8 in units of 1/64, 2^states entries, or with masks (uint8, up to 8) 2^(number of masks): index bit i is the
  // parity of a window's bits in masks[i].
  TrellisProduct(const at::Tensor& codes, int64_t rows, int64_t columns, int64_t rate, const at::Tensor& table,
                 const std::optional<at::Tensor>& masks, Isa isa);
  int64_t rows() const override { return matrix_.rows; }
  int64_t columns() const override { return matrix_.columns; }

  bool rounds() const override { return true; }
  bool is_direct(int64_t batch) const override { return has_tiles_ || batch <= kDirectBatch; }

  // x is rounded to 14 bits and a sign.
  void direct(const float* x, int64_t batch, float* y) const override;
  at::Tensor decoded(int64_t begin, int64_t count, at::ScalarType dtype, const at::Tensor& room) const override;

 private:
  at::Tensor codes_;
  std::vector<uint8_t> table_;
  TrellisMatrix matrix_;
  const IntegerKernels& kernels_;
  bool has_tiles_; // of whole numbers, which AMX multiplies as fast as those of bfloat16
};

} // namespace quiptools
