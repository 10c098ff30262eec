// The search of the trellis for any CPU.
#include "cpu_trellis.h"

#define QUIPTOOLS_ISA portable
#define QUIPTOOLS_LANES 4
#include "cpu_trellis_source.h"

namespace quiptools {
const TrellisSearch* portable_trellis() { return &portable::kTrellis; }
} // namespace quiptools
