// Products with GPTQ's packed matrices on plain pointers: one table of functions per instruction set.
//
// 32 codes of a column of the packed matrix, a run, fill `bits` words of 32 bits as one bit string (see
// GPTQ/casp_gptq/packing.py). Words of neighbouring outputs lie side by side, so that a register holds one word of each
// of its outputs. It is cut into quads, four codes of one output in the four bytes of a lane, which are multiplied with
// four activations at once. Activations are rounded in blocks, to whole numbers of two planes (integer_kernels.h).
#pragma once

#include <cstdint>

#include "instruction_sets.h"

namespace quiptools {

constexpr int64_t kRun = 32;
constexpr int kQuads = 8;          // of a run
constexpr int64_t kRounded = 128;  // most columns of a block: 255 * kLargest * 128 < 2^31, no sum overflows
constexpr int64_t kOutputs = 16;   // outputs from which on work may be shared out: whole registers of every set

// W[o][k] = scales[k / group][o] * (code of k and o - zeros[k / group][o]).
struct GPTQMatrix {
  int bits;                // 2, 3, 4 or 8
  int64_t rows, columns;   // outputs, inputs
  int64_t group;           // columns that share a scale
  const uint32_t* words;   // (runs * bits, rows)
  const uint8_t* zeros;    // (groups, zero_bytes): codes packed along the outputs, eight to `bits` bytes
  int64_t zero_bytes;
  const uint16_t* scales;  // (groups, rows), half precision
};

// Columns of one group, rounded with one step; they lie in these runs.
struct GPTQBlock {
  int64_t group, run, runs;
  int64_t place;           // of its first run's activations in a plane, in runs
};

// Rounded activations. Plane p of vector v is at planes + (2 v + p) * stride, high ones first, kRun bytes a run in the
// order of quads, zeros where the run has columns of other blocks.
struct GPTQVectors {
  const int8_t* planes;
  int64_t stride;
  const float* steps;      // (vectors, blocks)
  const int32_t* sums;     // (vectors, blocks): of the whole numbers
  int64_t count;
};

// The column, within a run, of byte `byte` of a quad.
constexpr int column_of(int bits, int quad, int byte) {
  if (bits == 3) return 4 * quad + byte;
  int to_word = 8 / bits; // quads
  return quad / to_word * (32 / bits) + byte * to_word + quad % to_word;
}

struct GPTQKernels {
  // Adds to y (vectors, m.rows) the outputs [begin, end), begin a multiple of kOutputs.
  void (*product)(const GPTQMatrix& m, const GPTQBlock* blocks, int64_t count, const GPTQVectors& x, int64_t begin,
                  int64_t end, float* y);

  // out[(k - kRun * first) * stride + o - begin] = W[o][k] of the runs [first, last) and the outputs [begin, end), begin
  // a multiple of kOutputs.
  void (*decode)(const GPTQMatrix& m, int64_t first, int64_t last, int64_t begin, int64_t end, int64_t stride, float* out);
  void (*decode_bfloat16)(const GPTQMatrix& m, int64_t first, int64_t last, int64_t begin, int64_t end, int64_t stride,
                          uint16_t* out);
};

const GPTQKernels& gptq_kernels(Isa isa);
const GPTQKernels& portable_gptq_kernels();
const GPTQKernels* avx2_gptq_kernels(); // null where this compiler does not target x86
const GPTQKernels* vbmi_gptq_kernels();

} // namespace quiptools
