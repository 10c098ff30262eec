// The exact search of the nearest sum of two codewords, compiled once for each instruction set: QUIPTOOLS_ISA names it
// and QUIPTOOLS_LANES says how many floats a register holds.
//
// All size^2 sums are looked at, an addition and a minimum each: |t - a - b|^2 is a part of t and a, one of b and t, and
// the product of a and b, which is read for several targets at a time. Which sum it was is found again at the end. (To
// rule sums out by the triangle inequality takes longer: in eight dimensions few are far enough.)
#include <algorithm>
#include <cstring>
#include <limits>

namespace quiptools {
namespace QUIPTOOLS_ISA {

constexpr int64_t kLanes = QUIPTOOLS_LANES;
constexpr int64_t kTogether = QUIPTOOLS_LANES == 16 ? 8 : 4; // targets that share what is read
constexpr int64_t kRegisters = kWords / kLanes;
typedef float Floats __attribute__((vector_size(4 * QUIPTOOLS_LANES)));

inline Floats load(const float* from) {
  Floats v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }

// out[j] = norms[j] - 2 <target, word j>, words (group, size)
inline void scores(const float* target, const float* words, const float* norms, int64_t size, int64_t group, float* out) {
  for (int64_t j = 0; j < size; j += kLanes) {
    Floats sum = load(norms + j);
    for (int64_t a = 0; a < group; a++) sum -= 2 * target[a] * load(words + a * size + j);
    store(out + j, sum);
  }
}

inline int64_t place_of_least(const float* values, int64_t size) {
  Floats least = load(values);
  for (int64_t j = kLanes; j < size; j += kLanes) {
    Floats value = load(values + j);
    least = value < least ? value : least;
  }
  float found = least[0];
  for (int64_t lane = 1; lane < kLanes; lane++) found = std::min<float>(found, least[lane]);
  return std::find(values, values + size, found) - values;
}

// least[t][j] += min over i of first[t][i] + products[i][j], of `together` targets t (size apart) and kWords places j.
template <int64_t together>
inline void add_least(const float* first, const float* products, int64_t size, float* least) {
  Floats found[together][kRegisters];
  for (int64_t t = 0; t < together; t++)
    for (int64_t n = 0; n < kRegisters; n++) found[t][n] = Floats{} + std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < size; i++) {
    for (int64_t n = 0; n < kRegisters; n++) {
      Floats product = load(products + i * kWords + n * kLanes);
#pragma GCC unroll 8
      for (int64_t t = 0; t < together; t++) {
        Floats sum = product + first[t * size + i];
        found[t][n] = sum < found[t][n] ? sum : found[t][n];
      }
    }
  }
  for (int64_t t = 0; t < together; t++)
    for (int64_t n = 0; n < kRegisters; n++) {
      float* to = least + t * size + n * kLanes;
      store(to, load(to) + found[t][n]);
    }
}

void nearest_pairs(const Pairs& pairs, const float* targets, int64_t count, float* scratch, int64_t* places) {
  const int64_t size = pairs.size;
  float *first = scratch, *least = scratch + kTargets * size;
  for (int64_t begin = 0; begin < count; begin += kTargets) {
    const int64_t here = std::min(kTargets, count - begin);
    for (int64_t t = 0; t < here; t++) {
      const float* target = targets + (begin + t) * pairs.group;
      scores(target, pairs.words[0], pairs.norms[0], size, pairs.group, first + t * size);
      scores(target, pairs.words[1], pairs.norms[1], size, pairs.group, least + t * size);
    }
    for (int64_t j = 0; j < size; j += kWords) {
      int64_t t = 0;
      for (; t + kTogether <= here; t += kTogether)
        add_least<kTogether>(first + t * size, pairs.products + j * size, size, least + t * size + j);
      for (; t < here; t++) add_least<1>(first + t * size, pairs.products + j * size, size, least + t * size + j);
    }
    for (int64_t t = 0; t < here; t++) {
      int64_t second = place_of_least(least + t * size, size);
      float* sums = first + t * size;
      for (int64_t i = 0; i < size; i += kLanes) store(sums + i, load(sums + i) + load(pairs.transposed + second * size + i));
      places[2 * (begin + t)] = place_of_least(sums, size);
      places[2 * (begin + t) + 1] = second;
    }
  }
}

} // namespace QUIPTOOLS_ISA
} // namespace quiptools
