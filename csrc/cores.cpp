// Whether the processor says that its cores differ. Asked once: cpuid is slow in a virtual machine.
#include "cores.h"

#include <cstdio>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace rac {
namespace {

#if defined(RAC_EMULATE)
bool ask() { return true; }  // so that the tests run this path on any machine
#elif defined(__x86_64__)
bool ask() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> 15 & 1) return true;  // Intel: "hybrid"
    return __get_cpuid_count(0x80000026, 0, &a, &b, &c, &d) && a >> 30 & 1;   // AMD: "heterogeneous cores"
}
#elif defined(__linux__)
// The capacity of a core over that of the fastest, in 1/1024; 0 if there is none.
int capacity_of(int core) {
    char path[80];
    std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/cpu_capacity", core);
    std::FILE* file = std::fopen(path, "r");
    if (!file) return 0;
    int capacity = 0;
    if (std::fscanf(file, "%d", &capacity) != 1) capacity = 0;
    std::fclose(file);
    return capacity;
}

bool ask() {
    const int first = capacity_of(0);
    for (int core = 1, capacity; (capacity = capacity_of(core)) != 0; core++)
        if (capacity != first) return true;
    return false;
}
#else
bool ask() { return false; }
#endif

}  // namespace

bool cores_differ() {
    static const bool differ = ask();
    return differ;
}

}  // namespace rac
