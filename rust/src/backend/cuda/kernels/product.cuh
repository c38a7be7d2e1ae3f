// What matrix products have in common: the packed order (pack.rs) and what happens to a finished number.
#pragma once
#include "device.cuh"

/// What becomes of the products: 0 stored, 1 added to out, 2 out = act(y), 3 out = act(gate) * up of interleaved rows.
struct Epilogue {
    u64 bias, out;
    /// Rows of the matrix; numbers of a row of out.
    u32 n, width, mode;
    Act act;
};

/// Products with several matrices of one shape by one launch, if there is a `list`: for each block of tokens
/// {matrix, first row, end of rows, rows of the first tile that are another matrix's}. `mats`: {weights, bias} of each.
/// Row t becomes row places[t] of out, or t; with `heads`, which have `rows` rows each, row t % rows * heads + t / rows.
struct Jobs {
    u64 list, mats, places;
    u32 heads, rows;
};
/// What a thread block does: rows `first` to `end`, of which there may be none.
struct Task {
    u64 w, bias;
    u32 first, end, skip;
};
/// `each`: rows of a block; without jobs the matrix is `w`. Kernels ask at their beginning and again at their end, so that
/// what is needed in one place only takes no registers in between.
DEVICE Task task_of(const Jobs& jobs, u64 w, const Epilogue& e, u32 each, u32 tokens) {
    if (!jobs.list) return Task{w, e.bias, blockIdx.x * each, tokens, 0};
    const uint4 job = reload16((const void*)(jobs.list + (u64)blockIdx.x * 16));
    const uint4 mat = reload16((const void*)(jobs.mats + (u64)job.x * 16));
    u64 at = (u64)mat.y << 32 | mat.x;
    // A matrix of another form has no address: another launch has its rows.
    return Task{at, (u64)mat.w << 32 | mat.z, job.y, at ? job.z : job.y, job.w};
}
DEVICE u32 place_of(const Jobs& jobs, u32 t) {
    if (jobs.heads) return t % jobs.rows * jobs.heads + t / jobs.rows;
    return jobs.places ? ((const u32*)jobs.places)[t] : t;
}

/// Row `row` of the first tile and on, `y` for token t; `up`: of row + 16, where rows are 16 gates and their 16 ups.
DEVICE void finish(const Epilogue& e, const Jobs& jobs, const Task& task, u32 row, u32 t, float y, float up) {
    const float* bias = (const float*)task.bias;
    row -= task.skip; // below 0: beyond every width
    u32 column = e.mode == 3 ? row / 32 * 16 + row % 16 : row;
    if (column >= e.width) return;
    if (bias) y = y + bias[row];
    if (bias && e.mode == 3) up = up + bias[row + 16];
    float* out = (float*)e.out + (u64)place_of(jobs, t) * e.width + column;
    if (e.mode == 1) y = *out + y;
    if (e.mode >= 2) y = gate(e.act, y, e.mode == 3 ? up : 1.0f);
    *out = y;
}

/// A matrix in tiles of 32 rows, a lane each.
///
/// int4: for each 256 inputs 16 bytes a lane (f32 d | 8 x 4 bits of sc - 1 | 8 x i8 mn), then 16 bytes a lane for each
/// 32 inputs: the low nibbles are inputs 0..16, the high ones 16..32. int8: f32 d a lane, then 16 bytes a lane for each 16
/// inputs. The last 256 inputs of a row have only the groups of 32 that are needed.
struct Matrix {
    u64 w;
    /// Groups of 32 inputs, blocks of 256.
    u32 groups, blocks;
};
DEVICE u32 groups_of(const Matrix& w, u32 block) {
    u32 left = w.groups - block * 8;
    return left < 8 ? left : 8;
}
DEVICE u64 block_q4(const Matrix& w, u32 tile, u32 block) {
    return w.w + (u64)tile * 512 * (w.blocks + w.groups) + (u64)block * (9 * 512);
}
DEVICE u64 block_q8(const Matrix& w, u32 tile, u32 block) {
    return w.w + (u64)tile * (128 * w.blocks + 1024 * w.groups) + (u64)block * (128 + 8 * 1024);
}
/// Integer scale and offset of group g from an int4 header.
DEVICE int scale_of(const uint4& header, int g) { return (int)((header.y >> (4 * g)) & 15u) + 1; }
DEVICE int offset_of(const uint4& header, int g) {
    return (int)(i8)((g < 4 ? header.z : header.w) >> (8 * (g % 4)));
}
/// Four int4 codes, one in each byte, as int8 weights: sc * q - mn. 256 keeps the halves apart and falls out of the byte.
DEVICE u32 expand(u32 codes, int sc, int mn) {
    u32 offset = (u32)(256 - mn) * 0x00010001u;
    u32 even = (codes & 0x00ff00ffu) * (u32)sc + offset;
    u32 odd = ((codes >> 8) & 0x00ff00ffu) * (u32)sc + offset;
    return (even & 0x00ff00ffu) | ((odd & 0x00ff00ffu) << 8);
}
DEVICE void store16(u8* at, uint4 v) { *(uint4*)at = v; }
/// A product of more tokens than gemv.cu takes: of few.cu and gemm.cu.
struct Gemm {
    Matrix w;
    Acts acts;
    u32 tokens, pad;
    Epilogue e;
    Jobs jobs;
};
