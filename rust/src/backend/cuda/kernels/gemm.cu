// variants: sm80
// Matrix times many tokens on int8 tensor cores: 128 rows by 64 tokens a thread block, 32 by 32 a warp. The integers of
// 256 inputs are exact whatever the order of their sum, and meet the scales in one fused multiply-add, blocks ascending:
// the bits of gemv.cu. Formula: rust/src/kernels/scalar.rs.
#include "grouped.cuh"

/// Rows and tokens of a thread block, its threads, inputs in shared memory at once, and bytes of their line: 16 more, so
/// that the eight rows a warp reads at once lie in different banks.
#define ROWS 128
#define TOKENS 64
#define THREADS 256
#define INPUTS 128
#define LINE (INPUTS + 16)

/// Groups `first` to `first + 4` of a block of the weights, as int8, and the scale of each row.
DEVICE void stage_q4(const Matrix& w, u32 row_tile, u32 tiles, u32 block, u32 first, u8* to, float* d) {
    u32 lane = threadIdx.x % 32, groups = groups_of(w, block);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        u32 unit = threadIdx.x / 32 + 8 * i; // 4 tiles of 32 rows by 4 groups
        u32 tile = unit / 4, g = first + unit % 4;
        u8* out = to + (tile * 32 + lane) * LINE + (unit % 4) * 32;
        uint4 low = make_uint4(0, 0, 0, 0), high = low;
        if (row_tile + tile < tiles && g < groups) {
            u64 at = block_q4(w, row_tile + tile, block) + lane * 16;
            uint4 header = stream((const void*)at), q = stream((const void*)(at + (u64)(g + 1) * 512));
            int sc = scale_of(header, g), mn = offset_of(header, g);
            low = make_uint4(expand(q.x & 0x0f0f0f0fu, sc, mn), expand(q.y & 0x0f0f0f0fu, sc, mn),
                             expand(q.z & 0x0f0f0f0fu, sc, mn), expand(q.w & 0x0f0f0f0fu, sc, mn));
            high = make_uint4(expand((q.x >> 4) & 0x0f0f0f0fu, sc, mn), expand((q.y >> 4) & 0x0f0f0f0fu, sc, mn),
                              expand((q.z >> 4) & 0x0f0f0f0fu, sc, mn), expand((q.w >> 4) & 0x0f0f0f0fu, sc, mn));
            if (g == first) d[tile * 32 + lane] = as_float(header.x);
        }
        store16(out, low);
        store16(out + 16, high);
    }
}
DEVICE void stage_q8(const Matrix& w, u32 row_tile, u32 tiles, u32 block, u32 first, u8* to, float* d) {
    u32 lane = threadIdx.x % 32, groups = groups_of(w, block);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        u32 unit = threadIdx.x / 32 + 8 * i;
        u32 tile = unit / 4, g = first + unit % 4;
        u8* out = to + (tile * 32 + lane) * LINE + (unit % 4) * 32;
        uint4 low = make_uint4(0, 0, 0, 0), high = low;
        if (row_tile + tile < tiles && g < groups) {
            u64 at = block_q8(w, row_tile + tile, block);
            low = stream((const void*)(at + 128 + (u64)(2 * g) * 512 + lane * 16));
            high = stream((const void*)(at + 128 + (u64)(2 * g + 1) * 512 + lane * 16));
            if (g == first) d[tile * 32 + lane] = stream_f32((const float*)at + lane);
        }
        store16(out, low);
        store16(out + 16, high);
    }
}
/// The same inputs of the tokens, zeros beyond the last, their scales, and if asked for the sums of each 16.
template <class Params>
DEVICE void stage_acts(const Params& p, const Task& task, u32 blocks, u32 token, u32 block, u32 first, u8* to, float* s, int* sums) {
#pragma unroll
    for (int i = 0; i < TOKENS * INPUTS / 16 / THREADS; i++) {
        u32 unit = threadIdx.x + i * THREADS;
        u32 t = unit / (INPUTS / 16), part = unit % (INPUTS / 16);
        uint4 v = make_uint4(0, 0, 0, 0);
        if (token + t < task.end) {
            u64 at = (u64)(token + t) * blocks + block;
            v = read16((const void*)(p.acts.q + at * 256 + first * 32 + part * 16));
        }
        store16(to + t * LINE + part * 16, v);
        if (sums) {
            int sum = 0;
#pragma unroll
            for (int j = 0; j < 4; j++) sum = dp4a(word(v, j), 0x01010101u, sum);
            sums[part * TOKENS + t] = sum;
        }
    }
    if (threadIdx.x < TOKENS) {
        u32 t = token + threadIdx.x;
        s[threadIdx.x] = t < task.end ? ((const float*)p.acts.s)[(u64)t * blocks + block] : 0.0f;
    }
}

/// The finished products of a thread block. `sums`: [16 tokens][ROWS].
template <class Params>
DEVICE void store(const Params& p, const Task& task, u32 row_tile, float (&acc)[2][4][4], float* sums) {
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = warp % 4 * 32;
    // Eight tokens of each warp at a time by way of shared memory, so that neighbours store neighbours and the code of
    // the activations is here once.
#pragma unroll
    for (int j = 0; j < 4; j++) {
        sync_block();
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int c = 0; c < 4; c++) {
                u32 t = warp / 4 * 8 + lane % 4 * 2 + c % 2, r = row + i * 16 + lane / 4 + c / 2 * 8;
                sums[t * ROWS + r] = acc[i][j][c];
            }
        sync_block();
#pragma unroll 1
        for (u32 i = threadIdx.x; i < 16 * ROWS; i += THREADS) {
            u32 r = i % ROWS, t = i / ROWS, at = task.first + t / 8 * 32 + j * 8 + t % 8;
            if (at >= task.end || (p.e.mode == 3 && r / 16 % 2 == 1)) continue;
            float up = r + 16 < ROWS ? sums[i + 16] : 0.0f;
            finish(p.e, p.jobs, task, row_tile * 32 + r, at, sums[i], up);
        }
    }
}

template <class Number>
DEVICE void clear(Number (&x)[2][4][4]) {
#pragma unroll
    for (int i = 0; i < 32; i++) x[i / 16][i / 4 % 4][i % 4] = 0;
}

template <bool FOUR>
DEVICE void gemm(const Gemm& p, u8* w, u8* a, float* d, float* s) {
    const Task task = task_of(p.jobs, p.w.w, p.e, TOKENS, p.tokens);
    if (task.first >= task.end) return;
    const Matrix m = {task.w, p.w.groups, p.w.blocks};
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 tiles = (p.e.n + task.skip + 31) / 32, row_tile = blockIdx.y * (ROWS / 32), token = task.first;
    u32 row = warp % 4 * 32, column = warp / 4 * 32;
    float acc[2][4][4];
    clear(acc);
    for (u32 block = 0; block < p.w.blocks; block++) {
        int sum[2][4][4];
        clear(sum);
        u32 groups = groups_of(m, block);
        for (u32 first = 0; first < groups; first += INPUTS / 32) {
            sync_block();
            if (FOUR) stage_q4(m, row_tile, tiles, block, first, w, d);
            else stage_q8(m, row_tile, tiles, block, first, w, d);
            stage_acts(p, task, p.w.blocks, token, block, first, a, s, nullptr);
            sync_block();
#pragma unroll
            for (int k = 0; k < INPUTS / 32; k++) {
                u32 at = k * 32 + lane % 4 * 4, line = lane / 4;
                u32 wf[2][4], af[4][2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const u8* from = w + (row + i * 16 + line) * LINE + at;
                    wf[i][0] = *(const u32*)from;
                    wf[i][1] = *(const u32*)(from + 8 * LINE);
                    wf[i][2] = *(const u32*)(from + 16);
                    wf[i][3] = *(const u32*)(from + 8 * LINE + 16);
                }
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const u8* from = a + (column + j * 8 + line) * LINE + at;
                    af[j][0] = *(const u32*)from;
                    af[j][1] = *(const u32*)(from + 16);
                }
#pragma unroll
                for (int i = 0; i < 2; i++)
#pragma unroll
                    for (int j = 0; j < 4; j++) mma_i8(sum[i][j], wf[i], af[j]);
            }
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    float scale = d[row + i * 16 + lane / 4 + c / 2 * 8] * s[column + j * 8 + lane % 4 * 2 + c % 2];
                    acc[i][j][c] = fmaf((float)sum[i][j][c], scale, acc[i][j][c]);
                }
    }
    store(p, task_of(p.jobs, p.w.w, p.e, TOKENS, p.tokens), row_tile, acc, (float*)w);
}

#define GEMM(name, FOUR)                                   \
    KERNEL(THREADS, name, Gemm) {                          \
        SHARED uint4 w[ROWS * LINE / 16], a[TOKENS * LINE / 16]; \
        SHARED float d[ROWS], s[TOKENS];                   \
        gemm<FOUR>(p, (u8*)w, (u8*)a, d, s);               \
    }
GEMM(gemm_q4, true)
GEMM(gemm_q8, false)

struct GemmGrouped {
    Grouped w;
    Acts acts;
    u32 tokens, pad;
    Epilogue e;
    Jobs jobs;
};

/// As `stage_q4`, of a grouped matrix: what the codes stand for, and for each 16 inputs (each 32, in every second place)
/// the scale and the offset of each row.
DEVICE void stage_grouped(const Grouped& w, u64 from, u32 row_tile, u32 tiles, u32 block, u32 first, u8* to, Step* steps) {
    u32 lane = threadIdx.x % 32, groups = groups_of(w.m, block), high = HIGH(w.how), table = TABLE(w.how);
    u32 unit = GROUP(w.how) == 16 ? 16 : 32;
#pragma unroll 1
    for (int i = 0; i < 2; i++) {
        u32 part = threadIdx.x / 32 + 8 * i; // 4 tiles of 32 rows by 4 groups
        u32 tile = part / 4, g = first + part % 4;
        u8* out = to + (tile * 32 + lane) * LINE + (part % 4) * 32;
        Step* step = steps + part % 4 * 2 * ROWS + tile * 32 + lane;
        if (row_tile + tile >= tiles || g >= groups) {
            store16(out, make_uint4(0, 0, 0, 0));
            store16(out + 16, make_uint4(0, 0, 0, 0));
            step[0] = step[ROWS] = Step{0.0f, 0.0f};
        } else {
            u64 header = block_grouped(w, from, row_tile + tile, block) + lane * 4, lines = header + 128 * w.header;
            u64 more = lines + (u64)groups * 512 + (u64)g * high * 128;
            u32 a = high > 0 ? read4((const void*)more) : 0, b = high > 1 ? read4((const void*)(more + 128)) : 0;
            uint4 q = stream((const void*)(lines + lane * 12 + (u64)g * 512)), low, top;
            values(high, table, q.x, a, b, 0, low.x, top.x);
            values(high, table, q.y, a, b, 1, low.y, top.y);
            values(high, table, q.z, a, b, 2, low.z, top.z);
            values(high, table, q.w, a, b, 3, low.w, top.w);
            store16(out, low);
            store16(out + 16, top);
            step[0] = step_of(w, header, g * 32 / unit, unit);
            step[ROWS] = unit == 16 ? step_of(w, header, 2 * g + 1, unit) : Step{0.0f, 0.0f};
        }
    }
}

/// As `gemm`, with a float step for each unit: a product of 16 by 8 by 32 on the tensor cores is just one, or two, with
/// zeros in the place of the other half of the weights.
DEVICE void gemm_units(const GemmGrouped& p, u8* w, u8* a, Step* steps, float* s, int* sums) {
    const Task task = task_of(p.jobs, p.w.m.w, p.e, TOKENS, p.tokens);
    if (task.first >= task.end) return;
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 tiles = (p.e.n + task.skip + 31) / 32, row_tile = blockIdx.y * (ROWS / 32), token = task.first;
    u32 row = warp % 4 * 32, column = warp / 4 * 32;
    bool short_units = GROUP(p.w.how) == 16, offsets = OFFSET(p.w.how) != 0;
    float acc[2][4][4];
    clear(acc);
#pragma unroll 1
    for (u32 block = 0; block < p.w.m.blocks; block++) {
        float chain[2][4][4];
        clear(chain);
        u32 groups = groups_of(p.w.m, block);
#pragma unroll 1
        for (u32 first = 0; first < groups; first += INPUTS / 32) {
            sync_block();
            stage_grouped(p.w, task.w, row_tile, tiles, block, first, w, steps);
            stage_acts(p, task, p.w.m.blocks, token, block, first, a, s, sums);
            sync_block();
#pragma unroll 1
            for (u32 unit = 0; unit < INPUTS / 16; unit += short_units ? 1 : 2) {
                u32 at = unit / 2 * 32 + lane % 4 * 4, line = lane / 4;
                u32 wf[2][4];
                Step here[2][2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const u8* from = w + (row + i * 16 + line) * LINE + at;
                    bool first_half = !short_units || unit % 2 == 0, second_half = !short_units || unit % 2 == 1;
                    wf[i][0] = first_half ? *(const u32*)from : 0;
                    wf[i][1] = first_half ? *(const u32*)(from + 8 * LINE) : 0;
                    wf[i][2] = second_half ? *(const u32*)(from + 16) : 0;
                    wf[i][3] = second_half ? *(const u32*)(from + 8 * LINE + 16) : 0;
                    here[i][0] = steps[unit * ROWS + row + i * 16 + line];
                    here[i][1] = steps[unit * ROWS + row + i * 16 + line + 8];
                }
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const u8* tokens = a + (column + j * 8 + line) * LINE + at;
                    u32 af[2] = {*(const u32*)tokens, *(const u32*)(tokens + 16)};
                    const int* all = sums + unit * TOKENS + column + j * 8 + lane % 4 * 2;
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        int dot[4] = {0, 0, 0, 0};
                        mma_i8(dot, wf[i], af);
#pragma unroll
                        for (int c = 0; c < 4; c++) {
                            chain[i][j][c] = fmaf((float)dot[c], here[i][c / 2].s, chain[i][j][c]);
                            if (offsets) {
                                int sum = all[c % 2] + (short_units ? 0 : all[TOKENS + c % 2]);
                                chain[i][j][c] = fmaf((float)sum, here[i][c / 2].o, chain[i][j][c]);
                            }
                        }
                    }
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    acc[i][j][c] = fmaf(chain[i][j][c], s[column + j * 8 + lane % 4 * 2 + c % 2], acc[i][j][c]);
                }
    }
    store(p, task_of(p.jobs, p.w.m.w, p.e, TOKENS, p.tokens), row_tile, acc, (float*)w);
}
KERNEL_BLOCKS(THREADS, 2, gemm_grouped, GemmGrouped) {
    SHARED uint4 w[ROWS * LINE / 16], a[TOKENS * LINE / 16];
    SHARED Step steps[INPUTS / 16 * ROWS];
    SHARED float s[TOKENS];
    SHARED int sums[INPUTS / 16 * TOKENS];
    gemm_units(p, (u8*)w, (u8*)a, steps, s, sums);
}
