// The search of the trellis on plain pointers: one function per instruction set (see casp_quip_sharp.trellis).
#pragma once

#include <cstdint>

namespace quiptools {

// A trellis of 2^states states and `bits` bits a step. A state is numbered here with its newest bits lowest, so that
// the 2^bits states that precede one lie at a fixed stride and its successors side by side.
struct Trellis {
  int states;
  int bits;
  const float* values;    // (2^states): what a state stands for
  const uint8_t* symbols; // (2^states): the bits that the step into this state reads, as they are stored
};

// Scratch of one sequence of up to `length` steps.
struct TrellisScratch {
  float* best[2];     // (2^(states - bits) + 16): what each overlap of two states costs, before and after a step
  uint8_t* decisions; // (length, 2^(states - bits))
  uint16_t* walk;     // (length)
};

// The closed walk of `length` steps nearest to x: its symbols and values.
using ClosedWalk = void (*)(const Trellis&, const float* x, int64_t length, const TrellisScratch&, uint8_t* symbols,
                            float* values);

// y += factor x, (length)
using AddScaled = void (*)(float* y, const float* x, float factor, int64_t length);

struct TrellisSearch {
  ClosedWalk closed_walk;
  AddScaled add_scaled;
};

const TrellisSearch* portable_trellis();
const TrellisSearch* avx2_trellis();   // null where this compiler does not target x86
const TrellisSearch* avx512_trellis(); // the same

} // namespace quiptools
