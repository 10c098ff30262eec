// A matrix as GPTQ stores it.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "gptq_kernels.h"
#include "product.h"

namespace quiptools {

class GPTQProduct final : public Product {
 public:
  // words (runs * bits, out) and zeros (groups, runs of out * bits) int32, scales (groups, out) float16.
  GPTQProduct(const at::Tensor& words, const at::Tensor& zeros, const at::Tensor& scales, int64_t columns, int64_t bits,
              int64_t group_size, Isa isa);
  int64_t rows() const override { return matrix_.rows; }
  int64_t columns() const override { return matrix_.columns; }

  // x is rounded to 14 bits and a sign, with a step for each kRounded columns at most.
  void direct(const float* x, int64_t batch, float* y) const override;
  at::Tensor decoded(int64_t begin, int64_t count, at::ScalarType dtype, const at::Tensor& room) const override;

 private:
  GPTQMatrix matrix_;
  std::vector<GPTQBlock> blocks_;
  int64_t places_ = 0; // runs of a plane
  Isa isa_;
  const GPTQKernels& kernels_;
};

// x W^T + bias of x (..., columns) in its dtype; half: long products may be computed in bfloat16.
at::Tensor plain_layer(const Product& product, const at::Tensor& x, const std::optional<at::Tensor>& bias, bool half);

} // namespace quiptools
