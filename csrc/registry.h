// The kernels of this library, in order of preference: the last kernel that runs is the best.
#pragma once
#include "gemm/kernel.h"

namespace rac {

int32_t kernel_count();

// The kernel of a number; null where there is none, or the compiler could not build it.
const Kernel* kernel_at(int32_t number);

// Whether this processor and operating system run it.
bool runs(int32_t number);

}  // namespace rac
