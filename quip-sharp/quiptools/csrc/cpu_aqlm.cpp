// AQLM's products. With at most 256 entries a codebook, the inner products of all codewords with a group of activations
// are a small table, made once for all outputs: an output is a sum of what its codes look up (Egiazarian et al. 2024,
// arXiv 2401.06118, section 4.4). Larger codebooks are read codeword by codeword. Both are loads more
// than arithmetic, and gathers measured no faster: there is one loop for all instruction sets, besides what aqlm_kernels.h
// has.
#include "cpu_aqlm.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <vector>

namespace quiptools {
namespace {

constexpr int64_t kTable = 8192;       // floats of the tables that are in use together: most of a first-level cache
constexpr int64_t kRowsTogether = 256; // outputs that they are used for meanwhile
constexpr int64_t kTableBits = 8;      // of a code, up to which tables are worth making
constexpr int64_t kTableRows = 256;    // outputs from which on they are
constexpr int64_t kWorthDecoding = 8;  // vectors beyond which rows are decoded instead
constexpr int64_t kGrain = 64;         // outputs a thread takes at least
constexpr int64_t kDotWidth = 8;       // weights to a group, for kernels that multiply by codewords

// The sum over n of table[n * size + codes[n]]: eight sums at once, since an addition takes as long as several loads.
template <typename Code>
float add_up(const float* table, int64_t size, const Code* codes, int64_t count) {
  float a = 0, b = 0, c = 0, d = 0, e = 0, f = 0, g = 0, h = 0;
  int64_t n = 0;
  for (; n + 8 <= count; n += 8, table += 8 * size) {
    a += table[codes[n]];
    b += table[size + codes[n + 1]];
    c += table[2 * size + codes[n + 2]];
    d += table[3 * size + codes[n + 3]];
    e += table[4 * size + codes[n + 4]];
    f += table[5 * size + codes[n + 5]];
    g += table[6 * size + codes[n + 6]];
    h += table[7 * size + codes[n + 7]];
  }
  for (; n < count; n++, table += size) a += table[codes[n]];
  return ((a + b) + (c + d)) + ((e + f) + (g + h));
}

// The sum over the groups k and codebooks m of the inner product of x + k * width with the codeword
// words + (m * size + codes[k * count + m]) * width. Two chains of sums, so that one addition need not wait for the
// other; `known` is the width where it is the usual one.
template <int64_t known>
float dot_of_width(const float* __restrict__ x, const float* __restrict__ words, int64_t size, int64_t width,
                   const uint16_t* __restrict__ codes, int64_t groups, int64_t count) {
  constexpr int64_t kMost = known ? known : 32; // groups have at most 32 weights
  int64_t w = known ? known : width, step = size * w;
  float even[kMost] = {}, odd[kMost] = {};
  for (int64_t k = 0; k < groups; k++, x += w) {
    int64_t m = 0;
    for (; m + 2 <= count; m += 2, codes += 2) {
      const float* first = words + m * step + codes[0] * w;
      const float* second = words + (m + 1) * step + codes[1] * w;
      for (int64_t a = 0; a < w; a++) even[a] += x[a] * first[a];
      for (int64_t a = 0; a < w; a++) odd[a] += x[a] * second[a];
    }
    if (m == count) continue;
    const float* last = words + m * step + *codes++ * w;
    if (k & 1) {
      for (int64_t a = 0; a < w; a++) odd[a] += x[a] * last[a];
    } else {
      for (int64_t a = 0; a < w; a++) even[a] += x[a] * last[a];
    }
  }
  float sum = 0;
  for (int64_t a = 0; a < w; a++) sum += even[a] + odd[a];
  return sum;
}

float dot(const float* x, const float* words, int64_t size, int64_t width, const uint16_t* codes, int64_t groups,
          int64_t count) {
  return width == 8 ? dot_of_width<8>(x, words, size, width, codes, groups, count)
                    : dot_of_width<0>(x, words, size, width, codes, groups, count);
}

} // namespace

const AQLMKernels* aqlm_kernels(Isa isa) {
  if (isa >= Isa::vbmi) return vbmi_aqlm();
  return isa >= Isa::avx2 ? avx2_aqlm() : nullptr;
}

AQLMProduct::AQLMProduct(const at::Tensor& codes, const at::Tensor& codebooks, const at::Tensor& scales, int64_t columns,
                         int64_t bits, bool rounds, Isa isa)
    : kernels_(aqlm_kernels(isa)), rounds_(rounds), codebooks_(codebooks), columns_(columns), bits_(bits) {
  TORCH_CHECK_VALUE(bits >= 1 && bits <= 16 && columns > 0, "AQLM has codes of 1 to 16 bits, and columns");
  TORCH_CHECK_VALUE(codebooks.dim() == 3 && codebooks.scalar_type() == at::kHalf && codebooks.is_contiguous() &&
                        codebooks.device().is_cpu() && codebooks.size(0) > 0 && codebooks.size(1) == int64_t(1) << bits &&
                        codebooks.size(2) > 0 && codebooks.size(2) <= 32,
                    "codebooks are a float16 tensor (codebooks, ", int64_t(1) << bits, ", group)");
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

// The codes of a row, (groups, M); the usual widths by whole bytes.
void AQLMProduct::unpack(int64_t row, uint16_t* out) const {
  const uint8_t* next = codes_ + row * bytes_;
  int64_t places = groups_ * count_, width = bits_, bits = 0, n = 0;
  if (width == 8) {
    std::copy_n(next, places, out);
    return;
  }
  if (width == 16) {
    for (; n < places; n++) out[n] = static_cast<uint16_t>(next[2 * n] | next[2 * n + 1] << 8);
    return;
  }
  if (width == 12) {
    if (kernels_ && kernels_->unpack12 && places >= 24) {
      n = (places - 8) / 8 * 8; // what is read beyond these lies in the row
      kernels_->unpack12(next, n / 8, out);
      next += n / 2 * 3;
    }
    for (; n + 2 <= places; n += 2, next += 3) {
      out[n] = static_cast<uint16_t>(next[0] | (next[1] & 15) << 8);
      out[n + 1] = static_cast<uint16_t>(next[1] >> 4 | next[2] << 4);
    }
  }
  uint32_t held = 0, mask = (1u << width) - 1;
  for (; n < places; n++) {
    for (; bits < width; bits += 8) held |= static_cast<uint32_t>(*next++) << bits;
    out[n] = static_cast<uint16_t>(held & mask);
    held >>= width;
    bits -= width;
  }
}

void AQLMProduct::direct(const float* x, int64_t batch, float* y) const {
  at::Tensor vectors = at::zeros({batch, groups_ * group_}, codebooks_.options().dtype(at::kFloat));
  float* to = vectors.mutable_data_ptr<float>();
  for (int64_t v = 0; v < batch; v++) std::copy_n(x + v * columns_, columns_, to + v * groups_ * group_);
  if (batch > kWorthDecoding) {
    at::Tensor product = multiply_decoded(*this, vectors.narrow(1, 0, columns_));
    std::copy_n(product.const_data_ptr<float>(), batch * rows_, y);
  } else if (bits_ <= kTableBits && rows_ >= kTableRows) {
    if (rounds_ && bits_ == kTableBits && kernels_ && kernels_->look_up) {
      look_up_rounded(vectors, batch, y);
    } else {
      look_up(vectors, batch, y);
    }
  } else {
    multiply_codewords(to, batch, y);
  }
}

// The inner products of all codewords with the groups of x: (groups, M, entries).
at::Tensor AQLMProduct::tables(const at::Tensor& x) const {
  at::Tensor words = codebooks_.view({count_ * size_, group_}).to(at::kFloat);
  return at::mm(x.view({groups_, group_}), words.t());
}

void AQLMProduct::look_up_rounded(const at::Tensor& x, int64_t batch, float* y) const {
  const int64_t places = groups_ * count_, blocks = (places + kPlaces - 1) / kPlaces;
  std::vector<std::vector<uint8_t>> bytes(batch);
  std::vector<std::vector<float>> steps(batch);
  std::vector<Planes> planes(batch);
  const at::Tensor columns = codebooks_.to(at::kFloat).transpose(1, 2).contiguous(); // of words: (M, g, entries)
  const float* words = columns.const_data_ptr<float>();
  for (int64_t v = 0; v < batch; v++) {
    bytes[v].resize(places * 2 * kEntries);
    steps[v].resize(blocks);
    planes[v] = {bytes[v].data(), steps[v].data()};
    const float* from = x.const_data_ptr<float>() + v * groups_ * group_;
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> room(kPlaces * kEntries);
      for (int64_t block = begin; block < end; block++) {
        const int64_t first = block * kPlaces, here = std::min(kPlaces, places - first);
        const Planes part = {planes[v].bytes + first * 2 * kEntries, planes[v].steps + block};
        kernels_->tabulate(from, words, group_, count_, first, here, part, room.data());
      }
    });
  }
  at::parallel_for(0, (rows_ + kOutputsTogether - 1) / kOutputsTogether, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * kOutputsTogether; row < std::min(rows_, end * kOutputsTogether); row += kOutputsTogether) {
      const int64_t here = std::min(kOutputsTogether, rows_ - row);
      kernels_->look_up(codes_ + row * bytes_, bytes_, here, places, planes.data(), batch, rows_, y + row);
      for (int64_t v = 0; v < batch; v++)
        for (int64_t r = row; r < row + here; r++) y[v * rows_ + r] *= static_cast<float>(scales_[r]);
    }
  });
}

void AQLMProduct::look_up(const at::Tensor& x, int64_t batch, float* y) const {
  int64_t places = groups_ * count_, together = std::max<int64_t>(kTable / size_, 1);
  std::fill_n(y, batch * rows_, 0.0f);
  for (int64_t v = 0; v < batch; v++) {
    at::Tensor exact = tables(x.select(0, v));
    const float* table = exact.const_data_ptr<float>();
    float* out = y + v * rows_;
    at::parallel_for(0, rows_, kGrain, [&](int64_t begin, int64_t end) {
      std::vector<uint16_t> buffer(bits_ == 8 ? 0 : places);
      if (bits_ != 8) { // codes that are not bytes are unpacked once, for all tables
        for (int64_t row = begin; row < end; row++) {
          unpack(row, buffer.data());
          out[row] = add_up(table, size_, buffer.data(), places);
        }
      } else {
        // A part of the tables at a time for many outputs, whose codes the second-level cache holds; those of the
        // outputs after them are asked for meanwhile, which are too far apart for the processor to foresee.
        for (int64_t block = begin; block < end; block += kRowsTogether) {
          for (int64_t first = 0; first < places; first += together) {
            int64_t last = std::min(places, first + together);
            for (int64_t row = block; row < std::min(end, block + kRowsTogether); row++) {
              const uint8_t* codes = codes_ + row * bytes_ + first;
              if (row + kRowsTogether < end) __builtin_prefetch(codes + kRowsTogether * bytes_, 0, 2);
              out[row] += add_up(table + first * size_, size_, codes, last - first);
            }
          }
        }
      }
      for (int64_t row = begin; row < end; row++) out[row] *= static_cast<float>(scales_[row]);
    });
  }
}

void AQLMProduct::multiply_codewords(const float* x, int64_t batch, float* y) const {
  const bool halves = kernels_ && kernels_->dot && group_ == kDotWidth;
  const at::Tensor exact = halves ? at::Tensor() : codebooks_.to(at::kFloat);
  const float* words = halves ? nullptr : exact.const_data_ptr<float>();
  const uint16_t* half_words = reinterpret_cast<const uint16_t*>(codebooks_.const_data_ptr<at::Half>());
  at::parallel_for(0, rows_, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<uint16_t> buffer(groups_ * count_);
    for (int64_t row = begin; row < end; row++) {
      unpack(row, buffer.data());
      for (int64_t v = 0; v < batch; v++) {
        const float* from = x + v * groups_ * group_;
        float sum = halves ? kernels_->dot(from, half_words, size_, buffer.data(), groups_, count_)
                           : dot(from, words, size_, group_, buffer.data(), groups_, count_);
        y[v * rows_ + row] = sum * static_cast<float>(scales_[row]);
      }
    }
  });
}

at::Tensor AQLMProduct::decoded(int64_t begin, int64_t count, at::ScalarType dtype, const at::Tensor& room) const {
  int64_t width = groups_ * group_;
  // Rows of whole groups, for which `room` is too small where columns are no multiple of them.
  at::Tensor tile = tile_of(width == columns_ ? room : at::Tensor(), count, width, dtype);
  const at::Tensor exact = codebooks_.to(at::kFloat);
  const float* words = exact.const_data_ptr<float>();
  at::parallel_for(0, count, kGrain, [&](int64_t from, int64_t to) {
    std::vector<uint16_t> buffer(groups_ * count_);
    std::vector<float> line(width);
    for (int64_t n = from; n < to; n++) {
      unpack(begin + n, buffer.data());
      const uint16_t* code = buffer.data();
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
