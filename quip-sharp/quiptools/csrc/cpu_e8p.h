// A matrix of E8 codes (casp_quip_sharp/codebooks.py) on a CPU.
#pragma once

#include "cpu_kernels.h"
#include "ops.h"
#include "product.h"

namespace quiptools {

class E8PProduct : public Product {
 public:
  // rounds: whether x may be rounded to 14 bits and a sign, as where it has no more than half precision.
  E8PProduct(const Codes& codes, bool rounds, Isa isa);
  int64_t rows() const override;
  int64_t columns() const override;
  bool rounds() const override { return rounds_; }

  // Two stages are decoded in turn or multiplied in turn: for many vectors one product of bfloat16 is faster.
  bool is_direct(int64_t batch) const override {
    return batch <= kDirectBatch || (rounds_ && isa_ == Isa::amx && matrix_.residual_book == Book::none);
  }

  int64_t panel() const override { return 256; }

  // x is taken as it is, or where it may be rounded, with AVX-512 VBMI and from two vectors on, in whole numbers.
  void direct(const float* x, int64_t batch, float* y) const override;
  at::Tensor decoded(int64_t begin, int64_t count, at::ScalarType dtype, const at::Tensor& room) const override;

  // The rows as they are, (count, columns).
  at::Tensor rows_decoded(int64_t begin, int64_t count, at::ScalarType dtype, const at::Tensor& room) const;

 private:
  Codes codes_;
  Matrix matrix_;
  bool rounds_;
  Isa isa_;
  const Kernels& kernels_;
};

} // namespace quiptools
