// variants: sm80
// Mixtures of experts but for their products: who chooses whom, which rows meet which matrix, and the weighted sums.
// Formulas: `Routing` and `Backend::moe` in rust/src/backend/mod.rs.
#include "device.cuh"

/// Experts, and experts of a position, at most.
#define MAX_EXPERTS 1024
#define MAX_CHOSEN 32
#define NOBODY 0xffffffffu

/// The largest of the keys not taken, the first of equals; in lane 0 of a warp.
DEVICE u32 largest(const float* keys, const bool* taken, u32 n) {
    u32 best = NOBODY;
    float most = 0.0f;
    for (u32 i = threadIdx.x % 32; i < n; i += 32) {
        if (taken[i] || (best != NOBODY && !(keys[i] > most))) continue;
        best = i;
        most = keys[i];
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        float other = shuffle_xor(most, lanes);
        u32 index = (u32)shuffle_xor((int)best, lanes);
        bool better = best == NOBODY || other > most || (other == most && index < best);
        if (index != NOBODY && better) {
            best = index;
            most = other;
        }
    }
    return best == NOBODY ? 0 : best;
}

struct Route {
    /// Logits [rows][experts], which become scores; chosen [rows][k]: an expert and its weight, experts ascending.
    u64 logits, correction, scales, chosen;
    /// softmax: 1, else a sigmoid; groups: 0 if there are none; renormalise: 1, the sum plus `more` divides.
    u32 experts, k, softmax, groups, open, by_two, renormalise;
    float more, scale;
    u32 pad;
};
/// A row a block, of one warp.
KERNEL(32, route, Route) {
    SHARED float scores[MAX_EXPERTS], keys[MAX_EXPERTS], of_group[MAX_EXPERTS];
    SHARED bool taken[MAX_EXPERTS], open[MAX_EXPERTS];
    SHARED u32 picked[MAX_CHOSEN], sorted[MAX_CHOSEN];
    u32 lane = threadIdx.x, n = p.experts;
    float* logits = (float*)p.logits + (u64)blockIdx.x * n;
    float most = -INFINITE, total = 0.0f;
    if (p.softmax) {
        for (u32 i = lane; i < n; i += 32) most = fmaxf(most, logits[i]);
#pragma unroll
        for (int m = 16; m > 0; m /= 2) most = fmaxf(most, shuffle_xor(most, m));
        for (u32 i = lane; i < n; i += 32) scores[i] = exp_(logits[i] - most);
        sync_warp();
        total = sum16(scores, (int)n);
        sync_warp();
    }
    for (u32 i = lane; i < n; i += 32) {
        float score = p.softmax ? scores[i] / total : sigmoid(logits[i]);
        logits[i] = scores[i] = score;
        keys[i] = p.correction ? score + ((const float*)p.correction)[i] : score;
        taken[i] = false;
    }
    sync_warp();
    if (p.groups) {
        u32 size = n / p.groups;
        for (u32 g = lane; g < p.groups; g += 32) {
            float first = -INFINITE, second = -INFINITE;
            for (u32 i = g * size; i < (g + 1) * size; i++) {
                second = fmaxf(second, fminf(first, keys[i]));
                first = fmaxf(first, keys[i]);
            }
            of_group[g] = p.by_two ? first + second : first;
            open[g] = false;
        }
        sync_warp();
        for (u32 i = 0; i < p.open; i++) {
            u32 g = largest(of_group, open, p.groups);
            if (lane == 0) open[g] = true;
            sync_warp();
        }
        for (u32 i = lane; i < p.groups * size; i += 32) taken[i] = !open[i / size];
        sync_warp();
    }
    for (u32 i = 0; i < p.k; i++) {
        u32 e = largest(keys, taken, n);
        if (lane == 0) {
            picked[i] = e;
            taken[e] = true;
        }
        sync_warp();
    }
    u32 place = 0;
    for (u32 i = 0; i < p.k && lane < p.k; i++) {
        place += picked[i] < picked[lane] || (picked[i] == picked[lane] && i < lane);
    }
    if (lane < p.k) sorted[place] = picked[lane];
    sync_warp();
    float sum = 0.0f;
    for (u32 i = 0; i < p.k; i++) sum = sum + scores[sorted[i]];
    if (lane < p.k) {
        u32 e = sorted[lane];
        float weight = scores[e];
        if (p.renormalise) weight = weight / (sum + p.more);
        weight = weight * p.scale;
        if (p.scales) weight = weight * ((const float*)p.scales)[e];
        u32* chosen = (u32*)p.chosen + 2 * ((u64)blockIdx.x * p.k + lane);
        chosen[0] = e;
        chosen[1] = as_bits(weight);
    }
}

struct Arrange {
    /// Choices, two words each; for each of `most` blocks of rows a job as in product.cuh; row of x and choice of each row.
    u64 chosen, jobs, rows, places;
    /// Choices; choices of a row; experts; rows of a job.
    u32 count, k, experts, each, most, pad;
};
/// Rows by expert, those of an expert in the order of positions. One block, an expert a thread.
KERNEL(MAX_EXPERTS, arrange, Arrange) {
    SHARED u64 ends[MAX_EXPERTS]; // rows, and jobs in the high half, of the experts up to this
    const u32* chosen = (const u32*)p.chosen;
    u32 e = threadIdx.x, rows = 0;
#pragma unroll 8
    for (u32 i = 0; i < p.count; i++) rows += chosen[2 * i] == e;
    u64 own = (u64)((rows + p.each - 1) / p.each) << 32 | rows;
    ends[e] = own;
#pragma unroll 1
    for (u32 n = 1; n < MAX_EXPERTS; n *= 2) {
        sync_block();
        u64 before = e >= n ? ends[e - n] : 0;
        sync_block();
        ends[e] += before;
    }
    sync_block();
    u32 start = (u32)(ends[e] - own), end = start + rows, row = start;
    for (u32 i = 0; i < p.count && row < end; i++) {
        if (chosen[2 * i] != e) continue;
        ((u32*)p.rows)[row] = i / p.k;
        ((u32*)p.places)[row++] = i;
    }
    uint4* jobs = (uint4*)p.jobs;
    u32 job = (u32)((ends[e] - own) >> 32);
    for (; start < end; start += p.each) {
        jobs[job++] = make_uint4(e, start, end - start < p.each ? end : start + p.each, 0);
    }
    for (u32 i = (u32)(ends[MAX_EXPERTS - 1] >> 32) + e; i < p.most; i += MAX_EXPERTS) jobs[i] = make_uint4(0, 0, 0, 0);
}

struct Combine {
    u64 chosen, y, out;
    u32 rows, width, k, pad;
};
/// out[t] = sum of weight * y[choice], experts ascending.
KERNEL(256, combine, Combine) {
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i >= (u64)p.rows * p.width) return;
    u64 t = i / p.width, c = i % p.width;
    float sum = 0.0f;
    for (u32 j = 0; j < p.k; j++) {
        u64 choice = t * p.k + j;
        sum = fmaf(as_float(((const u32*)p.chosen)[2 * choice + 1]), ((const float*)p.y)[choice * p.width + c], sum);
    }
    ((float*)p.out)[i] = sum;
}
