// variants: sm80
// What stands around attention (attend.cuh): norms of heads, rotation and the pages before it, the merging of chunks behind
// it, and what latent attention reads.
#include "attend.cuh"

struct Rope {
    u64 qkv, q_gain, k_gain, v_gain, table;
    Pages pages;
    Spans spans;
    /// Numbers of a row; query heads; key/value heads in a row; dimensions; of them turned; gain lengths.
    u32 row, heads, kv_heads, d, turned, q_gains, k_gains;
    /// 1: keys are stored; 1: pairs are neighbours; 1: layer norms; 1: norms after the rotation.
    u32 store, interleaved, centred, after;
    float clip, eps;
    /// 1: there are values beside the keys.
    u32 values;
};

/// x[0..d] divided by its root mean square (or deviation), times gain, in place; by one warp.
DEVICE void norm_head(float* x, u32 d, const float* gain, u32 centred, float eps) {
    float mean = centred ? sum16(x, d) / (float)d : 0.0f;
    float inv = 1.0f / sqrtf(mean_square(x, d, mean) + eps);
    sync_warp();
    for (u32 i = threadIdx.x % 32; i < d; i += 32) x[i] = (centred ? x[i] - mean : x[i]) * inv * gain[i];
    sync_warp();
}
/// x as a number of the pages of `dtype`.
DEVICE void put(u64 at, u32 dtype, u64 index, float x, float inv) {
    if (dtype == 0) ((float*)at)[index] = x;
    else if (dtype == 1) ((u16*)at)[index] = f32_to_f16(x);
    else ((u8*)at)[index] = (u8)round_i8(x * inv);
}

/// One head of one row, by a warp: heads, then keys, then values.
KERNEL(128, rope_store, Rope) {
    SHARED float all[4][MAX_KEY];
    u32 lane = threadIdx.x % 32, h = blockIdx.y * 4 + threadIdx.x / 32, r = blockIdx.x, d = p.d;
    if (h >= p.heads + (1 + p.values) * p.kv_heads) return;
    u32 kind = h < p.heads ? 0 : h < p.heads + p.kv_heads ? 1 : 2;
    float* x = all[threadIdx.x / 32];
    float* row = (float*)p.qkv + (u64)r * p.row + (u64)h * d;
    for (u32 i = lane; i < d; i += 32) x[i] = row[i];
    sync_warp();
    u64 gain = kind == 0 ? p.q_gain : kind == 1 ? p.k_gain : p.v_gain;
    u32 head = kind == 0 ? h : kind == 1 ? h - p.heads : h - p.heads - p.kv_heads;
    if (gain && kind == 0) gain += (u64)(head * d % p.q_gains) * 4;
    if (gain && kind == 1) gain += (u64)(head * d % p.k_gains) * 4;
    if (gain && !p.after) norm_head(x, d, (const float*)gain, p.centred, p.eps);
    if (p.clip > 0.0f) {
        for (u32 i = lane; i < d; i += 32) x[i] = fminf(fmaxf(x[i], -p.clip), p.clip);
        sync_warp();
    }
    if (p.table && kind < 2) {
        u32 half = p.turned / 2;
        const float* cos = (const float*)p.table + (u64)r * p.turned;
        for (u32 i = lane; i < half; i += 32) {
            u32 a = p.interleaved ? 2 * i : i, b = p.interleaved ? 2 * i + 1 : i + half;
            float u = x[a], v = x[b];
            x[a] = fmaf(u, cos[i], -(v * cos[half + i]));
            x[b] = fmaf(v, cos[i], u * cos[half + i]);
        }
        sync_warp();
    }
    if (gain && p.after) norm_head(x, d, (const float*)gain, p.centred, p.eps);
    if (kind == 0 || !p.store) {
        for (u32 i = lane; i < d; i += 32) row[i] = x[i];
        return;
    }
    const u32* words = (const u32*)p.spans.words;
    u32 span = words[p.spans.of_row + r];
    u32 position = words[span * 4 + 2] + r - words[span * 4], slot = position % PAGE;
    u64 at = head_of(p.pages, words, p.spans, span, position, head);
    float inv = 0.0f;
    if (p.pages.dtype == 2) {
        float amax = 0.0f, scale;
        for (u32 i = lane; i < d; i += 32) amax = fmaxf(amax, fabsf(x[i]));
#pragma unroll
        for (int m = 16; m > 0; m /= 2) amax = fmaxf(amax, shuffle_xor(amax, m));
        integer_scale(amax, 127.0f, inv, scale);
        if (lane == 0) ((float*)(at + p.pages.numbers))[(kind - 1) * PAGE + slot] = scale;
    }
    u32 v = p.pages.dtype == 0 ? 4 : p.pages.dtype == 1 ? 8 : 16;
    if (kind == 1) {
        // Padding up to a whole 16 bytes is zero, so that it adds nothing to a score.
        for (u32 i = lane; i < (d + v - 1) / v * v; i += 32) {
            put(at, p.pages.dtype, (u64)(i / v * PAGE + slot) * v + i % v, i < d ? x[i] : 0.0f, inv);
        }
    } else {
        for (u32 i = lane; i < d; i += 32) put(at + p.pages.keys, p.pages.dtype, (u64)slot * d + i, x[i], inv);
    }
}

/// Merges the chunks of one head (blockIdx.y) of one row (blockIdx.x), ascending, the sink last.
KERNEL(128, attend_merge, Attend) {
    const u32* words = (const u32*)p.spans.words;
    u32 r = blockIdx.x, h = blockIdx.y, span = words[p.spans.of_row + r];
    u32 own = words[span * 4 + 2] + r - words[span * 4];
    u32 from = p.window && own + 1 > p.window ? own + 1 - p.window : 0;
    float best = -INFINITE, total = 0.0f, sums[MAX_D / 128];
#pragma unroll
    for (int c = 0; c < MAX_D / 128; c++) sums[c] = 0.0f;
    for (u32 chunk = from / CHUNK; chunk <= own / CHUNK; chunk++) {
        const float* part = (const float*)p.parts + (((u64)r * p.heads + h) * p.chunks + chunk) * (p.values + 2);
        if (part[0] == -INFINITE) continue;
        float m = fmaxf(best, part[0]), old = exp_(best - m), fresh = exp_(part[0] - m);
        best = m;
        total = fmaf(part[1], fresh, total * old);
#pragma unroll
        for (int c = 0; c < MAX_D / 128; c++) {
            u32 i = c * 128 + threadIdx.x;
            if (i < p.values) sums[c] = fmaf(part[2 + i], fresh, sums[c] * old);
        }
    }
    float inv = 1.0f / total;
    if (p.sinks) {
        float sink = ((const float*)p.sinks)[h];
        float m = fmaxf(best, sink), keep = exp_(best - m);
        inv = keep / fmaf(total, keep, exp_(sink - m));
    }
#pragma unroll
    for (int c = 0; c < MAX_D / 128; c++) {
        u32 i = c * 128 + threadIdx.x;
        if (i < p.values) ((float*)p.out)[((u64)r * p.heads + h) * p.values + i] = sums[c] * inv;
    }
}

struct LatentQk {
    u64 q, kv, y, gain, out;
    u32 heads, nope, rope, rank;
    float eps;
    u32 pad;
};
/// Queries (blockIdx.y) and, last, the key of row blockIdx.x: their numbers that turn, then y or the norm of the rest.
KERNEL(128, latent_qk, LatentQk) {
    SHARED float inv;
    u32 h = blockIdx.y, r = blockIdx.x, wide = p.nope + p.rope;
    float* out = (float*)p.out + ((u64)r * (p.heads + 1) + h) * (p.rope + p.rank);
    const float* kv = (const float*)p.kv + (u64)r * (p.rank + p.rope);
    const float* y = (const float*)p.y + ((u64)r * p.heads + h) * p.rank;
    const float* turned = h < p.heads ? (const float*)p.q + ((u64)r * p.heads + h) * wide + p.nope : kv + p.rank;
    if (h == p.heads && threadIdx.x < 32) {
        float square = mean_square(kv, p.rank, 0.0f);
        if (threadIdx.x == 0) inv = 1.0f / sqrtf(square + p.eps);
    }
    sync_block();
    for (u32 i = threadIdx.x; i < p.rope; i += 128) out[i] = turned[i];
    for (u32 i = threadIdx.x; i < p.rank; i += 128) {
        out[p.rope + i] = h < p.heads ? y[i] : kv[i] * inv * ((const float*)p.gain)[i];
    }
}
