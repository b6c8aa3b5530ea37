// Which functions of a kernel multiply which panels and slots, with weights of integers; all but tiles.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "gemm/matmul.h"

namespace rac {
namespace {

constexpr int64_t CHUNK_BYTES = 360 * 1024;  // of a block of some tokens and of their sums: a part of a second-level cache

// Whether a kernel spreads 8-bit weights anew for each group of slots.
bool multiplies_stored(const IntMatmul& matmul, const Integers& kernel) {
    return matmul.slots(matmul.out.m) <= kernel.direct_slots && !has_codes(matmul.out.weight.type);
}

// Tokens that several panels use in turn, in whole groups of QUADS.
int64_t tokens_of_chunk(const IntMatmul& matmul) {
    const int64_t group = 2 * MOST_SLOTS, m = matmul.out.m;
    const int64_t most = CHUNK_BYTES / (2 * matmul.block + PANELS_PER_CHUNK * PANEL * 4) / group * group;
    const int64_t chunks = (m + most - 1) / most;
    return (m + chunks * group - 1) / (chunks * group) * group;
}

// A block of `slots` slots of x, whose first token is `token`.
Slots slots_of(const IntMatmul& matmul, const Integers& kernel, int64_t block, int64_t token, int64_t slots) {
    const int64_t slot = token / matmul.per_slot();
    return {matmul.x + offset_of(kernel.format, slot, slots, matmul.stride, block * matmul.block), matmul.stride,
            matmul.x_sums + token * matmul.blocks + block, matmul.blocks, matmul.bytes};
}

// A block of a panel in the kernel's dense form. Returns the address of the next block's values.
const char* expand_block(const IntMatmul& matmul, const Integers& kernel, int64_t panel, int64_t block, const char* values, char* out) {
    const Weight& weight = matmul.out.weight;
    return kernel.expand[weight.type - INT8](weight.masks_from(panel, block * matmul.block), values, weight.zeros_of(panel, block),
                                             matmul.quads_of(block), out);
}

// Tokens [token, token + tokens) times a block of a panel, added to acc [tokens][PANEL]. Returns the address of the next block's values.
const char* multiply_block(const IntMatmul& matmul, const Integers& kernel, int64_t panel, int64_t block, const char* values,
                           int64_t token, int64_t tokens, float* acc) {
    const int64_t per_slot = matmul.per_slot(), slots = matmul.slots(tokens), quads = matmul.quads_of(block);
    const bool stored = multiplies_stored(matmul, kernel);
    const int64_t together = stored ? kernel.slots : kernel.expanded_slots;
    const uint32_t* masks = matmul.out.weight.masks_from(panel, block * matmul.block);
    int32_t sums[2 * MOST_SLOTS * PANEL];
    float scale[PANEL];
    alignas(64) char expanded[2 * PANEL * BLOCK_MOST];
    const char* end = values;
    if (!stored) end = expand_block(matmul, kernel, panel, block, values, expanded);
    matmul.read_scale(panel, block, scale);
    for (int64_t at = 0; at < slots; at += together) {
        const int64_t some = std::min<int64_t>(slots - at, together), done = at * per_slot;
        const Slots x = slots_of(matmul, kernel, block, token + done, some);
        if (stored)
            end = kernel.dot[matmul.out.weight.type - INT8][some - 1](masks, values, quads, x, sums);
        else
            kernel.dot_expanded[some - 1](nullptr, expanded, quads, x, sums);
        kernel.add_scaled(sums, matmul.x_scale + (token + done) * matmul.blocks + block, matmul.blocks, scale,
                          std::min(tokens - done, some * per_slot), acc + done * PANEL);
    }
    return end;
}

// The same of two panels, added to acc [2][tokens][PANEL]. `values`: of both, which become the addresses of the next block's.
void multiply_pair(const IntMatmul& matmul, const Integers& kernel, int64_t panel, int64_t block, const char** values, int64_t token,
                   int64_t tokens, float* acc) {
    alignas(64) char expanded[2 * PANEL * BLOCK_MOST];
    float scale[2 * PANEL];
    for (int64_t p = 0; p < 2; p++) {
        values[p] = expand_block(matmul, kernel, panel + p, block, values[p], expanded + p * PANEL * BLOCK_MOST);
        matmul.read_scale(panel + p, block, scale + p * PANEL);
    }
    const int64_t slots = matmul.slots(tokens);
    for (int64_t at = 0; at < slots; at += MOST_SLOTS) {
        const int64_t some = std::min<int64_t>(slots - at, MOST_SLOTS), done = at * matmul.per_slot();
        const float* x_scale = matmul.x_scale + (token + done) * matmul.blocks + block;
        const PairSums to = {tokens - done, x_scale, scale, acc + done * PANEL, tokens * PANEL};
        kernel.pair[some - 1](expanded, matmul.quads_of(block), slots_of(matmul, kernel, block, token + done, some), to);
    }
}

// Panels of codes, a group of slots after the other.
void few_tokens(const IntMatmul& matmul, const Integers& kernel, int64_t first, int64_t last) {
    alignas(64) float acc[2 * MOST_SLOTS * PANEL];
    const int64_t step = MOST_SLOTS * matmul.per_slot();
    for (int64_t panel = first; panel < last; panel++)
        for (int64_t token = 0; token < matmul.out.m; token += step) {
            IntMatmul part = matmul;
            part.out.m = std::min(matmul.out.m - token, step);
            part.x += offset_of(QUADS, token / matmul.per_slot(), 0, matmul.stride, 0);
            part.x_scale += token * matmul.blocks;
            part.x_sums += token * matmul.blocks;
            kernel.few_tokens[matmul.out.weight.type - INT4][matmul.slots(part.out.m) - 1](part, panel, acc);
            matmul.out.store(matmul.out, panel, 1, token, part.out.m, {acc, 0, 0, PANEL});
        }
}

}  // namespace

bool multiplies_codes(const IntMatmul& matmul, const Integers& kernel) {
    const Type type = matmul.out.weight.type;
    return has_codes(type) && matmul.slots(matmul.out.m) <= kernel.few_slots[type - INT4];
}

bool int_panels(const IntMatmul& matmul, const Integers& kernel, int64_t first, int64_t last) {
    if (multiplies_codes(matmul, kernel)) {
        few_tokens(matmul, kernel, first, last);
        return true;
    }
    const int64_t m = matmul.out.m, step = m <= FEW_TOKENS ? 1 : PANELS_PER_CHUNK, chunk = tokens_of_chunk(matmul);
    float* acc = static_cast<float*>(std::malloc(std::min(m, chunk) * step * PANEL * sizeof(float)));
    if (!acc) return false;
    for (int64_t token = 0; token < m; token += chunk) {
        const int64_t tokens = std::min(m - token, chunk);
        for (int64_t panel = first; panel < last; panel += step) {
            const int64_t count = std::min(last - panel, step);
            const char* values[PANELS_PER_CHUNK];
            for (int64_t p = 0; p < count; p++) values[p] = matmul.out.weight.values_of(panel + p);
            std::memset(acc, 0, count * tokens * PANEL * sizeof(float));
            const int64_t pairs = kernel.pairs && !multiplies_stored(matmul, kernel) ? count / 2 : 0;
            for (int64_t block = 0; block < matmul.blocks; block++) {
                for (int64_t p = 0; p < 2 * pairs; p += 2)
                    multiply_pair(matmul, kernel, panel + p, block, values + p, token, tokens, acc + p * tokens * PANEL);
                for (int64_t p = 2 * pairs; p < count; p++)
                    values[p] = multiply_block(matmul, kernel, panel + p, block, values[p], token, tokens,
                                               acc + p * tokens * PANEL);
            }
            matmul.out.store(matmul.out, panel, count, token, tokens, {acc, 2 * tokens * PANEL, tokens * PANEL, PANEL});
        }
    }
    std::free(acc);
    return true;
}

}  // namespace rac
