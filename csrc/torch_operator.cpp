// The matmul with few tokens as an operator of torch, so that a call from Python enters C++ once.
//
// It uses torch's stable C interface (torch/csrc/inductor/aoti_torch/c/shim.h and torch/csrc/stable/c/shim.h), whose functions
// Python looks up in the torch that is loaded (kernels/cpu/support.py). So no header or library of torch is needed to
// build this file. What is not plain, such as many tokens, goes to the operator in Python, which also says what is wrong.
#include <cstring>
#include <stdexcept>
#include <string>

#include "format/layout.h"
#include "interface.h"

using namespace rac;

namespace {

using Tensor = void*;         // AtenTensorHandle
using Value = uint64_t;       // StableIValue: a number, a Tensor, or for an optional one the address of a Value
using Error = int32_t;        // 0: none
using Kernel = void (*)(Value* stack, uint64_t inputs, uint64_t outputs);

// In the order of FUNCTIONS of support.py; the last ones may be missing.
struct Torch {
    Error (*library_init_impl)(const char* space, const char* key, const char* file, uint32_t line, void** library);
    Error (*library_impl)(void* library, const char* name, Kernel kernel, uint64_t version);
    Error (*call)(const char* name, const char* overload, Value* stack, uint64_t version);
    Error (*delete_tensor)(Tensor);
    Error (*data_ptr)(Tensor, void**);
    Error (*dim)(Tensor, int64_t*);
    Error (*sizes)(Tensor, int64_t**);
    Error (*dtype)(Tensor, int32_t*);
    Error (*device_type)(Tensor, int32_t*);
    Error (*is_contiguous)(Tensor, bool*);
    Error (*empty_strided)(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t device_type,
                           int32_t device_index, Tensor*);
    Error (*num_threads)(uint32_t*);
    int32_t (*cpu)();
    int32_t (*bfloat16)();
    int32_t (*float32)();
    int32_t (*uint8)();
    Error (*delete_value)(Value*);     // since torch 2.13; before, a Value is deleted as what `new` made
    const char* (*exception)();        // since torch 2.13
};
constexpr int32_t FUNCTIONS = sizeof(Torch) / sizeof(void*), NEEDED = FUNCTIONS - 2;
constexpr uint64_t VERSION = (uint64_t{2} << 56) | (uint64_t{10} << 48);  // of the interface: torch 2.10

Torch torch;
int32_t kernel_in_use = -1;  // none: every call goes to Python
int64_t most_tokens = 0;

constexpr int64_t MOST_DIMS = 8;

// What a call needs to know of a tensor. False where it is not plain: not on the CPU, or not contiguous.
struct Plain {
    char* data = nullptr;
    int64_t dim = 0, count = 1;
    const int64_t* sizes = nullptr;
    int32_t dtype = 0;

    bool read(Tensor tensor) {
        int32_t device;
        bool contiguous;
        int64_t* lengths;
        void* address;
        if (torch.device_type(tensor, &device) || device != torch.cpu() || torch.is_contiguous(tensor, &contiguous) ||
            !contiguous || torch.dim(tensor, &dim) || dim > MOST_DIMS || torch.sizes(tensor, &lengths) ||
            torch.dtype(tensor, &dtype) || torch.data_ptr(tensor, &address))
            return false;
        sizes = lengths;
        data = static_cast<char*>(address);
        for (int64_t i = 0; i < dim; i++) count *= sizes[i];
        return true;
    }
    // BF16, FP32 or -1.
    int32_t type() const { return dtype == torch.bfloat16() ? BF16 : dtype == torch.float32() ? FP32 : -1; }
    int64_t bytes() const { return count * size_of(type()); }
};

Tensor tensor_of(Value value) { return reinterpret_cast<Tensor>(value); }

// The tensor of an optional one, or null.
Tensor optional(Value value) { return value ? tensor_of(*reinterpret_cast<Value*>(value)) : nullptr; }

void delete_optional(Value value) {
    if (!value) return;
    torch.delete_tensor(optional(value));
    if (torch.delete_value) {
        torch.delete_value(reinterpret_cast<Value*>(value));
    } else {
        delete reinterpret_cast<Value*>(value);
    }
}

// The result, in a new tensor; null where the operator in Python is to compute it.
Tensor multiply(const Value* stack) {
    Plain x, data, bias, scale;
    const int64_t rows = static_cast<int64_t>(stack[2]), columns = static_cast<int64_t>(stack[3]);
    if (kernel_in_use < 0 || !x.read(tensor_of(stack[0])) || x.type() < 0 || x.dim < 1 || x.sizes[x.dim - 1] != columns)
        return nullptr;
    if (columns < 1 || rows < 1 || !x.count || x.count / columns > most_tokens) return nullptr;
    if (!data.read(tensor_of(stack[1])) || data.dtype != torch.uint8()) return nullptr;
    const bool has_bias = stack[4] != 0, has_scale = stack[5] != 0;
    if (has_bias && (!bias.read(optional(stack[4])) || bias.type() < 0 || bias.dim != 1 || bias.count != rows))
        return nullptr;
    if (has_scale && (!scale.read(optional(stack[5])) || scale.type() < 0 || scale.dim != 3 || scale.sizes[1] < 1 ||
                      scale.sizes[0] != (rows + PANEL - 1) / PANEL || scale.sizes[2] != PANEL))
        return nullptr;
    int64_t sizes[MOST_DIMS], strides[MOST_DIMS], stride = 1;
    for (int64_t i = x.dim - 1; i >= 0; i--) {
        sizes[i] = i == x.dim - 1 ? rows : x.sizes[i];
        strides[i] = stride;
        stride *= sizes[i];
    }
    Tensor out;
    void* address;
    uint32_t threads;
    if (torch.num_threads(&threads) ||
        torch.empty_strided(x.dim, sizes, strides, x.dtype, torch.cpu(), 0, &out))
        return nullptr;
    const int64_t m = x.count / columns;
    if (torch.data_ptr(out, &address) ||
        rac_sparse_linear(data.data, data.count, rows, columns, x.data, x.bytes(), x.type(), m, scale.data,
                          has_scale ? scale.bytes() : 0, has_scale ? scale.type() : FP32, has_scale ? scale.sizes[1] : 1,
                          bias.data, has_bias ? bias.bytes() : 0, has_bias ? bias.type() : BF16, address,
                          m * rows * size_of(x.type()), kernel_in_use, static_cast<int32_t>(threads))) {
        torch.delete_tensor(out);
        return nullptr;
    }
    return out;
}

// (Tensor x, Tensor data, int rows, int columns, Tensor? bias, Tensor? scale) -> Tensor. What is on the stack is ours.
void native_linear(Value* stack, uint64_t, uint64_t) {
    if (Tensor out = multiply(stack)) {
        torch.delete_tensor(tensor_of(stack[0]));
        torch.delete_tensor(tensor_of(stack[1]));
        delete_optional(stack[4]);
        delete_optional(stack[5]);
        stack[0] = reinterpret_cast<Value>(out);
        return;
    }
    if (torch.call("rac_modifier::sparse_linear", "", stack, VERSION)) {
        const char* reason = torch.exception ? torch.exception() : nullptr;
        throw std::runtime_error(std::string("sparse_linear: ") + (reason ? reason : "see the message above"));
    }
}

}  // namespace

// Give torch the operator rac_modifier::native_linear, once per process. `functions`: addresses, of which only the last two of
// NEEDED + 2 may be null.
RAC_EXPORT int32_t rac_register_operator(const void* const* functions, int32_t count) {
    if (count != FUNCTIONS) return fail(BAD_ARGUMENT, "%d functions of torch, where %d are needed", count, FUNCTIONS);
    for (int32_t i = 0; i < NEEDED; i++)
        if (!functions[i]) return fail(BAD_ARGUMENT, "function %d of torch is missing", i);
    std::memcpy(&torch, functions, sizeof torch);
    void* library;  // is kept for as long as the process runs
    if (torch.library_init_impl("rac_modifier", "CPU", __FILE__, __LINE__, &library) ||
        torch.library_impl(library, "native_linear", native_linear, VERSION))
        return fail(BAD_ARGUMENT, "torch does not accept the operator");
    return OK;
}

// Let the operator multiply up to `tokens` tokens with the kernel of a number; -1: with none.
RAC_EXPORT int32_t rac_use_operator(int32_t number, int64_t tokens) {
    kernel_in_use = number;
    most_tokens = tokens;
    return OK;
}
