// The nearest sums of two codewords on plain pointers: one function per instruction set (see casp_aqlm.nearest).
#pragma once

#include <cstdint>

namespace quiptools {

constexpr int64_t kWords = 16;   // codewords of the second codebook that are searched together
constexpr int64_t kTargets = 32; // vectors that are: what is known of them stays in the second-level cache

// Two codebooks of `size` codewords of `group` numbers, size a multiple of kWords.
struct Pairs {
  int64_t size, group;
  const float* words[2];   // (group, size)
  const float* norms[2];   // (size)
  const float* products;   // (size / kWords, size, kWords): twice those of a codeword of the second, by the first's number
  const float* transposed; // (size, size): the same, a row for each of the second
};

// Floats of scratch that a search needs.
constexpr int64_t nearest_scratch(int64_t size) { return 2 * kTargets * size; }

// places (count, 2): of the pair whose sum is nearest to each of `targets` (count, group).
using NearestPairs = void (*)(const Pairs&, const float* targets, int64_t count, float* scratch, int64_t* places);

NearestPairs portable_nearest();
NearestPairs avx2_nearest();   // null where this compiler does not target x86
NearestPairs avx512_nearest(); // the same

} // namespace quiptools
