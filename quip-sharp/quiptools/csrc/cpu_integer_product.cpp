#include "cpu_integer_product.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu_scratch.h"

namespace quiptools {
namespace {

constexpr int64_t kBlockGroups = 256; // decoded before they are multiplied: 256 KB of a strip
constexpr int64_t kTileStride = (kBlockGroups + 1) * kBytes; // not a power of two: chunks fall into different cache sets
constexpr int64_t kTile = kStrip / kChunk * kTileStride;
constexpr int64_t kTileGroups = 16;   // of a tile of AMX
constexpr int64_t kAlign = kTileGroups * kWay;
constexpr int64_t kPerThread = 4;     // parts of work to a thread
constexpr int64_t kPartGroups = 64;   // that are worth a part of their own

struct Rounded {
  int8_t* planes; // (2 * batch, padded): high ones, then low ones
  std::vector<float> steps;
  std::vector<int32_t> sums; // of each plane
  int64_t padded, batch;
};

void round_panel(const IntegerKernels& kernels, const float* x, int64_t columns, int64_t batch, Rounded& to) {
  to.batch = batch;
  at::parallel_for(0, batch, 8, [&](int64_t from, int64_t end) {
    for (int64_t b = from; b < end; b++) {
      int32_t both[2];
      int8_t* high = to.planes + b * to.padded;
      to.steps[b] = kernels.round(x + b * columns, columns, to.padded, high, high + batch * to.padded, both);
      to.sums[b] = both[0];
      to.sums[batch + b] = both[1];
    }
  });
}

// Groups [begin, end) of a strip times all vectors: adds to sums (2 * batch, kStrip).
void multiply_groups(const ByteMatrix& m, const IntegerKernels& kernels, int64_t strip, int64_t begin, int64_t end,
                     const Rounded& x, int32_t* sums) {
  int64_t rows = std::min(kStrip, m.rows - strip * kStrip), chunks = (rows + kChunk - 1) / kChunk;
  if (x.batch == 1 && rows == kStrip)
    begin += m.vector(strip, begin, end, x.planes, x.planes + x.padded, sums);
  if (begin == end) return;
  uint8_t* tile = scratch<ByteMatrix, uint8_t>(kTile);
  for (; begin < end; begin += kBlockGroups) {
    int64_t here = std::min(kBlockGroups, end - begin);
    int64_t whole = (here + kTileGroups - 1) / kTileGroups * kTileGroups;
    m.decode(strip, begin, here, tile, kTileStride);
    for (int64_t c = 0; c < chunks; c++)
      std::memset(tile + c * kTileStride + here * kBytes, 0, (whole - here) * kBytes);
    kernels.multiply(tile, kTileStride, chunks, whole, x.planes + kWay * begin, x.padded, 2 * x.batch, sums);
  }
}

// A strip's sums to y, of which a vector has `stride` numbers; later terms are added.
void finish(const ByteMatrix& m, const IntegerKernels& kernels, int64_t strip, const Rounded& x, const int32_t* sums,
            bool add, float* y) {
  int64_t rows = std::min(kStrip, m.rows - strip * kStrip);
  for (int64_t b = 0; b < x.batch; b++)
    kernels.finish(sums + b * kStrip, sums + (x.batch + b) * kStrip, rows, kBias * x.sums[b], kBias * x.sums[x.batch + b],
                   x.steps[b] * m.unit, add, y + b * m.rows + strip * kStrip);
}

void multiply_panel(std::span<const ByteMatrix* const> terms, const IntegerKernels& kernels, const Rounded& x, float* y) {
  const ByteMatrix& m = *terms.front();
  int64_t strips = (m.rows + kStrip - 1) / kStrip, groups = (m.columns + kWay - 1) / kWay, size = 2 * x.batch * kStrip;
  int64_t wanted = at::get_num_threads() == 1 ? 1 : kPerThread * at::get_num_threads();
  int64_t blocks = (groups + kPartGroups - 1) / kPartGroups;
  int64_t parts = std::clamp<int64_t>((wanted + strips - 1) / strips, 1, blocks), part = (blocks + parts - 1) / parts;
  if (parts == 1) {
    at::parallel_for(0, strips, 1, [&](int64_t from, int64_t to) {
      for (int64_t s = from; s < to; s++) {
        for (const ByteMatrix* term : terms) {
          int32_t* sums = scratch<ByteMatrix, int32_t>(size);
          std::fill_n(sums, size, 0);
          multiply_groups(*term, kernels, s, 0, groups, x, sums);
          finish(*term, kernels, s, x, sums, term != &m, y);
        }
      }
    });
    return;
  }
  // Fewer strips than there are threads: columns are shared out too, and the parts' sums are added up.
  std::vector<int32_t> sums(strips * parts * size);
  for (const ByteMatrix* term : terms) {
    std::fill(sums.begin(), sums.end(), 0);
    at::parallel_for(0, strips * parts, 1, [&](int64_t from, int64_t to) {
      for (int64_t n = from; n < to; n++) {
        int64_t begin = n % parts * part * kPartGroups, end = std::min(groups, begin + part * kPartGroups);
        if (begin < end) multiply_groups(*term, kernels, n / parts, begin, end, x, &sums[n * size]);
      }
    });
    for (int64_t s = 0; s < strips; s++) {
      int32_t* first = &sums[s * parts * size];
      for (int64_t p = 1; p < parts; p++)
        for (int64_t i = 0; i < size; i++) first[i] += first[p * size + i];
      finish(*term, kernels, s, x, first, term != &m, y);
    }
  }
}

} // namespace

void multiply_bytes(std::span<const ByteMatrix* const> terms, const IntegerKernels& kernels, const float* x,
                    int64_t batch, int64_t panel, float* y) {
  int64_t rows = terms.front()->rows, columns = terms.front()->columns, most = std::min(batch, panel);
  Rounded rounded;
  // Room for a tile that begins at the last column; an odd number of tiles, so that the rows of one fall into different
  // cache sets.
  rounded.padded = (((columns + kAlign - 1) / kAlign + 1) | 1) * kAlign;
  rounded.planes = scratch<ByteMatrix, int8_t>(2 * most * rounded.padded);
  rounded.steps.resize(most);
  rounded.sums.resize(2 * most);
  for (int64_t first = 0; first < batch; first += panel) {
    round_panel(kernels, x + first * columns, columns, std::min(panel, batch - first), rounded);
    multiply_panel(terms, kernels, rounded, y + first * rows);
  }
}

} // namespace quiptools
