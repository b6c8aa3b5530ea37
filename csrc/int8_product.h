// What product.cpp calls for weights of 8 to 2 bits.
#pragma once
#include "int8.h"

namespace rac {

const Kernel8* kernel8_of(int32_t isa);

// Whether an instruction set multiplies bytes of x, so that x of one byte takes half of the products.
bool multiplies_bytes(int32_t isa);

// As linear() of product.h. `scale` is [panels][groups][16], and the groups have equally many columns.
Status linear8(const Product& out, const void* x, Type x_type, const void* scale, Type scale_type, int64_t groups,
               int32_t isa, int threads);

// The integers of a panel, without scale, as dense columns.
void expand8(const Weight& weight, int64_t panel, int32_t isa, void* out, Type out_type, int64_t stride);

}  // namespace rac
