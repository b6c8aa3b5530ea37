// The functions of the compiled library (csrc/library.cpp), for the programs of these tests.
#pragma once
#include <cstdint>

extern "C" {
int32_t rac_abi();
int32_t rac_best_isa();
int32_t rac_runs(int32_t);
const char* rac_compiler();
const char* rac_last_error();
int64_t rac_packed_bytes(int64_t, int64_t, int64_t, int32_t, const uint8_t*, int64_t, int64_t);
int32_t rac_pack_weight(const void*, int64_t, const uint8_t*, int64_t, const uint8_t*, int64_t, int64_t, int64_t, int64_t,
                        int32_t, void*, int64_t, int32_t);
int32_t rac_check_weight(const void*, int64_t, int64_t, int64_t, int32_t);
int32_t rac_sparse_int4_type(int32_t);
int32_t rac_value_type(const void*, int64_t);
int32_t rac_activation_bits(const void*, int64_t, int32_t);
int32_t rac_set_activation_bits(void*, int64_t, int32_t);
int32_t rac_expand_panels(const void*, int64_t, int64_t, int64_t, int64_t, int64_t, void*, int64_t, int32_t, int32_t,
                          int32_t);
int32_t rac_sparse_linear(const void*, int64_t, int64_t, int64_t, const void*, int64_t, int32_t, int64_t, const void*,
                          int64_t, int32_t, int64_t, const void*, int64_t, int32_t, void*, int64_t, int32_t, int32_t);
}
