// variants: sm80
// As gemv.cu, of a grouped matrix: of 256 inputs a chain of float steps, one for each unit.
// Formula: rust/src/quant/grouped.rs.
#include "grouped.cuh"

struct GemvGrouped {
    Grouped w;
    Acts acts;
    u32 tokens, pad;
    Epilogue e;
    Jobs jobs;
};

/// As `gemv`, of a grouped matrix: of 256 inputs a chain of its own over the units, ascending. HIGH_BITS: beyond 4; LOOK_UP:
/// codes stand for something else (then HIGH_BITS is 0).
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
