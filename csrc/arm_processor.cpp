// What the operating system says about an ARM processor.
#include "sve.h"

#if defined(RAC_NEON) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace rac {
namespace {

// Whether AT_HWCAP or AT_HWCAP2 has a bit; `always` where the system is not asked: whether the compiler may assume the instructions.
bool has_bit([[maybe_unused]] bool second, [[maybe_unused]] int bit, [[maybe_unused]] bool always) {
#if !defined(RAC_NEON)
    return false;
#elif defined(__linux__)
    return getauxval(second ? AT_HWCAP2 : AT_HWCAP) >> bit & 1;
#else
    return always;
#endif
}

#if defined(__ARM_FEATURE_DOTPROD)
constexpr bool DOTPROD_ALWAYS = true;
#else
constexpr bool DOTPROD_ALWAYS = false;
#endif
#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr bool I8MM_ALWAYS = true;
#else
constexpr bool I8MM_ALWAYS = false;
#endif
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
constexpr bool BF16_ALWAYS = true;
#else
constexpr bool BF16_ALWAYS = false;
#endif

}  // namespace

// The numbers of the bits are part of Linux's interface; old headers lack their names.
bool has_neon() { return has_bit(false, 1, true); }                             // HWCAP_ASIMD
bool has_dotprod() { return has_bit(false, 20, DOTPROD_ALWAYS); }               // HWCAP_ASIMDDP
bool has_i8mm() { return has_dotprod() && has_bit(true, 13, I8MM_ALWAYS); }     // HWCAP2_I8MM
bool has_arm_bf16() { return has_bit(true, 14, BF16_ALWAYS); }                  // HWCAP2_BF16

bool has_sve() {
#if defined(RAC_SVE)
    return has_bit(false, 22, false);  // HWCAP_SVE
#else
    return false;  // the compiler has none
#endif
}

// With shorter vectors, integers take fewer instructions than NEON and, by LLVM's models, the same time or more; bf16 takes more of both
// (docs/serving.md).
bool prefers_sve() { return sve_bits() >= 512; }

}  // namespace rac
