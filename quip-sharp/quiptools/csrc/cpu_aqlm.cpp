// AQLM's products. With at most 256 entries a codebook, the inner products of all codewords with a group of activations
// are a small table, made once for all outputs: an output is a sum of what its codes look up (Egiazarian et al. 2024,
// arXiv 2401.06118, section 4.4). Larger codebooks are read codeword by codeword. Both are loads more than arithmetic,
// and the same on every instruction set.
#include "cpu_aqlm.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <vector>

namespace quiptools {
namespace {

constexpr int64_t kTable = 8192;      // floats of the tables that are in use together: most of a first-level cache
constexpr int64_t kTableBits = 8;     // of a code, up to which tables are worth making
constexpr int64_t kTableRows = 256;   // outputs from which on they are
constexpr int64_t kWorthDecoding = 8; // vectors beyond which a row is decoded instead
constexpr int64_t kGrain = 64;        // outputs a thread takes at least

template <int64_t width>
void add_products(const float* x, const float* word, float* sums) {
  for (int64_t a = 0; a < width; a++) sums[a] += x[a] * word[a];
}

// sums[a] += x[a] * word[a]; the usual widths unrolled.
void add_products(const float* x, const float* word, int64_t width, float* sums) {
  if (width == 8) return add_products<8>(x, word, sums);
  if (width == 4) return add_products<4>(x, word, sums);
  for (int64_t a = 0; a < width; a++) sums[a] += x[a] * word[a];
}

} // namespace

AQLMProduct::AQLMProduct(const at::Tensor& codes, const at::Tensor& codebooks, const at::Tensor& scales, int64_t columns,
                         int64_t bits)
    : codebooks_(codebooks), columns_(columns), bits_(bits) {
  TORCH_CHECK_VALUE(bits >= 1 && bits <= 16 && columns > 0, "AQLM has codes of 1 to 16 bits, and columns");
  TORCH_CHECK_VALUE(codebooks.dim() == 3 && codebooks.scalar_type() == at::kFloat && codebooks.is_contiguous() &&
                        codebooks.device().is_cpu() && codebooks.size(0) > 0 && codebooks.size(1) == int64_t(1) << bits &&
                        codebooks.size(2) > 0,
                    "codebooks are a float32 tensor (codebooks, ", int64_t(1) << bits, ", group)");
  count_ = codebooks.size(0), size_ = codebooks.size(1), group_ = codebooks.size(2);
  groups_ = (columns + group_ - 1) / group_;
  bytes_ = (groups_ * count_ * bits + 7) / 8;
  TORCH_CHECK_VALUE(codes.dim() == 2 && codes.scalar_type() == at::kByte && codes.is_contiguous() &&
                        codes.device().is_cpu() && codes.size(0) > 0 && codes.size(1) == bytes_,
                    "codes of ", columns, " columns are a uint8 matrix (out, ", bytes_, ")");
  rows_ = codes.size(0);
  TORCH_CHECK_VALUE(scales.dim() == 1 && scales.scalar_type() == at::kHalf && scales.is_contiguous() &&
                        scales.device().is_cpu() && scales.size(0) == rows_,
                    "scales are ", rows_, " numbers of float16");
  codes_ = codes.const_data_ptr<uint8_t>();
  scales_ = scales.const_data_ptr<at::Half>();
}

// The codes of a row, (groups, M), in the buffer.
const uint16_t* AQLMProduct::unpacked(int64_t row, uint16_t* buffer) const {
  const uint8_t* next = codes_ + row * bytes_;
  uint32_t held = 0, mask = static_cast<uint32_t>(size_ - 1);
  int64_t bits = 0;
  for (int64_t n = 0; n < groups_ * count_; n++) {
    for (; bits < bits_; bits += 8) held |= static_cast<uint32_t>(*next++) << bits;
    buffer[n] = static_cast<uint16_t>(held & mask);
    held >>= bits_;
    bits -= bits_;
  }
  return buffer;
}

void AQLMProduct::direct(const float* x, int64_t batch, float* y) const {
  at::Tensor vectors = at::zeros({batch, groups_ * group_}, codebooks_.options());
  float* to = vectors.mutable_data_ptr<float>();
  for (int64_t v = 0; v < batch; v++) std::copy_n(x + v * columns_, columns_, to + v * groups_ * group_);
  if (batch > kWorthDecoding) {
    at::Tensor product = multiply_decoded(*this, vectors.narrow(1, 0, columns_));
    std::copy_n(product.const_data_ptr<float>(), batch * rows_, y);
  } else if (bits_ <= kTableBits && rows_ >= kTableRows) {
    look_up(vectors, batch, y);
  } else {
    multiply_codewords(to, batch, y);
  }
}

void AQLMProduct::look_up(const at::Tensor& x, int64_t batch, float* y) const {
  at::Tensor words = codebooks_.view({count_ * size_, group_});
  int64_t places = groups_ * count_, together = std::max<int64_t>(kTable / size_, 1);
  std::fill_n(y, batch * rows_, 0.0f);
  for (int64_t v = 0; v < batch; v++) {
    at::Tensor tables = at::mm(x.select(0, v).view({groups_, group_}), words.t()); // (groups, M, entries)
    const float* table = tables.const_data_ptr<float>();
    float* out = y + v * rows_;
    at::parallel_for(0, rows_, kGrain, [&](int64_t begin, int64_t end) {
      std::vector<uint16_t> buffer(bits_ == 8 ? 0 : places);
      // A part of the tables at a time, for all outputs; codes that are not bytes are unpacked once, for all tables.
      int64_t part = bits_ == 8 ? together : places;
      for (int64_t first = 0; first < places; first += part) {
        int64_t last = std::min(places, first + part);
        for (int64_t row = begin; row < end; row++) {
          float sums[4] = {0, 0, 0, 0};
          auto add = [&](auto code) {
            int64_t n = first;
            for (; n + 4 <= last; n += 4)
              for (int64_t i = 0; i < 4; i++) sums[i] += table[(n + i) * size_ + code[n + i]];
            for (; n < last; n++) sums[0] += table[n * size_ + code[n]];
          };
          if (bits_ == 8) {
            add(codes_ + row * bytes_);
          } else {
            add(unpacked(row, buffer.data()));
          }
          out[row] += (sums[0] + sums[1]) + (sums[2] + sums[3]);
        }
      }
      for (int64_t row = begin; row < end; row++) out[row] *= static_cast<float>(scales_[row]);
    });
  }
}

void AQLMProduct::multiply_codewords(const float* x, int64_t batch, float* y) const {
  const float* words = codebooks_.const_data_ptr<float>();
  at::parallel_for(0, rows_, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<uint16_t> buffer(groups_ * count_);
    std::vector<float> sums(batch * group_);
    for (int64_t row = begin; row < end; row++) {
      const uint16_t* code = unpacked(row, buffer.data());
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t k = 0; k < groups_; k++)
        for (int64_t m = 0; m < count_; m++) {
          const float* word = words + (m * size_ + *code++) * group_;
          for (int64_t v = 0; v < batch; v++)
            add_products(x + (v * groups_ + k) * group_, word, group_, &sums[v * group_]);
        }
      for (int64_t v = 0; v < batch; v++) {
        float sum = 0;
        for (int64_t a = 0; a < group_; a++) sum += sums[v * group_ + a];
        y[v * rows_ + row] = sum * static_cast<float>(scales_[row]);
      }
    }
  });
}

at::Tensor AQLMProduct::decoded(int64_t begin, int64_t count, at::ScalarType dtype) const {
  int64_t width = groups_ * group_;
  at::Tensor tile = at::empty({count, width}, codebooks_.options().dtype(dtype));
  const float* words = codebooks_.const_data_ptr<float>();
  at::parallel_for(0, count, kGrain, [&](int64_t from, int64_t to) {
    std::vector<uint16_t> buffer(groups_ * count_);
    std::vector<float> line(width);
    for (int64_t n = from; n < to; n++) {
      const uint16_t* code = unpacked(begin + n, buffer.data());
      float scale = scales_[begin + n];
      for (int64_t k = 0; k < groups_; k++) {
        float* sum = &line[k * group_];
        std::fill_n(sum, group_, 0.0f);
        for (int64_t m = 0; m < count_; m++) {
          const float* word = words + (m * size_ + *code++) * group_;
          for (int64_t a = 0; a < group_; a++) sum[a] += word[a];
        }
      }
      if (dtype == at::kFloat) {
        float* out = tile.mutable_data_ptr<float>() + n * width;
        for (int64_t k = 0; k < width; k++) out[k] = line[k] * scale;
      } else {
        at::BFloat16* out = tile.mutable_data_ptr<at::BFloat16>() + n * width;
        for (int64_t k = 0; k < width; k++) out[k] = line[k] * scale;
      }
    }
  });
  return tile.narrow(1, 0, columns_).t();
}

} // namespace quiptools
