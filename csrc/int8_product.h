// What the C interface calls for 8-bit weights.
#pragma once
#include "int8.h"

namespace rac {

const Kernel8* kernel8_of(int32_t isa);

// out.out = x W^T + bias with `scale` [panels][groups][16], each group of as many columns. Null, or what is wrong.
const char* linear8(const Product& out, const void* x, Type x_type, const float* scale, int64_t groups, int32_t isa,
                    int threads);

// A panel's integers, unscaled, as dense columns.
void expand8(const Weight& weight, int64_t panel, int32_t isa, void* out, Type out_type, int64_t stride);

}  // namespace rac
