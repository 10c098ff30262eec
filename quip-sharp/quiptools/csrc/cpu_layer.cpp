#include "cpu_layer.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace quiptools {
namespace {

using at::Tensor;

// What multiplies a side's coordinates: the vector, its scale, and what the transform leaves to be multiplied by.
std::vector<float> factors_of(const Rotation& side, const Kernels& kernels) {
  int64_t width = side.transform.width;
  std::vector<float> found(width);
  float scale = 1 / std::sqrt(static_cast<float>(side.transform.power));
  if (side.scale) scale *= side.scale->item<float>();
  if (side.vector.scalar_type() == at::kByte) {
    kernels.signs(side.vector.const_data_ptr<uint8_t>(), width, found.data());
    for (float& value : found) value *= scale;
  } else {
    std::fill(found.begin(), found.end(), scale);
    Tensor vector = side.vector.scalar_type() == at::kBFloat16 ? side.vector : side.vector.to(at::kFloat);
    if (vector.scalar_type() == at::kBFloat16) {
      kernels.load_bfloat16(reinterpret_cast<const uint16_t*>(vector.const_data_ptr<at::BFloat16>()), found.data(),
                            width, found.data());
    } else {
      kernels.load_floats(vector.const_data_ptr<float>(), found.data(), width, found.data());
    }
  }
  return found;
}

const uint16_t* bfloat16s(const Tensor& t) { return reinterpret_cast<const uint16_t*>(t.const_data_ptr<at::BFloat16>()); }
uint16_t* mutable_bfloat16s(Tensor& t) { return reinterpret_cast<uint16_t*>(t.mutable_data_ptr<at::BFloat16>()); }

// x (vectors, in) to (vectors, width): multiplied, transformed, in `dtype`.
Tensor rotated(const Tensor& x, const Rotation& side, const Kernels& kernels, at::ScalarType dtype) {
  int64_t in = x.size(1), width = side.transform.width;
  std::vector<float> factors = factors_of(side, kernels);
  Tensor y = at::empty({x.size(0), width}, x.options().dtype(dtype));
  for_vectors(x.size(0), [&](int64_t n, std::vector<float>& work) {
    work.resize(2 * width);
    if (x.scalar_type() == at::kFloat) {
      kernels.load_floats(x.const_data_ptr<float>() + n * in, factors.data(), in, work.data());
    } else {
      kernels.load_bfloat16(bfloat16s(x) + n * in, factors.data(), in, work.data());
    }
    std::fill(work.begin() + in, work.begin() + width, 0.0f);
    const float* found = side.transform.apply(work.data(), work.data() + width);
    if (dtype == at::kFloat) {
      std::copy_n(found, width, y.mutable_data_ptr<float>() + n * width);
    } else {
      kernels.store_bfloat16(found, width, mutable_bfloat16s(y) + n * width);
    }
  });
  return y;
}

// z (vectors, width) to (vectors, width) of `dtype`: transformed, multiplied, the bias added.
Tensor rotated_back(const Tensor& z, const Rotation& side, const std::optional<Tensor>& bias, const Kernels& kernels,
                    at::ScalarType dtype) {
  int64_t width = side.transform.width;
  std::vector<float> factors = factors_of(side, kernels), ones(width, 1.0f);
  Tensor added = bias ? bias->to(at::kFloat).contiguous() : Tensor();
  const float* constant = bias ? added.const_data_ptr<float>() : nullptr;
  Tensor y = at::empty({z.size(0), width}, z.options().dtype(dtype));
  for_vectors(z.size(0), [&](int64_t n, std::vector<float>& work) {
    work.resize(2 * width);
    if (z.scalar_type() == at::kFloat) {
      std::copy_n(z.const_data_ptr<float>() + n * width, width, work.data());
    } else {
      kernels.load_bfloat16(bfloat16s(z) + n * width, ones.data(), width, work.data());
    }
    float* found = side.transform.apply(work.data(), work.data() + width);
    kernels.load_floats(found, factors.data(), width, found);
    if (constant)
      for (int64_t i = 0; i < width; i++) found[i] += constant[i];
    if (dtype == at::kFloat) {
      std::copy_n(found, width, y.mutable_data_ptr<float>() + n * width);
    } else {
      kernels.store_bfloat16(found, width, mutable_bfloat16s(y) + n * width);
    }
  });
  return y;
}

} // namespace

Rotation read_rotation(const Tensor& vector, at::TensorList factors, int64_t power, const std::optional<Tensor>& scale,
                       Isa isa) {
  Transform transform = read_transform(factors, power, float_kernels(isa));
  bool packed = vector.scalar_type() == at::kByte;
  TORCH_CHECK_VALUE(vector.dim() == 1 && vector.is_contiguous() && vector.device().is_cpu() &&
                        (packed ? vector.size(0) * 8 >= transform.width
                                : vector.is_floating_point() && vector.size(0) == transform.width),
                    "a side's vector has ", transform.width, " floats, or as many packed signs");
  TORCH_CHECK_VALUE(!scale || scale->numel() == 1, "a scale is one number");
  return {std::move(transform), vector, scale};
}

Tensor rotated_layer(const Product& product, const Rotation& in, const Rotation& out, const Tensor& x,
                     const std::optional<Tensor>& bias, bool half, Isa isa) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.is_floating_point() && x.device().is_cpu() && x.size(-1) <= product.columns() &&
                        in.transform.width == product.columns() && out.transform.width == product.rows(),
                    "x ends in at most ", product.columns(), " floats, and the sides have the widths of the matrix");
  TORCH_CHECK_VALUE(!bias || (bias->dim() == 1 && bias->size(0) == product.rows()), "a bias has ", product.rows(), " numbers");
  const Kernels& kernels = float_kernels(isa);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end() - 1);
  shape.push_back(product.rows());
  auto dtype = x.scalar_type() == at::kBFloat16 ? at::kBFloat16 : at::kFloat;
  if (x.numel() == 0) return at::empty(shape, x.options()); // no vectors
  Tensor vectors = x.reshape({-1, x.size(-1)}).to(dtype).contiguous(), z;
  if (vectors.size(0) > kDirectBatch) {
    z = multiply_decoded(product, rotated(vectors, in, kernels, half ? dtype : at::kFloat));
  } else {
    Tensor turned = rotated(vectors, in, kernels, at::kFloat);
    z = at::empty({vectors.size(0), product.rows()}, turned.options());
    product.direct(turned.const_data_ptr<float>(), vectors.size(0), z.mutable_data_ptr<float>());
  }
  return rotated_back(z, out, bias, kernels, dtype).to(x.scalar_type()).view(shape);
}

} // namespace quiptools
