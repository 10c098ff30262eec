// The CPU operators: checks, choice of the instruction set, threads. The arithmetic is in cpu_kernels_source.h.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "cpu_kernels.h"
#include "ops.h"

namespace quiptools {
namespace {

using at::Tensor;

constexpr int64_t kDirectBatch = 16; // vectors up to which decoding on the fly is faster
constexpr int64_t kTileRows = 512; // decoded at once for the matrix product of many vectors
constexpr int64_t kGrain = 1 << 15; // numbers that are worth a thread

// The instruction sets that this CPU runs, the fastest first.
std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
    found.push_back(avx512_kernels());
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(avx2_kernels());
#endif
  found.push_back(portable_kernels());
  return found;
}

// The kernels of the instruction set of this name; the fastest where the name is empty.
const Kernels& kernels_for(const std::string& isa) {
  static const std::vector<const Kernels*> usable = usable_kernels();
  if (isa.empty()) return *usable.front();
  for (const Kernels* kernels : usable)
    if (isa == kernels->isa) return *kernels;
  TORCH_CHECK_VALUE(false, "this CPU does not run the instruction set ", isa);
}

// The vectors as float32 rows without gaps.
Tensor dense_rows(const Tensor& x) { return x.to(at::kFloat).contiguous(); }

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

void decode_tile(const Kernels& kernels, const Matrix& m, int64_t begin, int64_t end, float* out) {
  int64_t columns = m.groups * kGroup;
  for_row_blocks(end - begin, columns, [&](int64_t first, int64_t last) {
    kernels.decode(m, begin + first, begin + last, out + first * columns);
  });
}

Tensor decode(const Tensor& codes, const std::optional<Tensor>& residual, const Tensor& patterns, const Tensor& points,
              double residual_scale, std::string isa) {
  Codes checked = check_codes(codes, residual, patterns, points, residual_scale);
  Matrix m = matrix_of(checked);
  int64_t rows = codes.size(0);
  Tensor out = at::empty({rows, m.groups * kGroup}, patterns.options());
  decode_tile(kernels_for(isa), m, 0, rows, out.mutable_data_ptr<float>());
  return out;
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

Tensor product(const Tensor& x, const Tensor& codes, const std::optional<Tensor>& residual, const Tensor& patterns,
               const Tensor& points, double residual_scale, std::string isa) {
  Codes checked = check_codes(codes, residual, patterns, points, residual_scale);
  check_vectors(x, checked);
  const Kernels& kernels = kernels_for(isa);
  Matrix m = matrix_of(checked);
  Tensor vectors = dense_rows(x);
  int64_t rows = codes.size(0), batch = x.size(0), columns = m.groups * kGroup;
  Tensor y = at::empty({batch, rows}, vectors.options());
  if (y.numel() == 0) return y;
  if (batch > kDirectBatch) {
    Tensor tile = at::empty({std::min(rows, kTileRows), columns}, vectors.options());
    for (int64_t row = 0; row < rows; row += kTileRows) {
      int64_t count = std::min(kTileRows, rows - row);
      decode_tile(kernels, m, row, row + count, tile.mutable_data_ptr<float>());
      Tensor part = y.narrow(1, row, count);
      at::mm_out(part, vectors, tile.narrow(0, 0, count).t());
    }
    return y;
  }
  const float* xs = vectors.const_data_ptr<float>();
  std::vector<float> quarter_sums = quarter_sums_of(xs, batch, m.groups);
  float* out = y.mutable_data_ptr<float>();
  for_row_blocks(rows, columns * batch, [&](int64_t begin, int64_t end) {
    kernels.product(m, xs, quarter_sums.data(), batch, begin, end, rows, out);
  });
  return y;
}

Tensor transform(const Tensor& x, at::TensorList factors, int64_t power, std::string isa) {
  TORCH_CHECK_VALUE(x.dim() == 2 && x.scalar_type() == at::kFloat, "transform takes a float32 x (vectors, width)");
  int64_t count = x.size(0), width = x.size(1), product = power;
  for (const Tensor& factor : factors) {
    TORCH_CHECK_VALUE(factor.dim() == 2 && factor.size(0) == factor.size(1) && factor.scalar_type() == at::kFloat &&
                          factor.is_contiguous(),
                      "a factor is a square float32 matrix without gaps");
    product *= factor.size(0);
  }
  TORCH_CHECK_VALUE(power > 0 && (power & (power - 1)) == 0 && product == width, "the factors make up a width of ",
                    product, ", x has ", width);
  const Kernels& kernels = kernels_for(isa);
  Tensor source = x.contiguous(), y = at::empty({count, width}, x.options());
  Tensor other = factors.empty() ? y : at::empty({count, width}, x.options());
  // Each factor moves the vectors from one buffer to the other; the last one leaves them in y.
  bool odd = factors.size() % 2;
  float* from = (odd ? other : y).mutable_data_ptr<float>();
  float* to = (odd ? y : other).mutable_data_ptr<float>();
  const float* input = source.const_data_ptr<float>();
  float norm = 1 / std::sqrt(static_cast<float>(power));
  at::parallel_for(0, count * (width / power), std::max<int64_t>(1, kGrain / power), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * power; i < end * power; i++) from[i] = input[i] * norm;
    kernels.sylvester(from + begin * power, end - begin, power);
  });
  int64_t inner = power;
  for (const Tensor& factor : factors) {
    constexpr int64_t kRows = 4;
    int64_t order = factor.size(0), parts = (order + kRows - 1) / kRows, span = order * inner;
    const float* matrix = factor.const_data_ptr<float>();
    at::parallel_for(0, count * (width / span) * parts, std::max<int64_t>(1, 8 * kGrain / (kRows * span)),
                     [&](int64_t begin, int64_t end) {
                       for (int64_t n = begin; n < end; n++) {
                         int64_t at = n / parts * span, row = n % parts * kRows;
                         kernels.dense(matrix, from + at, to + at, order, inner, row, std::min(row + kRows, order));
                       }
                     });
    std::swap(from, to);
    inner *= order;
  }
  return y;
}

Tensor unpack_signs(const Tensor& packed, int64_t size) {
  TORCH_CHECK_VALUE(packed.dim() == 1 && packed.scalar_type() == at::kByte && packed.is_contiguous() && size >= 0 &&
                        packed.size(0) * 8 >= size,
                    "packed signs are a uint8 vector with a bit for each of ", size, " coordinates");
  Tensor signs = at::empty({size}, packed.options().dtype(at::kFloat));
  const uint8_t* bits = packed.const_data_ptr<uint8_t>();
  float* out = signs.mutable_data_ptr<float>();
  for (int64_t i = 0; i < size; i++) out[i] = bits[i / 8] >> (i % 8) & 1 ? -1.0f : 1.0f;
  return signs;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* kernels : usable_kernels()) names.emplace_back(kernels->isa);
  return names;
}

// Whether this was compiled so that rows are shared among PyTorch's threads.
bool threaded() {
#ifdef INTRA_OP_PARALLEL
  return true;
#else
  return false;
#endif
}

} // namespace

TORCH_LIBRARY(quiptools, library) {
  library.def("instruction_sets() -> str[]", instruction_sets);
  library.def("threaded() -> bool", threaded);
  library.def("unpack_signs(Tensor packed, int size) -> Tensor");
  library.def("transform(Tensor x, Tensor[] factors, int power, str isa='') -> Tensor");
  library.def(
      "decode(Tensor codes, Tensor? residual, Tensor patterns, Tensor points, float residual_scale, str isa='') -> "
      "Tensor");
  library.def(
      "product(Tensor x, Tensor codes, Tensor? residual, Tensor patterns, Tensor points, float residual_scale, "
      "str isa='') -> Tensor");
}

TORCH_LIBRARY_IMPL(quiptools, CPU, library) {
  library.impl("unpack_signs", unpack_signs);
  library.impl("transform", transform);
  library.impl("decode", decode);
  library.impl("product", product);
}

} // namespace quiptools
