// A matrix of E8 codes (casp_quip_sharp/codebooks.py) on a CPU.
#pragma once

#include "cpu_kernels.h"
#include "ops.h"
#include "product.h"

namespace quiptools {

class E8PProduct : public Product {
 public:
  E8PProduct(const Codes& codes, Isa isa);
  int64_t rows() const override;
  int64_t columns() const override;
  void direct(const float* x, int64_t batch, float* y) const override;
  at::Tensor decoded(int64_t begin, int64_t count, at::ScalarType dtype) const override;

  // The rows as they are, (count, columns).
  at::Tensor rows_decoded(int64_t begin, int64_t count, at::ScalarType dtype) const;

 private:
  Codes codes_;
  Matrix matrix_;
  const Kernels& kernels_;
};

} // namespace quiptools
