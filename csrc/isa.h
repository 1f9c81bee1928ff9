// Which of a file's compilations runs: ENCDIFF_WIDEST(name) is `name` of the widest instruction set the processor has.
// The environment's ENCDIFF_ISA=baseline|avx2 asks for less.
#pragma once

#include <cstdlib>
#include <string>

namespace encdiff {

enum class Isa { kBaseline, kAvx2, kAvx512 };

inline Isa choose_isa() {
#if defined(__x86_64__)
  const char* asked = std::getenv("ENCDIFF_ISA");
  const std::string limit = asked ? asked : "avx512";
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx512 && limit == "avx512") return Isa::kAvx512;
  if (has_avx2 && limit != "baseline") return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

inline Isa isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

#if defined(__x86_64__)
#define ENCDIFF_WIDEST(name) \
  (isa() == Isa::kAvx512 ? avx512::name : isa() == Isa::kAvx2 ? avx2::name : baseline::name)
#else
#define ENCDIFF_WIDEST(name) (baseline::name)
#endif

}  // namespace encdiff
