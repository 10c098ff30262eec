#include "sign_tiles.h"

#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // of GCC 12 about its own intrinsics
#endif

#include <immintrin.h>

#include <cstring>

#include "tile_config.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-bf16")
#endif

namespace quiptools {
namespace {

#define INLINE inline __attribute__((always_inline))

constexpr int64_t kDeep = 32;                   // columns of signs in a tile
constexpr int64_t kTile = kTileRows * kDeep;    // numbers of a tile
constexpr int64_t kTileBytes = 64;              // of a row

int64_t tiles_down(int64_t order) { return (order + kTileRows - 1) / kTileRows; }
int64_t tiles_deep(int64_t order) { return (order + kDeep - 1) / kDeep; }

int64_t packed(int64_t order) { return tiles_down(order) * tiles_deep(order) * kTile; }

// Tile after tile, those of 16 rows together; zeros where there is no entry.
void pack(const float* matrix, int64_t order, uint16_t* out) {
  std::memset(out, 0, packed(order) * sizeof(uint16_t));
  for (int64_t i = 0; i < order; i++) {
    for (int64_t j = 0; j < order; j++) {
      int64_t tile = i / kTileRows * tiles_deep(order) + j / kDeep;
      out[tile * kTile + i % kTileRows * kDeep + j % kDeep] = matrix[i * order + j] < 0 ? 0xBF80 : 0x3F80; // -1, 1
    }
  }
}

int64_t split_size(int64_t order, int64_t inner) { return 2 * tiles_deep(order) * kDeep * inner; }

INLINE __m512i bits_at(const float* x, bool there) { return there ? _mm512_loadu_si512(x) : _mm512_setzero_si512(); }

// The upper halves of two rows of floats, side by side.
INLINE __m512i uppers(__m512i first, __m512i second) {
  return _mm512_or_si512(_mm512_srli_epi32(first, 16), _mm512_and_si512(second, _mm512_set1_epi32(int(0xFFFF0000))));
}

// What the upper half of a float leaves, rounded to its own upper half.
INLINE __m512i rest_of(__m512i x) {
  __m512 upper = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(int(0xFFFF0000))));
  __m512i rest = _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(x), upper));
  return _mm512_add_epi32(rest, _mm512_set1_epi32(0x8000));
}

// For 16 columns, then 32 rows: a tile of the upper parts, a tile of the rests; a tile's row is two rows interleaved.
void split(int64_t order, int64_t inner, const float* x, uint16_t* out) {
  int64_t deep = tiles_deep(order);
  for (int64_t j = 0; j < deep * kDeep; j += 2) {
    uint16_t* place = out + j / kDeep * 2 * kTile + j % kDeep * kTileColumns;
    for (int64_t k = 0; k < inner; k += kTileColumns, place += deep * 2 * kTile) {
      __m512i first = bits_at(x + j * inner + k, j < order), second = bits_at(x + (j + 1) * inner + k, j + 1 < order);
      _mm512_store_si512(place, uppers(first, second));
      _mm512_store_si512(place + kTile, uppers(rest_of(first), rest_of(second)));
    }
  }
}

// 16 or 32 rows by 16 or 32 columns of the product.
template <bool two_down, bool two_across>
INLINE void multiply_tiles(const uint16_t* signs, int64_t deep, const uint16_t* x, int64_t inner, float* out) {
  _tile_zero(0);
  if (two_across) _tile_zero(1);
  if (two_down) _tile_zero(2);
  if (two_down && two_across) _tile_zero(3);
  const uint16_t *below = signs + deep * kTile, *beside = x + deep * 2 * kTile;
  for (int64_t t = 0; t < deep; t++) {
    _tile_loadd(4, signs + t * kTile, kTileBytes);
    if (two_down) _tile_loadd(5, below + t * kTile, kTileBytes);
#pragma GCC unroll 2
    for (int part = 0; part < 2; part++) {
      _tile_loadd(6, x + (2 * t + part) * kTile, kTileBytes);
      _tile_dpbf16ps(0, 4, 6);
      if (two_down) _tile_dpbf16ps(2, 5, 6);
      if (two_across) {
        _tile_loadd(7, beside + (2 * t + part) * kTile, kTileBytes);
        _tile_dpbf16ps(1, 4, 7);
        if (two_down) _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, out, inner * sizeof(float));
  if (two_across) _tile_stored(1, out + kTileColumns, inner * sizeof(float));
  if (two_down) _tile_stored(2, out + kTileRows * inner, inner * sizeof(float));
  if (two_down && two_across) _tile_stored(3, out + kTileRows * inner + kTileColumns, inner * sizeof(float));
}

template <bool two_across>
INLINE void multiply_columns(const uint16_t* signs, int64_t order, const uint16_t* x, int64_t inner, float* out) {
  int64_t deep = tiles_deep(order), down = tiles_down(order), i = 0;
  for (; i + 2 <= down; i += 2)
    multiply_tiles<true, two_across>(signs + i * deep * kTile, deep, x, inner, out + i * kTileRows * inner);
  if (i < down) multiply_tiles<false, two_across>(signs + i * deep * kTile, deep, x, inner, out + i * kTileRows * inner);
}

void multiply(const uint16_t* signs, int64_t order, int64_t inner, const float* x, uint16_t* work, float* out) {
  split(order, inner, x, work);
  TileConfig config;
  for (int t = 0; t < 8; t++) config.set(t, kTileRows, kTileBytes);
  _tile_loadconfig(&config);
  int64_t k = 0, columns = tiles_deep(order) * 2 * kTile;
  for (; k + 2 * kTileColumns <= inner; k += 2 * kTileColumns, work += 2 * columns)
    multiply_columns<true>(signs, order, work, inner, out + k);
  if (k < inner) multiply_columns<false>(signs, order, work, inner, out + k);
  _tile_release();
}

constexpr SignTiles kSignTiles{packed, pack, split_size, multiply};

} // namespace

const SignTiles* amx_sign_tiles() { return &kSignTiles; }

} // namespace quiptools

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace quiptools {
const SignTiles* amx_sign_tiles() { return nullptr; }
} // namespace quiptools

#endif
