// E8P12 and its relatives as a `Product`. The arithmetic is in cpu_kernels_source.h.
#include "cpu_e8p.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

namespace quiptools {
namespace {

using at::Tensor;

constexpr int64_t kGrain = 1 << 15; // numbers that are worth a thread

// Calls f(begin, end) for blocks of rows, `work` numbers to a row, on as many threads as the work is worth.
template <class F>
void for_row_blocks(int64_t rows, int64_t work, const F& f) {
  int64_t blocks = (rows + kRowBlock - 1) / kRowBlock;
  int64_t grain = std::max<int64_t>(1, 2 * kGrain / std::max<int64_t>(1, work * kRowBlock));
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    f(begin * kRowBlock, std::min(end * kRowBlock, rows));
  });
}

Matrix matrix_of(const Codes& codes) {
  auto book = [](const Tensor& t) { return t.scalar_type() == at::kByte ? Book::e8 : Book::e8p; };
  Matrix m;
  m.book = book(codes.first);
  m.residual_book = codes.second.defined() ? book(codes.second) : Book::none;
  m.codes = codes.first.const_data_ptr();
  m.residual = codes.second.defined() ? codes.second.const_data_ptr() : nullptr;
  m.residual_scale = codes.second.defined() ? static_cast<float>(codes.residual_scale) : 0;
  m.patterns = codes.patterns.const_data_ptr<float>();
  m.points = codes.points.const_data_ptr<float>();
  m.groups = codes.first.size(1);
  return m;
}


// See `Kernels::product`; x (batch, groups * kGroup).
std::vector<float> quarter_sums_of(const float* x, int64_t batch, int64_t groups) {
  std::vector<float> sums(batch * groups);
  for (int64_t b = 0; b < batch; b++) {
    for (int64_t g = 0; g < groups; g++) {
      float total = 0;
      for (int64_t i = 0; i < kGroup; i++) total += x[(b * groups + g) * kGroup + i];
      int64_t block = g / kBlock * kBlock, in_block = g - block;
      int64_t place = in_block % 2 * (kBlock / 2) + in_block / 2;
      sums[b * groups + block + (block + kBlock <= groups ? place : in_block)] = total / 4;
    }
  }
  return sums;
}

} // namespace

E8PProduct::E8PProduct(const Codes& codes, Isa isa)
    : codes_(codes), matrix_(matrix_of(codes)), kernels_(float_kernels(isa)) {}

int64_t E8PProduct::rows() const { return codes_.first.size(0); }
int64_t E8PProduct::columns() const { return matrix_.groups * kGroup; }

void E8PProduct::direct(const float* x, int64_t batch, float* y) const {
  std::vector<float> quarter_sums = quarter_sums_of(x, batch, matrix_.groups);
  for_row_blocks(rows(), columns() * batch, [&](int64_t begin, int64_t end) {
    kernels_.product(matrix_, x, quarter_sums.data(), batch, begin, end, rows(), y);
  });
}

Tensor E8PProduct::rows_decoded(int64_t begin, int64_t count, at::ScalarType dtype) const {
  int64_t width = columns();
  Tensor tile = at::empty({count, width}, codes_.patterns.options().dtype(dtype));
  for_row_blocks(count, width, [&](int64_t first, int64_t last) {
    if (dtype == at::kFloat) {
      kernels_.decode(matrix_, begin + first, begin + last, tile.mutable_data_ptr<float>() + first * width);
      return;
    }
    std::vector<float> row(width);
    auto* out = reinterpret_cast<uint16_t*>(tile.mutable_data_ptr<at::BFloat16>());
    for (int64_t r = first; r < last; r++) {
      kernels_.decode(matrix_, begin + r, begin + r + 1, row.data());
      kernels_.store_bfloat16(row.data(), width, out + r * width);
    }
  });
  return tile;
}

Tensor E8PProduct::decoded(int64_t begin, int64_t count, at::ScalarType dtype) const {
  return rows_decoded(begin, count, dtype).t();
}

} // namespace quiptools
