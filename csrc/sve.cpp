// bf16 weights on ARM processors with SVE: bits of the mask become predicates, from which the places of the stored values are counted.
#include "sve.h"

#if defined(RAC_SVE)

RAC_SVE_TARGET
namespace rac {
namespace {

namespace bits128 {
constexpr int CHUNKS = 4, LINES = 2;
#include "sve_masks.h"
#include "sve_words.h"
}  // namespace bits128

namespace bits256 {
constexpr int CHUNKS = 2, LINES = 4;
#include "sve_masks.h"
#include "sve_words.h"
}  // namespace bits256

namespace bits512 {
constexpr int CHUNKS = 1, LINES = 4;
#include "sve_masks.h"
#include "sve_words.h"
}  // namespace bits512

// A function of its own, so that its instruction does not run before has_sve() is known.
__attribute__((noinline)) int bits_of_vector() { return static_cast<int>(8 * svcntb()); }

}  // namespace
}  // namespace rac
RAC_TARGET_END

namespace rac {

int sve_bits() { return has_sve() ? bits_of_vector() : 0; }

const Kernel& sve_kernel() {
    static const Kernel kernel = sve_bits() >= 512   ? bits512::with_bf16(neon_kernel)
                                 : sve_bits() >= 256 ? bits256::with_bf16(neon_kernel)
                                 : sve_bits() > 0    ? bits128::with_bf16(neon_kernel)
                                                     : neon_kernel;
    return kernel;
}

}  // namespace rac
#else
namespace rac {
int sve_bits() { return 0; }
const Kernel& sve_kernel() { return neon_kernel; }
}  // namespace rac
#endif
