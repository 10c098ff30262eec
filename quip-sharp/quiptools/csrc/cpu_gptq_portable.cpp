// GPTQ's products for any CPU.
#include <c10/util/Half.h>

#include "gptq_kernels.h"
#include "integer_kernels.h"

#define QUIPTOOLS_ISA portable
#define INLINE inline __attribute__((always_inline))

namespace quiptools::portable {
namespace {

constexpr int64_t kLanes = 8, kMostVectors = 2;
typedef uint32_t Words __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef float Floats __attribute__((vector_size(32)));
typedef int16_t Shorts __attribute__((vector_size(32)));

// Products of a byte and a number of 7 bits, and sums of two of them, stay within 16 bits.
INLINE Ints dot(Ints sums, Words bytes, const int8_t* x) {
  Shorts even = (Shorts)(bytes & 0x00FF00FF) * (Shorts)(Words{} + (uint16_t(x[0]) | uint32_t{uint16_t(x[2])} << 16));
  Shorts odd = (Shorts)(bytes >> 8 & 0x00FF00FF) * (Shorts)(Words{} + (uint16_t(x[1]) | uint32_t{uint16_t(x[3])} << 16));
  Words pairs = (Words)(even + odd);
  return sums + ((Ints)(pairs << 16) >> 16) + ((Ints)pairs >> 16);
}

template <int bits>
INLINE Ints bytes_of(const uint8_t* packed) {
  uint64_t word = 0;
  for (int i = 0; i < bits; i++) word |= uint64_t{packed[i]} << 8 * i;
  Ints found = {};
  for (int i = 0; i < 8; i++) found[i] = int32_t(word >> bits * i & ((1u << bits) - 1));
  return found;
}

INLINE Floats halves(const uint16_t* h) {
  Floats found = {};
  for (int i = 0; i < 8; i++) found[i] = c10::Half(h[i], c10::Half::from_bits());
  return found;
}

} // namespace
} // namespace quiptools::portable

#include "gptq_source.h"

namespace quiptools {
const GPTQKernels& portable_gptq_kernels() { return portable::kKernels; }
} // namespace quiptools
