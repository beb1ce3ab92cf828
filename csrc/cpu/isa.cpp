// The instruction set in force, and its cap.
#include "cpu/isa.h"

#include <string>

#include "schemas.h"

namespace segops {
namespace {

int best() {
#if SEGOPS_X86_ISAS
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? 2 : avx2 ? 1 : 0;
#else
  return 0;
#endif
}

const int supported = best();
int in_force = supported;

int64_t cpu_isa(int64_t cap) {
  if (cap >= 0) in_force = cap < supported ? static_cast<int>(cap) : supported;
  return in_force;
}

}  // namespace

Isa isa_in_force() { return static_cast<Isa>(in_force); }

}  // namespace segops

STABLE_TORCH_LIBRARY_FRAGMENT(segops_C, m) { SEGOPS_DEF(m, cpu_isa); }
// No tensor argument carries a device, so the key is the one that takes any call.
STABLE_TORCH_LIBRARY_IMPL(segops_C, CompositeExplicitAutograd, m) { SEGOPS_IMPL(m, cpu_isa, segops::cpu_isa); }
