// Included inside the anonymous namespace of sources for ARM, in the section that is compiled for their ISA.

// The bytes that each lane receives: of bf16 for each mask byte, of fp32 for each half of one. 0x80 gives a zero.
struct Tables {
    alignas(64) uint8_t bf16[256][16];
    alignas(64) uint8_t fp32[16][16];
    uint8_t bytes[16];  // of the fp32 values that half a mask byte stores
    constexpr Tables() : bf16(), fp32(), bytes() {
        for (int mask = 0; mask < 256; mask++) fill(bf16[mask], mask, 2);
        for (int mask = 0; mask < 16; mask++) bytes[mask] = static_cast<uint8_t>(4 * fill(fp32[mask], mask, 4));
    }
    static constexpr int fill(uint8_t* order, int mask, int size) {
        int stored = 0;
        for (int lane = 0; lane < 16 / size; lane++) {
            const bool set = mask >> lane & 1;
            for (int i = 0; i < size; i++) order[size * lane + i] = static_cast<uint8_t>(set ? size * stored + i : 0x80);
            stored += set;
        }
        return stored;
    }
};
constexpr Tables tables;

inline uint8x16_t shuffled(const char* values, const uint8_t* order) {
    return vqtbl1q_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(values)), vld1q_u8(order));
}

// One or two mask words of bf16: of[j] holds rows 4j to 4j + 3, the next four those of the second word; both columns of a row are
// in a lane. Returns the address after the values.
template <int WORDS>
struct Pairs {
    uint32x4_t of[4 * WORDS];
};
template <int WORDS>
RAC_INLINE const char* spread_bf16(uint64_t mask, const char* values, Pairs<WORDS>& rows) {
    const uint64_t ends = ends_of_bytes(mask), starts = ends << 8;
    for (int j = 0; j < 4 * WORDS; j++)
        rows.of[j] = vreinterpretq_u32_u8(shuffled(values + 2 * (starts >> 8 * j & 0xff), tables.bf16[mask >> 8 * j & 0xff]));
    return values + 2 * (ends >> (32 * WORDS - 8) & 0xff);
}
