// Products of whole numbers with AVX-512 VBMI, GFNI and VNNI, and with the tiles of AMX.
#include "integer_kernels.h"

#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // of GCC 12 about its own intrinsics
#endif

#include <immintrin.h>

#include <array>

#include "tile_config.h"

#define QUIPTOOLS_TARGET "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,gfni"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target(QUIPTOOLS_TARGET ",amx-tile,amx-int8"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,gfni,amx-tile,amx-int8")
#endif

#define QUIPTOOLS_ISA vbmi
#include "integer_source.h"

namespace quiptools {
namespace vbmi {
namespace {

#define INLINE inline __attribute__((always_inline))

// How the bytes of a chunk (byte 4 b + j is byte b of column j) become a chunk of windows. A word of 8 bytes is laid out
// so that `vpmultishiftqb` cuts 8 windows of it. Where the windows of two rows always lie in two bytes, a word holds two
// rows of all four columns and the windows come out in order; else it holds 8 rows of one column, put in order at the end.
template <int rate>
struct Layout {
  static constexpr bool kInOrder = rate == 1 || rate == 2 || rate == 4;
  alignas(64) std::array<uint8_t, 64> gather{}, shift{}, order{};
  constexpr Layout() {
    for (int i = 0; i < 64; i++) {
      int word = i / 8, in_word = i % 8;
      if (kInOrder) {
        int first = 2 * word * rate / 8; // byte of the two rows' first window
        gather[i] = uint8_t(4 * (first + in_word % 2) + in_word / 2);
        shift[i] = uint8_t(16 * (in_word % 4) + (2 * word + in_word / 4) * rate - 8 * first);
      } else {
        int column = word / 2, half = word % 2;
        gather[i] = uint8_t(4 * (half * rate + (in_word <= rate ? in_word : rate)) + column);
        shift[i] = uint8_t(in_word * rate);
      }
      order[i] = uint8_t(i % 4 * 16 + i / 4);
    }
  }
};
template <int rate>
constexpr Layout<rate> kLayout;

template <int rate>
struct Decoder {
  __m512i gather, shift, order, map, table;

  INLINE explicit Decoder(const TrellisCode& code)
      : gather(_mm512_load_si512(kLayout<rate>.gather.data())),
        shift(_mm512_load_si512(kLayout<rate>.shift.data())),
        order(_mm512_load_si512(kLayout<rate>.order.data())),
        map(_mm512_set1_epi64(static_cast<long long>(code.map))),
        table(_mm512_loadu_si512(code.table)) {}

  INLINE __m512i operator()(__m512i bytes) const {
    __m512i windows = _mm512_multishift_epi64_epi8(shift, _mm512_permutexvar_epi8(gather, bytes));
    __m512i weights = _mm512_permutexvar_epi8(_mm512_gf2p8affine_epi64_epi8(windows, map, 0), table);
    return Layout<rate>::kInOrder ? weights : _mm512_permutexvar_epi8(order, weights);
  }

  // The last chunk of a group: the stream goes on at `after`.
  INLINE __m512i last(__m512i bytes, const uint8_t* after) const {
    int32_t next;
    __builtin_memcpy(&next, after, 4);
    return (*this)(_mm512_mask_set1_epi32(bytes, __mmask16(1u << 2 * rate), next));
  }
};

template <int rate>
void decode_rate(const TrellisCode& code, const uint8_t* bytes, const uint8_t* after, int64_t chunks, uint8_t* out,
                 int64_t stride) {
  const Decoder<rate> decoder(code);
  for (int64_t c = 0; c + 1 < chunks; c++, bytes += 8 * rate, out += stride)
    _mm512_storeu_si512(out, decoder(_mm512_loadu_si512(bytes)));
  _mm512_storeu_si512(out, decoder.last(_mm512_loadu_si512(bytes), after));
}

void decode(const TrellisCode& code, const uint8_t* bytes, const uint8_t* after, int64_t chunks, uint8_t* out,
            int64_t stride) {
  if (!code.linear) return decode_windows(code, bytes, after, chunks, out, stride);
  switch (code.rate) {
    case 1: return decode_rate<1>(code, bytes, after, chunks, out, stride);
    case 2: return decode_rate<2>(code, bytes, after, chunks, out, stride);
    case 3: return decode_rate<3>(code, bytes, after, chunks, out, stride);
    case 4: return decode_rate<4>(code, bytes, after, chunks, out, stride);
    case 5: return decode_rate<5>(code, bytes, after, chunks, out, stride);
    default: return decode_rate<6>(code, bytes, after, chunks, out, stride);
  }
}

INLINE __m512i four(const int8_t* x) {
  int32_t bytes;
  __builtin_memcpy(&bytes, x, 4);
  return _mm512_set1_epi32(bytes);
}

template <int rate>
void vector_rate(const TrellisCode& code, const uint8_t* bytes, int64_t groups, const int8_t* high, const int8_t* low,
                 int32_t* sums) {
  constexpr int kChunks = kStrip / kChunk;
  constexpr int64_t kAhead = 4096;
  const Decoder<rate> decoder(code);
  __m512i tops[kChunks], rests[kChunks];
  for (int c = 0; c < kChunks; c++) {
    tops[c] = _mm512_loadu_si512(sums + c * kChunk);
    rests[c] = _mm512_loadu_si512(sums + kStrip + c * kChunk);
  }
  for (int64_t g = 0; g < groups; g++, bytes += kChunks * 8 * rate) {
    __m512i top = four(high + kWay * g), rest = four(low + kWay * g);
#pragma GCC unroll 16
    for (int c = 0; c < kChunks; c++) {
      if (c * 8 * rate % 64 == 0) _mm_prefetch(reinterpret_cast<const char*>(bytes + c * 8 * rate + kAhead), _MM_HINT_T0);
      __m512i part = _mm512_loadu_si512(bytes + c * 8 * rate);
      __m512i weights = c + 1 < kChunks ? decoder(part) : decoder.last(part, bytes);
      tops[c] = _mm512_dpbusd_epi32(tops[c], weights, top);
      rests[c] = _mm512_dpbusd_epi32(rests[c], weights, rest);
    }
  }
  for (int c = 0; c < kChunks; c++) {
    _mm512_storeu_si512(sums + c * kChunk, tops[c]);
    _mm512_storeu_si512(sums + kStrip + c * kChunk, rests[c]);
  }
}

bool vector(const TrellisCode& code, const uint8_t* bytes, int64_t groups, const int8_t* high, const int8_t* low,
            int32_t* sums) {
  if (!code.linear) return false;
  switch (code.rate) {
    case 1: vector_rate<1>(code, bytes, groups, high, low, sums); break;
    case 2: vector_rate<2>(code, bytes, groups, high, low, sums); break;
    case 3: vector_rate<3>(code, bytes, groups, high, low, sums); break;
    case 4: vector_rate<4>(code, bytes, groups, high, low, sums); break;
    case 5: vector_rate<5>(code, bytes, groups, high, low, sums); break;
    default: vector_rate<6>(code, bytes, groups, high, low, sums);
  }
  return true;
}

template <int count>
INLINE void multiply_some(const uint8_t* tile, int64_t groups, const int8_t* x, int64_t x_stride, int32_t* sums) {
  __m512i total[count];
  for (int v = 0; v < count; v++) total[v] = _mm512_loadu_si512(sums + v * kStrip);
  for (int64_t g = 0; g < groups; g++) {
    __m512i weights = _mm512_loadu_si512(tile + g * kBytes);
    for (int v = 0; v < count; v++) total[v] = _mm512_dpbusd_epi32(total[v], weights, four(x + v * x_stride + kWay * g));
  }
  for (int v = 0; v < count; v++) _mm512_storeu_si512(sums + v * kStrip, total[v]);
}

void multiply(const uint8_t* tile, int64_t stride, int64_t chunks, int64_t groups, const int8_t* x, int64_t x_stride,
              int64_t vectors, int32_t* sums) {
  for (int64_t c = 0; c < chunks; c++) {
    int64_t v = 0;
    for (; v + 8 <= vectors; v += 8)
      multiply_some<8>(tile + c * stride, groups, x + v * x_stride, x_stride, sums + v * kStrip + c * kChunk);
    for (; v + 2 <= vectors; v += 2)
      multiply_some<2>(tile + c * stride, groups, x + v * x_stride, x_stride, sums + v * kStrip + c * kChunk);
    for (; v < vectors; v++)
      multiply_some<1>(tile + c * stride, groups, x + v * x_stride, x_stride, sums + v * kStrip + c * kChunk);
  }
}

// Tiles: 0 to 3 the sums of two chunks by two blocks of vectors, 4 and 5 the vectors, 6 and 7 the chunks' weights. A
// decoded chunk is a row of a tile of weights: sixteen groups make up a tile.
template <bool two_blocks, bool two_chunks>
INLINE void multiply_tiles(const uint8_t* tile, int64_t stride, int64_t groups, const int8_t* x, int64_t x_stride,
                           int32_t* sums) {
  constexpr int64_t kSums = 4 * kStrip;
  int32_t* below = sums + 16 * kStrip;
  _tile_loadd(0, sums, kSums);
  if (two_blocks) _tile_loadd(1, below, kSums);
  if (two_chunks) _tile_loadd(2, sums + kChunk, kSums);
  if (two_blocks && two_chunks) _tile_loadd(3, below + kChunk, kSums);
  for (int64_t g = 0; g < groups; g += 16) {
    _tile_loadd(6, tile + g * kBytes, kBytes);
    _tile_loadd(4, x + kWay * g, x_stride);
    _tile_dpbsud(0, 4, 6);
    if (two_blocks) {
      _tile_loadd(5, x + 16 * x_stride + kWay * g, x_stride);
      _tile_dpbsud(1, 5, 6);
    }
    if (two_chunks) {
      _tile_loadd(7, tile + stride + g * kBytes, kBytes);
      _tile_dpbsud(2, 4, 7);
      if (two_blocks) _tile_dpbsud(3, 5, 7);
    }
  }
  _tile_stored(0, sums, kSums);
  if (two_blocks) _tile_stored(1, below, kSums);
  if (two_chunks) _tile_stored(2, sums + kChunk, kSums);
  if (two_blocks && two_chunks) _tile_stored(3, below + kChunk, kSums);
}

template <bool two_blocks>
INLINE void multiply_blocks(const uint8_t* tile, int64_t stride, int64_t chunks, int64_t groups, const int8_t* x,
                            int64_t x_stride, int32_t* sums) {
  int64_t c = 0;
  for (; c + 2 <= chunks; c += 2)
    multiply_tiles<two_blocks, true>(tile + c * stride, stride, groups, x, x_stride, sums + c * kChunk);
  if (c < chunks) multiply_tiles<two_blocks, false>(tile + c * stride, stride, groups, x, x_stride, sums + c * kChunk);
}

void multiply_amx(const uint8_t* tile, int64_t stride, int64_t chunks, int64_t groups, const int8_t* x,
                  int64_t x_stride, int64_t vectors, int32_t* sums) {
  for (int64_t v = 0; v < vectors; v += 32) {
    int64_t here = vectors - v < 32 ? vectors - v : 32, second = here > 16 ? here - 16 : 0, first = here - second;
    TileConfig config;
    for (int t = 0; t < 8; t++) {
      bool is_second = t == 1 || t == 3 || t == 5;
      config.set(t, t >= 6 ? 16 : is_second ? (second ? second : 1) : first, 64);
    }
    _tile_loadconfig(&config);
    const int8_t* xs = x + v * x_stride;
    if (second) {
      multiply_blocks<true>(tile, stride, chunks, groups, xs, x_stride, sums + v * kStrip);
    } else {
      multiply_blocks<false>(tile, stride, chunks, groups, xs, x_stride, sums + v * kStrip);
    }
    _tile_release();
  }
}

// The bits of 16 floats.
INLINE __m512i as_floats(__m128i numbers) {
  __m512 floats = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(numbers));
  return _mm512_castps_si512(_mm512_mul_ps(floats, _mm512_set1_ps(kTableUnit)));
}

// Whole numbers of 8 bits are exact in bfloat16, the upper half of a float.
void spread(const uint8_t* decoded, int64_t chunks, int64_t stride, uint16_t* out) {
  alignas(64) uint8_t by_column[64];
  alignas(64) uint16_t upper[32];
  for (int i = 0; i < 64; i++) by_column[i] = uint8_t(i % 16 * 4 + i / 16);
  for (int i = 0; i < 32; i++) upper[i] = uint16_t(2 * i + 1);
  const __m512i order = _mm512_load_si512(by_column), halves = _mm512_load_si512(upper), bias = _mm512_set1_epi8(-128);
  for (int64_t c = 0; c < chunks; c++, decoded += kBytes, out += kChunk) {
    __m512i columns = _mm512_xor_si512(_mm512_permutexvar_epi8(order, _mm512_load_si512(decoded)), bias);
    __m512i floats[4] = {
        as_floats(_mm512_castsi512_si128(columns)),
        as_floats(_mm512_extracti32x4_epi32(columns, 1)),
        as_floats(_mm512_extracti32x4_epi32(columns, 2)),
        as_floats(_mm512_extracti32x4_epi32(columns, 3)),
    };
    for (int j = 0; j < 4; j += 2) {
      __m512i both = _mm512_permutex2var_epi16(floats[j], halves, floats[j + 1]);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + j * stride), _mm512_castsi512_si256(both));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (j + 1) * stride), _mm512_extracti64x4_epi64(both, 1));
    }
  }
}

constexpr IntegerKernels kKernels{round_activations, decode, vector, multiply, finish, spread};
constexpr IntegerKernels kAmxKernels{round_activations, decode, vector, multiply_amx, finish, spread};

} // namespace
} // namespace vbmi

const IntegerKernels* vbmi_integer_kernels() { return &vbmi::kKernels; }
const IntegerKernels* amx_integer_kernels() { return &vbmi::kAmxKernels; }

} // namespace quiptools

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace quiptools {
const IntegerKernels* vbmi_integer_kernels() { return nullptr; }
const IntegerKernels* amx_integer_kernels() { return nullptr; }
} // namespace quiptools

#endif
