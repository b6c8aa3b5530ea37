#include "processor.h"

#include <cstdio>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace rac {

// Each question is asked once: cpuid takes longer than a small matmul in a virtual machine.
#define RAC_ONCE(question)             \
    static const bool answer = question; \
    return answer

#if defined(RAC_EMULATE)  // tests run AVX512 and AMX in plain C++, and the shares of cores that differ, on every machine

bool has_avx512() { return true; }
bool has_avx512_bf16() { return true; }
bool has_amx() { return true; }
bool cores_differ() { return true; }

#elif defined(__x86_64__)

namespace {

enum Register { EAX, EBX, ECX, EDX };

bool cpuid_bit(unsigned leaf, unsigned subleaf, Register from, int bit) {
    unsigned registers[4] = {};
    return __get_cpuid_count(leaf, subleaf, registers, registers + 1, registers + 2, registers + 3) &&
           registers[from] >> bit & 1;
}

bool ask_for_amx() {
#if defined(__linux__)
    const bool bf16 = cpuid_bit(7, 0, EDX, 22), tile = cpuid_bit(7, 0, EDX, 24), int8 = cpuid_bit(7, 0, EDX, 25);
    return bf16 && tile && int8 && syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA
#else
    return false;
#endif
}

}  // namespace

bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
bool has_amx() { RAC_ONCE(has_avx512_bf16() && ask_for_amx()); }
// Intel: "hybrid". AMD: "heterogeneous cores".
bool cores_differ() { RAC_ONCE(cpuid_bit(7, 0, EDX, 15) || cpuid_bit(0x80000026, 0, EAX, 30)); }

#else

namespace {

// The capacity of a core over that of the fastest, in 1/1024; 0 if there is none.
int capacity_of(int core) {
    char path[80];
    int capacity = 0;
    std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/cpu_capacity", core);
    if (std::FILE* file = std::fopen(path, "r")) {
        if (std::fscanf(file, "%d", &capacity) != 1) capacity = 0;
        std::fclose(file);
    }
    return capacity;
}

bool ask_cores() {
    const int first = capacity_of(0);
    for (int core = 1, capacity; (capacity = capacity_of(core)) != 0; core++)
        if (capacity != first) return true;
    return false;
}

}  // namespace

bool has_avx512_bf16() { return false; }
bool cores_differ() { RAC_ONCE(ask_cores()); }

#endif

#if defined(__x86_64__)

bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt");
}
bool has_avx_vnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    RAC_ONCE(__get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1 && has_avx2());
}

#elif defined(__aarch64__)

#if defined(__linux__)
// The numbers of the bits are part of Linux's interface; old headers lack their names.
bool has_i8mm() { return getauxval(AT_HWCAP) >> 20 & getauxval(AT_HWCAP2) >> 13 & 1; }  // HWCAP_ASIMDDP, HWCAP2_I8MM
#elif defined(__ARM_FEATURE_MATMUL_INT8)
bool has_i8mm() { return true; }
#else
bool has_i8mm() { return false; }
#endif

#endif

}  // namespace rac
