#include "cpu_transform.h"

#include <algorithm>
#include <cmath>

#include "cpu_scratch.h"
#include "sign_tiles.h"

namespace quiptools {
namespace {

constexpr int64_t kRows = 4;          // of a factor that are applied at once
constexpr int64_t kWorthAThread = 1 << 17; // multiply-adds

} // namespace

void Transform::use_tiles() {
  const SignTiles* tiles = amx_sign_tiles();
  int64_t inner = power;
  for (Factor& factor : factors) {
    int64_t entries = factor.order * factor.order;
    float size = std::abs(factor.matrix[0]);
    bool alike = std::all_of(factor.matrix, factor.matrix + entries, [size](float entry) { return std::abs(entry) == size; });
    if (tiles && alike && inner % kTileColumns == 0) {
      factor.size = size;
      factor.tiles.resize(tiles->packed(factor.order));
      tiles->pack(factor.matrix, factor.order, factor.tiles.data());
    }
    inner *= factor.order;
  }
}

float Transform::rest() const {
  float found = 1 / std::sqrt(static_cast<float>(power));
  for (const Factor& factor : factors)
    if (!factor.tiles.empty()) found *= factor.size;
  return found;
}

int64_t Transform::room() const {
  int64_t inner = power, behind = 0;
  for (const Factor& factor : factors) {
    if (!factor.tiles.empty()) behind = std::max(behind, kTileRows * inner);
    inner *= factor.order;
  }
  return width + behind;
}

float* Transform::apply(float* x, float* other) const {
  kernels->sylvester(x, width / power, power);
  int64_t inner = power;
  for (const Factor& factor : factors) {
    int64_t order = factor.order, parts = (order + kRows - 1) / kRows, span = order * inner;
    if (!factor.tiles.empty()) {
      const SignTiles& tiles = *amx_sign_tiles();
      uint16_t* split = scratch<SignTiles, uint16_t>(tiles.split(order, inner));
      // In ascending order: what a product writes behind its end is where the next one begins.
      for (int64_t at = 0; at < width; at += span) tiles.multiply(factor.tiles.data(), order, inner, x + at, split, other + at);
      std::swap(x, other);
      inner *= order;
      continue;
    }
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
    plan.factors.push_back({factor.const_data_ptr<float>(), factor.size(0), {}, 0});
    plan.width *= factor.size(0);
  }
  return plan;
}

} // namespace quiptools
