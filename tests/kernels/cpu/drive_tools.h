// Random numbers, buffers and values of drive.cpp.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>

static std::mt19937_64 rng(7);
static int64_t below(int64_t n) { return static_cast<int64_t>(rng() % static_cast<uint64_t>(n)); }

static void require(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "failed: %s\n", what);
    std::exit(1);
}

struct Free {
    void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<uint8_t[], Free>;
static Buffer aligned(int64_t bytes) {  // packed data is a multiple of 64 bytes
    return Buffer(static_cast<uint8_t*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
}

// Small integers, so that products of bf16 inputs and sums in fp32 are exact and results can be compared.
static void put(uint8_t* to, int32_t type, int64_t index, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t half = static_cast<uint16_t>(bits >> 16);
    if (type >= 2)
        to[index] = static_cast<uint8_t>(static_cast<int8_t>(value));
    else if (type == 0)
        std::memcpy(to + 2 * index, &half, 2);
    else
        std::memcpy(to + 4 * index, &value, 4);
}
static float get(const uint8_t* from, int32_t type, int64_t index) {
    uint32_t bits = 0;
    if (type == 0)
        std::memcpy(reinterpret_cast<uint8_t*>(&bits) + 2, from + 2 * index, 2);
    else
        std::memcpy(&bits, from + 4 * index, 4);
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
static int64_t size_of(int32_t type) { return type == 0 ? 2 : type == 1 ? 4 : 1; }
