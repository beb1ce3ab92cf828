// Includes SEGOPS_BODY once per instruction set, each time in a namespace of its own. No include guard: every kernel
// file includes it. Standard headers must have come in before: what they define must not carry these instructions, or
// the linker may keep that copy for machines without them. For the same reason a body uses no std:: template.
#include "cpu/isa.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"  // wide vectors are only passed between inlined functions

#if SEGOPS_X86_ISAS
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#define SEGOPS_VECTOR_BYTES 64
#define SEGOPS_VECTOR_REGISTERS 32
namespace segops::avx512 {
namespace {
#include "cpu/simd.body.h"
#include SEGOPS_BODY
}  // namespace
}  // namespace segops::avx512
#undef SEGOPS_VECTOR_BYTES
#undef SEGOPS_VECTOR_REGISTERS
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define SEGOPS_VECTOR_BYTES 32
#define SEGOPS_VECTOR_REGISTERS 16
namespace segops::avx2 {
namespace {
#include "cpu/simd.body.h"
#include SEGOPS_BODY
}  // namespace
}  // namespace segops::avx2
#undef SEGOPS_VECTOR_BYTES
#undef SEGOPS_VECTOR_REGISTERS
#pragma GCC pop_options
#endif

#define SEGOPS_VECTOR_BYTES 16
#define SEGOPS_VECTOR_REGISTERS 16
namespace segops::base {
namespace {
#include "cpu/simd.body.h"
#include SEGOPS_BODY
}  // namespace
}  // namespace segops::base
#undef SEGOPS_VECTOR_BYTES
#undef SEGOPS_VECTOR_REGISTERS
#pragma GCC diagnostic pop
