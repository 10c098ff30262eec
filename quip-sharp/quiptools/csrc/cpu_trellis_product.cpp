#include "cpu_trellis_product.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#include "cpu_integer_product.h"

namespace quiptools {
namespace {

// One strip, and where the groups of its columns are.
class Strip {
 public:
  Strip(const TrellisMatrix& m, int64_t number) : m_(m) {
    first_ = number * kStrip;
    rows_ = std::min(kStrip, m.rows - first_);
    offset_ = number * kStrip / 8 * m.code.rate * m.columns;
    total_ = (m.rows * m.columns * m.code.rate + 7) / 8;
    chunks_ = (rows_ + kChunk - 1) / kChunk;
  }
  int64_t first() const { return first_; }
  int64_t rows() const { return rows_; }
  int64_t chunks() const { return chunks_; }

  // How many groups from `begin` to `end` lie as the kernels read them.
  int64_t plain(int64_t begin, int64_t end) const {
    if (rows_ % kChunk) return 0;
    int64_t complete = std::min(m_.columns / kWay, (total_ - offset_ - kSlack) / group_bytes());
    return std::max<int64_t>(0, std::min(end, complete) - begin);
  }
  int64_t group_bytes() const { return rows_ * m_.code.rate / 2; }
  const uint8_t* group(int64_t g) const { return m_.codes + offset_ + g * group_bytes(); }

  // Decodes group g, whichever way it lies.
  void decode(const IntegerKernels& kernels, int64_t g, uint8_t* out, int64_t stride) const {
    if (plain(g, g + 1)) return kernels.decode(m_.code, group(g), group(g), chunks_, out, stride);
    int64_t column_bytes = chunks_ * 2 * m_.code.rate;
    uint8_t copy[kWay * (kStrip / 8 * 6 + 2) + kSlack] = {};
    for (int64_t b = 0; b < column_bytes + 2; b++)
      for (int64_t j = 0; j < std::min(kWay, m_.columns - kWay * g); j++) copy[kWay * b + j] = byte(g, j, b);
    kernels.decode(m_.code, copy, copy + kWay * column_bytes, chunks_, out, stride);
  }

 private:
  // Byte b of the stream of column j of group g, which goes on from its beginning where it ends.
  uint8_t byte(int64_t g, int64_t j, int64_t b) const {
    int64_t bits = rows_ * m_.code.rate, way = std::min(kWay, m_.columns - kWay * g);
    if (rows_ % 8 == 0) return group(g)[way * (b % (bits / 8)) + j];
    int64_t origin = (kWay * g + j) * bits, from = 8 * b % bits;
    uint8_t found = 0;
    for (int i = 0; i < 8; i++) {
      int64_t bit = origin + (from + i) % bits;
      found |= uint8_t((m_.codes[offset_ + bit / 8] >> bit % 8 & 1) << i);
    }
    return found;
  }

  const TrellisMatrix& m_;
  int64_t first_, rows_, offset_, total_, chunks_;
};

// The matrix as bytes, for products in whole numbers.
struct TrellisBytes : ByteMatrix {
  TrellisBytes(const TrellisMatrix& m, const IntegerKernels& kernels)
      : ByteMatrix(m.rows, m.columns, kTableUnit), m(m), kernels(kernels) {}

  void decode(int64_t strip, int64_t begin, int64_t count, uint8_t* tile, int64_t stride) const override {
    Strip from(m, strip);
    for (int64_t g = 0; g < count; g++) from.decode(kernels, begin + g, tile + g * kBytes, stride);
  }

  int64_t vector(int64_t strip, int64_t begin, int64_t end, const int8_t* high, const int8_t* low,
                 int32_t* sums) const override {
    Strip from(m, strip);
    int64_t plain = from.plain(begin, end);
    bool done = kernels.vector(m.code, from.group(begin), plain, high + kWay * begin, low + kWay * begin, sums);
    return done ? plain : 0;
  }

  const TrellisMatrix& m;
  const IntegerKernels& kernels;
};

// Four columns of a strip as floats or bfloat16: out[j * count + r].
template <class T>
void spread(const uint8_t* decoded, int64_t rows, int64_t columns, int64_t count, T* out) {
  for (int64_t j = 0; j < columns; j++)
    for (int64_t r = 0; r < rows; r++) out[j * count + r] = T((float(decoded[kWay * r + j]) - float(kBias)) * kTableUnit);
}

template <class T>
void decode_to(const TrellisMatrix& m, const IntegerKernels& kernels, int64_t begin, int64_t count, T* out) {
  int64_t strips = (count + kStrip - 1) / kStrip, groups = (m.columns + kWay - 1) / kWay;
  at::parallel_for(0, strips * groups, 64, [&](int64_t from, int64_t to) {
    alignas(64) uint8_t decoded[kStrip * kWay];
    for (int64_t n = from; n < to; n++) {
      Strip strip(m, begin / kStrip + n / groups);
      int64_t g = n % groups;
      strip.decode(kernels, g, decoded, kBytes);
      int64_t columns = std::min(kWay, m.columns - kWay * g);
      T* place = out + kWay * g * count + strip.first() - begin;
      if (kernels.spread && std::is_same_v<T, at::BFloat16> && columns == kWay && strip.rows() % kChunk == 0) {
        kernels.spread(decoded, strip.chunks(), count, reinterpret_cast<uint16_t*>(place));
      } else {
        spread(decoded, strip.rows(), columns, count, place);
      }
    }
  });
}

// Fills what depends on the masks. More entries than a shuffle takes make the table one by window.
void read_masks(TrellisCode& code, const uint8_t* masks, int count, const int8_t* values, std::vector<uint8_t>& table) {
  uint8_t number[256];
  for (unsigned s = 0; s < 256; s++) {
    number[s] = 0;
    for (int i = 0; i < count; i++) number[s] |= uint8_t((std::popcount(s & masks[i]) & 1) << i);
    code.windows[s] = table[number[s]];
  }
  code.linear = count <= 6;
  if (!code.linear) {
    table.assign(code.windows, code.windows + 256);
    return;
  }
  code.map = 0;
  for (int i = 0; i < count; i++) code.map |= uint64_t{masks[i]} << 8 * (7 - i);
  int half = 1 << count >> 1;
  code.antisymmetric = count > 0;
  for (int n = 0; n < half; n++) code.antisymmetric &= values[n] != -128 && values[n] == -values[n + half];
  auto contribution = [&](unsigned window) {
    unsigned n = number[window & 0xFF], first = n & (half - 1);
    return uint8_t((first & 15) | (first >> 4) << 7 | (n >= unsigned(half)) << 5);
  };
  for (unsigned w = 0; w < 8; w++) {
    unsigned shift = w * code.rate % 8;
    for (unsigned n = 0; n < 16; n++) {
      code.halves[w][0][n] = contribution(n >> shift);
      code.halves[w][1][n] = contribution(n << 4 >> shift) | 16;
      code.halves[w][2][n] = contribution(n << (8 - shift));
      code.halves[w][3][n] = contribution(n << (12 - shift));
    }
  }
}

} // namespace

TrellisProduct::TrellisProduct(const at::Tensor& codes, int64_t rows, int64_t columns, int64_t rate,
                               const at::Tensor& table, const std::optional<at::Tensor>& masks, Isa isa)
    : codes_(codes), kernels_(integer_kernels(isa)), has_tiles_(isa == Isa::amx) {
  TORCH_CHECK_VALUE(rate >= 1 && rate <= 6 && rows > 0 && columns > 0 && columns <= kMostColumns,
                    "a trellis has 1 to 6 bits a weight, rows, and 1 to ", kMostColumns, " columns");
  int64_t bytes = (rows * columns * rate + 7) / 8;
  TORCH_CHECK_VALUE(codes.dim() == 1 && codes.scalar_type() == at::kByte && codes.is_contiguous() &&
                        codes.size(0) == bytes && codes.device().is_cpu(),
                    "codes of ", rows, "x", columns, " weights of ", rate, " bits are ", bytes, " bytes");
  TORCH_CHECK_VALUE(table.dim() == 1 && table.scalar_type() == at::kChar && table.is_contiguous() && table.device().is_cpu(),
                    "a table is an int8 vector on the CPU");
  int64_t size = table.size(0);
  const int8_t* values = table.const_data_ptr<int8_t>();
  matrix_ = {rows, columns, codes.const_data_ptr<uint8_t>(), {}};
  TrellisCode& code = matrix_.code;
  code.rate = static_cast<int>(rate);
  code.linear = masks.has_value();
  code.entries = static_cast<int>(size);
  code.states = masks ? 8 : std::bit_width(static_cast<uint64_t>(size)) - 1;
  if (masks) {
    TORCH_CHECK_VALUE(masks->dim() == 1 && masks->scalar_type() == at::kByte && masks->is_contiguous() &&
                          masks->size(0) <= 8 && size == int64_t{1} << masks->size(0) && masks->device().is_cpu(),
                      "up to 8 masks, uint8 on the CPU, and a table of 2^(their number) entries");
  } else {
    TORCH_CHECK_VALUE(size == int64_t{1} << code.states && code.states >= 8 && code.states <= 12,
                      "a table without masks has 2^8 to 2^12 entries");
  }
  for (int64_t i = 0; i < std::max<int64_t>(size, 64); i++) table_.push_back(uint8_t(values[i % size] + kBias));
  if (masks) read_masks(code, masks->const_data_ptr<uint8_t>(), static_cast<int>(masks->size(0)), values, table_);
  code.table = table_.data();
}

void TrellisProduct::direct(const float* x, int64_t batch, float* y) const {
  TrellisBytes bytes(matrix_, kernels_);
  const ByteMatrix* term = &bytes;
  multiply_bytes({&term, 1}, kernels_, x, batch, panel(), y);
}

at::Tensor TrellisProduct::decoded(int64_t begin, int64_t count, at::ScalarType dtype, const at::Tensor& room) const {
  at::Tensor tile = tile_of(room, columns(), count, dtype);
  if (dtype == at::kFloat) {
    decode_to(matrix_, kernels_, begin, count, tile.mutable_data_ptr<float>());
  } else {
    decode_to(matrix_, kernels_, begin, count, tile.mutable_data_ptr<at::BFloat16>());
  }
  return tile;
}

} // namespace quiptools
