// From a row-major bitmask and its values to the packed layout.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "format/layout.h"
#include "gemm/shares.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rac {
namespace {

#if defined(__linux__)
constexpr int ADVICE_HUGE = 14, ADVICE_COLLAPSE = 25;  // of Linux's interface; old headers lack the second
#else
constexpr int ADVICE_HUGE = 0, ADVICE_COLLAPSE = 0;
#endif

// Huge pages save address translations while a weight is read. ADVICE_HUGE is for pages that are not there yet, ADVICE_COLLAPSE (from
// Linux 6.1 on) for those of memory that was in use before. Where the system has none, this does nothing.
void advise_huge_pages(void* data, int64_t bytes, int advice) {
#if defined(__linux__)
    const uintptr_t page = uintptr_t{1} << 21, start = reinterpret_cast<uintptr_t>(data);
    const uintptr_t first = (start + page - 1) / page * page, last = (start + bytes) / page * page;
    if (last > first) (void)!madvise(reinterpret_cast<void*>(first), last - first, advice);
#else
    (void)data, (void)bytes, (void)advice;
#endif
}

// 32 columns of a row's bitmask, with zeros after its end.
uint32_t mask_word(const uint8_t* row, int64_t row_bytes, int64_t word) {
    uint8_t bytes[4] = {};
    const int64_t left = row_bytes - 4 * word;
    std::memcpy(bytes, row + 4 * word, left < 4 ? left : 4);
    return bytes[0] | uint32_t{bytes[1]} << 8 | uint32_t{bytes[2]} << 16 | uint32_t{bytes[3]} << 24;
}

int64_t rows_of(const Weight& weight, int64_t panel) { return std::min(weight.rows - panel * PANEL, PANEL); }

// The masks of a panel, and its values in the order of the masks to `to`. `starts`: the number of values before each row.
template <class Value, Type type>
void pack_panel(const Weight& weight, int64_t panel, const void* values, const uint8_t* bitmask, const int64_t* starts,
                Value* to) {
    const int64_t row_bytes = (weight.columns + 7) / 8, first = panel * PANEL, rows = rows_of(weight, panel);
    uint32_t* masks = const_cast<uint32_t*>(weight.masks_of(panel));
    const char* from[PANEL];  // the next value of each row, at any address
    for (int64_t n = 0; n < rows; n++)
        from[n] = static_cast<const char*>(values) + starts[first + n] * static_cast<int64_t>(sizeof(Value));
    for (int64_t tile = 0; tile < weight.words / TILE_WORDS; tile++, masks += TILE_WORDS) {
        Value dense[PANEL][TILE_COLUMNS];
        std::memset(masks, 0, TILE_WORDS * sizeof *masks);
        for (int n = 0; n < rows; n++)
            for (uint32_t left = mask_word(bitmask + (first + n) * row_bytes, row_bytes, tile); left; left &= left - 1) {
                const int column = __builtin_ctz(left);
                std::memcpy(&dense[n][column], from[n], sizeof(Value));
                from[n] += sizeof(Value);
                const int word = type >= INT8 ? column / 4 * 2 + n / 8 : column / 2;
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

// Call pack(panel) on the thread that will multiply the panel. Returns whether all calls returned true.
template <class Pack>
bool for_each_panel(const Weight& weight, int threads, const Pack& pack) {
    return in_shares(weight.panels, threads, 1, [&](int64_t first, int64_t last) {
        bool done = true;
        for (int64_t panel = first; panel < last; panel++) done = pack(panel) && done;
        return done;
    });
}

template <class Value, Type type>
void pack_all(const Weight& weight, const void* values, const uint8_t* bitmask, const int64_t* starts, int threads) {
    for_each_panel(weight, threads, [&](int64_t panel) {
        pack_panel<Value, type>(weight, panel, values, bitmask, starts,
                                reinterpret_cast<Value*>(const_cast<char*>(weight.values_of(panel))));
        return true;
    });
}

// The code of a value in a row of a panel and a column; -1 if the value has none.
int code_of(const Weight& weight, int64_t panel, int64_t row, int64_t column, int value) {
    const uint8_t* zeros = weight.zeros_of(panel, weight.zero_groups ? column / (weight.columns / weight.zero_groups) : 0);
    const int code = value + (zeros ? zeros[row] : ZERO_CODE);
    return code >= 0 && code < 1 << value_bits(weight.type) ? code : -1;
}

// Put a code where layout.h says. `to`: the byte of its row and column of a quad, in the first line of a panel.
void put_code(Type type, uint8_t* to, int64_t column, int code) {
    const auto add = [](uint8_t& byte, int bits) { byte = static_cast<uint8_t>(byte | bits); };
    const int64_t quad = column / 4;
    if (type == DENSE8) return add(to[quad * QUAD], code);
    if (type == DENSE4) return add(to[quad / 2 * QUAD], code << 4 * (quad % 2));
    if (type == DENSE2) return add(to[quad / 4 * QUAD], code << (quad % 2 * 4 + quad % 4 / 2 * 2));
    to += quad / 8 * 3 * QUAD;
    if (quad % 8 < 6) return add(to[quad % 8 / 2 * QUAD], code << 4 * (quad % 2));
    for (int bit = 0; bit < 3; bit++) add(to[bit * QUAD], (code >> bit & 1) << (quad % 2 ? 7 : 3));
}

void pack_dense(const Weight& weight, int64_t panel, const int8_t* values, bool* fits) {
    uint8_t* to = reinterpret_cast<uint8_t*>(const_cast<char*>(weight.values_of(panel)));
    std::memset(to, 0, dense_panel(weight.type, weight.columns));
    for (int64_t n = 0; n < rows_of(weight, panel); n++)
        for (int64_t column = 0; column < weight.columns; column++) {
            const int value = values[(panel * PANEL + n) * weight.columns + column];
            const int code = weight.type == DENSE8 ? value & 255 : code_of(weight, panel, n, column, value);
            if (code < 0)
                *fits = false;
            else
                put_code(weight.type, to + 4 * n + column % 4, column, code);
        }
}

// The codes of a panel of INT4. `bytes`: the values of the panel in the order of its masks.
void pack_codes(const Weight& weight, int64_t panel, const int8_t* bytes, bool* fits) {
    const uint32_t* masks = weight.masks_of(panel);
    uint8_t* to = reinterpret_cast<uint8_t*>(const_cast<char*>(weight.values_of(panel)));
    for (int64_t word = 0; word < weight.words; word += 2) {
        int count = 0;
        for (int64_t half = word; half < word + 2; half++)
            for (uint32_t left = masks[half]; left; left &= left - 1, count++) {
                const int bit = __builtin_ctz(left), row = row_of(INT4, half, bit);
                const int code = code_of(weight, panel, row, column_of(INT4, half, bit), *bytes++);
                if (code < 0) *fits = false;
                to[count / 2] = static_cast<uint8_t>((count % 2 ? to[count / 2] : 0) | (code & 15) << 4 * (count % 2));
            }
        to += code_bytes(static_cast<uint64_t>(count));
    }
}

// The masks and codes of a panel of INT4 from its int8 values. False if there is not enough memory.
bool pack_int4(const Weight& weight, int64_t panel, const int8_t* values, const uint8_t* bitmask, const int64_t* starts,
               bool* fits) {
    const int64_t first = panel * PANEL, rows = rows_of(weight, panel);
    int8_t* bytes = static_cast<int8_t*>(std::malloc(starts[first + rows] - starts[first] + 1));
    if (!bytes) return false;
    pack_panel<int8_t, INT4>(weight, panel, values, bitmask, starts, bytes);
    pack_codes(weight, panel, bytes, fits);
    std::free(bytes);
    return true;
}

// DENSE8 and codes from int8 values.
Status pack_integers(const Weight& weight, const int8_t* values, const uint8_t* bitmask, const int64_t* starts,
                      int threads) {
    std::atomic<bool> memory = true;
    const bool fit = for_each_panel(weight, threads, [&](int64_t panel) {
        bool fits = true;
        if (is_dense(weight.type))
            pack_dense(weight, panel, values, &fits);
        else if (!pack_int4(weight, panel, values, bitmask, starts, &fits))
            memory = false;
        return fits;
    });
    if (!memory) return fail(NO_MEMORY, "no memory for the codes of a panel");
    const int bits = value_bits(weight.type);
    if (fit) return OK;
    return fail(BAD_ARGUMENT, "values: one of them does not fit %d bits, 0 to %d with its code of zero", bits, (1 << bits) - 1);
}

// Where the codes of each panel start.
void write_offsets(const uint8_t* bitmask, const int64_t* starts, const Sizes& sizes, int64_t panels, uint64_t* offsets) {
    const int64_t row_bytes = (sizes.columns + 7) / 8;
    uint64_t codes = 0;
    for (int64_t panel = 0; panel <= panels; panel++) {
        const int64_t row = panel * PANEL < sizes.rows ? panel * PANEL : sizes.rows;
        if (is_dense(sizes.type)) {
            offsets[panel] = static_cast<uint64_t>(panel * dense_panel(sizes.type, sizes.columns));
        } else if (sizes.type == INT4) {
            offsets[panel] = codes;
            const int64_t rows = sizes.rows - row < PANEL ? sizes.rows - row : PANEL;
            if (rows) codes += count_code_bytes(bitmask + row * row_bytes, rows, sizes.columns);
        } else {
            offsets[panel] = static_cast<uint64_t>(starts[row]);
        }
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

Status pack(const Unpacked& from, int64_t rows, int64_t columns, int32_t type, void* data, int64_t bytes, int threads) {
    if (type < BF16 || type >= TYPES) return fail(BAD_ARGUMENT, "there is no value type %d", type);
    const int64_t size = size_of(type), count = from.value_bytes / size;
    if (from.value_bytes < 0 || from.value_bytes % size || (from.value_bytes && !from.values))
        return fail(BAD_ARGUMENT, "values: %lld bytes are no whole number of values", (long long)from.value_bytes);
    Sizes sizes = {rows, columns, count, type, type == INT4 ? static_cast<int64_t>(code_bytes(count)) : 0, from.zero_groups};
    Layout layout;
    if (!layout_of(sizes, &layout))
        return fail(BAD_ARGUMENT, "%lld values do not fit a weight [%lld, %lld]", (long long)count, (long long)rows,
                    (long long)columns);
    const int64_t mask_bytes = is_dense(type) ? 0 : rows * ((columns + 7) / 8);
    if (from.bitmask_bytes != mask_bytes || (mask_bytes && !from.bitmask))
        return fail(BAD_ARGUMENT, "bitmask: %lld bytes, where %lld are needed", (long long)from.bitmask_bytes,
                    (long long)mask_bytes);
    const int64_t zero_bytes = layout.panels * from.zero_groups * PANEL;
    if (from.zero_bytes != zero_bytes || (zero_bytes && !from.zeros))
        return fail(BAD_ARGUMENT, "zeros: %lld bytes, where %lld are needed", (long long)from.zero_bytes,
                    (long long)zero_bytes);
    if (!data || bytes < layout.bytes || (type != INT4 && bytes != layout.bytes))
        return fail(BAD_ARGUMENT, "data: %lld bytes, where %lld are needed", (long long)bytes, (long long)layout.bytes);
    if (reinterpret_cast<uintptr_t>(data) % 64) return fail(BAD_ARGUMENT, "data: not aligned to 64 bytes");
    int64_t* starts = static_cast<int64_t*>(std::malloc((rows + 1) * sizeof(int64_t)));
    if (!starts) return fail(NO_MEMORY, "no memory for the starts of %lld rows", (long long)rows);
    Status status = is_dense(type) ? OK : count_rows(from.bitmask, rows, columns, count, starts);
    if (status == OK && type == INT4) {
        sizes.code_bytes = count_code_bytes(from.bitmask, rows, columns);
        layout_of(sizes, &layout);
        if (layout.bytes != bytes)
            status = fail(BAD_ARGUMENT, "data: %lld bytes, where %lld are needed", (long long)bytes,
                          (long long)layout.bytes);
    }
    if (status == OK) {
        advise_huge_pages(data, bytes, ADVICE_HUGE);
        write_header(data, sizes);
        char* base = static_cast<char*>(data);
        std::memset(base + layout.values_end, 0, bytes - layout.values_end);
        std::memset(base + layout.zeros_at, 0, layout.values_at - layout.zeros_at);
        if (zero_bytes) std::memcpy(base + layout.zeros_at, from.zeros, zero_bytes);
        uint64_t* offsets = reinterpret_cast<uint64_t*>(base + sizeof(Header));
        std::memset(offsets, 0, layout.masks_at - sizeof(Header));
        write_offsets(from.bitmask, starts, sizes, layout.panels, offsets);
        const int8_t* integers = static_cast<const int8_t*>(from.values);
        Weight weight;
        status = view(data, bytes, &weight);
        if (status == OK && type == BF16) pack_all<uint16_t, BF16>(weight, from.values, from.bitmask, starts, threads);
        if (status == OK && type == FP32) pack_all<uint32_t, FP32>(weight, from.values, from.bitmask, starts, threads);
        if (status == OK && type == INT8) pack_all<int8_t, INT8>(weight, from.values, from.bitmask, starts, threads);
        if (status == OK && type > INT8) status = pack_integers(weight, integers, from.bitmask, starts, threads);
        advise_huge_pages(data, bytes, ADVICE_COLLAPSE);
    }
    std::free(starts);
    return status;
}

}  // namespace rac
