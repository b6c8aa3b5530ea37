// Whether this processor has pdep, and how fast it is.
#include "int4.h"

#if defined(__x86_64__)
#include <cpuid.h>

namespace rac {

bool has_pdep() { return __builtin_cpu_supports("bmi2"); }

// AMD's processors before Zen 3 (family 0x19), and Hygon's, take 18 cycles and more for it: others take one.
bool has_fast_pdep() {
    static const bool fast = [] {
        unsigned a = 0, vendor = 0, c = 0, d = 0;
        __get_cpuid(0, &a, &vendor, &c, &d);
        unsigned version = 0;
        __get_cpuid(1, &version, &a, &c, &d);
        const unsigned family = (version >> 8 & 15) == 15 ? 15 + (version >> 20 & 255) : version >> 8 & 15;
        const bool amd = vendor == signature_AMD_ebx || vendor == 0x6f677948;  // "Hygo"
        return has_pdep() && !(amd && family < 0x19);
    }();
    return fast;
}

}  // namespace rac
#else
namespace rac {
bool has_pdep() { return false; }
bool has_fast_pdep() { return false; }
}  // namespace rac
#endif
