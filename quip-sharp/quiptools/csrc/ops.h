// What the operators of all devices share: the tensors of a quantized matrix and their checks.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>

namespace quiptools {

// codes (out, in / 8): uint8 = the small codebook, int16 = E8P12; second: the residual's codes, or undefined.
struct Codes {
  at::Tensor first, second, patterns, points;
  double residual_scale;
};

inline Codes check_codes(const at::Tensor& codes, const std::optional<at::Tensor>& residual, const at::Tensor& patterns,
                         const at::Tensor& points, double residual_scale) {
  auto is_book = [](const at::Tensor& t) { return t.scalar_type() == at::kByte || t.scalar_type() == at::kShort; };
  TORCH_CHECK_VALUE(codes.dim() == 2 && is_book(codes) && codes.is_contiguous(),
                    "codes are a uint8 or int16 matrix without gaps");
  TORCH_CHECK_VALUE(!residual || (is_book(*residual) && residual->sizes() == codes.sizes() &&
                                  residual->is_contiguous() && residual->device() == codes.device() &&
                                  codes.scalar_type() == at::kShort),
                    "residual codes are a uint8 or int16 matrix of the shape and device of int16 codes");
  for (const at::Tensor& table : {patterns, points}) {
    TORCH_CHECK_VALUE(table.scalar_type() == at::kFloat && table.is_contiguous() && table.dim() == 2 &&
                          table.size(0) == 256 && table.size(1) == 8 && table.device() == codes.device(),
                      "a table is a (256, 8) float32 matrix on the device of the codes");
  }
  return {codes, residual.value_or(at::Tensor()), patterns, points, residual_scale};
}

inline void check_vectors(const at::Tensor& x, const Codes& codes) {
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(1) == codes.first.size(1) * 8 && x.is_floating_point() &&
                        x.device() == codes.first.device(),
                    "x is a (vectors, ", codes.first.size(1) * 8, ") matrix of floats on the device of the codes");
}

} // namespace quiptools
