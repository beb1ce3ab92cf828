// Which instruction set the CPU kernels run with: the best this machine has, or less when capped.
#pragma once

namespace segops {

enum class Isa { base = 0, avx2 = 1, avx512 = 2 };

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SEGOPS_X86_ISAS 1
#else
#define SEGOPS_X86_ISAS 0
#endif

Isa isa_in_force();

}  // namespace segops

// Calls `function` as compiled for the instruction set in force; its body came in through for_each_isa.h.
#if SEGOPS_X86_ISAS
#define SEGOPS_ISA_CALL(function, ...)                                           \
  (segops::isa_in_force() == segops::Isa::avx512 ? segops::avx512::function(__VA_ARGS__) \
   : segops::isa_in_force() == segops::Isa::avx2 ? segops::avx2::function(__VA_ARGS__)   \
                                                 : segops::base::function(__VA_ARGS__))
#else
#define SEGOPS_ISA_CALL(function, ...) segops::base::function(__VA_ARGS__)
#endif
