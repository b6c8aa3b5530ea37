// The packed layout of a sparse matrix [rows, columns]. Every sparsity pattern uses the same layout.
//
// Words of all files:
//     row    of the weight, an output. Token: a row of x
//     panel  16 neighbouring rows. Of its columns, a pair is two neighbours and a quad is four
//     line   64 bytes of codes without masks: two quads or more
//     group  columns of the weight that share a scale. Block: columns of x that share one, a group or 512
//     slot   two bytes per column of x: a number of 16 bits of a token, or the bytes of two tokens
//     form   how a loop reads weights: a Type, or what a kernel expanded (FLOAT_FORMS and INT_FORMS of gemm/kernel.h)
//
// A mask word has a bit for each of the 16 x 2 weights of a
// panel and a pair; the bit is set where the weight is stored. The stored values of a panel follow the order of its mask words and,
// within a word, of the bits. For row n of the panel and column k of the pair:
//     BF16: bit 2n + k   (the operand order of AMX and vdpbf16ps; a shift or an AND turns it into fp32 lanes)
//     FP32: bit 16k + n
// The number of words per panel is rounded up to 16, the height of an AMX tile.
//
// Integers are multiplied by quads. Two mask words are the mask of a quad, for column k of the quad:
//     INT8: bit 4n + k of the 64, little-endian
// DENSE8 stores every weight: no masks, 64 bytes per quad of a panel, columns padded to 64.
// The scales of integers, per row or per row and group of columns, are not part of the packed data. `byte_x` of the header is 1 where
// the matmul rounds x to bytes and 0 where it rounds x to 16 bits; only integers may have 1.
//
// INT4 has the masks of INT8. A value is stored as a code of four bits: the value plus the code of zero, which is 8, or is stored per
// row and group of columns. Two codes share a byte, the first in the low half. The codes of a quad start at a whole byte.
// DENSE4 stores every weight: no masks. 64 bytes hold two neighbouring quads, the first in the low halves; columns padded to 64.
//
// DENSE3 and DENSE2 store every weight in codes of three and two bits, and always store codes of zero. A few shifts turn them into
// lines of DENSE4 (gemm/narrow_codes.h). Byte 4n + k of a line of 64 bytes is of row n and of column k of its quads; columns padded to 64.
// DENSE3: three lines hold eight quads. Bits 0 to 2 of line i are quad 2i, bits 4 to 6 are quad 2i + 1. Bit 3 of line i is bit i of
// quad 6, and bit 7 is bit i of quad 7.
// DENSE2: a line holds four quads, in bits 0, 4, 2 and 6 and the ones above these.
//
//     Header | offsets: u64[panels + 1], in values, of INT4 in bytes | pad to 64 | masks: u32[panels][words]
//     | zeros: u8[panels][zero_groups][16] | pad to 64 | values | pad, >= 64 bytes
//
// The last pad lets a kernel load a whole vector at the last value.
#pragma once
#include <cstdint>

#include "format/status.h"

// Every function of a header is inlined: the linker must not keep, for the whole library, a copy that was compiled for one ISA.
#define RAC_INLINE __attribute__((always_inline)) inline

namespace rac {

enum Type : int32_t { BF16 = 0, FP32 = 1, INT8 = 2, DENSE8 = 3, INT4 = 4, DENSE4 = 5, DENSE3 = 6, DENSE2 = 7, TYPES };

constexpr int64_t PANEL = 16;  // rows
constexpr int64_t TILE_WORDS = 16;
constexpr int64_t TILE_COLUMNS = 2 * TILE_WORDS;
constexpr int64_t QUAD = 4 * PANEL;  // weights of four columns of a panel
constexpr int64_t PAIR_OF_QUADS = 8;  // columns that share the bytes of DENSE4
constexpr int ZERO_CODE = 8;          // of a 4-bit weight that stores no codes of zero

RAC_INLINE constexpr bool is_narrow(int32_t type) { return type == DENSE3 || type == DENSE2; }
RAC_INLINE constexpr bool is_dense(int32_t type) { return type == DENSE8 || type == DENSE4 || is_narrow(type); }
RAC_INLINE constexpr bool has_codes(int32_t type) { return type >= INT4; }  // of four bits or fewer
RAC_INLINE constexpr int value_bits(int32_t type) {
    return type == DENSE2 ? 2 : type == DENSE3 ? 3 : has_codes(type) ? 4 : 8;
}
RAC_INLINE constexpr int64_t size_of(int32_t type) { return type == BF16 ? 2 : type == FP32 ? 4 : 1; }

// The columns of a group that has a code of zero, and of a group that has a scale, are a multiple of this.
RAC_INLINE constexpr int64_t zero_unit(int32_t type) { return is_narrow(type) ? TILE_COLUMNS : PAIR_OF_QUADS; }
RAC_INLINE constexpr int64_t scale_unit(int32_t type) { return type < DENSE4 ? 4 : zero_unit(type); }

// Bytes of `count` 4-bit codes.
RAC_INLINE constexpr uint64_t code_bytes(uint64_t count) { return (count + 1) / 2; }

// Bytes of a panel of a weight without masks.
RAC_INLINE constexpr int64_t dense_panel(int32_t type, int64_t columns) {
    return (columns + 63) / 64 * 2 * QUAD * value_bits(type);
}

// What decides how many bytes a packed matrix has. `code_bytes`: of the codes of INT4, otherwise 0. `zero_groups`: groups of
// equally many columns that have a code of zero, or 0; only for codes.
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

    RAC_INLINE int64_t pairs() const { return (columns + 1) / 2; }
    RAC_INLINE const uint32_t* masks_of(int64_t panel) const { return masks + panel * words; }
    // The masks from a column on; those of a weight without masks are not read.
    RAC_INLINE const uint32_t* masks_from(int64_t panel, int64_t column) const {
        return masks_of(panel) + (is_dense(type) ? 0 : column / 2);
    }
    RAC_INLINE const char* values_of(int64_t panel) const {
        return values + static_cast<int64_t>(offsets[panel]) * size_of(type);
    }
    // The 16 codes of zero of a panel and group, or null where all are ZERO_CODE.
    RAC_INLINE const uint8_t* zeros_of(int64_t panel, int64_t group) const {
        return zero_groups ? zeros + (panel * zero_groups + (zero_groups > 1 ? group : 0)) * PANEL : nullptr;
    }
};

// False where a size is not positive, too large, or does not fit the others, or the type is unknown.
bool layout_of(const Sizes& sizes, Layout* layout);

void write_header(void* data, const Sizes& sizes);

// Set `byte_x` of a packed weight of integers.
Status set_byte_x(void* data, int64_t bytes, bool byte_x);

// Bytes of the codes of INT4, from a bitmask [rows][ceil(columns / 8)].
int64_t count_code_bytes(const uint8_t* bitmask, int64_t rows, int64_t columns);

// A weight as a checkpoint stores it.
struct Unpacked {
    const void* values;  // row-major, of any alignment; of codes int8
    int64_t value_bytes;
    const uint8_t* bitmask;  // [rows][ceil(columns / 8)]; null for types without masks
    int64_t bitmask_bytes;
    const uint8_t* zeros;  // [panels][zero_groups][16]
    int64_t zero_bytes, zero_groups;
};

// Fill `bytes` at `data` with the packed weight.
Status pack(const Unpacked& weight, int64_t rows, int64_t columns, int32_t type, void* data, int64_t bytes, int threads);

// Check the header and make a view of packed data, without a pass over the data.
Status view(const void* data, int64_t bytes, Weight* weight);

// Check that each panel's masks count exactly its values, so that no kernel reads outside of the buffer.
Status check(const Weight& weight);

// The row of a panel, and the column of a matrix, of a bit of a mask word.
RAC_INLINE int row_of(Type type, int64_t word, int bit) {
    return type == BF16 ? bit >> 1 : type == FP32 ? bit & 15 : static_cast<int>(word % 2) * 8 + (bit >> 2);
}
RAC_INLINE int64_t column_of(Type type, int64_t word, int bit) {
    return type == BF16 ? 2 * word + (bit & 1) : type == FP32 ? 2 * word + (bit >> 4) : word / 2 * 4 + (bit & 3);
}

}  // namespace rac
