// variants: sm80
// Matrix times many tokens on int8 tensor cores: 128 rows by 64 tokens a thread block, 32 by 32 a warp. The integers of
// 256 inputs are exact whatever the order of their sum, and meet the scales in one fused multiply-add, blocks ascending:
// the bits of gemv.cu. Formula: rust/src/kernels/scalar.rs.
#include "product.cuh"

struct Gemm {
    Matrix w;
    Acts acts;
    u32 tokens, pad;
    Epilogue e;
};

/// Rows and tokens of a thread block, its threads, inputs in shared memory at once, and bytes of their line: 16 more, so
/// that the eight rows a warp reads at once lie in different banks.
#define ROWS 128
#define TOKENS 64
#define THREADS 256
#define INPUTS 128
#define LINE (INPUTS + 16)

/// Four int4 codes, one in each byte, as int8 weights: sc * q - mn. 256 keeps the halves apart and falls out of the byte.
DEVICE u32 expand(u32 codes, int sc, int mn) {
    u32 offset = (u32)(256 - mn) * 0x00010001u;
    u32 even = (codes & 0x00ff00ffu) * (u32)sc + offset;
    u32 odd = ((codes >> 8) & 0x00ff00ffu) * (u32)sc + offset;
    return (even & 0x00ff00ffu) | ((odd & 0x00ff00ffu) << 8);
}
DEVICE void store16(u8* at, uint4 v) { *(uint4*)at = v; }

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
/// The same inputs of the tokens, zeros beyond the last, and their scales.
DEVICE void stage_acts(const Gemm& p, u32 token, u32 block, u32 first, u8* to, float* s) {
#pragma unroll
    for (int i = 0; i < TOKENS * INPUTS / 16 / THREADS; i++) {
        u32 unit = threadIdx.x + i * THREADS;
        u32 t = unit / (INPUTS / 16), part = unit % (INPUTS / 16);
        uint4 v = make_uint4(0, 0, 0, 0);
        if (token + t < p.tokens) {
            u64 at = (u64)(token + t) * p.w.blocks + block;
            v = read16((const void*)(p.acts.q + at * 256 + first * 32 + part * 16));
        }
        store16(to + t * LINE + part * 16, v);
    }
    if (threadIdx.x < TOKENS) {
        u32 t = token + threadIdx.x;
        s[threadIdx.x] = t < p.tokens ? ((const float*)p.acts.s)[(u64)t * p.w.blocks + block] : 0.0f;
    }
}

template <bool FOUR>
DEVICE void gemm(const Gemm& p, u8* w, u8* a, float* d, float* s) {
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 tiles = (p.e.n + 31) / 32, row_tile = blockIdx.y * (ROWS / 32), token = blockIdx.x * TOKENS;
    u32 row = warp % 4 * 32, column = warp / 4 * 32;
    float acc[2][4][4];
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int c = 0; c < 4; c++) acc[i][j][c] = 0.0f;
    for (u32 block = 0; block < p.w.blocks; block++) {
        int sum[2][4][4];
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int c = 0; c < 4; c++) sum[i][j][c] = 0;
        u32 groups = groups_of(p.w, block);
        for (u32 first = 0; first < groups; first += INPUTS / 32) {
            sync_block();
            if (FOUR) stage_q4(p.w, row_tile, tiles, block, first, w, d);
            else stage_q8(p.w, row_tile, tiles, block, first, w, d);
            stage_acts(p, token, block, first, a, s);
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
    // Eight tokens of each warp at a time by way of shared memory, so that neighbours store neighbours and the code of
    // the activations is here once.
    float* sums = (float*)w; // [16 tokens][ROWS]
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
            u32 r = i % ROWS, t = i / ROWS, at = token + t / 8 * 32 + j * 8 + t % 8;
            if (at >= p.tokens || (p.e.mode == 3 && r / 16 % 2 == 1)) continue;
            float up = r + 16 < ROWS ? sums[i + 16] : 0.0f;
            finish(p.e, row_tile * 32 + r, at, sums[i], up);
        }
    }
}

#define GEMM(name, FOUR)                                   \
    KERNEL(THREADS, name, Gemm) {                          \
        SHARED uint4 w[ROWS * LINE / 16], a[TOKENS * LINE / 16]; \
        SHARED float d[ROWS], s[TOKENS];                   \
        gemm<FOUR>(p, (u8*)w, (u8*)a, d, s);               \
    }
GEMM(gemm_q4, true)
GEMM(gemm_q8, false)
