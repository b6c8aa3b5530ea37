// Weights of 8 to 2 bits on ARM processors with SVE: four columns at a time, signed bytes times signed bytes (SDOT of SVE).
#include "sve.h"

#if defined(RAC_SVE)

RAC_SVE_TARGET
namespace rac {
namespace {

#include "few_bits.h"
#include "neon_quads.h"

namespace bits128 {
constexpr int CHUNKS = 4, LINES = 2;
#include "sve_masks.h"
#include "int8_sve.h"
}  // namespace bits128

namespace bits256 {
constexpr int CHUNKS = 2, LINES = 4;
#include "sve_masks.h"
#include "int8_sve.h"
}  // namespace bits256

namespace bits512 {
constexpr int CHUNKS = 1, LINES = 4;
#include "sve_masks.h"
#include "int8_sve.h"
}  // namespace bits512

}  // namespace
}  // namespace rac
RAC_TARGET_END

namespace rac {

const Kernel8& sve_kernel8() {
    return sve_bits() >= 512 ? bits512::kernel8 : sve_bits() >= 256 ? bits256::kernel8 : bits128::kernel8;
}
const Kernel4& sve_kernel4() {
    return sve_bits() >= 512 ? bits512::kernel4 : sve_bits() >= 256 ? bits256::kernel4 : bits128::kernel4;
}

}  // namespace rac
#else
namespace rac {
const Kernel8& sve_kernel8() { return neon_kernel8; }
const Kernel4& sve_kernel4() { return neon_kernel4; }
}  // namespace rac
#endif
