// Random and hostile calls of the C interface, for a build with AddressSanitizer and UBSan.
//
// Every buffer is exactly as large as the size that is passed with it. Argument: the number of rounds. Exits 0 and prints
// what it did.
#include <algorithm>
#include <cmath>
#include <vector>

#include "drive_tools.h"
#include "library_calls.h"
constexpr int32_t OK = 0, BAD_ARGUMENT = 2, NO_SUCH_ISA = 3;  // of csrc/format/status.h
constexpr int32_t DENSE3 = 6, DENSE2 = 7, TYPES = 8;           // of csrc/format/layout.h
constexpr int32_t NUMBERS = 9;                                 // more than there are kernels

constexpr int64_t MOST_OF_MANY = 1500;  // numbers of a weight
static int64_t many_lines = 0;  // calls with more lines than fit into a chunk

struct Case {
    int64_t rows, columns, bytes, zero_groups = 0;
    int32_t type, activation_bits = 16;
    std::vector<float> dense;
    Buffer data;
};

static Case random_case() {
    Case c;
    c.rows = 1 + below(below(4) ? 40 : 130);
    c.columns = 1 + below(below(4) ? 70 : 700);
    c.type = static_cast<int32_t>(below(TYPES));
    const bool narrow = c.type == DENSE3 || c.type == DENSE2, masked = c.type != 3 && c.type != 5 && !narrow;
    const int64_t panels = (c.rows + 15) / 16;
    if (narrow || (c.type >= 4 && below(2))) c.zero_groups = 1 + below(1 + c.columns / 8);
    if (c.zero_groups > 1 && c.columns % ((narrow ? 32 : 8) * c.zero_groups)) c.zero_groups = 1;
    std::vector<uint8_t> zeros(panels * c.zero_groups * 16);
    // Values are -3 to 3, in 3 bits -3 to 2 and in 2 bits -1 and 0.
    for (uint8_t& zero : zeros) zero = static_cast<uint8_t>(c.type == DENSE3 ? 3 + below(3) : c.type == DENSE2 ? 1 + below(3) : 3 + below(10));
    const int64_t density = masked ? below(101) : 101, row_bytes = (c.columns + 7) / 8;
    c.dense.assign(c.rows * c.columns, 0);
    std::vector<uint8_t> bitmask(c.rows * row_bytes);
    std::vector<float> kept;
    for (int64_t row = 0; row < c.rows; row++)
        for (int64_t column = 0; column < c.columns; column++)
            if (below(100) < density) {
                bitmask[row * row_bytes + column / 8] |= 1 << (column % 8);
                kept.push_back(c.dense[row * c.columns + column] = static_cast<float>(c.type == DENSE3 ? below(6) - 3 : c.type == DENSE2 ? below(2) - 1 : below(7) - 3));
            }
    const int64_t count = static_cast<int64_t>(kept.size());
    std::vector<uint8_t> values(count * size_of(c.type));
    for (int64_t i = 0; i < count; i++) put(values.data(), c.type, i, kept[i]);
    const uint8_t* masks = masked ? bitmask.data() : nullptr;
    const int64_t value_bytes = static_cast<int64_t>(values.size()), mask_bytes = masked ? bitmask.size() : 0;
    c.bytes = rac_packed_bytes(c.rows, c.columns, count, c.type, masks, mask_bytes, c.zero_groups);
    c.data = aligned(c.bytes);
    const int32_t threads = 1 + static_cast<int32_t>(below(3));
    const auto pack = [&](int64_t values_there, const uint8_t* from, int64_t masks_there, const uint8_t* zeros_from,
                          int64_t zeros_there, uint8_t* to, int64_t bytes) {
        return rac_pack_weight(values.data(), values_there, from, masks_there, zeros_from, zeros_there, c.zero_groups, c.rows,
                               c.columns, c.type, to, bytes, threads);
    };
    const int64_t zero_bytes = static_cast<int64_t>(zeros.size());
    require(pack(value_bytes, masks, mask_bytes, zeros.data(), zero_bytes, c.data.get(), c.bytes) == OK, rac_last_error());
    if (zero_bytes)
        require(pack(value_bytes, masks, mask_bytes, zeros.data(), zero_bytes - 1, c.data.get(), c.bytes) == BAD_ARGUMENT,
                "refuse short zeros");
    require(rac_check_weight(c.data.get(), c.bytes, c.rows, c.columns, c.type) == OK, "check what was packed");
    c.activation_bits = below(2) ? 8 : 16;
    require(rac_set_activation_bits(c.data.get(), c.bytes, 7) == BAD_ARGUMENT, "refuse activations of 7 bits");
    const int32_t set = rac_set_activation_bits(c.data.get(), c.bytes, c.activation_bits);
    require(set == (c.type >= 2 ? OK : BAD_ARGUMENT), "activation bits of integers only");
    require(rac_check_weight(c.data.get(), c.bytes, c.rows, c.columns, c.type) == OK, "check with activation bits");
    if (!masked) {
        require(rac_packed_bytes(c.rows, c.columns, count - 1, c.type, nullptr, 0, c.zero_groups) < 0,
                "a dense weight with a hole");
    } else if (count > 0) {  // a count that the bitmask does not have
        const int64_t less = rac_packed_bytes(c.rows, c.columns, count - 1, c.type, masks, mask_bytes, c.zero_groups);
        Buffer other = aligned(less < 0 ? 64 : less);
        require(pack(value_bytes - size_of(c.type), masks, mask_bytes, zeros.data(), zero_bytes, other.get(),
                     less < 0 ? 64 : less) != OK,
                "refuse a wrong count");
        const std::vector<uint8_t> short_mask(bitmask.begin(), bitmask.end() - 1);
        require(pack(value_bytes, short_mask.data(), mask_bytes - 1, zeros.data(), zero_bytes, c.data.get(), c.bytes) ==
                    BAD_ARGUMENT,
                "refuse a short bitmask");
        require(pack(value_bytes, masks, mask_bytes, zeros.data(), zero_bytes, c.data.get(), c.bytes - 64) == BAD_ARGUMENT,
                "refuse short data");
    }
    return c;
}

static void multiply_and_expand(const Case& c, const uint8_t* data, bool compare) {
    for (const KernelLine& kernel : running_kernels()) {
        const int32_t isa = kernel.number;
        // Of small weights also more lines than are multiplied at a time: 240 (fp32, bytes), 384 (AMX), 480 (bf16).
        const bool many = compare && c.rows * c.columns <= MOST_OF_MANY && !below(3);
        const int64_t m = many ? 481 + below(100) : below(3) ? 1 + below(9) : below(100);
        many_lines += many;
        const int32_t x_type = static_cast<int32_t>(below(2)), bias_type = static_cast<int32_t>(below(2));
        std::vector<uint8_t> x(m * c.columns * size_of(x_type)), bias(c.rows * size_of(bias_type));
        std::vector<uint8_t> out(m * c.rows * size_of(x_type));
        for (int64_t i = 0; i < m * c.columns; i++) put(x.data(), x_type, i, static_cast<float>(below(5) - 2));
        if (!compare && below(2))  // any bits: NaN, infinities, denormal numbers
            for (uint8_t& byte : x) byte = static_cast<uint8_t>(rng());
        for (int64_t i = 0; i < c.rows; i++) put(bias.data(), bias_type, i, static_cast<float>(below(5) - 2));
        const bool with_bias = below(2), integers = c.type >= 2;
        int64_t groups = 1;  // of a multiple of four columns, in DENSE4 of eight, in DENSE3 and DENSE2 of 32, up to 512
        const int64_t unit = c.type == 5 ? 8 : c.type >= DENSE3 ? 32 : 4;
        for (int64_t g = 2; integers && below(2) && g <= c.columns / unit; g++)
            if (c.columns % (unit * g) == 0 && c.columns / g <= 512) groups = g;
        if (c.zero_groups > 1) {
            groups = c.zero_groups;
            if (c.columns / groups > 512) continue;
        }
        std::vector<float> scale((c.rows + 15) / 16 * groups * 16);
        for (float& value : scale) value = static_cast<float>(int64_t{1} << below(3));
        const bool with_scale = integers || below(2);
        const int32_t scale_type = c.type >= 4 && below(2) ? 0 : 1;
        const int64_t scale_bytes = size_of(scale_type) * static_cast<int64_t>(scale.size());
        std::vector<uint8_t> scales(scale_bytes);
        for (size_t i = 0; i < scale.size(); i++) put(scales.data(), scale_type, i, scale[i]);
        const int32_t status = rac_sparse_linear(
            data, c.bytes, c.rows, c.columns, x.data(), x.size(), x_type, m, with_scale ? scales.data() : nullptr,
            with_scale ? scale_bytes : 0, scale_type, groups, with_bias ? bias.data() : nullptr, with_bias ? bias.size() : 0,
            bias_type, out.data(), out.size(), isa, 1 + static_cast<int32_t>(below(3)));
        require(status == OK, rac_last_error());
        if (integers && m) {
            require(rac_sparse_linear(data, c.bytes, c.rows, c.columns, x.data(), x.size(), x_type, m, nullptr, 0, 1, 1,
                                      nullptr, 0, 0, out.data(), out.size(), isa, 1) == BAD_ARGUMENT,
                    "integers without a scale");
            for (int64_t bad : {INT64_MIN, int64_t{-1}, int64_t{0}, c.columns + 1, INT64_MAX})
                require(rac_sparse_linear(data, c.bytes, c.rows, c.columns, x.data(), x.size(), x_type, m, scales.data(),
                                          scale_bytes, scale_type, bad, nullptr, 0, 0, out.data(), out.size(), isa,
                                          1) == BAD_ARGUMENT,
                        "impossible groups");
        }
        for (int64_t i = 0; compare && i < m * c.rows; i++) {
            const int64_t line = i / c.rows, row = i % c.rows;
            float sum = with_bias ? get(bias.data(), bias_type, row) : 0, terms = std::fabs(sum);
            for (int64_t k = 0; k < c.columns; k++) {
                const int64_t at = (row / 16 * groups + k / (c.columns / groups)) * 16 + row % 16;
                const float weight = c.dense[row * c.columns + k] * (with_scale ? scale[at] : 1);
                sum += get(x.data(), x_type, line * c.columns + k) * weight;
                terms += 2 * std::fabs(weight);  // 2: the largest x
            }
            const float levels = kernel.bytes && c.activation_bits == 8 ? 127 : 32639;
            const float rounding = (x_type == 0 ? std::fabs(sum) / 128 : 0) + (integers ? terms / levels : 0);
            require(std::fabs(get(out.data(), x_type, i) - sum) <= rounding, "product");
        }

        const int64_t panels = (c.rows + 15) / 16;
        if (integers && c.zero_groups <= 1) {
            const int64_t count = 1 + below(panels);
            std::vector<int64_t> chosen(m * count);
            for (int64_t i = 0; i < m * count; i++) chosen[i] = (i / count + i % count) % panels;
            std::vector<float> floats(m * c.columns), added(m * c.rows), factors(16 * panels, 2);
            for (float& value : floats) value = static_cast<float>(below(5) - 2);
            const auto add = [&](int64_t panel_bytes) {
                return rac_add_panels(data, c.bytes, c.rows, c.columns, floats.data(), 4 * floats.size(), m, chosen.data(),
                                      panel_bytes, count, factors.data(), 4 * factors.size(), added.data(), 4 * added.size(), isa,
                                      1 + static_cast<int32_t>(below(3)));
            };
            require(add(8 * chosen.size()) == OK, rac_last_error());
            require(add(8 * chosen.size() + 8) == BAD_ARGUMENT, "refuse a buffer of panels of a wrong size");
            for (int64_t bad : {INT64_MIN, int64_t{-1}, panels, INT64_MAX}) {
                if (!m) break;
                std::swap(chosen.back(), bad);
                require(add(8 * chosen.size()) == BAD_ARGUMENT, "refuse a panel that is none");
                std::swap(chosen.back(), bad);
            }
        }
        const int64_t first = below(panels), last = first + 1 + below(panels - first);
        const int64_t stride = 16 * (last - first);
        std::vector<float> columns(c.columns * stride);
        require(rac_expand_panels(data, c.bytes, c.rows, c.columns, first, last, columns.data(), 4 * columns.size(), isa, 1) == OK,
                "expand");
        for (int64_t k = 0; compare && k < c.columns; k++)
            for (int64_t n = 0; n < stride && 16 * first + n < c.rows; n++)
                require(columns[k * stride + n] == c.dense[(16 * first + n) * c.columns + k], "expanded value");
    }
}

// One buffer is shorter or longer than the weight needs, at any place: refused before it is read or written.
static void wrong_sizes(const Case& c) {
    const int64_t m = 1 + below(40), panels = (c.rows + 15) / 16, groups = 1;
    const std::vector<KernelLine> kernels = running_kernels();
    const int32_t isa = kernels[below(kernels.size())].number, type = static_cast<int32_t>(below(2));
    const int64_t sizes[] = {m * c.columns * size_of(type), panels * groups * 64, c.rows * size_of(type),
                             m * c.rows * size_of(type)};
    const int64_t wrongs[] = {-1, 1, -size_of(type), size_of(type), -4, 4, -64};
    for (int which = 0; which < 4; which++)
        for (int64_t wrong : wrongs) {
            int64_t bytes[4];
            std::copy(sizes, sizes + 4, bytes);
            bytes[which] = bytes[which] + wrong < 0 ? 0 : bytes[which] + wrong;
            std::vector<std::unique_ptr<uint8_t[]>> buffers;
            for (int64_t size : bytes) buffers.emplace_back(new uint8_t[size]());
            const auto call = [&] {
                return rac_sparse_linear(c.data.get(), c.bytes, c.rows, c.columns, buffers[0].get(), bytes[0], type, m,
                                         buffers[1].get(), bytes[1], 1, groups,
                                         buffers[2].get(), bytes[2], type, buffers[3].get(), bytes[3], isa, 1);
            };
            require(call() == BAD_ARGUMENT, "refuse a buffer of a wrong size");
            for (int64_t size : {INT64_MIN, int64_t{-1}, INT64_MAX}) {
                bytes[which] = size;
                require(call() == BAD_ARGUMENT, "refuse an impossible size");
            }
        }
    std::vector<float> out(c.columns * 16 * panels - 1);
    require(rac_expand_panels(c.data.get(), c.bytes, c.rows, c.columns, 0, panels, out.data(), 4 * out.size(), isa, 1) ==
                BAD_ARGUMENT,
            "refuse a short buffer for panels");
}

// Damaged copies: refused, or as harmless as any other weight of that shape.
static void hostile(const Case& c, int64_t* refused, int64_t* harmless) {
    const int64_t masks = 64 + (8 * ((c.rows + 15) / 16 + 1) + 63) / 64 * 64;
    for (int round = 0; round < 50; round++) {
        const int64_t bytes = below(8) ? c.bytes : 64 * below(c.bytes / 64 + 1);
        Buffer copy = aligned(bytes);
        if (bytes) std::memcpy(copy.get(), c.data.get(), bytes);
        const int64_t ends[] = {64, masks, c.bytes};
        for (int64_t i = below(4); bytes && i >= 0; i--) {
            const int64_t at = below(ends[below(3)]);
            if (at < bytes) copy[at] = static_cast<uint8_t>(below(3) ? rng() : below(2) * 255);
        }
        float x[1] = {0}, out[1];
        if (rac_check_weight(copy.get(), bytes, c.rows, c.columns, c.type) != OK) {
            ++*refused;
            // Shapes that the header may have been changed to, without the check.
            rac_sparse_linear(copy.get(), bytes, -1, 0, x, 4, 1, 1, nullptr, 0, 1, 1, nullptr, 0, 1, out, 4, 0, 1);
            rac_value_type(copy.get(), bytes);
        } else {
            ++*harmless;
            Case same;
            same.rows = c.rows, same.columns = c.columns, same.bytes = bytes, same.type = c.type;
            std::memcpy(&same.zero_groups, copy.get() + 48, sizeof same.zero_groups);
            multiply_and_expand(same, copy.get(), false);
        }
    }
}

static void extremes() {
    const int64_t extreme[] = {INT64_MIN, -(int64_t{1} << 40), -1, 0, 1, 16, (int64_t{1} << 31) - 1, int64_t{1} << 31,
                               int64_t{1} << 62, INT64_MAX};
    for (int64_t a : extreme)
        for (int64_t b : extreme)
            for (int64_t n : extreme)
                for (int32_t type : {-1, 0, 1, 2, 3, 4, 5, 6, 7, 8, INT32_MAX}) {
                    rac_packed_bytes(a, b, n, type, nullptr, n, a);
                    rac_packed_bytes(a, b, n, type, nullptr, n, n);
                    rac_check_weight(nullptr, n, a, b, type);
                    rac_sparse_linear(nullptr, n, a, b, nullptr, n, type, n, nullptr, n, type, n, nullptr, n, type, nullptr, n,
                                      type, type);
                    rac_expand_panels(nullptr, n, a, b, a, b, nullptr, n, type, type);
                    uint8_t none[1] = {0};
                    require(rac_pack_weight(nullptr, n, nullptr, n, nullptr, n, a, a, b, type, nullptr, n, 1) != OK, "no addresses");
                    require(rac_pack_weight(none, n, none, a, none, a, n, b, n, type, none, b, 1) != OK, "impossible sizes");
                }
    Case c = random_case();
    float out[1];
    for (int64_t a : extreme)
        for (int64_t b : extreme) {
            if (a != b)
                require(rac_expand_panels(c.data.get(), c.bytes, c.rows, c.columns, a, b, out, 4, 0, 1) != OK,
                        "panels");
            if (a != c.rows || b != c.columns)
                require(rac_expand_panels(c.data.get(), c.bytes, a, b, 0, 0, out, 0, 0, 1) != OK, "another shape");
            require(rac_sparse_linear(c.data.get(), c.bytes, c.rows, c.columns, out, a, 1, b, nullptr, 0, 1, 1, nullptr, 0, 1,
                                      out, a, 0, 1) != OK || (a == 0 && b == 0), "sizes");
            if (a != c.rows || b != c.columns)
                require(rac_sparse_linear(c.data.get(), c.bytes, a, b, out, 4, 1, 1, nullptr, 0, 1, 1, nullptr, 0, 1, out,
                                          4, 0, 1) != OK, "shapes");
        }
}

// What this processor does not run is refused, not tried.
static void missing_instruction_sets() {
    const Case c = random_case();
    const std::vector<KernelLine> running = running_kernels();
    std::vector<float> x(c.columns), out(c.rows);
    for (int32_t isa = -1; isa <= NUMBERS; isa++) {
        if (std::any_of(running.begin(), running.end(), [=](const KernelLine& kernel) { return kernel.number == isa; })) continue;
        require(rac_sparse_linear(c.data.get(), c.bytes, c.rows, c.columns, x.data(), 4 * x.size(), 1, 1, nullptr, 0, 1, 1, nullptr, 0,
                                  1, out.data(), 4 * out.size(), isa, 1) == NO_SUCH_ISA,
                "a product on an instruction set that is missing");
        require(rac_expand_panels(c.data.get(), c.bytes, c.rows, c.columns, 0, 0, out.data(), 0, isa, 1) == NO_SUCH_ISA,
                "panels on an instruction set that is missing");
    }
}

int main(int argc, char** argv) {
    const int rounds = argc > 1 ? std::atoi(argv[1]) : 100;
    int64_t refused = 0, harmless = 0;
    extremes();
    missing_instruction_sets();
    for (int round = 0; round < rounds; round++) {
        Case c = random_case();
        multiply_and_expand(c, c.data.get(), true);
        wrong_sizes(c);
        hostile(c, &refused, &harmless);
    }
    require(rounds < 10 || many_lines > 0, "calls with many lines");
    std::printf("best %s: %d weights, %lld calls with many lines, %lld damaged copies refused, %lld harmless\n",
                running_kernels().back().name.c_str(), rounds, static_cast<long long>(many_lines),
                static_cast<long long>(refused), static_cast<long long>(harmless));
}
