// Plain C++ for the AVX512 and AMX intrinsics that csrc/ uses, so that those kernels run on any machine.
//
// From the pseudocode of Intel's intrinsics guide. Tiles check what the processor would fault on, or compute wrongly.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define RAC_REQUIRE(condition)                                                  \
    do {                                                                        \
        if (!(condition)) {                                                     \
            std::fprintf(stderr, "emulated instruction: %s\n", #condition);     \
            std::abort();                                                       \
        }                                                                       \
    } while (0)

#define _MM_HINT_T0 3
#define _MM_HINT_T2 1
#define _mm_prefetch(address, hint) ((void)(address))

using __mmask16 = uint16_t;
using __mmask32 = uint32_t;
struct __m512i {
    uint32_t lane[16];
};
struct __m512 {
    float lane[16];
};
struct __m256i {
    uint16_t lane[16];
};

template <class To>
inline To rac_load(const void* from) {
    To to;
    std::memcpy(&to, from, sizeof to);
    return to;
}
inline __m512i _mm512_loadu_si512(const void* from) { return rac_load<__m512i>(from); }
inline __m512i _mm512_load_si512(const void* from) {
    RAC_REQUIRE(reinterpret_cast<uintptr_t>(from) % 64 == 0);
    return rac_load<__m512i>(from);
}
inline __m512 _mm512_loadu_ps(const void* from) { return rac_load<__m512>(from); }
inline void _mm512_storeu_ps(void* to, __m512 value) { std::memcpy(to, &value, 64); }
inline void _mm512_store_si512(void* to, __m512i value) {
    RAC_REQUIRE(reinterpret_cast<uintptr_t>(to) % 64 == 0);
    std::memcpy(to, &value, 64);
}
template <class To, class From>
inline To rac_bits(const From& from) {
    static_assert(sizeof(To) == sizeof from, "same bits");
    return rac_load<To>(&from);
}
inline __m512 _mm512_castsi512_ps(__m512i value) { return rac_bits<__m512>(value); }

template <class Operation>
inline __m512 rac_lanes(Operation operation) {
    __m512 to;
    for (int i = 0; i < 16; i++) to.lane[i] = operation(i);
    return to;
}
#define RAC_FLOATS(name, parameters, ...) \
    inline __m512 name parameters { return rac_lanes([&](int i) { return __VA_ARGS__; }); }
inline __m512 _mm512_setzero_ps() { return __m512{}; }
inline __m512 _mm512_set1_ps(float value) {
    return rac_lanes([=](int) { return value; });
}
RAC_FLOATS(_mm512_add_ps, (__m512 a, __m512 b), a.lane[i] + b.lane[i])
RAC_FLOATS(_mm512_mul_ps, (__m512 a, __m512 b), a.lane[i] * b.lane[i])
RAC_FLOATS(_mm512_fmadd_ps, (__m512 a, __m512 b, __m512 c), std::fma(a.lane[i], b.lane[i], c.lane[i]))

template <class Operation>
inline __m512i rac_integers(Operation operation) {
    __m512i to;
    for (int i = 0; i < 16; i++) to.lane[i] = operation(i);
    return to;
}
#define RAC_INTEGERS(name, parameters, ...) \
    inline __m512i name parameters { return rac_integers([&](int i) { return __VA_ARGS__; }); }
inline __m512i _mm512_set1_epi32(int value) {
    return rac_integers([=](int) { return static_cast<uint32_t>(value); });
}
RAC_INTEGERS(_mm512_and_si512, (__m512i a, __m512i b), a.lane[i] & b.lane[i])
RAC_INTEGERS(_mm512_slli_epi32, (__m512i a, unsigned count), a.lane[i] << count)
RAC_INTEGERS(_mm512_mask_blend_epi16, (__mmask32 mask, __m512i a, __m512i b),
             ((mask >> 2 * i & 1 ? b : a).lane[i] & 0xffffu) | ((mask >> (2 * i + 1) & 1 ? b : a).lane[i] & 0xffff0000u))
RAC_INTEGERS(_mm512_set4_epi32, (int d, int c, int b, int a), static_cast<uint32_t>(i % 4 == 0 ? a : i % 4 == 1 ? b : i % 4 == 2 ? c : d))
RAC_INTEGERS(_mm512_srli_epi32, (__m512i a, unsigned count), a.lane[i] >> count)
RAC_INTEGERS(_mm512_srai_epi32, (__m512i a, unsigned count), static_cast<uint32_t>(static_cast<int32_t>(a.lane[i]) >> count))
RAC_INTEGERS(_mm512_or_si512, (__m512i a, __m512i b), a.lane[i] | b.lane[i])
RAC_INTEGERS(_mm512_xor_si512, (__m512i a, __m512i b), a.lane[i] ^ b.lane[i])
RAC_FLOATS(_mm512_cvtepi32_ps, (__m512i a), static_cast<float>(static_cast<int32_t>(a.lane[i])))
inline __m512i _mm512_castps_si512(__m512 value) { return rac_bits<__m512i>(value); }
using __m512bh = __m512i;  // 32 of bf16
inline float rac_bf16_of(uint32_t bits) { return rac_bits<float>(bits << 16); }
// acc[i] += a[2i + 1] b[2i + 1] + a[2i] b[2i]
inline __m512 _mm512_dpbf16_ps(__m512 acc, __m512bh a, __m512bh b) {
    return rac_lanes([&](int i) {
        const float odd = rac_bf16_of(a.lane[i] >> 16) * rac_bf16_of(b.lane[i] >> 16);
        return acc.lane[i] + odd + rac_bf16_of(a.lane[i] & 0xffff) * rac_bf16_of(b.lane[i] & 0xffff);
    });
}
inline __m512i _mm512_setzero_si512() { return __m512i{}; }
RAC_INTEGERS(_mm512_add_epi32, (__m512i a, __m512i b), a.lane[i] + b.lane[i])
RAC_INTEGERS(_mm512_sub_epi32, (__m512i a, __m512i b), a.lane[i] - b.lane[i])
struct __m128i {
    uint8_t lane[16];
};
inline __m128i _mm_loadu_si128(const __m128i* from) { return rac_load<__m128i>(from); }
inline __m256i _mm256_loadu_si256(const __m256i* from) { return rac_load<__m256i>(from); }
RAC_INTEGERS(_mm512_cvtepu8_epi32, (__m128i a), uint32_t{a.lane[i]})
RAC_INTEGERS(_mm512_cvtepu16_epi32, (__m256i a), uint32_t{a.lane[i]})
RAC_INTEGERS(_mm512_cvtepu8_epi16, (__m256i a), (a.lane[i] & 0xffu) | (a.lane[i] & 0xff00u) << 8)
RAC_INTEGERS(_mm512_slli_epi16, (__m512i a, unsigned count), (a.lane[i] << count & 0xffffu) | (a.lane[i] >> 16) << (16 + count))
inline __m512i _mm512_sub_epi8(__m512i a, __m512i b) {
    return rac_integers([&](int i) {
        uint32_t to = 0;
        for (int k = 0; k < 32; k += 8) to |= (((a.lane[i] >> k) - (b.lane[i] >> k)) & 0xffu) << k;
        return to;
    });
}
RAC_INTEGERS(_mm512_mullo_epi32, (__m512i a, __m512i b), a.lane[i] * b.lane[i])
// Each bit of the result is the bit of `table` that the bits of a, b and c number.
inline __m512i _mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
    return rac_integers([&](int i) {
        uint32_t to = 0;
        for (int bit = 0; bit < 32; bit++) {
            const uint32_t at = (a.lane[i] >> bit & 1) << 2 | (b.lane[i] >> bit & 1) << 1 | (c.lane[i] >> bit & 1);
            to |= (static_cast<uint32_t>(table) >> at & 1) << bit;
        }
        return to;
    });
}
// The lanes of `from` one after another at the set bits of the mask, and `rest` elsewhere.
template <class Lane, class Register>
inline Register rac_expand(Register rest, uint64_t mask, const Register& from) {
    Lane stored[64 / sizeof(Lane)], spread[64 / sizeof(Lane)];
    std::memcpy(stored, &from, 64);
    std::memcpy(spread, &rest, 64);
    for (size_t i = 0, next = 0; i < 64 / sizeof(Lane); i++)
        if (mask >> i & 1) spread[i] = stored[next++];
    return rac_load<Register>(spread);
}
inline __m512i _mm512_mask_expand_epi8(__m512i rest, uint64_t mask, __m512i from) {
    return rac_expand<uint8_t>(rest, mask, from);
}
inline __m512i _mm512_shuffle_epi8(__m512i a, __m512i order) {
    uint8_t from[64], at[64], to[64];
    std::memcpy(from, &a, 64);
    std::memcpy(at, &order, 64);
    for (int i = 0; i < 64; i++) to[i] = at[i] & 0x80 ? 0 : from[i / 16 * 16 + at[i] % 16];
    return rac_load<__m512i>(to);
}
inline void _mm512_storeu_si512(void* to, __m512i value) { std::memcpy(to, &value, 64); }
inline __m512i _mm512_maskz_expand_epi8(uint64_t mask, __m512i from) {
    return rac_expand<uint8_t>(__m512i{}, mask, from);
}
// acc[i] += the sum of four products of unsigned bytes of a and signed ones of b
inline __m512i _mm512_dpbusd_epi32(__m512i acc, __m512i a, __m512i b) {
    return rac_integers([&](int i) {
        uint32_t sum = acc.lane[i];
        for (int k = 0; k < 4; k++) {
            const int left = static_cast<uint8_t>(a.lane[i] >> 8 * k), right = static_cast<int8_t>(b.lane[i] >> 8 * k);
            sum += static_cast<uint32_t>(left * right);
        }
        return sum;
    });
}
inline __m512i _mm512_maskz_expand_epi16(__mmask32 mask, __m512i from) {
    return rac_expand<uint16_t>(__m512i{}, mask, from);
}
inline __m512 _mm512_maskz_expand_ps(__mmask16 mask, __m512 from) {
    return rac_expand<float>(__m512{}, mask, from);
}

struct RacTiles {
    bool configured = false;
    int rows[8], bytes[8];
    uint8_t data[8][16][64];
};
inline RacTiles& rac_tiles() {
    static thread_local RacTiles tiles;
    return tiles;
}
inline void _tile_loadconfig(const void* config) {
    const uint8_t* from = static_cast<const uint8_t*>(config);
    RacTiles& tiles = rac_tiles();
    RAC_REQUIRE(from[0] == 1);
    for (int i = 1; i < 16; i++) RAC_REQUIRE(from[i] == 0);
    for (int i = 0; i < 16; i++) {
        uint16_t bytes;
        std::memcpy(&bytes, from + 16 + 2 * i, 2);
        const int rows = from[48 + i];
        RAC_REQUIRE(bytes <= 64 && rows <= 16 && (i < 8 || (bytes == 0 && rows == 0)) && (bytes == 0) == (rows == 0));
        if (i < 8) tiles.bytes[i] = bytes, tiles.rows[i] = rows;
    }
    std::memset(tiles.data, 0, sizeof tiles.data);
    tiles.configured = true;
}
inline void _tile_release() { rac_tiles().configured = false; }
inline RacTiles& rac_configured(int tile) {
    RAC_REQUIRE(rac_tiles().configured && rac_tiles().rows[tile] > 0);
    return rac_tiles();
}
inline void _tile_zero(int tile) { std::memset(rac_configured(tile).data[tile], 0, sizeof rac_tiles().data[tile]); }
inline void _tile_loadd(int tile, const void* from, int64_t stride) {
    RacTiles& tiles = rac_configured(tile);
    std::memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
    for (int row = 0; row < tiles.rows[tile]; row++)
        std::memcpy(tiles.data[tile][row], static_cast<const char*>(from) + row * stride, tiles.bytes[tile]);
}
inline void _tile_stored(int tile, void* to, int64_t stride) {
    RacTiles& tiles = rac_configured(tile);
    for (int row = 0; row < tiles.rows[tile]; row++)
        std::memcpy(static_cast<char*>(to) + row * stride, tiles.data[tile][row], tiles.bytes[tile]);
}
// acc[m][n] += the sums of `dot` over four bytes of a[m] and four of b[group][n]
template <class Number, class Dot>
inline void rac_multiply_tiles(int acc, int a, int b, Dot dot) {
    RacTiles& tiles = rac_configured(acc);
    RAC_REQUIRE(rac_configured(a).bytes[a] == 4 * rac_configured(b).rows[b]);
    RAC_REQUIRE(tiles.rows[acc] == tiles.rows[a] && tiles.bytes[acc] == tiles.bytes[b]);
    RAC_REQUIRE(acc != a && acc != b && a != b);
    for (int m = 0; m < tiles.rows[acc]; m++)
        for (int n = 0; n < tiles.bytes[acc] / 4; n++) {
            Number sum = rac_load<Number>(tiles.data[acc][m] + 4 * n);
            for (int group = 0; group < tiles.rows[b]; group++)
                sum = dot(sum, tiles.data[a][m] + 4 * group, tiles.data[b][group] + 4 * n);
            std::memcpy(tiles.data[acc][m] + 4 * n, &sum, 4);
        }
}
inline void _tile_dpbf16ps(int acc, int a, int b) {
    rac_multiply_tiles<float>(acc, a, b, [](float sum, const uint8_t* left, const uint8_t* right) {
        for (int k = 0; k < 4; k += 2)
            sum += rac_bf16_of(rac_load<uint16_t>(left + k)) * rac_bf16_of(rac_load<uint16_t>(right + k));
        return sum;
    });
}
inline void _tile_dpbssd(int acc, int a, int b) {
    rac_multiply_tiles<uint32_t>(acc, a, b, [](uint32_t sum, const uint8_t* left, const uint8_t* right) {
        for (int k = 0; k < 4; k++)
            sum += static_cast<uint32_t>(static_cast<int8_t>(left[k]) * static_cast<int8_t>(right[k]));
        return sum;
    });
}

// The functions of csrc/isa/avx512.h that are assembly.
namespace rac {
static inline __m512i four_bytes(const char* x) {
    int32_t bytes;
    std::memcpy(&bytes, x, sizeof bytes);
    return _mm512_set1_epi32(bytes);
}
static inline void add_products(__m512i& sums, __m512i w, __m512i x) { sums = _mm512_dpbusd_epi32(sums, w, x); }
static inline void add_products(__m512i& sums, __m512i w, const char* x) { add_products(sums, w, four_bytes(x)); }
static inline __m512i expand_bytes(uint64_t mask, const char* values) {
    return _mm512_maskz_expand_epi8(mask, _mm512_loadu_si512(values));
}
}  // namespace rac
