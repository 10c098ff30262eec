#include "product.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>

namespace quiptools {

namespace {
constexpr int64_t kTileRows = 1024; // decoded at once: enough for PyTorch's product to be at its best
} // namespace

at::Tensor tile_of(const at::Tensor& room, int64_t height, int64_t width, at::ScalarType dtype) {
  if (!room.defined()) return at::empty({height, width}, at::TensorOptions().dtype(dtype));
  return room.narrow(0, 0, height * width).view({height, width});
}

at::Tensor multiply_decoded(const Product& product, const at::Tensor& x) {
  int64_t rows = product.rows();
  at::Tensor y = at::empty({x.size(0), rows}, x.options());
  at::Tensor room = at::empty({std::min(kTileRows, rows) * product.columns()}, x.options());
  for (int64_t row = 0; row < rows; row += kTileRows) {
    int64_t count = std::min(kTileRows, rows - row);
    at::Tensor part = y.narrow(1, row, count);
    at::mm_out(part, x, product.decoded(row, count, x.scalar_type(), room));
  }
  return y;
}

at::Tensor multiply(const Product& product, const at::Tensor& x, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(1) == product.columns() && x.is_floating_point() && x.device().is_cpu(),
                    "x is a (vectors, ", product.columns(), ") matrix of floats on the device of the codes");
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kBFloat16, "factors are float32 or bfloat16");
  at::Tensor vectors = x.to(at::kFloat).contiguous();
  if (!product.is_direct(x.size(0)))
    return multiply_decoded(product, vectors.to(dtype)).to(at::kFloat);
  at::Tensor y = at::empty({x.size(0), product.rows()}, vectors.options());
  if (y.numel()) product.direct(vectors.const_data_ptr<float>(), x.size(0), y.mutable_data_ptr<float>());
  return y;
}

} // namespace quiptools
