#include "gemm/matmul.h"
#include "processor.h"

namespace rac {

struct Entry {
    const Kernel* (*kernel)();
    bool (*runs)();
};

// Weak: the build leaves out a file whose flags the compiler does not know, and then the address is null.
#define RAC_KERNEL(name)                                           \
    [] {                                                           \
        extern const Kernel name##_kernel __attribute__((weak)); \
        return &name##_kernel;                                     \
    }

// A line per instruction set, which includes the lower ones; but AVX512 does not include AVX-VNNI.
static const Entry ENTRIES[] = {
    {RAC_KERNEL(portable), [] { return true; }},
#if defined(__x86_64__)
    {RAC_KERNEL(avx2), has_avx2},
    {RAC_KERNEL(avxvnni), has_avx_vnni},
    {RAC_KERNEL(avx512), has_avx512},
    {RAC_KERNEL(amx), has_amx},
#elif defined(__aarch64__)
    {RAC_KERNEL(neon), [] { return true; }},
    {RAC_KERNEL(i8mm), has_i8mm},
#endif
};

int32_t kernel_count() { return sizeof ENTRIES / sizeof *ENTRIES; }

const Kernel* kernel_at(int32_t number) {
    return number >= 0 && number < kernel_count() ? ENTRIES[number].kernel() : nullptr;
}

bool runs(int32_t number) { return kernel_at(number) && ENTRIES[number].runs(); }

}  // namespace rac
