// Products with matrices of signs, as Hadamard's, by the tiles of AMX.
#pragma once

#include <cstdint>

namespace quiptools {

constexpr int64_t kTileRows = 16, kTileColumns = 16;

// Sizes are counts of bfloat16.
struct SignTiles {
  int64_t (*packed)(int64_t order);
  void (*pack)(const float* matrix, int64_t order, uint16_t* out); // (order, order), of which the signs are taken

  // out[i][k] = sum_j sign[i][j] x[j][k] for i, j in [0, order), k in [0, inner), inner a multiple of kTileColumns. x is
  // split into two bfloat16, at `split`; up to kTileRows - 1 rows behind the end of `out` are overwritten.
  int64_t (*split)(int64_t order, int64_t inner);
  void (*multiply)(const uint16_t* tiles, int64_t order, int64_t inner, const float* x, uint16_t* split, float* out);
};

const SignTiles* amx_sign_tiles(); // null where this compiler does not target x86

} // namespace quiptools
