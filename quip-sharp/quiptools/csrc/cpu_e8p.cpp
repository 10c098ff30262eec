// E8P12 and its relatives as a `Product`. The arithmetic is in cpu_kernels_source.h.
#include "cpu_e8p.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu_integer_product.h"
#include "e8p_bytes.h"

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

E8Tables tables_of(const Matrix& m) {
  E8Tables tables;
  for (int64_t n = 0; n < 256; n++) {
    tables.patterns[n] = 0;
    uint8_t bytes[kGroup];
    for (int64_t i = 0; i < kGroup; i++) {
      tables.patterns[n] |= static_cast<uint16_t>(static_cast<int>(std::abs(m.patterns[n * kGroup + i])) << 2 * i);
      bytes[i] = static_cast<uint8_t>(static_cast<int>(4 * m.points[n * kGroup + i]) + kBias);
    }
    std::memcpy(&tables.points[n], bytes, kGroup);
  }
  return tables;
}

constexpr float kQuarter = 0.25f;

// One stage of a matrix as bytes; or both where the second counts a quarter of the first, as at 4 bits.
struct LatticeBytes : ByteMatrix {
  LatticeBytes(const Matrix& m, const E8Tables& tables, Book book, const void* codes, const void* quarter, float unit,
               int64_t rows)
      : ByteMatrix(rows, m.groups * kGroup, unit), m(m), tables(tables), book(book), codes(codes), quarter(quarter) {}

  void decode(int64_t strip, int64_t begin, int64_t count, uint8_t* tile, int64_t stride) const override {
    const E8Bytes& kernels = *vbmi_e8_bytes();
    int64_t first = strip * kStrip, end = std::min(rows, first + kStrip), groups = count / 2; // a code is two groups of kWay
    for (int64_t row = first; row < end; row += kChunk, tile += stride) {
      int64_t here = std::min(kChunk, end - row), at = row * m.groups + begin / 2;
      if (book == Book::e8) {
        kernels.e8(tables, static_cast<const uint8_t*>(codes) + at, m.groups, here, groups, tile);
      } else {
        kernels.e8p(tables, static_cast<const uint16_t*>(codes) + at, m.groups, here, groups, false, tile);
      }
      if (quarter) kernels.e8p(tables, static_cast<const uint16_t*>(quarter) + at, m.groups, here, groups, true, tile);
    }
  }

  const Matrix& m;
  const E8Tables& tables;
  Book book;
  const void *codes, *quarter;
};

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

E8PProduct::E8PProduct(const Codes& codes, bool rounds, Isa isa)
    : codes_(codes), matrix_(matrix_of(codes)), rounds_(rounds), isa_(isa), kernels_(float_kernels(isa)) {}

int64_t E8PProduct::rows() const { return codes_.first.size(0); }
int64_t E8PProduct::columns() const { return matrix_.groups * kGroup; }

void E8PProduct::direct(const float* x, int64_t batch, float* y) const {
  if (rounds_ && batch > 1 && (isa_ == Isa::amx || isa_ == Isa::vbmi) && columns() <= kMostColumns) {
    const E8Tables tables = tables_of(matrix_);
    bool together = matrix_.residual_book == Book::e8p && matrix_.residual_scale == kQuarter;
    LatticeBytes first(matrix_, tables, matrix_.book, matrix_.codes, together ? matrix_.residual : nullptr,
                       together ? kQuarter * kQuarter : kQuarter, rows());
    LatticeBytes second(matrix_, tables, matrix_.residual_book, matrix_.residual, nullptr,
                        kQuarter * matrix_.residual_scale, rows());
    const ByteMatrix* terms[] = {&first, &second};
    size_t count = matrix_.residual_book == Book::none || together ? 1 : 2;
    return multiply_bytes({terms, count}, integer_kernels(isa_), x, batch, panel(), y);
  }
  std::vector<float> quarter_sums = quarter_sums_of(x, batch, matrix_.groups);
  for_row_blocks(rows(), columns() * batch, [&](int64_t begin, int64_t end) {
    kernels_.product(matrix_, x, quarter_sums.data(), batch, begin, end, rows(), y);
  });
}

Tensor E8PProduct::rows_decoded(int64_t begin, int64_t count, at::ScalarType dtype, const Tensor& room) const {
  int64_t width = columns();
  Tensor tile = tile_of(room, count, width, dtype);
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

Tensor E8PProduct::decoded(int64_t begin, int64_t count, at::ScalarType dtype, const Tensor& room) const {
  return rows_decoded(begin, count, dtype, room).t();
}

} // namespace quiptools
