// The product with weights of 8 to 2 bits: x is rounded to integers, and panels are shared by the threads.
#include "int8_product.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "int8_panels.h"
#include "shares.h"

namespace rac {
namespace {

// Round one block of columns of every line of x, with zeros after the last column.
void quantize(const Product8& product, const void* x, Type type, Format8 format, Quantize quantize_line, int64_t block, char* out,
              float* scales, int32_t* sums) {
    int16_t integers[BLOCK_ROOM];
    int8_t bytes[2][BLOCK_ROOM];
    const int64_t m = product.out.m, columns = product.out.weight.columns, stride = product.stride;
    const int64_t first = block * product.block, count = std::min(product.block, columns - first);
    const int64_t whole = block + 1 < product.blocks ? count : stride - first, size = type == BF16 ? 2 : 4;
    const int64_t doubles = product.doubles(m), per_double = product.per_double();
    const int levels = product.bytes ? BYTE_LEVELS : LEVELS;
    for (int64_t line = 0; line < m; line++) {
        const void* from = static_cast<const char*>(x) + (line * columns + first) * size;
        scales[line * product.blocks + block] = quantize_line(from, type, count, levels, integers, bytes);
        for (int64_t k = count; k < whole; k++) integers[k] = bytes[0][k] = bytes[1][k] = 0;
        int32_t sum = 0;
        for (int64_t k = 0; k < count; k++) sum += integers[k];
        sums[line * product.blocks + block] = sum;
        if (format == INTEGERS) {
            std::memcpy(out + offset_of(format, line, 1, stride, first), integers, whole * sizeof *integers);
        } else if (format == TILES) {
            const int64_t lines = 16 * per_double, row = line % lines;
            char* to = out + 2 * (line / lines * 16 * stride + 16 * first) + 1024 * (row / 16) + 64 * (row % 16);
            for (int64_t k = 0; k < whole; k += 64, to += 2048) {
                if (!product.bytes) std::memcpy(to, bytes[0] + k, 64);
                std::memcpy(to + (product.bytes ? 0 : 1024), bytes[1] + k, 64);
            }
        } else {
            const int64_t at = line / per_double, first_line = at / LINES_TOGETHER * LINES_TOGETHER;
            const int64_t lines = std::min<int64_t>(doubles - first_line, LINES_TOGETHER);
            char* to = out + offset_of(format, first_line, lines, stride, first) + 8 * (at - first_line);
            if (product.bytes) to += 4 * (line % 2);
            for (int64_t k = 0; k < whole; k += 4, to += 8 * lines) {
                if (!product.bytes) std::memcpy(to, bytes[0] + k, 4);
                std::memcpy(to + (product.bytes ? 0 : 4), bytes[1] + k, 4);
            }
        }
    }
}

bool multiply(const Product8& product, int32_t isa, int threads) {
    const int64_t least = product.out.m <= FEW_LINES ? 1 : SHARE_PAIRS;
    return in_shares(product.out.weight.panels, threads, least, [&](int64_t first, int64_t last) {
        return isa == AMX ? amx_panels8(product, first, last) : vector_panels8(product, *kernel8_of(isa), first, last);
    });
}

}  // namespace

const Kernel8* kernel8_of(int32_t isa) {
    switch (isa) {
        case PORTABLE: return &portable_kernel8;
        case NEON: return &neon_kernel8;
        case DOTPROD: return &dotprod_kernel8;
        case I8MM: return &i8mm_kernel8;
        case SVE: return &sve_kernel8();
        case AVXVNNI: return &avxvnni_kernel8;
        default: return isa >= AVX512 && has_vnni() ? &avx512_kernel8 : &avx2_kernel8;
    }
}

bool runs_planes(int32_t isa) { return isa == PORTABLE || ((isa == AVX2 || isa == AVXVNNI) && has_pdep()); }

bool prefers_planes(int32_t isa) { return (isa == AVX2 || isa == AVXVNNI) && has_fast_pdep(); }

bool multiplies_bytes(int32_t isa) { return kernel8_of(isa)->format == QUADS; }

Status linear8(const Product& out, const void* x, Type x_type, const void* scale, Type scale_type, int64_t groups,
               int32_t isa, int threads) {
    const int64_t columns = out.weight.columns, zero_groups = out.weight.zero_groups;
    if (!scale) return fail(BAD_ARGUMENT, "scale: missing, a weight of integers needs one");
    if (scale_type != FP32 && !is_few_bits(out.weight.type))
        return fail(BAD_ARGUMENT, "scale: an 8-bit weight needs one in fp32");
    if (zero_groups > 1 && zero_groups != groups)
        return fail(BAD_ARGUMENT, "scale: %lld groups, where the weight's zeros have %lld", (long long)groups,
                    (long long)zero_groups);
    if (out.weight.type == PLANES4 && !runs_planes(isa))
        return fail(BAD_ARGUMENT, "it was packed for AVX2 with pdep, and this instruction set does not multiply it; pack it again");
    Product8 product;
    product.out = out;
    product.scale = scale;
    product.scale_type = scale_type;
    product.groups = groups;
    product.block = BLOCK_MOST;
    if (groups > 1) {
        product.block = columns / groups;
        const int64_t unit = scale_unit(out.weight.type);
        if (product.block % unit || product.block > BLOCK_MOST)
            return fail(BAD_ARGUMENT, "scale: groups of %lld columns; they must have a multiple of %lld, at most 512",
                        (long long)product.block, (long long)unit);
    }
    if (isa == AMX && (!has_amx_int8() || product.block % 64)) isa = AVX512;
    product.bytes = out.weight.byte_x && multiplies_bytes(isa);
    const int64_t doubles = product.doubles(out.m);
    // It expands in registers, which is faster with few lines.
    if (isa == AMX && doubles <= LINES_TOGETHER && has_vnni()) isa = AVX512;
    const bool direct = isa != AMX && is_direct4(product, *kernel8_of(isa));
    const Format8 format = isa == AMX ? TILES
                           : direct   ? kernel4_of(*kernel8_of(isa)).format[out.weight.type - INT4]
                                      : kernel8_of(isa)->format;
    product.blocks = (columns + product.block - 1) / product.block;
    product.stride = (columns + 63) / 64 * 64;
    const int64_t together = isa == AMX ? 16 : LINES_TOGETHER;
    const int64_t lines = isa == AMX ? (doubles + 15) / 16 * 16 : doubles;  // AMX reads 16 of them at a time
    const int64_t line_bytes = 2 * product.stride, numbers = doubles * product.per_double() * product.blocks;
    char* integers = static_cast<char*>(std::aligned_alloc(64, lines * line_bytes));
    float* scales = static_cast<float*>(std::calloc(numbers, sizeof(float)));
    int32_t* sums = static_cast<int32_t*>(std::calloc(numbers, sizeof(int32_t)));
    Status status = OK;
    if (!integers || !scales || !sums) {
        status = fail(NO_MEMORY, "no memory for the activations");
    } else {
        // Double lines of tiles, or of interleaved ones, that have no line without numbers.
        const int64_t whole = out.m / product.per_double() / together * together;
        if (lines * product.per_double() > out.m)
            std::memset(integers + whole * line_bytes, 0, (lines - whole) * line_bytes);
        (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && out.m * columns > 32768)
        for (int64_t block = 0; block < product.blocks; block++)
            quantize(product, x, x_type, format, kernel8_of(isa)->quantize, block, integers, scales, sums);
        product.x = integers;
        product.x_scale = scales;
        product.x_sums = sums;
        if (!multiply(product, isa, threads)) status = fail(NO_MEMORY, "no memory for the accumulators");
    }
    std::free(integers);
    std::free(scales);
    std::free(sums);
    return status;
}

namespace {

// `count` columns of quads [16 rows][4 columns] of bytes as numbers, each column `stride` after the one before. They are exact.
template <class Number>
void write_columns(const int8_t* quads, int64_t count, Number* out, int64_t stride) {
    for (int64_t k = 0; k < count; k++, out += stride) {
        int32_t words[PANEL];
        std::memcpy(words, quads + k / 4 * QUAD, sizeof words);
        const int left = 24 - 8 * static_cast<int>(k % 4);
        for (int n = 0; n < PANEL; n++) {
            const float value = static_cast<float>(static_cast<int32_t>(static_cast<uint32_t>(words[n]) << left) >> 24);
            out[n] = sizeof(Number) == 2 ? static_cast<Number>(bits_of(value) >> 16) : static_cast<Number>(value);
        }
    }
}

}  // namespace

void expand8(const Weight& weight, int64_t panel, int32_t isa, void* out, Type out_type, int64_t stride) {
    // AVX2 expands to 16 bits, AVXVNNI to unsigned bytes.
    const Kernel8 *fast = kernel8_of(isa), &kernel = fast == &avx2_kernel8 || isa == AVXVNNI || weight.type == PLANES4 ? portable_kernel8 : *fast;
    const bool fast_planes = weight.type == PLANES4 && isa != PORTABLE && runs_planes(isa);
    const char* values = weight.values_of(panel);
    const int64_t group = weight.zero_groups > 1 ? weight.columns / weight.zero_groups : weight.columns;
    int8_t block[PANEL * BLOCK_MOST];
    for (int64_t first = 0, count; first < weight.columns; first += count) {
        count = std::min({BLOCK_MOST, weight.columns - first, group - first % group});
        const uint32_t* masks = weight.masks_of(panel) + (is_dense(weight.type) ? 0 : first / 2);
        const Expand4 expand = fast_planes                ? avx2_planes_to_bytes
                               : is_few_bits(weight.type) ? kernel4_of(kernel).expand[weight.type - INT4]
                                                          : nullptr;
        if (expand)
            values = expand(masks, values, weight.zeros_of(panel, first / group), (count + 3) / 4, block);
        else
            values = kernel.expand[weight.type - INT8](masks, values, (count + 3) / 4, block);
        if (out_type == BF16)
            write_columns(block, count, static_cast<uint16_t*>(out) + first * stride, stride);
        else
            write_columns(block, count, static_cast<float*>(out) + first * stride, stride);
    }
}

}  // namespace rac
