// What int8_product.cpp calls to multiply panels.
#pragma once
#include "int4.h"
#include "int8.h"

namespace rac {

constexpr int64_t FEW_LINES = 32;  // so few lines stay in the cache anyway: panels are read one by one

const Kernel4& kernel4_of(const Kernel8& kernel);

// The offset in bytes of a column of the double lines from `line` on; in QUADS, `lines` of them are interleaved.
int64_t offset_of(Format8 format, int64_t line, int64_t lines, int64_t stride, int64_t column);

// Whether codes of few bits are spread anew for each group of lines, and not written.
bool is_direct4(const Product8& product, const Kernel8& kernel);

// Panels [first, last). False if there is not enough memory.
bool vector_panels8(const Product8& product, const Kernel8& kernel, int64_t first, int64_t last);

}  // namespace rac
