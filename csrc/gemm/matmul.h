// The matmuls of the C interface, for every kernel.
#pragma once
#include "gemm/kernel.h"

namespace rac {

// The scale of a weight: [panels][groups][16], or null for floats.
struct Scale {
    const void* data;
    Type type;
    int64_t groups;
};

constexpr int64_t FEW_TOKENS = 32;        // so few tokens stay in the cache anyway: panels are read one by one
constexpr int64_t PANELS_PER_CHUNK = 8;   // panels that the same tokens multiply in turn, while these are in the cache

// out[m][rows] = x[m][columns] W^T + bias: `out` holds all but x, the scale and `store`. x is contiguous and has the type of out.
// Integers need a scale, floats may have a scale of a single group. The scale is fp32, of codes also bf16.
Status linear(const Matmul& out, const void* x, const Scale& scale, const Kernel& kernel, int threads);
Status check_scale(const Weight& weight, const Scale& scale);  // of integers
IntMatmul in_blocks(const Matmul& out, const Scale& scale);    // without x: its columns in blocks of one scale
Status int_linear(const Matmul& out, const void* x, const Scale& scale, const Kernel& kernel, int threads);

// Panels [first, last) as dense columns without scale: out[columns][16 * (last - first)].
Status expand(const Weight& weight, int64_t first, int64_t last, float* out, const Kernel& kernel, int threads);
void int_expand(const Weight& weight, int64_t panel, const Kernel& kernel, float* out, int64_t stride);

// out[token] += x[token] W^T in the rows of the `count` panels that `panels` [m][count] has for a token. All but integers is fp32.
Status add_panels(const Matmul& out, const float* x, const int64_t* panels, int64_t count, const Scale& scale, const Kernel& kernel,
                  int threads);

// Panels [first, last) by the kernel's vector instructions. False if there is not enough memory.
bool int_panels(const IntMatmul& matmul, const Integers& kernel, int64_t first, int64_t last);

// Whether codes are spread for each group of tokens anew, and not written.
bool multiplies_codes(const IntMatmul& matmul, const Integers& kernel);

// The offset in bytes of a column of the slots from `slot` on; in QUADS, `slots` of them are interleaved.
inline int64_t offset_of(XFormat format, int64_t slot, int64_t slots, int64_t stride, int64_t column) {
    return 2 * slot * stride + column * (format == INTEGERS ? 2 : 2 * slots);
}

// The kernels of this library (registry.cpp), in order of preference: the last kernel that runs is the best.
int32_t kernel_count();
const Kernel* kernel_at(int32_t number);  // null where there is none, or the compiler could not build it
bool runs(int32_t number);                // on this processor and operating system

// Whether a kernel multiplies bytes of x, so that x of bytes takes half of the instructions.
inline bool multiplies_bytes(const Kernel& kernel) { return kernel.integers->format == QUADS; }

}  // namespace rac
