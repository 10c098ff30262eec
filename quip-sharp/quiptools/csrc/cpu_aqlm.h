// A matrix as AQLM stores it.
#pragma once

#include <ATen/core/Tensor.h>

#include "aqlm_kernels.h"
#include "product.h"

namespace quiptools {

class AQLMProduct final : public Product {
 public:
  // codes (out, bytes) uint8, those of a row packed group by group, a group's by codebook, `bits` each from the lowest
  // bit of the row's first byte on (see AQLM/casp_aqlm/packing.py); codebooks (M, 2^bits, g) and scales (out)
  // float16. rounds: what is looked up may be rounded to 16 bits.
  AQLMProduct(const at::Tensor& codes, const at::Tensor& codebooks, const at::Tensor& scales, int64_t columns,
              int64_t bits, bool rounds, Isa isa);
  int64_t rows() const override { return rows_; }
  int64_t columns() const override { return columns_; }
  void direct(const float* x, int64_t batch, float* y) const override;
  at::Tensor decoded(int64_t begin, int64_t count, at::ScalarType dtype, const at::Tensor& room) const override;

 private:
  at::Tensor tables(const at::Tensor& x) const;
  void look_up(const at::Tensor& x, int64_t batch, float* y) const;
  void look_up_rounded(const at::Tensor& x, int64_t batch, float* y) const;
  void multiply_codewords(const float* x, int64_t batch, float* y) const;
  void unpack(int64_t row, uint16_t* out) const;

  const AQLMKernels* kernels_;
  bool rounds_;
  at::Tensor codebooks_;
  const uint8_t* codes_;
  const at::Half* scales_;
  int64_t rows_, columns_, bytes_, groups_, count_, size_, group_, bits_;
};

} // namespace quiptools
