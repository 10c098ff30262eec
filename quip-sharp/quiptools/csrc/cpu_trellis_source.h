// The Viterbi search of closed walks, compiled once for each instruction set: QUIPTOOLS_ISA names it and
// QUIPTOOLS_LANES says how many floats a register holds.
//
// Tail-biting (Tseng et al. 2024, arXiv 2406.11235, section 3.3): the sequence is solved once around its own beginning,
// with free ends; the state in which that walk passes the beginning fixes both ends of a second search. A walk settles
// within a few times the steps that a state lasts, so the first search needs no more than those on both sides.
#include <algorithm>
#include <cstring>
#include <limits>

namespace quiptools {
namespace QUIPTOOLS_ISA {

constexpr int kLanes = QUIPTOOLS_LANES;
constexpr int64_t kSettled = 16; // lives of a state, on each side
typedef float Floats __attribute__((vector_size(4 * QUIPTOOLS_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * QUIPTOOLS_LANES)));
typedef uint8_t Bytes __attribute__((vector_size(QUIPTOOLS_LANES)));

inline Floats load(const float* from) {
  Floats v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }

// One step: each overlap of two states is left to the 2^bits states that it begins, which cost what it did and the
// distance of their value from x; of the states that end in one and the same overlap the cheapest is kept, and which one.
// States and bits are template parameters where they are known to the compiler, 0 where not.
template <int kStates, int kBits>
inline void step(const Trellis& trellis, float x, const float* best, float* next, uint8_t* decisions) {
  const int bits = kBits ? kBits : trellis.bits;
  const int overlaps = 1 << ((kStates ? kStates : trellis.states) - bits), branches = 1 << bits;
  if (overlaps >= kLanes) {
    Ints lanes;
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane >> bits;
    for (int u = 0; u < overlaps; u += kLanes) {
      Floats least;
      Ints from = {};
      for (int j = 0; j < branches; ++j) {
        const int state = j * overlaps + u;
        Floats error = x - load(trellis.values + state);
        Floats cost = __builtin_shuffle(load(best + (state >> bits)), lanes) + error * error;
        if (j == 0) {
          least = cost;
          continue;
        }
        Ints less = cost < least;
        least = less ? cost : least;
        from = less ? (Ints{} + j) : from;
      }
      store(next + u, least);
      Bytes narrow = __builtin_convertvector(from, Bytes);
      std::memcpy(decisions + u, &narrow, sizeof narrow);
    }
    return;
  }
  if (branches >= kLanes) {
    // All states of a register follow one overlap; its lanes are several ways into each of the few next ones.
    const int together = kLanes / overlaps, size = overlaps * branches;
    Floats least = Floats{} + std::numeric_limits<float>::infinity();
    Ints from = {};
    for (int state = 0; state < size; state += kLanes) {
      Floats error = x - load(trellis.values + state);
      Floats cost = (Floats{} + best[state >> bits]) + error * error;
      Ints less = cost < least;
      least = less ? cost : least;
      from = less ? (Ints{} + state / kLanes) : from;
    }
    for (int u = 0; u < overlaps; ++u) {
      int lane = u;
      for (int other = u + overlaps; other < kLanes; other += overlaps)
        if (least[other] < least[lane] || (least[other] == least[lane] && from[other] < from[lane])) lane = other;
      next[u] = least[lane];
      decisions[u] = static_cast<uint8_t>(from[lane] * together + lane / overlaps);
    }
    return;
  }
  for (int u = 0; u < overlaps; ++u) {
    next[u] = std::numeric_limits<float>::infinity();
    for (int j = 0; j < branches; ++j) {
      const int state = j * overlaps + u;
      float error = x - trellis.values[state], cost = best[state >> bits] + error * error;
      if (cost < next[u]) {
        next[u] = cost;
        decisions[u] = static_cast<uint8_t>(j);
      }
    }
  }
}

template <int kStates, int kBits>
void search_of(const Trellis& trellis, const float* x, int64_t length, int64_t first, int64_t steps,
               const TrellisScratch& scratch) {
  const int64_t overlaps = int64_t{1} << (trellis.states - trellis.bits);
  for (int64_t i = 0; i < steps; ++i) {
    int64_t t = first + i < length ? first + i : first + i - length;
    float *best = scratch.best[i % 2], *next = scratch.best[(i + 1) % 2];
    step<kStates, kBits>(trellis, x[t], best, next, scratch.decisions + i * overlaps);
  }
}

// `steps` steps around the sequence from step `first` on. What each overlap costs before them is in scratch.best[0];
// what it costs after them is returned.
inline const float* search(const Trellis& trellis, const float* x, int64_t length, int64_t first, int64_t steps,
                           const TrellisScratch& scratch) {
  auto chosen = search_of<0, 0>;
  if (trellis.states == 8) {
    if (trellis.bits == 1) chosen = search_of<8, 1>;
    if (trellis.bits == 2) chosen = search_of<8, 2>;
    if (trellis.bits == 3) chosen = search_of<8, 3>;
    if (trellis.bits == 4) chosen = search_of<8, 4>;
    if (trellis.bits == 5) chosen = search_of<8, 5>;
    if (trellis.bits == 6) chosen = search_of<8, 6>;
  }
  chosen(trellis, x, length, first, steps, scratch);
  return scratch.best[steps % 2];
}

// The states of the walk that ends in `overlap`, from the last step back to step `until`.
inline void trace(const Trellis& trellis, int64_t length, int overlap, int64_t until, const TrellisScratch& scratch) {
  const int shift = trellis.states - trellis.bits;
  for (int64_t step = length; step-- > until;) {
    int state = scratch.decisions[(step << shift) + overlap] << shift | overlap;
    scratch.walk[step] = static_cast<uint16_t>(state);
    overlap = state >> trellis.bits;
  }
}

inline float closed(const Trellis& trellis, const float* x, int64_t length, int overlap, const TrellisScratch& scratch) {
  const int overlaps = 1 << (trellis.states - trellis.bits);
  std::fill(scratch.best[0], scratch.best[0] + overlaps, std::numeric_limits<float>::max() / 2);
  scratch.best[0][overlap] = 0;
  return search(trellis, x, length, 0, length, scratch)[overlap];
}

void closed_walk(const Trellis& trellis, const float* x, int64_t length, const TrellisScratch& scratch,
                 uint8_t* symbols, float* values) {
  const int overlaps = 1 << (trellis.states - trellis.bits);
  int overlap = 0;
  if (length * trellis.bits < 2 * trellis.states) {
    // So short a walk is bound to its own beginning: every overlap is tried, and the result is the optimum.
    float least = std::numeric_limits<float>::infinity();
    for (int u = 0; u < overlaps; ++u) {
      float cost = closed(trellis, x, length, u, scratch);
      if (cost < least) least = cost, overlap = u;
    }
  } else {
    int64_t half = std::min(length / 2, kSettled * ((trellis.states + trellis.bits - 1) / trellis.bits));
    std::fill(scratch.best[0], scratch.best[0] + overlaps, 0.0f);
    const float* costs = search(trellis, x, length, length - half, 2 * half, scratch);
    int end = static_cast<int>(std::min_element(costs, costs + overlaps) - costs);
    trace(trellis, 2 * half, end, half, scratch);
    overlap = scratch.walk[half] >> trellis.bits;
  }
  closed(trellis, x, length, overlap, scratch);
  trace(trellis, length, overlap, 0, scratch);
  for (int64_t t = 0; t < length; ++t) {
    symbols[t] = trellis.symbols[scratch.walk[t]];
    values[t] = trellis.values[scratch.walk[t]];
  }
}

void add_scaled(float* y, const float* x, float factor, int64_t length) {
  for (int64_t i = 0; i < length; ++i) y[i] += factor * x[i];
}

constexpr TrellisSearch kTrellis{closed_walk, add_scaled};

} // namespace QUIPTOOLS_ISA
} // namespace quiptools
