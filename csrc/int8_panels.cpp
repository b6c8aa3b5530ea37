// Which kernel multiplies which panels and lines of x, with weights of 8 to 2 bits; all but AMX.
#include "int8_panels.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace rac {

const Kernel4& kernel4_of(const Kernel8& kernel) {
    if (&kernel == &avx512_kernel8) return avx512_kernel4;
    if (&kernel == &avx2_kernel8) return avx2_kernel4;
    if (&kernel == &avxvnni_kernel8) return avxvnni_kernel4;
    if (&kernel == &dotprod_kernel8) return dotprod_kernel4;
    if (&kernel == &i8mm_kernel8) return i8mm_kernel4;
    if (&kernel == &sve_kernel8()) return sve_kernel4();
    return &kernel == &portable_kernel8 ? portable_kernel4 : neon_kernel4;
}

int64_t offset_of(Format8 format, int64_t line, int64_t lines, int64_t stride, int64_t column) {
    return 2 * line * stride + column * (format == INTEGERS ? 2 : 2 * lines);
}

namespace {

constexpr int64_t PANELS_PER_CHUNK = 8;  // panels that are multiplied by the same lines in turn, while these are in the cache
constexpr int64_t CHUNK_BYTES = 360 * 1024;  // of one block of these lines and of their sums: a part of a second-level cache

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

}  // namespace

bool is_direct4(const Product8& product, const Kernel8& kernel) {
    const int64_t doubles = product.doubles(product.out.m);
    const int64_t most = std::max<int64_t>(direct_lines(kernel), LINES_TOGETHER);
    if (!is_few_bits(product.out.weight.type) || doubles > most) return false;
    return kernel4_of(kernel).dot[product.out.weight.type - INT4][std::min<int64_t>(doubles, LINES_TOGETHER) - 1];
}

namespace {

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

}  // namespace

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

}  // namespace rac
