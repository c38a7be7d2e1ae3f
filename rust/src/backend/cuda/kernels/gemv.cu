// variants: sm80
// Matrix times a few tokens, weights read once. A lane is a row of the matrix, so no sum crosses lanes: of 256 inputs
// an exact integer, then one fused multiply-add for each 256, ascending. Each warp has other blocks of 256 inputs of the
// same 32 rows; a round of blocks ends with the first warps adding up what all have found, in order.
// Formula: rust/src/kernels/scalar.rs.
#include "grouped.cuh"

struct Gemv {
    Matrix w;
    Acts acts;
    u32 tokens, pad;
    Epilogue e;
    Jobs jobs;
};

/// The integer dot product of one int4 row with one token over a block.
struct Q4 {
    uint4 header, q[8];
    MEMBER void load(const Matrix& m, u32 tile, u32 block, u32 lane, u32 groups) {
        u64 at = block_q4(m, tile, block) + lane * 16;
        header = stream((const void*)at);
#pragma unroll
        for (int g = 0; g < 8; g++) {
            // Groups that are not there are zeros, so that no branch stands in the products.
            q[g] = stream_if(g < groups, (const void*)(at + (u64)(g + 1) * 512));
        }
    }
    MEMBER float d() const { return as_float(header.x); }
    MEMBER int dot(const Acts& acts, u64 at) const {
        const uint4 all = read16((const void*)(acts.sums + at * 16));
        int total = 0;
#pragma unroll
        for (int g = 0; g < 8; g++) {
            const uint4 low = read16((const void*)(acts.q + at * 256 + g * 32));
            const uint4 high = read16((const void*)(acts.q + at * 256 + g * 32 + 16));
            int dot = 0;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                dot = dp4a(word(q[g], j) & 0x0f0f0f0fu, word(low, j), dot);
                dot = dp4a((word(q[g], j) >> 4) & 0x0f0f0f0fu, word(high, j), dot);
            }
            int sum = (int)(short)(word(all, g / 2) >> (16 * (g % 2)));
            total += scale_of(header, g) * dot - offset_of(header, g) * sum;
        }
        return total;
    }
};
/// The same of an int8 row.
struct Q8 {
    float scale;
    uint4 q[16];
    MEMBER void load(const Matrix& m, u32 tile, u32 block, u32 lane, u32 groups) {
        u64 at = block_q8(m, tile, block);
        scale = stream_f32((const float*)at + lane);
#pragma unroll
        for (int i = 0; i < 16; i++) {
            q[i] = stream_if(i < 2 * groups, (const void*)(at + 128 + (u64)i * 512 + lane * 16));
        }
    }
    MEMBER float d() const { return scale; }
    MEMBER int dot(const Acts& acts, u64 at) const {
        int total = 0;
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const uint4 a = read16((const void*)(acts.q + at * 256 + i * 16));
#pragma unroll
            for (int j = 0; j < 4; j++) total = dp4a(word(q[i], j), word(a, j), total);
        }
        return total;
    }
};

template <class Form, int T>
DEVICE void gemv(const Gemv& p, float2 (&part)[2][16 * T][32]) {
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const Task task = task_of(p.jobs, p.w.w, p.e, T, p.tokens);
    if (task.first >= task.end) return;
    const Matrix m = {task.w, p.w.groups, p.w.blocks};
    u32 tile = blockIdx.y, first = task.first;
    float acc = 0.0f; // of token `warp`, row `lane`, in the first T warps
    u32 half = 0;
    for (u32 round = 0; round < p.w.blocks; round += warps, half ^= 1) {
        u32 block = round + warp;
        if (block < p.w.blocks) {
            u32 groups = groups_of(m, block);
            Form w;
            w.load(m, tile, block, lane, groups);
            u32 count = task.end - first < T ? task.end - first : T;
#pragma unroll 1
            for (u32 t = 0; t < count; t++) {
                u64 at = (u64)(first + t) * p.w.blocks + block;
                int dot = w.dot(p.acts, at);
                float s = ((const float*)p.acts.s)[at];
                part[half][warp * T + t][lane] = make_float2((float)dot, w.d() * s);
            }
        }
        // One barrier a round: the next round writes the other half.
        sync_block();
        if (warp < T && first + warp < task.end) {
            u32 count = p.w.blocks - round < warps ? p.w.blocks - round : warps;
#pragma unroll 4
            for (u32 i = 0; i < count; i++) {
                float2 found = part[half][i * T + warp][lane];
                acc = fmaf(found.x, found.y, acc);
            }
        }
    }
    const Task last = task_of(p.jobs, p.w.w, p.e, T, p.tokens);
    if (warp >= T || last.first + warp >= last.end) return;
    float up = shuffle_xor(acc, 16);
    if (p.e.mode != 3 || lane < 16) finish(p.e, p.jobs, last, tile * 32 + lane, last.first + warp, acc, up);
}

#define GEMV(name, Form, T)              \
    KERNEL(512, name, Gemv) {            \
        SHARED float2 part[2][16 * T][32]; \
        gemv<Form, T>(p, part);          \
    }
GEMV(gemv_q4_1, Q4, 1)
GEMV(gemv_q4_4, Q4, 4)
GEMV(gemv_q8_1, Q8, 1)
GEMV(gemv_q8_4, Q8, 4)

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

struct GemvGrouped {
    Grouped w;
    Acts acts;
    u32 tokens, pad;
    Epilogue e;
    Jobs jobs;
};

/// As `gemv`, of a grouped matrix: of 256 inputs a chain of its own over the units, ascending. HIGH: bits beyond 4; TABLE:
/// codes stand for something else (then HIGH is 0).
template <int HIGH_BITS, bool LOOK_UP, int T>
DEVICE void gemv_grouped(const GemvGrouped& p, float2 (&part)[2][16 * T][32]) {
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const Task task = task_of(p.jobs, p.w.m.w, p.e, T, p.tokens);
    if (task.first >= task.end) return;
    u32 tile = blockIdx.y, first = task.first, blocks = p.w.m.blocks;
    u32 table = LOOK_UP ? TABLE(p.w.how) : 0;
    bool short_units = GROUP(p.w.how) == 16, offsets = OFFSET(p.w.how) != 0;
    float acc = 0.0f; // of token `warp`, row `lane`, in the first T warps
    u32 half = 0;
    for (u32 round = 0; round < blocks; round += warps, half ^= 1) {
        u32 block = round + warp;
        if (block < blocks) {
            u32 groups = groups_of(p.w.m, block);
            u64 header = block_grouped(p.w, task.w, tile, block) + lane * 4, lines = header + 128 * p.w.header;
            float chain[T];
#pragma unroll
            for (int t = 0; t < T; t++) chain[t] = 0.0f;
#pragma unroll 2
            for (u32 g = 0; g < groups; g++) {
                uint4 q = stream((const void*)(lines + lane * 12 + (u64)g * 512));
                u64 more = lines + (u64)groups * 512 + (u64)g * (128 * HIGH_BITS);
                u32 bits = HIGH_BITS > 0 ? read4((const void*)more) : 0;
                u32 top_bits = HIGH_BITS > 1 ? read4((const void*)(more + 128)) : 0;
                Step step = step_of(p.w, header, short_units ? 2 * g : g, short_units ? 16 : 32), second = step;
                if (short_units) second = step_of(p.w, header, 2 * g + 1, 16);
                u32 v[4], w[4];
#pragma unroll
                for (int j = 0; j < 4; j++) values(HIGH_BITS, table, word(q, j), bits, top_bits, j, v[j], w[j]);
#pragma unroll
                for (int t = 0; t < T; t++) {
                    // Tokens beyond the last are the last again, and not stored.
                    u64 at = (u64)(first + t < task.end ? first + t : task.end - 1) * blocks + block;
                    const uint4 a = read16((const void*)(p.acts.q + at * 256 + g * 32));
                    const uint4 b = read16((const void*)(p.acts.q + at * 256 + g * 32 + 16));
                    int low = 0, high = 0, sum = 0;
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        low = dp4a(v[j], word(a, j), low);
                        high = dp4a(w[j], word(b, j), high);
                    }
                    int both = offsets ? ((const short*)(p.acts.sums + at * 16))[g] : 0;
                    if (short_units) {
                        chain[t] = fmaf((float)low, step.s, chain[t]);
                        if (offsets) {
#pragma unroll
                            for (int j = 0; j < 4; j++) sum = dp4a(word(a, j), 0x01010101u, sum);
                            chain[t] = fmaf((float)sum, step.o, chain[t]);
                        }
                        chain[t] = fmaf((float)high, second.s, chain[t]);
                        if (offsets) chain[t] = fmaf((float)(both - sum), second.o, chain[t]);
                    } else {
                        chain[t] = fmaf((float)(low + high), step.s, chain[t]);
                        if (offsets) chain[t] = fmaf((float)both, step.o, chain[t]);
                    }
                }
            }
#pragma unroll
            for (int t = 0; t < T; t++) {
                u64 at = (u64)(first + t < task.end ? first + t : task.end - 1) * blocks + block;
                part[half][warp * T + t][lane] = make_float2(chain[t], ((const float*)p.acts.s)[at]);
            }
        }
        sync_block();
        if (warp < T && first + warp < task.end) {
            u32 count = blocks - round < warps ? blocks - round : warps;
#pragma unroll 4
            for (u32 i = 0; i < count; i++) {
                float2 found = part[half][i * T + warp][lane];
                acc = fmaf(found.x, found.y, acc);
            }
        }
    }
    const Task last = task_of(p.jobs, p.w.m.w, p.e, T, p.tokens);
    if (warp >= T || last.first + warp >= last.end) return;
    float up = shuffle_xor(acc, 16);
    if (p.e.mode != 3 || lane < 16) finish(p.e, p.jobs, last, tile * 32 + lane, last.first + warp, acc, up);
}

#define GEMV_GROUPED(name, HIGH_BITS, LOOK_UP, T)    \
    KERNEL_BLOCKS(512, 1, name, GemvGrouped) {       \
        SHARED float2 part[2][16 * T][32];           \
        gemv_grouped<HIGH_BITS, LOOK_UP, T>(p, part); \
    }
GEMV_GROUPED(gemv_g4_1, 0, false, 1)
GEMV_GROUPED(gemv_g4_4, 0, false, 4)
GEMV_GROUPED(gemv_g5_1, 1, false, 1)
GEMV_GROUPED(gemv_g5_4, 1, false, 4)
GEMV_GROUPED(gemv_g6_1, 2, false, 1)
GEMV_GROUPED(gemv_g6_4, 2, false, 4)
GEMV_GROUPED(gemv_gt_1, 0, true, 1)
GEMV_GROUPED(gemv_gt_4, 0, true, 4)
