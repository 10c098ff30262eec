// A quantized matrix that activations are multiplied by, whatever its codes are.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace quiptools {

// Vectors up to which any matrix is multiplied straight from its codes.
constexpr int64_t kDirectBatch = 16;

struct Product {
  virtual ~Product() = default;
  virtual int64_t rows() const = 0;
  virtual int64_t columns() const = 0;

  // Whether x may be rounded to 14 bits and a sign.
  virtual bool rounds() const { return false; }

  // Whether `direct` is the fastest way to multiply so many vectors, at least up to kDirectBatch; more may be worth
  // decoding the matrix.
  virtual bool is_direct(int64_t batch) const { return batch <= kDirectBatch; }

  // How many vectors `direct` multiplies before it decodes the matrix again: their planes should stay in the second-level
  // cache, the more so the cheaper decoding is.
  virtual int64_t panel() const { return 128; }

  // y[b][r] = sum_k W[r][k] x[b][k]; the same bytes on any number of threads.
  virtual void direct(const float* x, int64_t batch, float* y) const = 0;

  // Rows [begin, begin + count), begin a multiple of kTileRows: a (columns, count) tensor of this dtype, float32 or
  // bfloat16, which may be the transpose of what lies in memory; that is `room`, see `tile_of`.
  virtual at::Tensor decoded(int64_t begin, int64_t count, at::ScalarType dtype, const at::Tensor& room) const = 0;
};

// A (height, width) matrix at the beginning of `room`, a vector of this dtype, or a new one where that is undefined: pages
// that are new for each tile cost as much as decoding it.
at::Tensor tile_of(const at::Tensor& room, int64_t height, int64_t width, at::ScalarType dtype);

// x W^T of x (vectors, columns), float32 or bfloat16, in that dtype: tiles of W are decoded for PyTorch's product.
at::Tensor multiply_decoded(const Product& product, const at::Tensor& x);

// x W^T in float32; the factors of vectors for which it is decoded are rounded to `dtype`, float32 or bfloat16.
at::Tensor multiply(const Product& product, const at::Tensor& x, at::ScalarType dtype);

} // namespace quiptools
