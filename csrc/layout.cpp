#include "layout.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>

namespace rac {

static const char MAGIC[8] = {'R', 'A', 'C', 'p', 'a', 'c', 'k', '1'};
static const int64_t MOST = int64_t{1} << 31;  // rows, columns; keeps every product below within int64

const char* failure(const char* format, ...) {
    static thread_local char text[256];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    return text;
}

bool layout_of(int64_t rows, int64_t columns, int64_t nonzeros, int32_t type, Layout* layout) {
    if (rows < 1 || columns < 1 || rows >= MOST || columns >= MOST || type < BF16 || type > DENSE8) return false;
    if (nonzeros < 0 || nonzeros > rows * columns || rows * columns >= int64_t{1} << 48) return false;
    layout->panels = (rows + PANEL - 1) / PANEL;
    layout->words = (columns + TILE_COLUMNS - 1) / TILE_COLUMNS * TILE_WORDS;
    int64_t stored = nonzeros;
    if (type == DENSE8) {
        if (nonzeros != rows * columns) return false;
        layout->words = 0;
        stored = layout->panels * dense_panel(columns);
    }
    layout->masks_at = static_cast<int64_t>(sizeof(Header)) + (8 * (layout->panels + 1) + 63) / 64 * 64;
    layout->values_at = layout->masks_at + 4 * layout->panels * layout->words;
    layout->bytes = (layout->values_at + stored * size_of(static_cast<Type>(type)) + 63) / 64 * 64 + 64;
    return true;
}

const char* view(const void* data, int64_t bytes, Weight* weight) {
    Header header;
    Layout layout;
    if (!data || bytes < static_cast<int64_t>(sizeof header)) return "too short for a header";
    if (reinterpret_cast<uintptr_t>(data) % 64) return "not aligned to 64 bytes";
    std::memcpy(&header, data, sizeof header);
    if (std::memcmp(header.magic, MAGIC, sizeof MAGIC)) return "no packed weight of this version";
    if (!layout_of(header.rows, header.columns, header.nonzeros, header.type, &layout)) return "impossible header";
    if (layout.bytes != bytes)
        return failure("%lld bytes where its header needs %lld", (long long)bytes, (long long)layout.bytes);
    const char* base = static_cast<const char*>(data);
    weight->rows = header.rows;
    weight->columns = header.columns;
    weight->nonzeros = header.nonzeros;
    weight->panels = layout.panels;
    weight->words = layout.words;
    weight->type = static_cast<Type>(header.type);
    weight->offsets = reinterpret_cast<const uint64_t*>(base + sizeof header);
    weight->masks = reinterpret_cast<const uint32_t*>(base + layout.masks_at);
    weight->values = base + layout.values_at;
    return nullptr;
}

void write_header(void* data, int64_t rows, int64_t columns, int64_t nonzeros, Type type) {
    Header header = {};
    std::memcpy(header.magic, MAGIC, sizeof MAGIC);
    header.type = type;
    header.rows = rows;
    header.columns = columns;
    header.nonzeros = nonzeros;
    std::memcpy(data, &header, sizeof header);
}

const char* check(const Weight& weight) {
    if (weight.offsets[0] != 0) return "the first offset is not 0";
    if (weight.type == DENSE8) {  // padding is multiplied by zeros, or not stored
        for (int64_t panel = 0; panel <= weight.panels; panel++)
            if (weight.offsets[panel] != static_cast<uint64_t>(panel * dense_panel(weight.columns)))
                return failure("panel %lld: its offset is not that of a dense weight", (long long)panel);
        return nullptr;
    }
    for (int64_t panel = 0; panel < weight.panels; panel++) {
        const uint32_t* masks = weight.masks_of(panel);
        uint64_t count = 0;
        for (int64_t word = 0; word < weight.words; word++) count += __builtin_popcount(masks[word]);
        if (weight.offsets[panel] + count != weight.offsets[panel + 1])
            return failure("panel %lld: its masks and its offset disagree", (long long)panel);
        // Bits beyond the last column are stray; the kernels would multiply them by padding.
        for (int64_t word = weight.columns / 4 * 2; word < weight.words; word++)
            for (int bit = 0; bit < 32; bit++)
                if (masks[word] >> bit & 1 && column_of(weight.type, word, bit) >= weight.columns)
                    return failure("panel %lld: bits beyond the last column", (long long)panel);
    }
    if (weight.offsets[weight.panels] != static_cast<uint64_t>(weight.nonzeros)) return "the last offset is not the count";
    const int64_t last = weight.panels - 1;
    for (int64_t word = 0; word < weight.words; word++)
        for (int bit = 0; bit < 32; bit++)
            if (weight.masks_of(last)[word] >> bit & 1 && last * PANEL + row_of(weight.type, word, bit) >= weight.rows)
                return "bits beyond the last row";
    return nullptr;
}

}  // namespace rac
