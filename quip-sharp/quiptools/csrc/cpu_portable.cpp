// The kernels for any CPU that GCC or Clang compiles for.
#define QUIPTOOLS_ISA portable
#define QUIPTOOLS_LANES 8
#define QUIPTOOLS_LANE_SHIFTS 0
#include "cpu_kernels_source.h"

namespace quiptools {
const Kernels* portable_kernels() { return &portable::kKernels; }

const Kernels& float_kernels(Isa isa) {
  const Kernels* found = nullptr;
  if (isa >= Isa::avx512) found = avx512_kernels(); // what goes beyond is of no use to floats
  if (isa == Isa::avx2) found = avx2_kernels();
  return found ? *found : *portable_kernels();
}
} // namespace quiptools
