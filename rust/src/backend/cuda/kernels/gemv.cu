// variants: sm80
// Matrix times a few tokens, weights read once. A lane is a row of the matrix, so no sum crosses lanes: of 256 inputs
// an exact integer, then one fused multiply-add for each 256, ascending. Each warp has other blocks of 256 inputs of the
// same 32 rows; a round of blocks ends with the first warps adding up what all have found, in order.
// Formula: rust/src/kernels/scalar.rs.
#include "product.cuh"

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
