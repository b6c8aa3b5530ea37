// What the C interface calls for weights of any type.
#pragma once
#include "kernel.h"

namespace rac {

// Whether this processor and operating system run an Isa; false for other numbers.
bool runs(int32_t isa);

// out[m][rows] = x[m][columns] W^T + bias: `out` holds all but x, `scale` and the way to round. x is contiguous and of the
// same type as the result. `scale` is [panels][groups][16] or null: integers need it, floats may have one group. It is fp32;
// that of weights of few bits may be bf16.
Status linear(const Product& out, const void* x, const void* scale, Type scale_type, int64_t groups, int32_t isa,
              int threads);

// Panels [first, last) as dense columns without scale: out[columns][16 * (last - first)].
Status expand(const Weight& weight, int64_t first, int64_t last, void* out, Type out_type, int32_t isa, int threads);

}  // namespace rac
