// What the CPU kernels compute, on plain pointers: one table of functions per instruction set.
#pragma once

#include <cstdint>

#include "instruction_sets.h"

namespace quiptools {

constexpr int64_t kGroup = 8;       // weights to a code
constexpr int64_t kBlock = 16;      // codes that a kernel unpacks at once

// A codebook: the 256 points of the small one (codes of 8 bits) or the 65,536 of E8P12 (16 bits).
enum class Book { none, e8, e8p };

// A quantized matrix of whole rows of codes: W = point(codes) + residual_scale * point(residual).
struct Matrix {
  Book book, residual_book;
  const void* codes;    // (rows, groups), uint8 or uint16
  const void* residual; // the same shape, or null
  float residual_scale;
  const float* patterns; // (256, 8): absolute values of E8P12, the last one negative where the signs must be odd
  const float* points;   // (256, 8): the small codebook
  int64_t groups;        // to a row
};

// Rows [begin, end) are whole blocks of `kRowBlock` rows, but for the last block of a matrix: then every row is
// computed in the same order however the blocks are given to threads, and the bytes are the same.
constexpr int64_t kRowBlock = 8;

struct Kernels {
  // out (end - begin, groups * 8): the decoded rows.
  void (*decode)(const Matrix& m, int64_t begin, int64_t end, float* out);

  // y[b * stride + r] = sum_k W[r][k] x[b][k] for the rows r in [begin, end) and `batch` vectors.
  // quarter_sums (batch, groups): a quarter of the sum of each group of x; within a whole block of kBlock groups those
  // of even number come first.
  void (*product)(const Matrix& m, const float* x, const float* quarter_sums, int64_t batch, int64_t begin, int64_t end,
                  int64_t stride, float* y);

  // In place: Sylvester's transform, not normalised, of each of `count` vectors of `power` numbers.
  void (*sylvester)(float* x, int64_t count, int64_t power);

  // out[i][k] = sum_j matrix[i][j] x[j][k] for i in [begin, end), k in [0, inner); matrix (order, order).
  void (*dense)(const float* matrix, const float* x, float* out, int64_t order, int64_t inner, int64_t begin,
                int64_t end);

  // n signs, +-1, of packed bits, 1 = negative, the lowest bit first.
  void (*signs)(const uint8_t* packed, int64_t n, float* out);

  // out[i] = x[i] * factors[i], of floats and of bfloat16.
  void (*load_floats)(const float* x, const float* factors, int64_t n, float* out);
  void (*load_bfloat16)(const uint16_t* x, const float* factors, int64_t n, float* out);

  // The nearest bfloat16.
  void (*store_bfloat16)(const float* x, int64_t n, uint16_t* out);
};

const Kernels& float_kernels(Isa isa);

const Kernels* portable_kernels();
const Kernels* avx2_kernels();   // null where this compiler does not target x86
const Kernels* avx512_kernels(); // the same

} // namespace quiptools
