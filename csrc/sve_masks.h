// Included inside a namespace of each vector length, in the section that is compiled for SVE: where the stored values of a mask of 64 bits
// belong.
//
// Such a namespace defines CHUNKS: the vectors of 64 bytes, 4 of 128 bits, 2 of 256 or 1 of 512. As many bits of the mask as a vector has
// bytes are loaded as its predicate. From the predicate a multiplication makes, for each bit, the number of those that are set before it in
// its byte. Added to the number of those in the bytes before, that is the place of its value among the stored ones: an index for TBL.

constexpr int CHUNK = 64 / CHUNKS;  // bytes of a vector that are used, and bits of the mask

RAC_INLINE svbool_t whole() { return svptrue_pat_b8(CHUNKS == 1 ? SV_VL64 : CHUNKS == 2 ? SV_VL32 : SV_VL16); }
RAC_INLINE svbool_t whole_words() { return svptrue_pat_b32(CHUNKS == 1 ? SV_VL16 : CHUNKS == 2 ? SV_VL8 : SV_VL4); }

// For each byte of a mask of 64 bits: how many bits are set in the bytes before it, of the same `bits` of the mask.
template <int bits>
RAC_INLINE svuint8_t starts_of_bytes(svbool_t all, const uint32_t* masks) {
    if constexpr (bits == 8) return svdup_n_u8(0);
    uint64_t mask;
    std::memcpy(&mask, masks, sizeof mask);
    const svuint8_t counts = svcnt_u8_x(all, svreinterpret_u8_u64(svdup_n_u64(mask)));
    if constexpr (bits == 64) return svreinterpret_u8_u64(svmul_n_u64_x(all, svreinterpret_u64_u8(counts), 0x0101010101010100));
    if constexpr (bits == 32) return svreinterpret_u8_u32(svmul_n_u32_x(all, svreinterpret_u32_u8(counts), 0x01010100));
    return svreinterpret_u8_u16(svlsl_n_u16_x(all, svreinterpret_u16_u8(counts), 8));
}

// `bits` of the mask, from the `part`th on, as the predicate of bytes; any bits behind them.
template <int bits>
RAC_INLINE svbool_t bits_of(const uint32_t* masks, int part) {
    return *reinterpret_cast<const MaskOfBytes*>(reinterpret_cast<const char*>(masks) + bits / 8 * part);
}

// The byte of the mask that each bit of a chunk is in.
RAC_INLINE svuint8_t own_bytes(svbool_t all, int chunk) { return svld1_u8(all, eighths.of + CHUNK * (chunk % CHUNKS)); }

// For each bit of a chunk: how many are set before it, of the same `bits` of the mask.
template <int bits>
RAC_INLINE svuint8_t places(svbool_t all, svbool_t mask, svuint8_t starts, svuint8_t own) {
    const svuint64_t ones = svreinterpret_u64_u8(svdup_n_u8_z(mask, 1));
    if constexpr (bits == 8) return svreinterpret_u8_u64(svmul_n_u64_x(all, ones, 0x0101010101010100));
    return svreinterpret_u8_u64(svmla_n_u64_x(all, svreinterpret_u64_u8(svtbl_u8(starts, own)), ones, 0x0101010101010100));
}
