// The C interface over a pipe, so that tests can call a library that was compiled for another processor.
//
// A request is the name of a function and its arguments, each one a letter and what follows it: 'n' an int64; 'z' a null
// pointer; 'b' an int64 and so many bytes, which the function gets at an aligned address. The answer is the int64 or the text
// that the function returned, and then the last 'b' of the request as the function left it. Texts and bytes have an int64
// before them, their length.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "library_calls.h"

static void read_all(void* to, int64_t bytes) {
    if (std::fread(to, 1, bytes, stdin) == static_cast<size_t>(bytes)) return;
    std::exit(0);  // the caller has ended
}
static int64_t read_number() {
    int64_t number;
    read_all(&number, sizeof number);
    return number;
}
static void write_bytes(const void* from, int64_t bytes) {
    std::fwrite(&bytes, sizeof bytes, 1, stdout);
    std::fwrite(from, 1, bytes, stdout);
}

struct Free {
    void operator()(char* p) const { std::free(p); }
};

struct Arguments {
    std::vector<std::unique_ptr<char[], Free>> buffers;
    int64_t last_bytes = 0;

    template <class T>
    T next() {
        char kind;
        read_all(&kind, 1);
        if constexpr (std::is_pointer_v<T>) {
            if (kind == 'z') return nullptr;
            last_bytes = read_number();
            buffers.emplace_back(static_cast<char*>(std::aligned_alloc(64, (last_bytes + 64) / 64 * 64)));
            read_all(buffers.back().get(), last_bytes);
            return reinterpret_cast<T>(buffers.back().get());
        } else {
            return static_cast<T>(read_number());
        }
    }
};

template <class R, class... A>
static void call(R (*function)(A...)) {
    Arguments arguments;
    const std::tuple<A...> values{arguments.next<A>()...};  // braces: from left to right
    const R result = std::apply(function, values);
    if constexpr (std::is_pointer_v<R>) {
        write_bytes(result, std::strlen(result));
    } else {
        const int64_t number = result;
        std::fwrite(&number, sizeof number, 1, stdout);
    }
    write_bytes(arguments.buffers.empty() ? nullptr : arguments.buffers.back().get(), arguments.last_bytes);
    std::fflush(stdout);
}

int main() {
    for (;;) {
        std::string name(read_number(), ' ');
        read_all(name.data(), name.size());
#define RAC_CALL(function) \
    if (name == #function) call(function)
        RAC_CALL(rac_abi);
        RAC_CALL(rac_kernels);
        RAC_CALL(rac_compiler);
        RAC_CALL(rac_last_error);
        RAC_CALL(rac_packed_bytes);
        RAC_CALL(rac_pack_weight);
        RAC_CALL(rac_check_weight);
        RAC_CALL(rac_value_type);
        RAC_CALL(rac_activation_bits);
        RAC_CALL(rac_set_activation_bits);
        RAC_CALL(rac_expand_panels);
        RAC_CALL(rac_sparse_linear);
    }
}
