#include "registry.h"

#include "processor.h"

namespace rac {

// Weak: the build leaves out a file whose flags the compiler does not know, and then the address is null.
#define RAC_WEAK __attribute__((weak))
extern const Kernel portable_kernel, avx2_kernel RAC_WEAK, avxvnni_kernel RAC_WEAK, avx512_kernel RAC_WEAK, amx_kernel RAC_WEAK,
    neon_kernel RAC_WEAK, i8mm_kernel RAC_WEAK;

namespace {

struct Entry {
    const Kernel* kernel;
    bool (*runs)();
};

// A line per instruction set, which includes the lower ones; but AVX512 does not include AVX-VNNI.
const Entry ENTRIES[] = {
    {&portable_kernel, [] { return true; }},
#if defined(__x86_64__)
    {&avx2_kernel, has_avx2},
    {&avxvnni_kernel, has_avx_vnni},
    {&avx512_kernel, has_avx512},
    {&amx_kernel, has_amx},
#elif defined(__aarch64__)
    {&neon_kernel, has_neon},
    {&i8mm_kernel, has_i8mm},
#endif
};
constexpr int32_t COUNT = sizeof ENTRIES / sizeof *ENTRIES;

}  // namespace

int32_t kernel_count() { return COUNT; }

const Kernel* kernel_at(int32_t number) { return number >= 0 && number < COUNT ? ENTRIES[number].kernel : nullptr; }

bool runs(int32_t number) { return kernel_at(number) && ENTRIES[number].runs(); }

}  // namespace rac
