// A whole layer with incoherent weights: y = out_vector * T^T (W~ T' (in_vector * x)) + bias.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "cpu_transform.h"
#include "instruction_sets.h"
#include "product.h"

namespace quiptools {

// One side's rotation. vector: (width,) floats, or packed signs (uint8); scale: a number that multiplies it, or none.
struct Rotation {
  Transform transform;
  at::Tensor vector;
  std::optional<at::Tensor> scale;
};

Rotation read_rotation(const at::Tensor& vector, at::TensorList factors, int64_t power,
                       const std::optional<at::Tensor>& scale, Isa isa);

// x (..., in) of any floating dtype, in <= the width of `in`, the rest are zeros; y (..., rows) of x's dtype. Vectors of bfloat16
// for which the matrix is decoded are multiplied in that dtype if `half`.
at::Tensor rotated_layer(const Product& product, Rotation in, Rotation out, const at::Tensor& x,
                         const std::optional<at::Tensor>& bias, bool half, Isa isa);

} // namespace quiptools
