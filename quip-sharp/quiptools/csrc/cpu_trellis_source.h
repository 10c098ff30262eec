// The Viterbi search of closed walks, compiled once for each instruction set: QUIPTOOLS_ISA names it and
// QUIPTOOLS_LANES says how many floats a register holds.
//
// Tail-biting (Tseng et al. 2024, arXiv 2406.11235, section 3.3): the sequence is solved once, begun at its middle and
// with free ends; where that walk passes the sequence's own beginning, its state fixes both ends of a second search.
#include <algorithm>
#include <cstring>
#include <limits>

namespace quiptools {
namespace QUIPTOOLS_ISA {

constexpr int kLanes = QUIPTOOLS_LANES;
typedef float Floats __attribute__((vector_size(4 * QUIPTOOLS_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * QUIPTOOLS_LANES)));
typedef uint8_t Bytes __attribute__((vector_size(QUIPTOOLS_LANES)));

inline Floats load(const float* from) {
  Floats v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }

// costs[s] = best[s >> bits] + (x - values[s])^2: each overlap is repeated for its 2^bits successors.
inline void enter(const Trellis& trellis, float x, const float* best, float* costs) {
  const int bits = trellis.bits, count = 1 << trellis.states;
  Ints lanes;
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane >> bits;
  for (int s = 0; s < count; s += kLanes) {
    Floats error = x - load(trellis.values + s);
    store(costs + s, __builtin_shuffle(load(best + (s >> bits)), lanes) + error * error);
  }
}

// best[u] = min over j of costs[j U + u] with U = 2^(states - bits), and the j.
inline void leave(const Trellis& trellis, const float* costs, float* best, uint8_t* decisions) {
  const int overlaps = 1 << (trellis.states - trellis.bits), branches = 1 << trellis.bits;
  if (overlaps >= kLanes) {
    for (int u = 0; u < overlaps; u += kLanes) {
      Floats least = load(costs + u);
      Ints from = {};
      for (int j = 1; j < branches; ++j) {
        Floats cost = load(costs + j * overlaps + u);
        Ints less = cost < least;
        least = less ? cost : least;
        from = less ? (Ints{} + j) : from;
      }
      store(best + u, least);
      Bytes narrow = __builtin_convertvector(from, Bytes);
      std::memcpy(decisions + u, &narrow, sizeof narrow);
    }
    return;
  }
  for (int u = 0; u < overlaps; ++u) {
    best[u] = costs[u];
    decisions[u] = 0;
    for (int j = 1; j < branches; ++j)
      if (costs[j * overlaps + u] < best[u]) {
        best[u] = costs[j * overlaps + u];
        decisions[u] = static_cast<uint8_t>(j);
      }
  }
}

// Steps `first`, first + 1, ... around the sequence; `best` holds what each overlap costs before and, then, after them.
inline void search(const Trellis& trellis, const float* x, int64_t length, int64_t first, const TrellisScratch& scratch) {
  const int64_t overlaps = int64_t{1} << (trellis.states - trellis.bits);
  for (int64_t step = 0; step < length; ++step) {
    int64_t t = first + step < length ? first + step : first + step - length;
    enter(trellis, x[t], scratch.best, scratch.costs);
    leave(trellis, scratch.costs, scratch.best, scratch.decisions + step * overlaps);
  }
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
  std::fill(scratch.best, scratch.best + overlaps, std::numeric_limits<float>::max() / 2);
  scratch.best[overlap] = 0;
  search(trellis, x, length, 0, scratch);
  return scratch.best[overlap];
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
    int64_t middle = length / 2;
    std::fill(scratch.best, scratch.best + overlaps, 0.0f);
    search(trellis, x, length, middle, scratch);
    int end = static_cast<int>(std::min_element(scratch.best, scratch.best + overlaps) - scratch.best);
    trace(trellis, length, end, length - middle, scratch);
    overlap = scratch.walk[length - middle] >> trellis.bits;
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
