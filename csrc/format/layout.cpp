#include "format/layout.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>

namespace rac {

static thread_local char text[256] = "";

Status fail(Status status, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    return status;
}

const char* last_error() { return text; }

static const char MAGIC[8] = {'R', 'A', 'C', 'p', 'a', 'c', 'k', '1'};
static const int64_t LIMIT = int64_t{1} << 31;  // of rows and columns; every product below then fits int64

bool layout_of(const Sizes& sizes, Layout* layout) {
    const int64_t rows = sizes.rows, columns = sizes.columns, nonzeros = sizes.nonzeros, groups = sizes.zero_groups;
    const int32_t type = sizes.type;
    if (rows < 1 || columns < 1 || rows >= LIMIT || columns >= LIMIT || type < BF16 || type >= TYPES) return false;
    if (nonzeros < 0 || nonzeros > rows * columns || rows * columns >= int64_t{1} << 48) return false;
    if (groups < 0 || groups > columns || (groups && !has_codes(type)) || (!groups && is_narrow(type))) return false;
    if (groups > 1 && (columns % groups || columns / groups % zero_unit(type))) return false;
    layout->panels = (rows + PANEL - 1) / PANEL;
    layout->words = (columns + TILE_COLUMNS - 1) / TILE_COLUMNS * TILE_WORDS;
    int64_t stored = nonzeros * size_of(static_cast<Type>(type));
    if (is_dense(type)) {
        if (nonzeros != rows * columns) return false;
        layout->words = 0;
        stored = layout->panels * dense_panel(type, columns);
    }
    if (type == INT4) {
        stored = sizes.code_bytes;
        const int64_t quads = layout->panels * ((columns + 3) / 4);  // each has at most half a byte of padding
        if (stored < nonzeros / 2 + nonzeros % 2 || stored > (nonzeros + quads) / 2) return false;
    } else if (sizes.code_bytes) {
        return false;
    }
    layout->masks_at = static_cast<int64_t>(sizeof(Header)) + (8 * (layout->panels + 1) + 63) / 64 * 64;
    layout->zeros_at = layout->masks_at + 4 * layout->panels * layout->words;
    layout->values_at = layout->zeros_at + (layout->panels * groups * PANEL + 63) / 64 * 64;
    layout->values_end = layout->values_at + stored;
    layout->bytes = (layout->values_end + 63) / 64 * 64 + 64;
    return true;
}

int64_t count_code_bytes(const uint8_t* bitmask, int64_t rows, int64_t columns) {
    const int64_t row_bytes = (columns + 7) / 8;
    uint64_t bytes = 0;
    for (int64_t row = 0; row < rows; row += PANEL)
        for (int64_t at = 0; at < row_bytes; at++) {
            uint64_t low = 0, high = 0;  // of the two quads in a byte of each row
            for (int64_t n = row; n < row + PANEL && n < rows; n++) {
                low += __builtin_popcount(bitmask[n * row_bytes + at] & 15);
                high += __builtin_popcount(bitmask[n * row_bytes + at] >> 4);
            }
            bytes += code_bytes(low) + code_bytes(high);
        }
    return static_cast<int64_t>(bytes);
}

Status view(const void* data, int64_t bytes, Weight* weight) {
    Header header;
    Layout layout;
    if (!data || bytes < static_cast<int64_t>(sizeof header))
        return fail(DAMAGED, "%lld bytes are too short for a header", (long long)bytes);
    if (reinterpret_cast<uintptr_t>(data) % 64) return fail(BAD_ARGUMENT, "its data is not aligned to 64 bytes");
    std::memcpy(&header, data, sizeof header);
    if (std::memcmp(header.magic, MAGIC, sizeof MAGIC)) return fail(DAMAGED, "its header is not that of a packed weight");
    const Sizes sizes = {header.rows, header.columns,    header.nonzeros,
                         header.type, header.code_bytes, header.zero_groups};
    if (!layout_of(sizes, &layout))
        return fail(DAMAGED, "its header has impossible sizes");
    if (header.byte_x < 0 || header.byte_x > (header.type >= INT8 ? 1 : 0))
        return fail(DAMAGED, "its header has %d where activations are rounded to bytes or not", header.byte_x);
    if (layout.bytes != bytes)
        return fail(DAMAGED, "%lld bytes where its header needs %lld", (long long)bytes, (long long)layout.bytes);
    const char* base = static_cast<const char*>(data);
    *weight = {header.rows, header.columns, header.nonzeros, layout.panels, layout.words, header.code_bytes,
               header.zero_groups, static_cast<Type>(header.type), header.byte_x != 0,
               reinterpret_cast<const uint64_t*>(base + sizeof header),
               reinterpret_cast<const uint32_t*>(base + layout.masks_at),
               reinterpret_cast<const uint8_t*>(base + layout.zeros_at), base + layout.values_at};
    return OK;
}

void write_header(void* data, const Sizes& sizes) {
    Header header = {{}, sizes.type, 0, sizes.rows, sizes.columns, sizes.nonzeros, sizes.code_bytes, sizes.zero_groups, {}};
    std::memcpy(header.magic, MAGIC, sizeof MAGIC);
    std::memcpy(data, &header, sizeof header);
}

Status set_byte_x(void* data, int64_t bytes, bool byte_x) {
    Weight weight = {};
    RAC_TRY(view(data, bytes, &weight));
    if (weight.type < INT8) return fail(BAD_ARGUMENT, "activations are rounded for weights of integers only");
    Header header;
    std::memcpy(&header, data, sizeof header);
    header.byte_x = byte_x;
    std::memcpy(data, &header, sizeof header);
    return OK;
}

Status check(const Weight& weight) {
    if (weight.offsets[0] != 0) return fail(DAMAGED, "the first offset is not 0");
    for (int64_t i = 0; i < weight.panels * weight.zero_groups * PANEL; i++)
        if (weight.zeros[i] >> value_bits(weight.type))
            return fail(DAMAGED, "a code of zero is %d, more than %d", weight.zeros[i], (1 << value_bits(weight.type)) - 1);
    if (is_dense(weight.type)) {  // zeros of x multiply its padding, or no row of out takes it
        for (int64_t panel = 0; panel <= weight.panels; panel++)
            if (weight.offsets[panel] != static_cast<uint64_t>(panel * dense_panel(weight.type, weight.columns)))
                return fail(DAMAGED, "panel %lld: its offset is not that of a dense weight", (long long)panel);
        return OK;
    }
    uint64_t values = 0;
    for (int64_t panel = 0; panel < weight.panels; panel++) {
        const uint32_t* masks = weight.masks_of(panel);
        uint64_t size = 0;  // in the unit of the offsets
        for (int64_t word = 0; word < weight.words; word += 2) {
            const uint64_t count = __builtin_popcount(masks[word]) + __builtin_popcount(masks[word + 1]);
            values += count;
            size += weight.type == INT4 ? code_bytes(count) : count;
        }
        if (weight.offsets[panel] + size != weight.offsets[panel + 1])
            return fail(DAMAGED, "panel %lld: its masks and its offset disagree", (long long)panel);
        // A bit beyond the last column would be multiplied by the padding of x.
        for (int64_t word = weight.columns / TILE_COLUMNS * TILE_WORDS; word < weight.words; word++)
            for (int bit = 0; bit < 32; bit++)
                if (masks[word] >> bit & 1 && column_of(weight.type, word, bit) >= weight.columns)
                    return fail(DAMAGED, "panel %lld: bits beyond the last column", (long long)panel);
    }
    const int64_t stored = weight.type == INT4 ? weight.code_bytes : weight.nonzeros;
    if (values != static_cast<uint64_t>(weight.nonzeros) || weight.offsets[weight.panels] != static_cast<uint64_t>(stored))
        return fail(DAMAGED, "the last offset is not the number of values");
    const int64_t last = weight.panels - 1;
    for (int64_t word = 0; word < weight.words; word++)
        for (int bit = 0; bit < 32; bit++)
            if (weight.masks_of(last)[word] >> bit & 1 && last * PANEL + row_of(weight.type, word, bit) >= weight.rows)
                return fail(DAMAGED, "bits beyond the last row");
    return OK;
}

}  // namespace rac
