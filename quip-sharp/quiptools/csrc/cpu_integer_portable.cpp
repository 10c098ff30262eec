// Products of whole numbers for any CPU.
#define QUIPTOOLS_ISA portable
#include "integer_source.h"

namespace quiptools {
namespace portable {
namespace {

bool vector(const TrellisCode&, const uint8_t*, int64_t, const int8_t*, const int8_t*, int32_t*) { return false; }

void multiply(const uint8_t* tile, int64_t stride, int64_t chunks, int64_t groups, const int8_t* x, int64_t x_stride,
              int64_t vectors, int32_t* sums) {
  for (int64_t v = 0; v < vectors; v++) {
    for (int64_t c = 0; c < chunks; c++) {
      int32_t total[kBytes] = {};
      for (int64_t g = 0; g < groups; g++) {
        const uint8_t* weights = tile + c * stride + g * kBytes;
        const int8_t* xs = x + v * x_stride + kWay * g;
        for (int64_t i = 0; i < kBytes; i++) total[i] += weights[i] * xs[i % kWay];
      }
      for (int64_t r = 0; r < kChunk; r++)
        for (int64_t j = 0; j < kWay; j++) sums[v * kStrip + c * kChunk + r] += total[kWay * r + j];
    }
  }
}

constexpr IntegerKernels kKernels{round_activations, decode_windows, vector, multiply, finish, nullptr};

} // namespace
} // namespace portable

const IntegerKernels& portable_integer_kernels() { return portable::kKernels; }

const IntegerKernels& integer_kernels(Isa isa) {
  const IntegerKernels* found = nullptr;
  if (isa == Isa::amx) found = amx_integer_kernels();
  if (isa == Isa::vbmi) found = vbmi_integer_kernels();
  if (isa == Isa::avx512 || isa == Isa::avx2) found = avx2_integer_kernels(); // without VBMI, AVX-512 cuts no windows
  return found ? *found : portable_integer_kernels();
}

} // namespace quiptools
