// Included inside the anonymous namespace of sources that spread 8-bit weights by shuffling bytes.

// For each mask byte and each of 8 bytes: the number of the stored byte that is put there, 0x80 for a zero. The second table is
// for the upper half of a vector, whose values are loaded at byte 8.
struct Tables {
    alignas(64) uint8_t low[256][8];
    alignas(64) uint8_t high[256][8];
    constexpr Tables() : low(), high() {
        for (int mask = 0; mask < 256; mask++)
            for (int lane = 0, stored = 0; lane < 8; lane++) {
                const bool set = mask >> lane & 1;
                low[mask][lane] = static_cast<uint8_t>(set ? stored : 0x80);
                high[mask][lane] = static_cast<uint8_t>(set ? 8 + stored : 0x80);
                stored += set;
            }
    }
};
constexpr Tables tables;
