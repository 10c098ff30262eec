#include "cpu_gptq.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "integer_kernels.h"

namespace quiptools {
namespace {

constexpr int64_t kStripOutputs = 256; // that one thread walks down at once: neighbours in memory
constexpr int64_t kPerThread = 4;      // parts of work to a thread

int64_t runs_of(int64_t codes) { return (codes + kRun - 1) / kRun; }

} // namespace

const GPTQKernels& gptq_kernels(Isa isa) {
  switch (isa) {
    case Isa::amx:
    case Isa::vbmi: return *vbmi_gptq_kernels();
    case Isa::avx512:
    case Isa::avx2: return *avx2_gptq_kernels();
    default: return portable_gptq_kernels();
  }
}

GPTQProduct::GPTQProduct(const at::Tensor& words, const at::Tensor& zeros, const at::Tensor& scales, int64_t columns,
                         int64_t bits, int64_t group_size, Isa isa)
    : isa_(isa), kernels_(gptq_kernels(isa)) {
  TORCH_CHECK_VALUE((bits == 2 || bits == 3 || bits == 4 || bits == 8) && columns > 0 && (group_size == -1 || group_size > 0),
                    "GPTQ has 2, 3, 4 or 8 bits, columns, and groups of columns (-1: all)");
  int64_t group = group_size == -1 ? columns : std::min(group_size, columns), groups = (columns + group - 1) / group;
  auto is_matrix = [](const at::Tensor& t, int64_t height, at::ScalarType dtype) {
    return t.dim() == 2 && t.size(0) == height && t.scalar_type() == dtype && t.is_contiguous() && t.device().is_cpu();
  };
  TORCH_CHECK_VALUE(is_matrix(words, runs_of(columns) * bits, at::kInt), "codes of ", columns, " columns of ", bits,
                    " bits are an int32 matrix of ", runs_of(columns) * bits, " rows");
  int64_t rows = words.size(1);
  TORCH_CHECK_VALUE(rows > 0 && is_matrix(scales, groups, at::kHalf) && scales.size(1) == rows,
                    "scales are a float16 matrix (", groups, ", ", rows, ")");
  TORCH_CHECK_VALUE(is_matrix(zeros, groups, at::kInt) && zeros.size(1) == runs_of(rows) * bits,
                    "zeros are an int32 matrix (", groups, ", ", runs_of(rows) * bits, ")");
  matrix_ = {static_cast<int>(bits),
             rows,
             columns,
             group,
             reinterpret_cast<const uint32_t*>(words.const_data_ptr<int32_t>()),
             reinterpret_cast<const uint8_t*>(zeros.const_data_ptr<int32_t>()),
             4 * zeros.size(1),
             reinterpret_cast<const uint16_t*>(scales.const_data_ptr<at::Half>())};
  for (int64_t first = 0; first < columns;) {
    int64_t last = std::min({columns, (first / group + 1) * group, (first / kRounded + 1) * kRounded});
    int64_t run = first / kRun, runs = runs_of(last) - run;
    blocks_.push_back({first / group, run, runs, places_});
    places_ += runs;
    first = last;
  }
}

void GPTQProduct::direct(const float* x, int64_t batch, float* y) const {
  const GPTQMatrix& m = matrix_;
  auto round = integer_kernels(isa_).round;
  int64_t blocks = static_cast<int64_t>(blocks_.size()), stride = places_ * kRun;
  std::vector<int8_t> planes(2 * batch * stride);
  std::vector<float> steps(batch * blocks);
  std::vector<int32_t> totals(batch * blocks);
  int8_t order[kRun]; // where a column of a run lies
  for (int q = 0; q < kQuads; q++)
    for (int b = 0; b < 4; b++) order[column_of(m.bits, q, b)] = static_cast<int8_t>(4 * q + b);
  for (int64_t v = 0; v < batch; v++) {
    int64_t first = 0;
    for (int64_t n = 0; n < blocks; n++) {
      const GPTQBlock& block = blocks_[n];
      int64_t last = std::min({m.columns, (block.group + 1) * m.group, (first / kRounded + 1) * kRounded});
      int8_t high[kRounded], low[kRounded];
      int32_t sums[2];
      steps[v * blocks + n] = round(x + v * m.columns + first, last - first, last - first, high, low, sums);
      totals[v * blocks + n] = kRadix * sums[0] + sums[1];
      int8_t* place = &planes[2 * v * stride + kRun * block.place];
      for (int64_t k = first; k < last; k++) {
        int64_t at = (k / kRun - block.run) * kRun + order[k % kRun];
        place[at] = high[k - first];
        place[stride + at] = low[k - first];
      }
      first = last;
    }
  }
  std::fill_n(y, batch * m.rows, 0.0f);
  int64_t share = (m.rows + kPerThread * at::get_num_threads() - 1) / (kPerThread * at::get_num_threads());
  int64_t part = std::min(kStripOutputs, (share + kOutputs - 1) / kOutputs * kOutputs);
  GPTQVectors vectors{planes.data(), stride, steps.data(), totals.data(), batch};
  at::parallel_for(0, (m.rows + part - 1) / part, 1, [&](int64_t from, int64_t to) {
    for (int64_t n = from; n < to; n++)
      kernels_.product(m, blocks_.data(), blocks, vectors, n * part, std::min(m.rows, (n + 1) * part), y);
  });
}

at::Tensor GPTQProduct::decoded(int64_t begin, int64_t count, at::ScalarType dtype, const at::Tensor& room) const {
  at::Tensor tile = tile_of(room, columns(), count, dtype);
  at::parallel_for(0, runs_of(columns()), 1, [&](int64_t first, int64_t last) {
    int64_t place = first * kRun * count;
    if (dtype == at::kFloat) {
      kernels_.decode(matrix_, first, last, begin, begin + count, count, tile.mutable_data_ptr<float>() + place);
    } else {
      uint16_t* out = reinterpret_cast<uint16_t*>(tile.mutable_data_ptr<at::BFloat16>());
      kernels_.decode_bfloat16(matrix_, first, last, begin, begin + count, count, out + place);
    }
  });
  return tile;
}

at::Tensor plain_layer(const Product& product, const at::Tensor& x, const std::optional<at::Tensor>& bias, bool half) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.is_floating_point() && x.device().is_cpu() && x.size(-1) == product.columns(),
                    "x ends in ", product.columns(), " floats");
  TORCH_CHECK_VALUE(!bias || (bias->dim() == 1 && bias->size(0) == product.rows()), "a bias has ", product.rows(),
                    " numbers");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end() - 1);
  shape.push_back(product.rows());
  if (x.numel() == 0) return at::empty(shape, x.options()); // no vectors
  at::Tensor vectors = x.reshape({-1, product.columns()}), y;
  if (!product.is_direct(vectors.size(0))) {
    y = multiply_decoded(product, vectors.to(half && x.scalar_type() == at::kBFloat16 ? at::kBFloat16 : at::kFloat));
  } else {
    y = multiply(product, vectors, at::kFloat);
  }
  if (bias) y.add_(*bias);
  return y.to(x.scalar_type()).view(shape);
}

} // namespace quiptools
