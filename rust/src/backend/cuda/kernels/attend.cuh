// Pages of keys and values, and attention over them. The order of every sum is that of
// rust/src/kernels/attention.rs: keys in chunks of 512 by absolute position, a score one chain over the dimensions, the
// weights of a chunk summed by key modulo 16 and a tree, its values one chain over keys, chunks merged ascending. int8
// keys and values are multiplied in integers (attention/int8.rs there), but for latent attention.
//
// A head's part of a page (64 positions), in numbers of E bytes, V = 16 / E of them side by side, d padded to V:
//   K [d / V][64][V] | V [64][d] | int8: f32 scale of each key [64], of each value [64]
// Latent attention has keys only: the values are their last dimensions, and a dimension of a chunk is summed by key modulo
// 16 and a tree.
#pragma once
#include "spans.cuh"

#define PAGE 64
#define CHUNK 512
/// Dimensions of a head, and of a key of latent attention, at most.
#define MAX_D 512
#define MAX_KEY 576

/// The pages of one layer.
struct Pages {
    u64 bytes;
    /// Bytes from a page to the next, of one head, of its keys, of its keys and values.
    u32 page, head, keys, numbers;
    /// 0 f32, 1 f16, 2 int8.
    u32 dtype, pad;
};

DEVICE u64 head_of(const Pages& pages, const u32* words, const Spans& spans, u32 span, u32 position, u32 h) {
    u32 page = words[spans.tables + words[span * 4 + 3] + position / PAGE];
    return pages.bytes + (u64)page * pages.page + (u64)h * pages.head;
}

struct Attend {
    u64 qkv, sinks, growth, out, parts;
    Pages pages;
    Spans spans;
    /// Numbers of a row of qkv; query heads; key/value heads; dimensions; keys seen or 0 = all; chunks of a row at most.
    u32 row, heads, kv_heads, d, window, chunks;
    /// Query heads of a block; its positions; blocks of one span at most; 1: a block has one chunk and leaves it in parts.
    u32 group, positions, tiles, split;
    float scale, cap;
    /// Dimensions of a value.
    u32 values, pad;
};

/// Threads of a block; lines of 16 bytes of values in shared memory at once.
#define THREADS 256
#define LINES 768

/// V numbers of 16 bytes as f32.
template <int DTYPE>
DEVICE float number(const uint4& v, int i) {
    if (DTYPE == 0) return as_float(word(v, i % 4));
    if (DTYPE == 1) return f16_to_f32((u16)(word(v, i / 2 % 4) >> (16 * (i % 2))));
    return (float)(i8)(word(v, i / 4) >> (8 * (i % 4)));
}
template <int DTYPE>
DEVICE float stored(const uint4* lines, u32 index) {
    if (DTYPE == 0) return ((const float*)lines)[index];
    if (DTYPE == 1) return f16_to_f32(((const u16*)lines)[index]);
    return (float)((const i8*)lines)[index];
}
/// Queries and weights of int8 keys and values are integers up to this: 127 * 257, see attention/int8.rs.
#define MOST 32639.0f
/// x rounded to such an integer, ties to even.
DEVICE int round_i16(float x) { return (int)(short)as_bits(x + 12582912.0f); }
/// x[0..n], n <= MAX_D, as integers, in place, by a warp: for each four a word of their high bytes and one of their low
/// bytes, which are signed. Gives what one is worth.
DEVICE float query(float* x, u32 n) {
    u32 lane = threadIdx.x % 32, high[MAX_D / 128], low[MAX_D / 128];
    float amax = 0.0f, inv, worth;
    for (u32 i = lane; i < n; i += 32) amax = fmaxf(amax, fabsf(x[i]));
#pragma unroll
    for (int m = 16; m > 0; m /= 2) amax = fmaxf(amax, shuffle_xor(amax, m));
    integer_scale(amax, MOST, inv, worth);
#pragma unroll
    for (u32 j = 0; j < MAX_D / 128; j++) {
        high[j] = low[j] = 0;
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 at = (j * 32 + lane) * 4 + i;
            int q = round_i16((at < n ? x[at] : 0.0f) * inv);
            high[j] |= (u32)((q + 128) >> 8 & 255) << (8 * i);
            low[j] |= (u32)(q & 255) << (8 * i);
        }
    }
    sync_warp();
#pragma unroll
    for (u32 j = 0; j < MAX_D / 128; j++) {
        u32 at = (j * 32 + lane) * 4;
        if (at >= n) continue;
        x[at / 2] = as_float(high[j]);
        x[at / 2 + 1] = as_float(low[j]);
    }
    return worth;
}
/// Lines of values of the keys from `key` on, of which this thread has every 256th.
DEVICE void fetch(uint4 (&next)[LINES / THREADS], u64 at, u32 lines) {
#pragma unroll
    for (int i = 0; i < LINES / THREADS; i++) {
        u32 line = threadIdx.x + i * THREADS;
        next[i] = stream_if(line < lines, (const void*)(at + (u64)line * 16));
    }
}

/// Weighted sums [R][values] of a chunk, where the values are the last numbers of the keys. A lane has every 16th key of a
/// line of V dimensions.
template <int DTYPE, int R>
DEVICE void latent_values(const Attend& p, const u32* words, u32 span, u32 h, u32 chunk, u32 low, u32 high,
                          const float (&w)[R][CHUNK], float* sums) {
    const int V = DTYPE == 0 ? 4 : DTYPE == 1 ? 8 : 16;
    u32 lane = threadIdx.x % 16, before = p.d - p.values, end = (p.d + V - 1) / V;
    // Whole blocks of 16 keys: the weights of those that nobody sees are 0.
    u32 from = low / 16 * 16, to = (high + 15) / 16 * 16;
#pragma unroll 1
    for (u32 first = before / V; first < end; first += THREADS / 16) {
        u32 line = first + threadIdx.x / 16;
        float acc[R][V];
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
            for (int i = 0; i < V; i++) acc[r][i] = 0.0f;
#pragma unroll 1
        for (u32 key = from + lane; line < end && key < to; key += 16) {
            u32 position = chunk * CHUNK + key, slot = position % PAGE;
            u64 at = head_of(p.pages, words, p.spans, span, position, h);
            const uint4 k = read16((const void*)(at + ((u64)line * PAGE + slot) * 16));
            float scale = DTYPE == 2 ? ((const float*)(at + p.pages.numbers))[slot] : 1.0f;
#pragma unroll
            for (int r = 0; r < R; r++) {
                float weight = DTYPE == 2 ? w[r][key] * scale : w[r][key];
#pragma unroll
                for (int i = 0; i < V; i++) acc[r][i] = fmaf(number<DTYPE>(k, i), weight, acc[r][i]);
            }
        }
#pragma unroll
        for (int i = 0; i < V; i++) {
            u32 at = line * V + i;
#pragma unroll
            for (int r = 0; r < R; r++) {
                float sum = tree(acc[r][i]);
                if (lane == 0 && at >= before && at < p.d) sums[r * p.values + at - before] = sum;
            }
        }
    }
    sync_block();
}

/// Rows of queries: `positions` x `group` of them share a key/value head.
template <int DTYPE, int R, int D>
DEVICE void attend(const Attend& p, float (&q)[R][D], float (&w)[R][CHUNK], float (&best)[R], float (&total)[R],
                   float (&old)[R], float (&fresh)[R], bool (&seen)[R], float (&worth)[2][R],
                   uint4 (&staged)[LINES]) {
    const int V = DTYPE == 0 ? 4 : DTYPE == 1 ? 8 : 16;
    const bool LATENT = D == MAX_KEY, INTEGERS = DTYPE == 2 && !LATENT;
    const u32* words = (const u32*)p.spans.words;
    u32 parts = (p.heads / p.kv_heads + p.group - 1) / p.group;
    u32 span = blockIdx.x / p.tiles, tile = blockIdx.x % p.tiles;
    u32 h = blockIdx.y / parts, first_head = h * (p.heads / p.kv_heads) + blockIdx.y % parts * p.group;
    u32 last_head = (h + 1) * (p.heads / p.kv_heads);
    u32 group = last_head - first_head < p.group ? last_head - first_head : p.group;
    u32 first = tile * p.positions, len = words[span * 4 + 1];
    if (first >= len) return;
    u32 positions = len - first < p.positions ? len - first : p.positions;
    u32 rows = positions * group, first_row = words[span * 4] + first, start = words[span * 4 + 2] + first;
    u32 d = p.d, padded = (d + V - 1) / V * V, values = LATENT ? p.values : d;
    // Keys of row i: from `lo(i)` up to its own position.
    u32 to = start + positions;
    u32 from = p.window && start + 1 > p.window ? start + 1 - p.window : 0;
    u32 chunk = p.split ? blockIdx.z : from / CHUNK, chunks = p.split ? chunk + 1 : (to + CHUNK - 1) / CHUNK;
    if (p.split && (chunk * CHUNK >= to || (chunk + 1) * CHUNK <= from)) return;

    for (u32 i = threadIdx.x; i < R * padded; i += THREADS) {
        u32 row = i / padded, c = i % padded;
        float x = 0.0f;
        if (row < rows && c < d) {
            u64 r = first_row + row / group;
            x = ((const float*)p.qkv)[r * p.row + (u64)(first_head + row % group) * d + c];
            if (p.growth) x = x * ((const float*)p.growth)[r];
        }
        q[row][c] = x;
    }
    if (threadIdx.x < R) {
        best[threadIdx.x] = -INFINITE;
        total[threadIdx.x] = 0.0f;
    }
    if (INTEGERS) {
        sync_block();
#pragma unroll 1
        for (u32 r = threadIdx.x / 32; r < R; r += THREADS / 32) {
            float one = query(q[r], padded);
            if (threadIdx.x % 32 == 0) worth[0][r] = one;
        }
    }
    // What a thread has summed so far stands where the result will: its own numbers, which nobody else reads.
    u32 begin = chunk;
    for (; chunk < chunks; chunk++) {
        sync_block();
        u32 low = from > chunk * CHUNK ? from - chunk * CHUNK : 0;
        u32 high = to - chunk * CHUNK < CHUNK ? to - chunk * CHUNK : CHUNK;
        // Scores: a key a thread.
#pragma unroll 1
        for (u32 key = threadIdx.x; key < CHUNK; key += THREADS) {
            if (key < low || key >= high) {
#pragma unroll
                for (int r = 0; r < R; r++) w[r][key] = -INFINITE;
                continue;
            }
            u32 position = chunk * CHUNK + key, slot = position % PAGE;
            u64 at = head_of(p.pages, words, p.spans, span, position, h);
            float acc[R];
            int upper[R], lower[R];
#pragma unroll
            for (int r = 0; r < R; r++) {
                acc[r] = 0.0f;
                upper[r] = lower[r] = 0;
            }
#pragma unroll (R > 4 ? 2 : 4)
            for (u32 c = 0; c < padded; c += V) {
                uint4 k = read16((const void*)(at + ((u64)(c / V) * PAGE + slot) * 16));
                if (INTEGERS) {
#pragma unroll
                    for (int i = 0; i < 4; i++) {
#pragma unroll
                        for (int r = 0; r < R; r++) {
                            upper[r] = dp4a(word(k, i), as_bits(q[r][c / 2 + 2 * i]), upper[r]);
                            lower[r] = dp4a(word(k, i), as_bits(q[r][c / 2 + 2 * i + 1]), lower[r]);
                        }
                    }
                    continue;
                }
#pragma unroll
                for (int i = 0; i < V; i++) {
                    float x = number<DTYPE>(k, i);
#pragma unroll
                    for (int r = 0; r < R; r++) acc[r] = fmaf(x, q[r][c + i], acc[r]);
                }
            }
            float scale = DTYPE == 2 ? ((const float*)(at + p.pages.numbers))[slot] : 1.0f;
#pragma unroll
            for (int r = 0; r < R; r++) {
                // Row r sees `window` keys up to its own position.
                u32 own = start + r / group;
                bool sees = r < rows && position <= own && (p.window == 0 || position + p.window > own);
                float s = (DTYPE == 2 ? acc[r] * scale : acc[r]) * p.scale;
                if (INTEGERS) s = (float)(upper[r] * 256 + lower[r]) * scale * (worth[0][r] * p.scale);
                w[r][key] = sees ? s : -INFINITE;
            }
        }
        sync_block();
        // Weights: a row a warp.
#pragma unroll 1
        for (u32 r = threadIdx.x / 32; r < rows; r += THREADS / 32) {
            u32 lane = threadIdx.x % 32;
            if (p.cap > 0.0f) {
#pragma unroll 1
                for (u32 key = lane; key < CHUNK; key += 32) {
                    if (w[r][key] != -INFINITE) w[r][key] = softcap(w[r][key], p.cap, 2.0f / p.cap);
                }
            }
            float most = -INFINITE;
#pragma unroll 1
            for (u32 key = lane; key < CHUNK; key += 32) most = fmaxf(most, w[r][key]);
#pragma unroll
            for (int m = 16; m > 0; m /= 2) most = fmaxf(most, shuffle_xor(most, m));
            bool any = most != -INFINITE;
#pragma unroll 1
            for (u32 key = lane; key < CHUNK; key += 32) w[r][key] = any ? exp_(w[r][key] - most) : 0.0f;
            sync_warp();
            float sum = sum16(w[r], CHUNK);
            if (lane == 0) {
                if (p.split) {
                    best[r] = most;
                    total[r] = sum;
                } else {
                    float m = fmaxf(best[r], most);
                    // A chunk of which a row sees nothing changes nothing.
                    seen[r] = any;
                    if (any) {
                        old[r] = exp_(best[r] - m);
                        fresh[r] = exp_(most - m);
                        best[r] = m;
                        total[r] = fmaf(sum, fresh[r], total[r] * old[r]);
                    }
                }
            }
            if (INTEGERS) {
                // The weights times the scales of their values, as integers.
                float amax = 0.0f, inv, one;
                sync_warp();
#pragma unroll 1
                for (u32 key = lane; key < CHUNK; key += 32) {
                    float x = 0.0f;
                    if (key >= low && key < high) {
                        u32 position = chunk * CHUNK + key;
                        u64 at = head_of(p.pages, words, p.spans, span, position, h) + p.pages.numbers;
                        x = w[r][key] * ((const float*)at)[PAGE + position % PAGE];
                    }
                    w[r][key] = x;
                    amax = fmaxf(amax, fabsf(x));
                }
#pragma unroll
                for (int m = 16; m > 0; m /= 2) amax = fmaxf(amax, shuffle_xor(amax, m));
                integer_scale(amax, MOST, inv, one);
#pragma unroll 1
                for (u32 key = lane; key < CHUNK; key += 32) w[r][key] = as_float((u32)round_i16(w[r][key] * inv));
                if (lane == 0) worth[1][r] = one;
            }
        }
        sync_block();
        float acc[2][R];
        u32 sums[2][R];
#pragma unroll
        for (int r = 0; r < R; r++) {
            acc[0][r] = acc[1][r] = 0.0f;
            sums[0][r] = sums[1][r] = 0;
        }
        if (LATENT) {
            latent_values<DTYPE, R>(p, words, span, h, chunk, low, high, w, (float*)staged);
#pragma unroll
            for (int c = 0; c < 2; c++) {
                u32 i = c * THREADS + threadIdx.x;
#pragma unroll
                for (int r = 0; r < R; r++) acc[c][r] = i < values ? ((const float*)staged)[r * values + i] : 0.0f;
            }
        }
        // Values: a dimension a thread, or two. As many keys at once as fit into shared memory, a power of two: 16 or more
        // of one byte, 8 of two, 4 of four, so that they are whole lines. The next ones are on their way meanwhile.
        const u32 E = 16 / V;
        u32 at_once = PAGE;
        while (at_once * d * E > LINES * 16) at_once /= 2;
        u32 lines = at_once * d * E / 16;
        u32 base = LATENT ? high : low / at_once * at_once;
        uint4 next[LINES / THREADS];
        u64 page = 0;
        if (!LATENT) page = head_of(p.pages, words, p.spans, span, chunk * CHUNK + base, h);
        if (!LATENT) fetch(next, page + p.pages.keys + (u64)(base % PAGE) * d * E, lines);
#pragma unroll 1
        while (base < high) {
            sync_block();
#pragma unroll
            for (int i = 0; i < LINES / THREADS; i++) staged[threadIdx.x + i * THREADS] = next[i];
            sync_block();
            u32 begin_key = base < low ? low - base : 0, end_key = high - base < at_once ? high - base : at_once;
            u32 first_key = base;
            base += at_once;
            if (base < high) {
                page = head_of(p.pages, words, p.spans, span, chunk * CHUNK + base, h);
                fetch(next, page + p.pages.keys + (u64)(base % PAGE) * d * E, lines);
            }
#pragma unroll
            for (int c = 0; c < 2; c++) {
                u32 i = c * THREADS + threadIdx.x;
                if (i >= d) continue;
#pragma unroll 4
                for (u32 key = begin_key; key < end_key; key++) {
                    float v = stored<DTYPE>(staged, key * d + i);
                    u32 whole = (u32)(int)((const i8*)staged)[key * d + i];
#pragma unroll
                    for (int r = 0; r < R; r++) {
                        float weight = w[r][first_key + key];
                        if (INTEGERS) sums[c][r] += whole * as_bits(weight);
                        else acc[c][r] = fmaf(v, weight, acc[c][r]);
                    }
                }
            }
        }
#pragma unroll
        for (int c = 0; c < 2; c++) {
            u32 i = c * THREADS + threadIdx.x;
            if (i >= values) continue;
#pragma unroll
            for (int r = 0; r < R; r++) {
                if (r >= rows) continue;
                if (INTEGERS) acc[c][r] = (float)(int)sums[c][r] * worth[1][r];
                u64 row = (u64)(first_row + r / group) * p.heads + first_head + r % group;
                if (p.split) {
                    ((float*)p.parts)[(row * p.chunks + chunk) * (values + 2) + 2 + i] = acc[c][r];
                } else {
                    float* out = (float*)p.out + row * values + i;
                    if (chunk == begin) *out = seen[r] ? acc[c][r] * fresh[r] : 0.0f;
                    else if (seen[r]) *out = fmaf(acc[c][r], fresh[r], *out * old[r]);
                }
            }
        }
    }
    sync_block();
#pragma unroll 1
    for (u32 r = 0; r < rows; r++) {
        u64 row = (u64)(first_row + r / group) * p.heads + first_head + r % group;
        if (p.split) {
            float* part = (float*)p.parts + (row * p.chunks + blockIdx.z) * (values + 2);
            if (threadIdx.x == 0) {
                part[0] = best[r];
                part[1] = total[r];
            }
            continue;
        }
        float inv = 1.0f / total[r];
        if (p.sinks) {
            float sink = ((const float*)p.sinks)[first_head + r % group];
            float m = fmaxf(best[r], sink), keep = exp_(best[r] - m);
            inv = keep / fmaf(total[r], keep, exp_(sink - m));
        }
        for (u32 i = threadIdx.x; i < values; i += THREADS) {
            float* out = (float*)p.out + row * values + i;
            *out = *out * inv;
        }
    }
}

#define ATTEND_OF(name, DTYPE, R, D)                                             \
    KERNEL_BLOCKS(THREADS, 2, name, Attend) {                                    \
        SHARED float q[R][D], w[R][CHUNK], best[R], total[R], old[R], fresh[R];  \
        SHARED float worth[2][R];                                                \
        SHARED bool seen[R];                                                     \
        SHARED uint4 staged[LINES];                                              \
        attend<DTYPE, R, D>(p, q, w, best, total, old, fresh, seen, worth, staged); \
    }
#define ATTEND(name, DTYPE, R) ATTEND_OF(name, DTYPE, R, MAX_D)
