// variants: sm80
// Matrix of stored floats times tokens: one chain of fused multiply-adds for each number.
// Formula: rust/src/kernels/scalar.rs.
#include "product.cuh"

struct GemvFloat {
    u64 w, x;
    /// form: 2 bf16, 3 f16, 4 f32, as `Form`.
    u32 k, tokens, form, pad;
    Epilogue e;
    Jobs jobs;
};

/// Number j of 16 bytes of stored floats.
template <int F>
DEVICE float number(const uint4& line, int j) {
    if (F == 4) return as_float(word(line, j));
    u16 h = (u16)(word(line, j / 2) >> (16 * (j % 2)));
    return F == 2 ? bf16_to_f32(h) : f16_to_f32(h);
}
/// Stored floats: one chain of fused multiply-adds over k, ascending. A warp has 32 rows and T tokens.
template <int F, int T>
DEVICE void gemv_float(const GemvFloat& p) {
    const int N = F == 4 ? 4 : 8; // numbers of 16 bytes
    const Task task = task_of(p.jobs, p.w, p.e, T, p.tokens);
    if (task.first >= task.end) return;
    u32 lane = threadIdx.x, tile = blockIdx.y, first = task.first;
    u64 at = task.w + (u64)tile * 512 * ((p.k + N - 1) / N) + lane * 16;
    const float* x[T];
    float acc[T];
#pragma unroll
    for (int t = 0; t < T; t++) {
        // Tokens beyond the last are the last again, and not stored.
        u32 token = first + t < task.end ? first + t : task.end - 1;
        x[t] = (const float*)p.x + (u64)token * p.k;
        acc[t] = 0.0f;
    }
    // Rows of x whose numbers stand at multiples of 16 bytes; the rest number by number.
    u32 lines = p.k % 4 == 0 ? p.k / N : 0;
#pragma unroll 2
    for (u32 i = 0; i < lines; i++) {
        uint4 line = stream((const void*)(at + (u64)i * 512));
#pragma unroll
        for (int t = 0; t < T; t++) {
#pragma unroll
            for (int j = 0; j < N; j += 4) {
                const uint4 four = read16(x[t] + i * N + j);
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    acc[t] = fmaf(number<F>(line, j + c), as_float(word(four, c)), acc[t]);
                }
            }
        }
    }
#pragma unroll 1
    for (u32 k = lines * N; k < p.k; k++) {
        u64 line = at + (u64)(k / N) * 512;
        float w = F == 4 ? ((const float*)line)[k % N]
                : F == 2 ? bf16_to_f32(((const u16*)line)[k % N]) : f16_to_f32(((const u16*)line)[k % N]);
#pragma unroll
        for (int t = 0; t < T; t++) acc[t] = fmaf(w, x[t][k], acc[t]);
    }
    const Task last = task_of(p.jobs, p.w, p.e, T, p.tokens);
    // Rolled, or the compiler makes a copy of the activations for each token and each choice.
#pragma unroll 1
    for (u32 t = 0; t < T && first + t < last.end; t++) {
        float y = acc[0];
#pragma unroll
        for (int i = 1; i < T; i++) y = t == i ? acc[i] : y;
        float up = shuffle_xor(y, 16);
        if (p.e.mode != 3 || lane < 16) finish(p.e, p.jobs, last, tile * 32 + lane, first + t, y, up);
    }
}
#define GEMV_FLOAT(name, F, T) \
    KERNEL_BLOCKS(32, 16, name, GemvFloat) { gemv_float<F, T>(p); }
GEMV_FLOAT(gemv_bf16_1, 2, 1)
GEMV_FLOAT(gemv_bf16_4, 2, 4)
GEMV_FLOAT(gemv_f16_1, 3, 1)
GEMV_FLOAT(gemv_f16_4, 3, 4)
GEMV_FLOAT(gemv_f32_1, 4, 1)
GEMV_FLOAT(gemv_f32_4, 4, 4)
