// A quantized matrix that activations are multiplied by, whatever its codes are.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace quiptools {

// Vectors up to which a matrix is multiplied straight from its codes; more are worth decoding it.
constexpr int64_t kDirectBatch = 16;

struct Product {
  virtual ~Product() = default;
  virtual int64_t rows() const = 0;
  virtual int64_t columns() const = 0;

  // y[b][r] = sum_k W[r][k] x[b][k] for up to kDirectBatch vectors; the same bytes on any number of threads.
  virtual void direct(const float* x, int64_t batch, float* y) const = 0;

  // Rows [begin, begin + count), begin a multiple of kTileRows: a (columns, count) tensor of this dtype, float32 or
  // bfloat16, which may be the transpose of what lies in memory.
  virtual at::Tensor decoded(int64_t begin, int64_t count, at::ScalarType dtype) const = 0;
};

// x W^T of x (vectors, columns), float32 or bfloat16, in that dtype: tiles of W are decoded for PyTorch's product.
at::Tensor multiply_decoded(const Product& product, const at::Tensor& x);

// x W^T in float32; the factors of more than kDirectBatch vectors are rounded to `dtype`, float32 or bfloat16.
at::Tensor multiply(const Product& product, const at::Tensor& x, at::ScalarType dtype);

} // namespace quiptools
