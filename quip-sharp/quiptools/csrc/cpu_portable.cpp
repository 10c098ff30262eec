// The kernels for any CPU that GCC or Clang compiles for.
#define QUIPTOOLS_ISA portable
#define QUIPTOOLS_NAME "portable"
#define QUIPTOOLS_LANES 8
#define QUIPTOOLS_LANE_SHIFTS 0
#include "cpu_kernels_source.h"

namespace quiptools {
const Kernels* portable_kernels() { return &portable::kKernels; }
} // namespace quiptools
