// The matmul with weights of integers: x is rounded to integers, and the threads share the panels.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "gemm/matmul.h"
#include "gemm/shares.h"

namespace rac {
namespace {

// x of a matmul as integers.
struct Activations {
    char* integers;  // in an XFormat
    float* scales;   // [m][blocks]
    int32_t* sums;   // [m][blocks]
};

// The integers of a token and block, in each of the forms that a kernel reads.
struct Rounded {
    int16_t integers[BLOCK_ROOM];
    int8_t bytes[2][BLOCK_ROOM];  // of integers; with x of bytes, bytes[1] alone
};

// Copy both bytes of `columns` integers, COUNT columns at a time to places `step` bytes apart, the second bytes SECOND behind.
template <int COUNT, int SECOND>
void place_bytes(const Rounded& from, bool bytes, int64_t columns, int64_t step, char* to) {
    for (int64_t k = 0; k < columns; k += COUNT, to += step) {
        if (!bytes) std::memcpy(to, from.bytes[0] + k, COUNT);
        std::memcpy(to + (bytes ? 0 : SECOND), from.bytes[1] + k, COUNT);
    }
}

// Copy `columns` integers of a token from column `first` on to their places in the XFormat.
void place(const IntMatmul& matmul, XFormat format, const Rounded& from, int64_t token, int64_t first, int64_t columns, char* out) {
    const int64_t stride = matmul.stride, per_slot = matmul.per_slot(), slots = matmul.slots(matmul.out.m);
    if (format == INTEGERS) {
        std::memcpy(out + offset_of(format, token, 1, stride, first), from.integers, columns * sizeof *from.integers);
    } else if (format == TILES) {
        const int64_t tokens = 16 * per_slot, row = token % tokens;
        char* to = out + 2 * (token / tokens * 16 * stride + 16 * first) + 1024 * (row / 16) + 64 * (row % 16);
        place_bytes<64, 1024>(from, matmul.bytes, columns, 2048, to);
    } else {
        const int64_t slot = token / per_slot, first_slot = slot / MOST_SLOTS * MOST_SLOTS;
        const int64_t together = std::min<int64_t>(slots - first_slot, MOST_SLOTS);
        char* to = out + offset_of(format, first_slot, together, stride, first) + 8 * (slot - first_slot);
        place_bytes<4, 4>(from, matmul.bytes, columns, 8 * together, matmul.bytes ? to + 4 * (token % 2) : to);
    }
}

// Round a block of columns of every token of x, with zeros after the last column.
void quantize_block(const IntMatmul& matmul, const void* x, Type type, XFormat format, Quantize quantize, int64_t block,
                    const Activations& to) {
    Rounded rounded;
    const int64_t columns = matmul.out.weight.columns, first = block * matmul.block, count = matmul.columns_of(block);
    const int64_t whole = block + 1 < matmul.blocks ? count : matmul.stride - first;
    for (int64_t token = 0; token < matmul.out.m; token++) {
        const void* from = static_cast<const char*>(x) + (token * columns + first) * size_of(type);
        const int64_t at = token * matmul.blocks + block;
        to.scales[at] =
            quantize(from, type, count, matmul.bytes ? BYTE_LEVELS : LEVELS, rounded.integers, rounded.bytes);
        for (int64_t k = count; k < whole; k++) rounded.integers[k] = rounded.bytes[0][k] = rounded.bytes[1][k] = 0;
        int32_t sum = 0;
        for (int64_t k = 0; k < count; k++) sum += rounded.integers[k];
        to.sums[at] = sum;
        place(matmul, format, rounded, token, first, whole, to.integers);
    }
}

}  // namespace

Status check_scale(const Weight& weight, const Scale& scale) {
    if (!scale.data) return fail(BAD_ARGUMENT, "scale: missing, a weight of integers needs one");
    const int64_t unit = scale_unit(weight.type), block = weight.columns / scale.groups;
    if (scale.type != FP32 && !has_codes(weight.type)) return fail(BAD_ARGUMENT, "scale: an 8-bit weight needs one in fp32");
    if (weight.zero_groups > 1 && weight.zero_groups != scale.groups)
        return fail(BAD_ARGUMENT, "scale: %lld groups, where the weight's zeros have %lld", (long long)scale.groups,
                    (long long)weight.zero_groups);
    if (scale.groups > 1 && (block % unit || block > BLOCK_MOST))
        return fail(BAD_ARGUMENT, "scale: groups of %lld columns; they must have a multiple of %lld, at most 512",
                    (long long)block, (long long)unit);
    return OK;
}

IntMatmul in_blocks(const Matmul& out, const Scale& scale) {
    const int64_t columns = out.weight.columns;
    IntMatmul matmul = {};
    matmul.out = out;
    matmul.scale = scale.data;
    matmul.scale_type = scale.type;
    matmul.groups = scale.groups;
    matmul.block = scale.groups > 1 ? columns / scale.groups : BLOCK_MOST;
    matmul.blocks = (columns + matmul.block - 1) / matmul.block;
    return matmul;
}

namespace {

// Round x to integers, then return what `work(tiles)` does; `tiles`: x is in TILES.
template <class Work>
Status with_integers(IntMatmul& matmul, const void* x, const Kernel& kernel, int threads, const Work& work) {
    const Matmul& out = matmul.out;
    const Integers& integers = *kernel.integers;
    const int64_t columns = out.weight.columns;
    matmul.stride = (columns + 63) / 64 * 64;
    const bool whole_tiles = kernel.tiles && matmul.block % 64 == 0;
    matmul.bytes = out.weight.byte_x && multiplies_bytes(kernel);
    const int64_t slots = matmul.slots(out.m);
    const bool tiles = whole_tiles && slots > MOST_SLOTS;  // for fewer, vectors expand in registers, which is faster
    const XFormat format = tiles                                ? TILES
                           : multiplies_codes(matmul, integers) ? integers.few_format[out.weight.type - INT4]
                                                                : integers.format;
    const int64_t together = tiles ? 16 : MOST_SLOTS, room = tiles ? (slots + 15) / 16 * 16 : slots;
    const int64_t slot_bytes = 2 * matmul.stride, numbers = slots * matmul.per_slot() * matmul.blocks;
    const Activations to = {static_cast<char*>(std::aligned_alloc(64, room * slot_bytes)),
                            static_cast<float*>(std::calloc(numbers, sizeof(float))),
                            static_cast<int32_t*>(std::calloc(numbers, sizeof(int32_t)))};
    bool done = to.integers && to.scales && to.sums;
    if (done) {
        // Slots of tiles, or of interleaved ones, that hold no token.
        const int64_t whole = out.m / matmul.per_slot() / together * together;
        if (room * matmul.per_slot() > out.m) std::memset(to.integers + whole * slot_bytes, 0, (room - whole) * slot_bytes);
        (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && out.m * columns > 32768)
        for (int64_t block = 0; block < matmul.blocks; block++)
            quantize_block(matmul, x, out.out_type, format, integers.quantize, block, to);
        matmul.x = to.integers;
        matmul.x_scale = to.scales;
        matmul.x_sums = to.sums;
        done = work(tiles);
    }
    std::free(to.integers);
    std::free(to.scales);
    std::free(to.sums);
    return done ? OK : fail(NO_MEMORY, "no memory for the activations and the accumulators");
}

// A Store of one token and one panel that adds to fp32.
void add_to_out(const Matmul& matmul, int64_t panel, int64_t, int64_t, int64_t, const Sums& sums) {
    const int64_t first = panel * PANEL, rows = std::min<int64_t>(PANEL, matmul.weight.rows - first);
    for (int64_t n = 0; n < rows; n++) static_cast<float*>(matmul.out)[first + n] += sums.data[n];
}

}  // namespace

Status int_linear(const Matmul& out, const void* x, const Scale& scale, const Kernel& kernel, int threads) {
    IntMatmul matmul = in_blocks(out, scale);
    return with_integers(matmul, x, kernel, threads, [&](bool tiles) {
        return in_shares(out.weight.panels, threads, out.m <= FEW_TOKENS ? 1 : SHARE_PAIRS, [&](int64_t first, int64_t last) {
            return tiles ? kernel.tiles->integers(matmul, first, last) : int_panels(matmul, *kernel.integers, first, last);
        });
    });
}

Status add_panels(const Matmul& out, const float* x, const int64_t* panels, int64_t count, const Scale& scale, const Kernel& kernel,
                  int threads) {
    const int64_t rows = out.weight.rows, columns = out.weight.columns;
    bool done = true;
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(&& : done) if (threads > 1 && out.m > 1)
    for (int64_t token = 0; token < out.m; token++) {
        Matmul one = out;
        one.m = 1;
        one.out = static_cast<float*>(out.out) + token * rows;
        one.store = add_to_out;
        IntMatmul matmul = in_blocks(one, scale);
        const Status status = with_integers(matmul, x + token * columns, kernel, 1, [&](bool) {
            return std::all_of(panels + token * count, panels + (token + 1) * count,
                               [&](int64_t panel) { return int_panels(matmul, *kernel.integers, panel, panel + 1); });
        });
        done = status == OK && done;
    }
    return done ? OK : fail(NO_MEMORY, "no memory for the activations and the accumulators");
}

namespace {

// `count` columns of quads [16 rows][4 columns] of bytes as floats; columns are `stride` apart.
void write_columns(const int8_t* quads, int64_t count, float* out, int64_t stride) {
    for (int64_t k = 0; k < count; k++, out += stride) {
        int32_t words[PANEL];
        std::memcpy(words, quads + k / 4 * QUAD, sizeof words);
        const int left = 24 - 8 * static_cast<int>(k % 4);
        for (int n = 0; n < PANEL; n++)
            out[n] = static_cast<float>(static_cast<int32_t>(static_cast<uint32_t>(words[n]) << left) >> 24);
    }
}

}  // namespace

void int_expand(const Weight& weight, int64_t panel, const Kernel& kernel, float* out, int64_t stride) {
    const Integers& integers = kernel.integers->signed_bytes ? *kernel.integers : portable_integers;
    const char* values = weight.values_of(panel);
    const int64_t group = weight.zero_groups > 1 ? weight.columns / weight.zero_groups : weight.columns;
    int8_t block[PANEL * BLOCK_MOST];
    for (int64_t first = 0, count; first < weight.columns; first += count) {
        count = std::min({BLOCK_MOST, weight.columns - first, group - first % group});
        values = integers.expand[weight.type - INT8](weight.masks_from(panel, first), values,
                                                     weight.zeros_of(panel, first / group), (count + 3) / 4, block);
        write_columns(block, count, out + first * stride, stride);
    }
}

}  // namespace rac
