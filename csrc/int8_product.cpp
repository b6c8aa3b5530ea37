// The product with weights of 8 to 2 bits: x is rounded to integers; which kernel multiplies which panels and lines.
#include "int8_product.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "int4.h"
#include "shares.h"

namespace rac {
namespace {

const Kernel4& kernel4_of(const Kernel8& kernel) {
    if (&kernel == &avx512_kernel8) return avx512_kernel4;
    if (&kernel == &avx2_kernel8) return avx2_kernel4;
    if (&kernel == &avxvnni_kernel8) return avxvnni_kernel4;
    if (&kernel == &dotprod_kernel8) return dotprod_kernel4;
    if (&kernel == &i8mm_kernel8) return i8mm_kernel4;
    if (&kernel == &sve_kernel8()) return sve_kernel4();
    return &kernel == &portable_kernel8 ? portable_kernel4 : neon_kernel4;
}

// The offset in bytes of a column of the double lines from `line` on; in QUADS, `lines` of them are interleaved.
int64_t offset_of(Format8 format, int64_t line, int64_t lines, int64_t stride, int64_t column) {
    return 2 * line * stride + column * (format == INTEGERS ? 2 : 2 * lines);
}

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

constexpr int64_t PANELS_PER_CHUNK = 8;  // panels that are multiplied by the same lines in turn, while these are in the cache
constexpr int64_t CHUNK_BYTES = 360 * 1024;  // of one block of these lines and of their sums: a part of a second-level cache
constexpr int64_t FEW_LINES = 32;  // so few lines stay in the cache anyway: panels are read one by one

// Up to how many double lines values are spread anew for each group of lines, and not written: where a kernel multiplies a whole
// group of QUADS as it spreads them.
int64_t direct_lines(const Kernel8& kernel) {
    return kernel.lines == LINES_TOGETHER ? 4 * LINES_TOGETHER : kernel.lines;
}

// So many lines that several panels use in turn, in whole groups of QUADS.
int64_t lines_of_chunk(const Product8& product) {
    const int64_t group = 2 * LINES_TOGETHER, m = product.out.m;
    const int64_t most = CHUNK_BYTES / (2 * product.block + PANELS_PER_CHUNK * PANEL * 4) / group * group;
    const int64_t chunks = (m + most - 1) / most;
    return (m + chunks * group - 1) / (chunks * group) * group;
}

// Double lines of x from `line` on, of one block.
Lines8 lines_of(const Product8& product, const Kernel8& kernel, int64_t block, int64_t line, int64_t doubles) {
    const char* x = product.x + offset_of(kernel.format, line / product.per_double(), doubles, product.stride, block * product.block);
    return {x, product.stride, product.x_sums + line * product.blocks + block, product.blocks, product.bytes};
}

int64_t quads_of(const Product8& product, int64_t block) {
    return (std::min(product.block, product.out.weight.columns - block * product.block) + 3) / 4;
}

const uint32_t* masks_of(const Product8& product, int64_t panel, int64_t block) {
    const Weight& weight = product.out.weight;
    return weight.masks_of(panel) + (is_dense(weight.type) ? 0 : block * product.block / 2);
}

// One block of one panel in the kernel's dense form. Returns the address of the next block's values.
const char* expand_block(const Product8& product, const Kernel8& kernel, int64_t panel, int64_t block, const char* values, char* out) {
    const Type type = product.out.weight.type;
    const uint32_t* masks = masks_of(product, panel, block);
    const int64_t quads = quads_of(product, block);
    if (!is_few_bits(type)) return kernel.expand[type - INT8](masks, values, quads, out);
    return kernel4_of(kernel).expand[type - INT4](masks, values, product.zeros_of(panel, block), quads, out);
}

// Whether a kernel spreads values anew for each group of lines.
bool is_direct8(const Product8& product, const Kernel8& kernel) {
    return product.doubles(product.out.m) <= direct_lines(kernel) && !is_few_bits(product.out.weight.type);
}

// Lines [line, line + lines) times one block of one panel, added to acc [lines][PANEL]. Returns the address of the next block's
// values.
const char* multiply_block(const Product8& product, const Kernel8& kernel, int64_t panel, int64_t block,
                           const char* values, int64_t line, int64_t lines, float* acc) {
    const int64_t per_double = product.per_double(), doubles = product.doubles(lines), quads = quads_of(product, block);
    const bool direct = is_direct8(product, kernel);
    const int64_t together = direct ? kernel.lines : kernel.expanded_lines;
    const uint32_t* masks = masks_of(product, panel, block);
    int32_t sums[2 * MOST_LINES * PANEL];
    alignas(64) char expanded[2 * PANEL * BLOCK_MOST];
    const char* end = values;
    if (!direct) end = expand_block(product, kernel, panel, block, values, expanded);
    for (int64_t at = 0; at < doubles; at += together) {
        const int64_t some = std::min<int64_t>(doubles - at, together), done = at * per_double;
        const Lines8 x = lines_of(product, kernel, block, line + done, some);
        if (direct)
            end = kernel.dot[product.out.weight.type - INT8][some - 1](masks, values, quads, x, sums);
        else
            kernel.dot_expanded[some - 1](nullptr, expanded, quads, x, sums);
        add_block(product, kernel.add, panel, block, line + done, std::min(lines - done, some * per_double), sums,
                  acc + done * PANEL);
    }
    return end;
}

// The same of two panels, added to acc [2][lines][PANEL]. `values`: of both, which become the addresses of the next block's.
void multiply_pair(const Product8& product, const Kernel8& kernel, int64_t panel, int64_t block, const char** values, int64_t line,
                   int64_t lines, float* acc) {
    alignas(64) char expanded[2 * PANEL * BLOCK_MOST];
    float scale[2 * PANEL];
    for (int64_t p = 0; p < 2; p++) {
        values[p] = expand_block(product, kernel, panel + p, block, values[p], expanded + p * PANEL * BLOCK_MOST);
        product.read_scale(panel + p, block, scale + p * PANEL);
    }
    const int64_t doubles = product.doubles(lines);
    for (int64_t at = 0; at < doubles; at += LINES_TOGETHER) {
        const int64_t some = std::min<int64_t>(doubles - at, LINES_TOGETHER), done = at * product.per_double();
        const float* x_scale = product.x_scale + (line + done) * product.blocks + block;
        const Sums8 to = {lines - done, x_scale, scale, acc + done * PANEL, lines * PANEL};
        kernel.pair[some - 1](expanded, quads_of(product, block), lines_of(product, kernel, block, line + done, some), to);
    }
}

// Whether codes of few bits are spread anew for each group of lines, and not written.
bool is_direct4(const Product8& product, const Kernel8& kernel) {
    const int64_t doubles = product.doubles(product.out.m);
    const int64_t most = std::max<int64_t>(direct_lines(kernel), LINES_TOGETHER);
    if (!is_few_bits(product.out.weight.type) || doubles > most) return false;
    return kernel4_of(kernel).dot[product.out.weight.type - INT4][std::min<int64_t>(doubles, LINES_TOGETHER) - 1];
}

void few_lines4(const Product8& product, const Kernel8& kernel, int64_t first, int64_t last) {
    alignas(64) float acc[2 * LINES_TOGETHER * PANEL];
    const int64_t step = LINES_TOGETHER * product.per_double();
    for (int64_t panel = first; panel < last; panel++)
        for (int64_t line = 0; line < product.out.m; line += step) {
            Product8 part = product;
            part.out.m = std::min(product.out.m - line, step);
            part.x += offset_of(QUADS, line / product.per_double(), 0, product.stride, 0);
            part.x_scale += line * product.blocks;
            part.x_sums += line * product.blocks;
            kernel4_of(kernel).dot[product.out.weight.type - INT4][product.doubles(part.out.m) - 1](part, panel, acc);
            product.out.store(product.out, panel, 1, line, part.out.m, {acc, 0, 0, PANEL});
        }
}

bool vector_panels8(const Product8& product, const Kernel8& kernel, int64_t first, int64_t last) {
    if (is_direct4(product, kernel)) {
        few_lines4(product, kernel, first, last);
        return true;
    }
    const int64_t m = product.out.m, step = m <= FEW_LINES ? 1 : PANELS_PER_CHUNK, chunk = lines_of_chunk(product);
    float* acc = static_cast<float*>(std::malloc(std::min(m, chunk) * step * PANEL * sizeof(float)));
    if (!acc) return false;
    for (int64_t line = 0; line < m; line += chunk) {
        const int64_t lines = std::min(m - line, chunk);
        for (int64_t panel = first; panel < last; panel += step) {
            const int64_t count = std::min(last - panel, step);
            const char* values[PANELS_PER_CHUNK];
            for (int64_t p = 0; p < count; p++) values[p] = product.out.weight.values_of(panel + p);
            std::memset(acc, 0, count * lines * PANEL * sizeof(float));
            const int64_t pairs = kernel.pair[0] && !is_direct8(product, kernel) ? count / 2 : 0;
            for (int64_t block = 0; block < product.blocks; block++) {
                for (int64_t p = 0; p < 2 * pairs; p += 2)
                    multiply_pair(product, kernel, panel + p, block, values + p, line, lines, acc + p * lines * PANEL);
                for (int64_t p = 2 * pairs; p < count; p++)
                    values[p] = multiply_block(product, kernel, panel + p, block, values[p], line, lines,
                                               acc + p * lines * PANEL);
            }
            product.out.store(product.out, panel, count, line, lines, {acc, 2 * lines * PANEL, lines * PANEL, PANEL});
        }
    }
    std::free(acc);
    return true;
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
