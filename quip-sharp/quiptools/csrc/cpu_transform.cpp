#include "cpu_transform.h"

#include <algorithm>
#include <cmath>

namespace quiptools {
namespace {

constexpr int64_t kRows = 4;          // of a factor that are applied at once
constexpr int64_t kWorthAThread = 1 << 17; // multiply-adds

} // namespace

float* Transform::apply(float* x, float* other) const {
  kernels->sylvester(x, width / power, power);
  int64_t inner = power;
  for (const Factor& factor : factors) {
    int64_t order = factor.order, parts = (order + kRows - 1) / kRows, span = order * inner;
    int64_t grain = std::max<int64_t>(1, kWorthAThread / (kRows * span));
    at::parallel_for(0, width / span * parts, grain, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n++) {
        int64_t at = n / parts * span, row = n % parts * kRows;
        kernels->dense(factor.matrix, x + at, other + at, order, inner, row, std::min(row + kRows, order));
      }
    });
    std::swap(x, other);
    inner *= order;
  }
  return x;
}

Transform read_transform(at::TensorList factors, int64_t power, const Kernels& kernels) {
  Transform plan{&kernels, {}, power, power};
  TORCH_CHECK_VALUE(power > 0 && (power & (power - 1)) == 0, power, " is no power of two");
  for (const at::Tensor& factor : factors) {
    TORCH_CHECK_VALUE(factor.dim() == 2 && factor.size(0) == factor.size(1) && factor.scalar_type() == at::kFloat &&
                          factor.is_contiguous(),
                      "a factor is a square float32 matrix without gaps");
    plan.factors.push_back({factor.const_data_ptr<float>(), factor.size(0)});
    plan.width *= factor.size(0);
  }
  return plan;
}

} // namespace quiptools
