// From a row-major bitmask and its values to the packed layout.
#include <cstdlib>
#include <cstring>

#include "layout.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rac {
namespace {

// Huge pages save address translations while a weight is read. Where the system has none, this does nothing.
void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
    const uintptr_t page = uintptr_t{1} << 21, start = reinterpret_cast<uintptr_t>(data);
    const uintptr_t first = (start + page - 1) / page * page, last = (start + bytes) / page * page;
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

// 32 columns of a row's bitmask, with zeros after its end.
uint32_t mask_word(const uint8_t* row, int64_t row_bytes, int64_t word) {
    uint8_t bytes[4] = {};
    const int64_t left = row_bytes - 4 * word;
    std::memcpy(bytes, row + 4 * word, left < 4 ? left : 4);
    return bytes[0] | uint32_t{bytes[1]} << 8 | uint32_t{bytes[2]} << 16 | uint32_t{bytes[3]} << 24;
}

// `from`: the next value of each row, at any address.
template <class Value, Type type>
void pack_panel(const uint8_t* bitmask, int64_t row_bytes, int64_t rows, const char** from, int64_t tiles,
                uint32_t* masks, Value* to) {
    for (int64_t tile = 0; tile < tiles; tile++, masks += TILE_WORDS) {
        Value dense[PANEL][TILE_COLUMNS];
        std::memset(masks, 0, TILE_WORDS * sizeof *masks);
        for (int n = 0; n < rows; n++)
            for (uint32_t left = mask_word(bitmask + n * row_bytes, row_bytes, tile); left; left &= left - 1) {
                const int column = __builtin_ctz(left);
                std::memcpy(&dense[n][column], from[n], sizeof(Value));
                from[n] += sizeof(Value);
                const int word = type == INT8 ? column / 4 * 2 + n / 8 : column / 2;
                masks[word] |= uint32_t{1} << (type == BF16   ? 2 * n + column % 2
                                               : type == FP32 ? 16 * (column % 2) + n
                                                              : n % 8 * 4 + column % 4);
            }
        for (int word = 0; word < TILE_WORDS; word++)
            for (uint32_t left = masks[word]; left; left &= left - 1) {
                const int bit = __builtin_ctz(left);
                *to++ = dense[row_of(type, word, bit)][column_of(type, word, bit)];
            }
    }
}

// `starts`: the number of values before each row.
template <class Value, Type type>
void pack_all(const Weight& weight, const void* values, const uint8_t* bitmask, const int64_t* starts, int threads) {
    const int64_t row_bytes = (weight.columns + 7) / 8;
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t panel = 0; panel < weight.panels; panel++) {
        const int64_t row = panel * PANEL, rows = weight.rows - row < PANEL ? weight.rows - row : PANEL;
        const char* from[PANEL];
        for (int64_t n = 0; n < rows; n++)
            from[n] = static_cast<const char*>(values) + starts[row + n] * static_cast<int64_t>(sizeof(Value));
        pack_panel<Value, type>(bitmask + row * row_bytes, row_bytes, rows, from, weight.words / TILE_WORDS,
                                const_cast<uint32_t*>(weight.masks_of(panel)),
                                reinterpret_cast<Value*>(const_cast<char*>(weight.values_of(panel))));
    }
}

void pack_dense8(const Weight& weight, const int8_t* values, int threads) {
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t panel = 0; panel < weight.panels; panel++) {
        int8_t* to = reinterpret_cast<int8_t*>(const_cast<char*>(weight.values_of(panel)));
        const int64_t row = panel * PANEL, rows = weight.rows - row < PANEL ? weight.rows - row : PANEL;
        std::memset(to, 0, dense_panel(weight.columns));
        for (int64_t n = 0; n < rows; n++)
            for (int64_t column = 0; column < weight.columns; column++)
                to[column / 4 * QUAD + 4 * n + column % 4] = values[(row + n) * weight.columns + column];
    }
}

// The number of values before each row; starts[rows] is the number of all.
Status count_rows(const uint8_t* bitmask, int64_t rows, int64_t columns, int64_t values, int64_t* starts) {
    const int64_t row_bytes = (columns + 7) / 8;
    starts[0] = 0;
    for (int64_t row = 0; row < rows; row++) {
        int64_t count = 0;
        for (int64_t byte = 0; byte < row_bytes; byte++) count += __builtin_popcount(bitmask[row * row_bytes + byte]);
        if (columns % 8 && bitmask[(row + 1) * row_bytes - 1] >> (columns % 8))
            return fail(DAMAGED, "row %lld of the bitmask has bits beyond column %lld", (long long)row,
                        (long long)columns);
        starts[row + 1] = starts[row] + count;
    }
    if (starts[rows] == values) return OK;
    return fail(DAMAGED, "the bitmask has %lld bits set and there are %lld values", (long long)starts[rows],
                (long long)values);
}

}  // namespace

Status pack(const void* values, int64_t value_bytes, const uint8_t* bitmask, int64_t bitmask_bytes, int64_t rows,
            int64_t columns, int32_t type, void* data, int64_t bytes, int threads) {
    Layout layout;
    if (type < BF16 || type > DENSE8) return fail(BAD_ARGUMENT, "there is no value type %d", type);
    const int64_t size = size_of(static_cast<Type>(type)), count = value_bytes / size;
    if (value_bytes < 0 || value_bytes % size || (value_bytes && !values))
        return fail(BAD_ARGUMENT, "values: %lld bytes are no whole number of values", (long long)value_bytes);
    if (!layout_of(rows, columns, count, type, &layout))
        return fail(BAD_ARGUMENT, "%lld values do not fit a weight [%lld, %lld]", (long long)count, (long long)rows,
                    (long long)columns);
    const int64_t mask_bytes = type == DENSE8 ? 0 : rows * ((columns + 7) / 8);
    if (bitmask_bytes != mask_bytes || (mask_bytes && !bitmask))
        return fail(BAD_ARGUMENT, "bitmask: %lld bytes, where %lld are needed", (long long)bitmask_bytes,
                    (long long)mask_bytes);
    if (!data || layout.bytes != bytes)
        return fail(BAD_ARGUMENT, "data: %lld bytes, where %lld are needed", (long long)bytes, (long long)layout.bytes);
    if (reinterpret_cast<uintptr_t>(data) % 64) return fail(BAD_ARGUMENT, "data: not aligned to 64 bytes");
    int64_t* starts = static_cast<int64_t*>(std::malloc((rows + 1) * sizeof(int64_t)));
    if (!starts) return fail(NO_MEMORY, "no memory for the starts of %lld rows", (long long)rows);
    Status status = type == DENSE8 ? OK : count_rows(bitmask, rows, columns, count, starts);
    if (status == OK) {
        advise_huge_pages(data, bytes);
        write_header(data, rows, columns, count, static_cast<Type>(type));
        const int64_t stored = type == DENSE8 ? layout.panels * dense_panel(columns) : count;
        const int64_t end = layout.values_at + stored * size;
        char* base = static_cast<char*>(data);
        std::memset(base + end, 0, bytes - end);
        uint64_t* offsets = reinterpret_cast<uint64_t*>(base + sizeof(Header));
        std::memset(offsets, 0, layout.masks_at - sizeof(Header));
        for (int64_t panel = 0; panel <= layout.panels; panel++)
            offsets[panel] = static_cast<uint64_t>(
                type == DENSE8 ? panel * dense_panel(columns) : starts[panel * PANEL < rows ? panel * PANEL : rows]);
        Weight weight;
        status = view(data, bytes, &weight);
        if (status == OK && type == BF16) pack_all<uint16_t, BF16>(weight, values, bitmask, starts, threads);
        if (status == OK && type == FP32) pack_all<uint32_t, FP32>(weight, values, bitmask, starts, threads);
        if (status == OK && type == INT8) pack_all<int8_t, INT8>(weight, values, bitmask, starts, threads);
        if (status == OK && type == DENSE8) pack_dense8(weight, static_cast<const int8_t*>(values), threads);
    }
    std::free(starts);
    return status;
}

}  // namespace rac
