// The instruction sets that kernels are compiled for, in ascending order; what this CPU runs is found once.
#pragma once

#include <string>
#include <vector>

namespace quiptools {

// vbmi: AVX-512 with VBMI, GFNI and VNNI; amx: vbmi and the tile products of int8 and bf16.
enum class Isa { portable, avx2, avx512, vbmi, amx };

// Those that this CPU runs, the fastest first.
const std::vector<Isa>& usable_sets();

const char* name_of(Isa isa);

// The set of this name, the fastest where the name is empty; an error where the CPU does not run it.
Isa set_named(const std::string& name);

} // namespace quiptools
