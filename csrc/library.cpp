// The C interface. Every pointer comes with its size in bytes, and every size is checked here before anything is read.
//
// Functions that can fail return a Status; rac_last_error() has the text, until the thread's next failure.
#include "int4.h"
#include "int8_product.h"
#include "product.h"

// Raised by one with every change of the functions below. Python refuses a library with another number.
#ifndef RAC_ABI
#define RAC_ABI 7
#endif
#define RAC_EXPORT extern "C" __attribute__((visibility("default")))

using namespace rac;

namespace {

// a * b * c, or -1 if a factor is negative or the product does not fit.
int64_t product_of(int64_t a, int64_t b, int64_t c) {
    int64_t ab, abc;
    if (a < 0 || b < 0 || c < 0 || __builtin_mul_overflow(a, b, &ab) || __builtin_mul_overflow(ab, c, &abc)) return -1;
    return abc;
}

// A buffer has exactly the bytes that [a, b] elements of `size` bytes need, and is aligned to them.
Status check_buffer(const char* name, const void* pointer, int64_t bytes, int64_t a, int64_t b, int64_t size) {
    const int64_t needed = product_of(a, b, size);
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

Status check_isa(int32_t isa) {
    return runs(isa) ? OK : fail(NO_SUCH_ISA, "this processor does not run instruction set %d", isa);
}

// BF16 or FP32, the types of x, bias and results.
Status check_float(const char* name, int32_t type) {
    return type == BF16 || type == FP32 ? OK : fail(BAD_ARGUMENT, "%s: there is no float type %d", name, type);
}

}  // namespace

RAC_EXPORT int32_t rac_abi() { return RAC_ABI; }

// The best instruction set that this processor and operating system run: the last of those that run, except SVE where it is not preferred.
RAC_EXPORT int32_t rac_best_isa() {
    for (int32_t isa = ISAS - 1; isa > PORTABLE; isa--)
        if (runs(isa) && (isa != SVE || prefers_sve())) return isa;
    return PORTABLE;
}

// 1 where this processor and operating system run an instruction set.
RAC_EXPORT int32_t rac_runs(int32_t isa) { return runs(isa); }

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

// The value type in which an instruction set multiplies sparse 4-bit weights fastest on this processor: INT4 or PLANES4. PLANES4 needs
// scales, and codes of zero, that are one per row or in groups of a multiple of 32 columns; only portable code and those that prefer
// it multiply it.
RAC_EXPORT int32_t rac_sparse_int4_type(int32_t isa) { return prefers_planes(isa) ? PLANES4 : INT4; }

// Bytes of a packed weight; -1 for sizes that are impossible or do not fit each other. INT4 and PLANES4 need the bitmask.
RAC_EXPORT int64_t rac_packed_bytes(int64_t rows, int64_t columns, int64_t nonzeros, int32_t type, const uint8_t* bitmask,
                                    int64_t bitmask_bytes, int64_t zero_groups) {
    Sizes sizes = {rows, columns, nonzeros, type, least_code_bytes(type, nonzeros), zero_groups};
    Layout layout;
    if (!layout_of(sizes, &layout)) return -1;
    if (!has_codes(type)) return layout.bytes;
    if (!bitmask || bitmask_bytes != rows * ((columns + 7) / 8)) return -1;
    sizes.code_bytes = count_code_bytes(type, bitmask, rows, columns);
    return layout_of(sizes, &layout) ? layout.bytes : -1;
}

// Fill `data`. No bitmask for types without masks. `zeros`: the codes of zero of a weight of few bits, [panels][zero_groups][16]; DENSE3
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

// Whether x is rounded to 8 bits or to 16 in products with this packed weight of integers. 16 is what packing leaves. Instruction sets
// that do not multiply bytes round to 16 bits always.
RAC_EXPORT int32_t rac_set_activation_bits(void* data, int64_t bytes, int32_t bits) {
    if (bits != 8 && bits != 16) return fail(BAD_ARGUMENT, "activations of %d bits; 8 and 16 are possible", bits);
    return set_byte_x(data, bytes, bits == 8);
}

// The bits that x is rounded to in products with a packed weight of integers on an instruction set; 0 where it is not rounded to
// integers, -1 where the header is damaged.
RAC_EXPORT int32_t rac_activation_bits(const void* data, int64_t bytes, int32_t isa) {
    Weight weight;
    if (view(data, bytes, &weight) != OK) return -1;
    return weight.type < INT8 ? 0 : weight.byte_x && multiplies_bytes(isa) ? 8 : 16;
}

// Panels [first, last) as dense columns, without scale: out[columns][16 * (last - first)].
RAC_EXPORT int32_t rac_expand_panels(const void* data, int64_t bytes, int64_t rows, int64_t columns, int64_t first,
                                     int64_t last, void* out, int64_t out_bytes, int32_t out_type, int32_t isa,
                                     int32_t threads) {
    Weight weight;
    RAC_TRY(view_of_shape(data, bytes, rows, columns, &weight));
    RAC_TRY(check_isa(isa));
    RAC_TRY(check_float("out", out_type));
    if (out_type == BF16 && weight.type == FP32) return fail(BAD_ARGUMENT, "out: bf16 cannot hold fp32 values exactly");
    if (first < 0 || first > last || last > weight.panels)
        return fail(BAD_ARGUMENT, "there are no panels [%lld, %lld) in a weight of %lld", (long long)first,
                    (long long)last, (long long)weight.panels);
    const Type type = static_cast<Type>(out_type);
    RAC_TRY(check_buffer("out", out, out_bytes, columns, PANEL * (last - first), size_of(type)));
    return expand(weight, first, last, out, type, isa, threads < 1 ? 1 : threads);
}

// out[m][rows] = x[m][columns] W^T + bias[rows], all contiguous; out is of x's type. On AMX, fp32 uses AVX512.
//
// `scale` is [panels][groups][16]: factors for each row of the weight and each of `groups` equally wide groups of columns, in
// fp32, for weights of few bits also in bf16. Weights of integers need it. Floats may have one group, or none: a null `scale` of 0
// bytes. The same for a missing bias.
RAC_EXPORT int32_t rac_sparse_linear(const void* data, int64_t bytes, int64_t rows, int64_t columns, const void* x,
                                     int64_t x_bytes, int32_t x_type, int64_t m, const void* scale,
                                     int64_t scale_bytes, int32_t scale_type, int64_t groups, const void* bias,
                                     int64_t bias_bytes, int32_t bias_type, void* out, int64_t out_bytes, int32_t isa, int32_t threads) {
    Product product = {};
    RAC_TRY(view_of_shape(data, bytes, rows, columns, &product.weight));
    RAC_TRY(check_isa(isa));
    RAC_TRY(check_float("x", x_type));
    RAC_TRY(check_float("bias", bias_type));
    if (m < 0 || m >= int64_t{1} << 31) return fail(BAD_ARGUMENT, "x: impossible number of rows %lld", (long long)m);
    const int64_t size = size_of(static_cast<Type>(x_type));
    RAC_TRY(check_buffer("x", x, x_bytes, m, columns, size));
    RAC_TRY(check_buffer("out", out, out_bytes, m, rows, size));
    if (bias || bias_bytes)
        RAC_TRY(check_buffer("bias", bias, bias_bytes, 1, rows, size_of(static_cast<Type>(bias_type))));
    if (scale || scale_bytes) {
        if (groups < 1 || columns % groups)
            return fail(BAD_ARGUMENT, "scale: %lld columns cannot be cut into %lld groups", (long long)columns,
                        (long long)groups);
        RAC_TRY(check_float("scale", scale_type));
        RAC_TRY(check_buffer("scale", scale, scale_bytes, product.weight.panels * PANEL, groups,
                             size_of(static_cast<Type>(scale_type))));
    }
    if (m == 0) return OK;
    product.m = m;
    product.bias = bias;
    product.bias_type = static_cast<Type>(bias_type);
    product.out = out;
    product.out_type = static_cast<Type>(x_type);
    return linear(product, x, scale, static_cast<Type>(scale_type), groups, isa, threads < 1 ? 1 : threads);
}
