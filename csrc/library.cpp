// The C interface. Every pointer comes with its size in bytes, and every size is checked here before anything is read.
//
// Functions that can fail return a Status; rac_last_error() has the text, until the thread's next failure.
#include <cstdio>

#include "gemm/matmul.h"
#include "interface.h"

// Raised by one with every change of the functions below. Python refuses a library with another number.
#ifndef RAC_ABI
#define RAC_ABI 10
#endif

using namespace rac;

namespace {

// a * b * c, or -1 if a factor is negative or the product does not fit.
int64_t bytes_of(int64_t a, int64_t b, int64_t c) {
    int64_t ab, abc;
    if (a < 0 || b < 0 || c < 0 || __builtin_mul_overflow(a, b, &ab) || __builtin_mul_overflow(ab, c, &abc)) return -1;
    return abc;
}

// A buffer has exactly the bytes that [a, b] elements of `size` bytes need, and is aligned to them.
Status check_buffer(const char* name, const void* pointer, int64_t bytes, int64_t a, int64_t b, int64_t size) {
    const int64_t needed = bytes_of(a, b, size);
    if (bytes != needed)
        return fail(BAD_ARGUMENT, "%s: %lld bytes, where [%lld, %lld] of %lld bytes each are needed", name,
                    (long long)bytes, (long long)a, (long long)b, (long long)size);
    if (needed && !pointer) return fail(BAD_ARGUMENT, "%s: no address", name);
    if (reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(size))
        return fail(BAD_ARGUMENT, "%s: its address is no multiple of %lld", name, (long long)size);
    return OK;
}

// A view of packed data whose header says [rows, columns].
Status view_of_shape(const void* data, int64_t bytes, int64_t rows, int64_t columns, Weight* weight) {
    RAC_TRY(view(data, bytes, weight));
    if (weight->rows == rows && weight->columns == columns) return OK;
    return fail(BAD_ARGUMENT, "its header says [%lld, %lld], another shape", (long long)weight->rows,
                (long long)weight->columns);
}

// `kernel`: the kernel of a number, which this processor runs.
Status find_kernel(int32_t number, const Kernel** kernel) {
    *kernel = runs(number) ? kernel_at(number) : nullptr;
    return *kernel ? OK : fail(NO_SUCH_ISA, "this processor does not run kernel %d", number);
}

// BF16 or FP32, the types of x, bias and results.
Status check_float(const char* name, int32_t type) {
    return type == BF16 || type == FP32 ? OK : fail(BAD_ARGUMENT, "%s: there is no float type %d", name, type);
}

}  // namespace

RAC_EXPORT int32_t rac_abi() { return RAC_ABI; }

// The kernels of this library, a line each: number, name, title, 0 or 1 whether this processor runs the kernel and whether the kernel
// multiplies bytes of x, and the crossover of floats, int8 and int4 (Crossover). The last kernel that runs is the best.
RAC_EXPORT const char* rac_kernels() {
    static thread_local char text[1024];
    int length = 0;
    for (int32_t number = 0; number < kernel_count(); number++) {
        const Kernel* kernel = kernel_at(number);
        if (!kernel) continue;
        const Crossover& crossover = kernel->crossover;
        length += std::snprintf(text + length, sizeof text - length, "%d %s %s %d %d %d %d %d\n", number, kernel->name,
                                kernel->title, runs(number), multiplies_bytes(*kernel), crossover.floats, crossover.int8,
                                crossover.int4);
    }
    return text;
}

RAC_EXPORT const char* rac_compiler() {
#if defined(_OPENMP)
#define RAC_THREADS ", OpenMP"
#else
#define RAC_THREADS ", one thread: no OpenMP"
#endif
#if defined(__clang__)
    return "Clang " __clang_version__ RAC_THREADS;
#else
    return "GCC " __VERSION__ RAC_THREADS;
#endif
}

// Why the calling thread's latest call failed.
RAC_EXPORT const char* rac_last_error() { return last_error(); }

// Bytes of a packed weight; -1 for sizes that are impossible or do not fit each other. INT4 needs the bitmask.
RAC_EXPORT int64_t rac_packed_bytes(int64_t rows, int64_t columns, int64_t nonzeros, int32_t type, const uint8_t* bitmask,
                                    int64_t bitmask_bytes, int64_t zero_groups) {
    Sizes sizes = {rows, columns, nonzeros, type, type == INT4 ? nonzeros / 2 + nonzeros % 2 : 0, zero_groups};
    Layout layout;
    if (!layout_of(sizes, &layout)) return -1;
    if (type != INT4) return layout.bytes;
    if (!bitmask || bitmask_bytes != rows * ((columns + 7) / 8)) return -1;
    sizes.code_bytes = count_code_bytes(bitmask, rows, columns);
    return layout_of(sizes, &layout) ? layout.bytes : -1;
}

// Fill `data`. No bitmask for types without masks. `zeros`: the codes of zero of codes, [panels][zero_groups][16]; DENSE3
// and DENSE2 need them.
RAC_EXPORT int32_t rac_pack_weight(const void* values, int64_t value_bytes, const uint8_t* bitmask, int64_t bitmask_bytes,
                                   const uint8_t* zeros, int64_t zero_bytes, int64_t zero_groups, int64_t rows,
                                   int64_t columns, int32_t type, void* data, int64_t bytes, int32_t threads) {
    const Unpacked from = {values, value_bytes, bitmask, bitmask_bytes, zeros, zero_bytes, zero_groups};
    return pack(from, rows, columns, type, data, bytes, threads < 1 ? 1 : threads);
}

// The complete check, once per packed weight: afterwards no kernel reads outside of the buffer.
RAC_EXPORT int32_t rac_check_weight(const void* data, int64_t bytes, int64_t rows, int64_t columns, int32_t type) {
    Weight weight;
    RAC_TRY(view(data, bytes, &weight));
    if (weight.rows != rows || weight.columns != columns || weight.type != type)
        return fail(DAMAGED, "its header says [%lld, %lld] of type %d", (long long)weight.rows,
                    (long long)weight.columns, weight.type);
    return check(weight);
}

// The value type in the header; -1 where the header is damaged.
RAC_EXPORT int32_t rac_value_type(const void* data, int64_t bytes) {
    Weight weight;
    return view(data, bytes, &weight) == OK ? weight.type : -1;
}

// Have matmuls with this packed weight of integers round x to `bits`, 8 or 16. Packing leaves 16. Kernels that do not multiply bytes
// always round to 16 bits.
RAC_EXPORT int32_t rac_set_activation_bits(void* data, int64_t bytes, int32_t bits) {
    if (bits != 8 && bits != 16) return fail(BAD_ARGUMENT, "activations of %d bits; 8 and 16 are possible", bits);
    return set_byte_x(data, bytes, bits == 8);
}

// Panels [first, last) as dense columns of fp32, without scale: out[columns][16 * (last - first)].
RAC_EXPORT int32_t rac_expand_panels(const void* data, int64_t bytes, int64_t rows, int64_t columns, int64_t first,
                                     int64_t last, float* out, int64_t out_bytes, int32_t number, int32_t threads) {
    Weight weight;
    const Kernel* kernel;
    RAC_TRY(view_of_shape(data, bytes, rows, columns, &weight));
    RAC_TRY(find_kernel(number, &kernel));
    if (first < 0 || first > last || last > weight.panels)
        return fail(BAD_ARGUMENT, "there are no panels [%lld, %lld) in a weight of %lld", (long long)first,
                    (long long)last, (long long)weight.panels);
    RAC_TRY(check_buffer("out", out, out_bytes, columns, PANEL * (last - first), sizeof *out));
    return expand(weight, first, last, out, *kernel, threads < 1 ? 1 : threads);
}

// out[m][rows] = x[m][columns] W^T + bias[rows] by a kernel, all contiguous; out is of x's type.
//
// `scale` is [panels][groups][16]: a factor per row of the weight and per group of columns, `groups` of equal width, in fp32, of codes
// also in bf16. Integers need it. Floats may have a scale of one group, or a null `scale` of 0 bytes. The same for a missing bias.
RAC_EXPORT int32_t rac_sparse_linear(const void* data, int64_t bytes, int64_t rows, int64_t columns, const void* x,
                                     int64_t x_bytes, int32_t x_type, int64_t m, const void* scale,
                                     int64_t scale_bytes, int32_t scale_type, int64_t groups, const void* bias,
                                     int64_t bias_bytes, int32_t bias_type, void* out, int64_t out_bytes, int32_t number,
                                     int32_t threads) {
    Matmul matmul = {};
    const Kernel* kernel;
    RAC_TRY(view_of_shape(data, bytes, rows, columns, &matmul.weight));
    RAC_TRY(find_kernel(number, &kernel));
    RAC_TRY(check_float("x", x_type));
    RAC_TRY(check_float("bias", bias_type));
    if (m < 0 || m >= int64_t{1} << 31) return fail(BAD_ARGUMENT, "x: impossible number of rows %lld", (long long)m);
    const int64_t size = size_of(x_type);
    RAC_TRY(check_buffer("x", x, x_bytes, m, columns, size));
    RAC_TRY(check_buffer("out", out, out_bytes, m, rows, size));
    if (bias || bias_bytes)
        RAC_TRY(check_buffer("bias", bias, bias_bytes, 1, rows, size_of(bias_type)));
    if (scale || scale_bytes) {
        if (groups < 1 || columns % groups)
            return fail(BAD_ARGUMENT, "scale: %lld columns cannot be cut into %lld groups", (long long)columns,
                        (long long)groups);
        RAC_TRY(check_float("scale", scale_type));
        RAC_TRY(check_buffer("scale", scale, scale_bytes, matmul.weight.panels * PANEL, groups,
                             size_of(scale_type)));
    }
    if (m == 0) return OK;
    matmul.m = m;
    matmul.bias = bias;
    matmul.bias_type = static_cast<Type>(bias_type);
    matmul.out = out;
    matmul.out_type = static_cast<Type>(x_type);
    const Scale scales = {scale, static_cast<Type>(scale_type), groups};
    return linear(matmul, x, scales, *kernel, threads < 1 ? 1 : threads);
}

// out[m][rows] += x[m][columns] W^T in the rows of the panels that `panels` [m][count] has for each token. W has integers and a scale
// per row, [panels][16]; everything else is fp32 and contiguous.
RAC_EXPORT int32_t rac_add_panels(const void* data, int64_t bytes, int64_t rows, int64_t columns, const float* x, int64_t x_bytes,
                                  int64_t m, const int64_t* panels, int64_t panel_bytes, int64_t count, const float* scale,
                                  int64_t scale_bytes, float* out, int64_t out_bytes, int32_t number, int32_t threads) {
    Matmul matmul = {};
    const Kernel* kernel;
    RAC_TRY(view_of_shape(data, bytes, rows, columns, &matmul.weight));
    RAC_TRY(find_kernel(number, &kernel));
    const int64_t last = matmul.weight.panels - 1;
    if (matmul.weight.type < INT8) return fail(BAD_ARGUMENT, "panels of floats cannot be added");
    RAC_TRY(check_buffer("x", x, x_bytes, m, columns, sizeof *x));
    RAC_TRY(check_buffer("panels", panels, panel_bytes, m, count, sizeof *panels));
    RAC_TRY(check_buffer("scale", scale, scale_bytes, last + 1, PANEL, sizeof *scale));
    RAC_TRY(check_buffer("out", out, out_bytes, m, rows, sizeof *out));
    for (int64_t i = 0; i < m * count; i++)
        if (panels[i] < 0 || panels[i] > last)
            return fail(BAD_ARGUMENT, "there is no panel %lld after panel %lld", (long long)panels[i], (long long)last);
    const Scale scales = {scale, FP32, 1};
    RAC_TRY(check_scale(matmul.weight, scales));
    matmul.m = m;
    matmul.out = out;
    matmul.out_type = FP32;
    return add_panels(matmul, x, panels, count, scales, *kernel, threads < 1 ? 1 : threads);
}
