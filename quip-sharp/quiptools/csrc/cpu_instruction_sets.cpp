#include "instruction_sets.h"

#include <c10/util/Exception.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace quiptools {
namespace {

#if defined(__x86_64__)
bool has_amx() {
#if defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  if ((d & (kBf16 | kTile | kInt8)) != (kBf16 | kTile | kInt8)) return false;
  // The kernel gives the tiles' 8 KB of state only to a process that asks for it.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

std::vector<Isa> find_usable() {
  std::vector<Isa> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned a, b, c = 0, d;
  bool converts_halves = __get_cpuid(1, &a, &b, &c, &d) && (c & 1u << 29); // F16C
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
              converts_halves;
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  bool vbmi = avx512 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
              __builtin_cpu_supports("gfni");
  if (vbmi && has_amx()) found.push_back(Isa::amx);
  if (vbmi) found.push_back(Isa::vbmi);
  if (avx512) found.push_back(Isa::avx512);
  if (avx2) found.push_back(Isa::avx2);
#endif
  found.push_back(Isa::portable);
  return found;
}

} // namespace

const std::vector<Isa>& usable_sets() {
  static const std::vector<Isa> found = find_usable();
  return found;
}

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::amx: return "amx";
    case Isa::vbmi: return "vbmi";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "portable";
  }
}

Isa set_named(const std::string& name) {
  if (name.empty()) return usable_sets().front();
  for (Isa isa : usable_sets())
    if (name == name_of(isa)) return isa;
  TORCH_CHECK_VALUE(false, "this CPU does not run the instruction set ", name);
}

} // namespace quiptools
