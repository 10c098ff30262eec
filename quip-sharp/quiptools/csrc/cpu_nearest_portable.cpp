// The nearest sums of two codewords for any CPU.
#include "cpu_nearest.h"

#define QUIPTOOLS_ISA portable
#define QUIPTOOLS_LANES 4
#include "cpu_nearest_source.h"

namespace quiptools {
NearestPairs portable_nearest() { return portable::nearest_pairs; }
} // namespace quiptools
