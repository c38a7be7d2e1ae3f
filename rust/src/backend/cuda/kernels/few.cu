// variants: sm80
// Matrix times 9 to 64 tokens on int8 tensor cores: 32 rows by 16 tokens a thread block, over all inputs. Each warp has other
// blocks of 256 inputs, as in gemv.cu, so that enough of the matrix is on its way whatever its shape; a round of blocks
// ends with all warps adding up what all have found, in order. Other blocks of tokens find the matrix in the L2 cache.
// Formula: rust/src/kernels/scalar.rs.
#include "product.cuh"

#define T 16
#define WARPS 16
/// Inputs of the tokens in shared memory at once, bytes of their line (16 more, so that the eight a warp reads at once lie
/// in different banks), and of as many sums of a token.
#define INPUTS 128
#define LINE (INPUTS + 16)
#define SUMS (LINE / 4)

/// What a lane has of 128 inputs of an int4 matrix: of rows lane / 4 + 8 j, word lane % 4 of each group of 32 inputs.
struct Q4 {
    uint4 header[4];
    u32 q[4][4]; // [group][j]
    MEMBER static u64 at(const Matrix& m, u32 tile, u32 block) { return block_q4(m, tile, block); }
    MEMBER static float scale(u64 at, u32 row) { return *(const float*)(at + row * 16); }
    MEMBER void load(u64 at, u32 lane, u32 first, u32 groups) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u64 row = at + (lane / 4 + 8 * j) * 16;
            header[j] = read16((const void*)row);
#pragma unroll
            for (int g = 0; g < 4; g++) {
                u64 from = row + (u64)(1 + first + g) * 512 + lane % 4 * 4;
                q[g][j] = first + g < groups ? read4((const void*)from) : 0;
            }
        }
    }
    /// Rows 16 i + lane / 4 and 8 below, of group g of the four.
    MEMBER void part(u32 first, int g, int i, u32 (&a)[4]) const {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const uint4& h = header[2 * i + j];
            int sc = scale_of(h, first + g), mn = offset_of(h, first + g);
            a[j] = expand(q[g][2 * i + j] & 0x0f0f0f0fu, sc, mn);
            a[j + 2] = expand((q[g][2 * i + j] >> 4) & 0x0f0f0f0fu, sc, mn);
        }
    }
};
/// The same of an int8 matrix.
struct Q8 {
    u32 q[4][2][4]; // [group][half][j]
    MEMBER static u64 at(const Matrix& m, u32 tile, u32 block) { return block_q8(m, tile, block); }
    MEMBER static float scale(u64 at, u32 row) { return *(const float*)(at + row * 4); }
    MEMBER void load(u64 at, u32 lane, u32 first, u32 groups) {
#pragma unroll
        for (int g = 0; g < 4; g++)
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    u64 from = at + 128 + (u64)(2 * (first + g) + half) * 512 + (lane / 4 + 8 * j) * 16 + lane % 4 * 4;
                    q[g][half][j] = first + g < groups ? read4((const void*)from) : 0;
                }
    }
    MEMBER void part(u32, int g, int i, u32 (&a)[4]) const {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            a[j] = q[g][0][2 * i + j];
            a[j + 2] = q[g][1][2 * i + j];
        }
    }
};

/// A token of the sums for each warp. `lines`: of each warp first inputs of the tokens, then sums [T][SUMS] of 32 rows.
template <class Form>
DEVICE void few(const Gemm& p, uint4 (&lines)[WARPS][T * LINE / 16], float (&d)[WARPS][32], float (&s)[WARPS][T]) {
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Task task = task_of(p.jobs, p.w.w, p.e, T, p.tokens);
    if (task.first >= task.end) return;
    const Matrix m = {task.w, p.w.groups, p.w.blocks};
    u32 tile = blockIdx.y, token = task.first;
    u8* mine = (u8*)lines[warp];
    float acc = 0.0f; // of row `lane`, token `warp`
#pragma unroll 1
    for (u32 round = 0; round < p.w.blocks; round += WARPS) {
        u32 block = round + warp;
        if (block < p.w.blocks) {
            u64 at = Form::at(m, tile, block);
            u32 groups = groups_of(m, block);
            int sum[2][2][4];
#pragma unroll
            for (int i = 0; i < 16; i++) sum[i / 8][i / 4 % 2][i % 4] = 0;
            d[warp][lane] = Form::scale(at, lane);
            if (lane < T) {
                u32 t = token + lane;
                s[warp][lane] = t < task.end ? ((const float*)p.acts.s)[(u64)t * p.w.blocks + block] : 0.0f;
            }
#pragma unroll 1
            for (u32 first = 0; first < groups; first += INPUTS / 32) {
                Form w;
                w.load(at, lane, first, groups);
                sync_warp();
#pragma unroll
                for (int i = 0; i < T / 4; i++) {
                    u32 line = i * 4 + lane / 8, t = token + line;
                    u64 from = p.acts.q + ((u64)t * p.w.blocks + block) * 256 + first * 32 + lane % 8 * 16;
                    uint4 v = make_uint4(0, 0, 0, 0);
                    if (t < task.end) v = read16((const void*)from);
                    store16(mine + line * LINE + lane % 8 * 16, v);
                }
                sync_warp();
#pragma unroll
                for (int g = 0; g < INPUTS / 32; g++) {
                    u32 b[2][2];
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        const u8* from = mine + (j * 8 + lane / 4) * LINE + g * 32 + lane % 4 * 4;
                        b[j][0] = *(const u32*)from;
                        b[j][1] = *(const u32*)(from + 16);
                    }
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        u32 a[4];
                        w.part(first, g, i, a);
#pragma unroll
                        for (int j = 0; j < 2; j++) mma_i8(sum[i][j], a, b[j]);
                    }
                }
            }
            sync_warp();
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int j = 0; j < 2; j++)
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        u32 row = i * 16 + lane / 4 + c / 2 * 8, t = j * 8 + lane % 4 * 2 + c % 2;
                        ((float*)mine)[t * SUMS + row] = (float)sum[i][j][c];
                    }
        }
        sync_block();
        u32 count = p.w.blocks - round < WARPS ? p.w.blocks - round : WARPS;
#pragma unroll 4
        for (u32 i = 0; i < count; i++) {
            acc = fmaf(((const float*)lines[i])[warp * SUMS + lane], d[i][lane] * s[i][warp], acc);
        }
        sync_block();
    }
    const Task last = task_of(p.jobs, p.w.w, p.e, T, p.tokens);
    u32 t = last.first + warp;
    if (t >= last.end) return;
    float up = shuffle_xor(acc, 16);
    if (p.e.mode != 3 || lane < 16) finish(p.e, p.jobs, last, tile * 32 + lane, t, acc, up);
}

#define FEW(name, Form)                                \
    KERNEL(32 * WARPS, name, Gemm) {                   \
        SHARED uint4 lines[WARPS][T * LINE / 16];      \
        SHARED float d[WARPS][32], s[WARPS][T];        \
        few<Form>(p, lines, d, s);                     \
    }
FEW(few_q4, Q4)
FEW(few_q8, Q8)
