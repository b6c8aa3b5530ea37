// The packed layout of a sparse matrix [rows, columns]. Every sparsity pattern uses the same layout.
//
// Rows are cut into panels of 16. Two neighbouring columns are a pair, four are a quad. One mask word has a bit for each of
// the 16 x 2 weights of a panel and a pair: set where the weight is stored. The stored values of a panel are in the order of
// its words and, within a word, of the bits:
//     bf16: bit 2n + k   (the operand order of AMX and vdpbf16ps; a shift or an AND turns it into fp32 lanes)
//     fp32: bit 16k + n
// for row n of the panel and column k of the pair. The number of words per panel is rounded up to 16, the height of an AMX
// tile.
//
// 8-bit integers are multiplied one quad at a time: two words are the mask of a quad, 16 x 4 weights,
//     int8: bit 4n + k of the 64, little-endian
// Where every weight is stored there are no words, and each quad of a panel is 64 bytes (DENSE8, columns padded to 64).
// The scales of integers, one per row or one per row and group of columns, are kept outside of the packed data. `byte_x` of the header
// is 1 where x is rounded to bytes in a product with them, and 0 where it is rounded to 16 bits; only integers may have 1.
//
// 4-bit integers (INT4) have the masks of 8-bit ones. A value is stored as a code of four bits, 0 to 15: the value plus the
// code of zero, which is 8, or given for each row and group of columns. The codes of a quad are in the order of its bits, two
// per byte, the first one low. They start at a whole byte, so a quad with an odd number has four bits of padding.
// Where every weight is stored there are no words (DENSE4): 64 bytes hold two neighbouring quads, the first one in the low
// halves, the second one in the high ones; columns are padded to 64.
//
// DENSE3 and DENSE2 have codes of three and two bits, of a weight of which every value is stored, and always codes of zero. They are
// packed so that a few shifts make lines of 64 bytes of them as DENSE4 has (few_bits.h). Byte 4n + k of a line is of row n and of column
// k of its quads; columns are padded to 64.
// DENSE3: three lines hold eight quads. Bits 0 to 2 of line i are quad 2i, bits 4 to 6 are quad 2i + 1. Bit 3 of line i is bit i of
// quad 6, and bit 7 is bit i of quad 7.
// DENSE2: a line holds four quads, in bits 0, 4, 2 and 6 and the ones above these.
//
// PLANES4 has the same codes as INT4, as bits, for processors that spread 64 bits of an integer register at once (pdep) and have no
// instruction that spreads bytes. Each 32 columns of a row have a mask word: bit 8o + t is column 4t + o. The masks of two
// neighbouring rows are 64 bits. Each of the n codes there is XORed with its code of zero, and the bits 0 of all of them, then
// bits 1, 2 and 3, take (n + 7) / 8 bytes each. So a pruned weight is four zeros, and the XOR makes its code of zero of them.
//
//     Header | offsets: u64[panels + 1], in values, of INT4 and PLANES4 in bytes
//     | pad to 64 | masks: u32[panels][words]
//     | zeros: u8[panels][zero_groups][16] | pad to 64 | values | pad, >= 64 bytes
//
// Because of the last pad, a kernel can load a whole vector at the last value.
#pragma once
#include <cstdint>

#include "status.h"

namespace rac {

enum Type : int32_t { BF16 = 0, FP32 = 1, INT8 = 2, DENSE8 = 3, INT4 = 4, DENSE4 = 5, PLANES4 = 6, DENSE3 = 7, DENSE2 = 8, TYPES };

constexpr int64_t PANEL = 16;  // rows
constexpr int64_t TILE_WORDS = 16;
constexpr int64_t TILE_COLUMNS = 2 * TILE_WORDS;
constexpr int64_t QUAD = 4 * PANEL;  // weights of four columns of a panel

constexpr bool is_narrow(int32_t type) { return type == DENSE3 || type == DENSE2; }
constexpr bool is_dense(int32_t type) { return type == DENSE8 || type == DENSE4 || is_narrow(type); }
constexpr bool is_few_bits(int32_t type) { return type >= INT4; }  // codes of two to four bits
constexpr int value_bits(int32_t type) { return type == DENSE2 ? 2 : type == DENSE3 ? 3 : is_few_bits(type) ? 4 : 8; }
constexpr bool has_codes(int32_t type) { return type == INT4 || type == PLANES4; }  // and masks
constexpr int ZERO_CODE = 8;  // of a 4-bit weight without zeros
constexpr int64_t PAIR_OF_QUADS = 8;  // columns that share the bytes of DENSE4

// Columns that a group with a code of zero has a multiple of.
constexpr int64_t zero_unit(int32_t type) {
    return type == PLANES4 || is_narrow(type) ? TILE_COLUMNS : PAIR_OF_QUADS;
}
// Columns that a group with a scale has a multiple of.
constexpr int64_t scale_unit(int32_t type) { return !is_few_bits(type) || type == INT4 ? 4 : zero_unit(type); }

// Bytes of `count` codes that share 64 bits of masks.
constexpr uint64_t bytes_of_codes(int32_t type, uint64_t count) {
    return type == PLANES4 ? (count + 7) / 8 * 4 : (count + 1) / 2;
}

// The fewest bytes of the codes of a weight: 0 where it has none.
constexpr int64_t least_code_bytes(int32_t type, int64_t values) {
    return has_codes(type) ? static_cast<int64_t>(bytes_of_codes(type, static_cast<uint64_t>(values))) : 0;
}

// Bytes of a panel of a weight without masks.
constexpr int64_t dense_panel(int32_t type, int64_t columns) { return (columns + 63) / 64 * 2 * QUAD * value_bits(type); }

constexpr int64_t size_of(Type type) { return type == BF16 ? 2 : type == FP32 ? 4 : 1; }

// What decides how many bytes a packed matrix has. `code_bytes`: of the codes of INT4 and PLANES4, otherwise 0. `zero_groups`: groups of
// equally many columns whose code of zero is given, or 0; only for weights of few bits.
struct Sizes {
    int64_t rows, columns, nonzeros;
    int32_t type;
    int64_t code_bytes, zero_groups;
};

struct Header {
    char magic[8];
    int32_t type;
    int32_t byte_x;
    int64_t rows, columns, nonzeros, code_bytes, zero_groups;
    char pad[8];
};
static_assert(sizeof(Header) == 64, "offsets start at a cache line");

// Where the parts of a packed matrix lie, in bytes from its start.
struct Layout {
    int64_t panels, words, masks_at, zeros_at, values_at, values_end, bytes;
};

// A checked view of packed data.
struct Weight {
    int64_t rows, columns, nonzeros, panels, words, code_bytes, zero_groups;
    Type type;
    bool byte_x;
    const uint64_t* offsets;
    const uint32_t* masks;
    const uint8_t* zeros;
    const char* values;

    int64_t pairs() const { return (columns + 1) / 2; }
    uint64_t stored() const { return static_cast<uint64_t>(has_codes(type) ? code_bytes : nonzeros); }  // as offsets count
    int64_t value_bytes() const { return size_of(type); }
    const uint32_t* masks_of(int64_t panel) const { return masks + panel * words; }
    const char* values_of(int64_t panel) const {
        return values + static_cast<int64_t>(offsets[panel]) * value_bytes();
    }
    int64_t zero_group_of(int64_t column) const { return zero_groups > 1 ? column / (columns / zero_groups) : 0; }
    // The 16 codes of zero of a panel and group, or null where all are ZERO_CODE.
    const uint8_t* zeros_of(int64_t panel, int64_t group) const {
        return zero_groups ? zeros + (panel * zero_groups + group) * PANEL : nullptr;
    }
    // The code of a value of few bits in a row of a panel and a column; -1 if there is none.
    int code_of(int64_t panel, int64_t row, int64_t column, int value) const {
        const uint8_t* of_rows = zeros_of(panel, zero_group_of(column));
        const int code = value + (of_rows ? of_rows[row] : ZERO_CODE);
        return code >= 0 && code < 1 << value_bits(type) ? code : -1;
    }
};

// False where a size is not positive, too large, or does not fit the others, or the type is unknown.
bool layout_of(const Sizes& sizes, Layout* layout);

void write_header(void* data, const Sizes& sizes);

// Set `byte_x` of a packed weight of integers.
Status set_byte_x(void* data, int64_t bytes, bool byte_x);

// Bytes of the codes of INT4 or PLANES4, from a bitmask [rows][ceil(columns / 8)].
int64_t count_code_bytes(int32_t type, const uint8_t* bitmask, int64_t rows, int64_t columns);

struct Unpacked {
    const void* values;  // row-major, of any alignment; of few bits int8
    int64_t value_bytes;
    const uint8_t* bitmask;  // [rows][ceil(columns / 8)]; none for types without masks
    int64_t bitmask_bytes;
    const uint8_t* zeros;  // [panels][zero_groups][16]
    int64_t zero_bytes, zero_groups;
};

// The stored values and a bitmask into `bytes` at `data`.
Status pack(const Unpacked& weight, int64_t rows, int64_t columns, int32_t type, void* data, int64_t bytes, int threads);

// The checks that need no pass over the data.
Status view(const void* data, int64_t bytes, Weight* weight);

// Each panel's masks count exactly its values, so that no kernel reads outside of the buffer.
Status check(const Weight& weight);

// The row of a panel, and the column of a matrix, that a bit of a word stands for.
inline int row_of(Type type, int64_t word, int bit) {
    if (type == PLANES4) return static_cast<int>(word % TILE_WORDS);
    return type == BF16 ? bit >> 1 : type == FP32 ? bit & 15 : static_cast<int>(word % 2) * 8 + (bit >> 2);
}
inline int64_t column_of(Type type, int64_t word, int bit) {
    if (type == PLANES4) return word / TILE_WORDS * TILE_COLUMNS + bit % 8 * 4 + bit / 8;
    return type == BF16 ? 2 * word + (bit & 1) : type == FP32 ? 2 * word + (bit >> 4) : word / 2 * 4 + (bit & 3);
}

}  // namespace rac
