// variants: sm80
// A token from each row of logits: rust/src/sample.rs without typical sampling. Bias and penalties first; weights are
// integers, so that their sums are exact in any order, and every operation on doubles is the one that stands there.
#include "device.cuh"

struct Draw {
    /// `how`: HOW words for each row: 1 / temperature, the least weight, the coin and top-p, low word first; 1 if greedy;
    /// top-k or 0. `limits`: of each row the least key that may be drawn, or 0: there are none.
    u64 logits, how, best, limits, sums, out;
    /// Rows are cut into `parts`, a thread block each.
    u32 vocab, parts;
};
#define HOW 10
#define THREADS 256
/// Answers that are no ids: a logit is not a number or infinite; all are minus infinity.
#define NOT_FINITE 0xffffffffu
#define NOTHING 0xfffffffeu

/// Larger for a larger logit, and of equals for a lower id; all ones for what is no number.
DEVICE u64 key_of(float x, u32 id) {
    if (!(x < INFINITE)) return ~0ull;
    u32 bits = as_bits(x + 0.0f); // -0 ties with 0
    u32 ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
    return (u64)ordered << 32 | (u32)~id;
}
DEVICE float logit_of(u64 key) {
    u32 ordered = (u32)(key >> 32);
    return as_float(ordered >> 31 ? ordered & 0x7fffffffu : ~ordered);
}
DEVICE u64 pair(const u32* words) { return (u64)words[1] << 32 | words[0]; }
DEVICE u32 part_length(const Draw& p) { return (p.vocab + p.parts - 1) / p.parts; }

/// round(2^38 exp(x)), x = (logit - max) / temperature, and 0 below `least`.
DEVICE u64 weight_of(float logit, double max, double per_temperature, u64 least) {
    double x = ((double)logit - max) * per_temperature;
    x = x > 0.0 ? 0.0 : x;
    x = x > -60.0 ? x : -60.0;
    double t = x * 1.44269504088896340735992468100189214 + 6755399441055744.0;
    double k = t - 6755399441055744.0;
    double r = (x - k * 0.6931471803691238) - k * 1.9082149292705877e-10;
    double sum = 1.0 / 40320.0;
    sum = sum * r + 1.0 / 5040.0;
    sum = sum * r + 1.0 / 720.0;
    sum = sum * r + 1.0 / 120.0;
    sum = sum * r + 1.0 / 24.0;
    sum = sum * r + 1.0 / 6.0;
    sum = sum * r + 0.5;
    sum = sum * r + 1.0;
    sum = sum * r + 1.0;
    double e = as_double(as_word(sum) + (as_word(t) << 52));
    u64 weight = as_word(e * 274877906944.0 + 4503599627370496.0) & ((1ull << 52) - 1);
    return weight >= least ? weight : 0;
}

struct Edits {
    /// `edits`: the first edit of each row and the end of all, padded to 16 bytes; then of each the id, what is added, the
    /// penalty, what is taken away. Ids of a row differ.
    u64 logits, edits, saved;
    /// restore: 1, the logits as they were.
    u32 rows, vocab, restore, pad;
};
/// `Edit::apply` on row blockIdx.x.
KERNEL(THREADS, edit, Edits) {
    const u32* first = (const u32*)p.edits + blockIdx.x;
    u64 edits = p.edits + (u64)((p.rows + 4) / 4) * 16;
    float *logits = (float*)p.logits + (u64)blockIdx.x * p.vocab, *saved = (float*)p.saved;
    for (u32 i = first[0] + threadIdx.x; i < first[1]; i += THREADS) {
        const uint4 e = read16((const void*)(edits + (u64)i * 16));
        if (p.restore) {
            logits[e.x] = saved[i];
            continue;
        }
        saved[i] = logits[e.x];
        float x = saved[i] + as_float(e.y), penalty = as_float(e.z);
        logits[e.x] = (x > 0.0f ? x / penalty : x * penalty) - as_float(e.w);
    }
}

/// The best of each part.
KERNEL(THREADS, draw_best, Draw) {
    SHARED u64 best[THREADS];
    const float* logits = (const float*)p.logits + (u64)blockIdx.x * p.vocab;
    u32 length = part_length(p), first = blockIdx.y * length;
    u64 found = 0;
#pragma unroll 4
    for (u32 i = threadIdx.x; i < length; i += THREADS) {
        u32 id = first + i;
        u64 key = id < p.vocab ? key_of(logits[id], id) : 0;
        found = key > found ? key : found;
    }
    best[threadIdx.x] = found;
#pragma unroll 1
    for (u32 n = THREADS / 2; n > 0; n /= 2) {
        sync_block();
        if (threadIdx.x < n && best[threadIdx.x + n] > best[threadIdx.x]) best[threadIdx.x] = best[threadIdx.x + n];
    }
    if (threadIdx.x == 0) ((u64*)p.best)[blockIdx.x * p.parts + blockIdx.y] = best[0];
}

/// The best of a row.
DEVICE u64 best_of(const Draw& p) {
    const u64* all = (const u64*)p.best + blockIdx.x * p.parts;
    u64 best = 0;
    for (u32 i = 0; i < p.parts; i++) best = all[i] > best ? all[i] : best;
    return best;
}

/// What a filter of keys keeps of a token's weight.
DEVICE u64 kept(float logit, u32 id, double max, double per_temperature, u64 least, u64 limit) {
    if (limit && key_of(logit, id) < limit) return 0;
    return weight_of(logit, max, per_temperature, least);
}
DEVICE u64 limit_of(const Draw& p) { return p.limits ? ((const u64*)p.limits)[blockIdx.x] : 0; }

#define LIMIT_THREADS 512
#define BINS 256
/// Logits that a thread has on their way at once.
#define AT_ONCE 8
/// Sums of a warp's keys by digit, in halves: a shared atomic on 64 bits would be a loop that lanes with one digit take turns
/// in. The last bins are those of all warps, from a digit on.
struct Bins {
    u32 low[LIMIT_THREADS / 32][BINS], high[LIMIT_THREADS / 32][BINS];
    u64 sums[BINS], prefix, left;
    bool all;
};
DEVICE void add(Bins& bins, u32 warp, u32 digit, u64 x) {
    u32 low = (u32)x, high = (u32)(x >> 32) + (add(&bins.low[warp][digit], low) > ~low); // with the carry
    if (high) add(&bins.high[warp][digit], high);
}
/// The largest key such that those from it on, of keys not below `floor`, have a count of `k`; or without k, a weight of
/// `share` of theirs. Digit by digit: what the keys with the digits so far have for each next digit, the largest first.
DEVICE u64 select(const Draw& p, u64 floor, u32 k, double share, double max, double per_temperature, Bins& bins) {
    const float* logits = (const float*)p.logits + (u64)blockIdx.x * p.vocab;
    u64 prefix = 0, left = k;
#pragma unroll 1
    for (int shift = 56; shift >= 0; shift -= 8) {
        if (shift == 24 && p.vocab <= 1 << 24) {
            prefix |= 0xffull << 24; // of all ids
            continue;
        }
        u32 warp = threadIdx.x / 32, digit = threadIdx.x;
        for (u32 i = threadIdx.x; i < LIMIT_THREADS / 32 * BINS; i += LIMIT_THREADS) {
            bins.low[i / BINS][i % BINS] = bins.high[i / BINS][i % BINS] = 0;
        }
        sync_block();
#pragma unroll 1
        for (u32 first = threadIdx.x; first < p.vocab; first += AT_ONCE * LIMIT_THREADS) {
            float some[AT_ONCE];
#pragma unroll
            for (u32 i = 0; i < AT_ONCE; i++) {
                u32 id = first + i * LIMIT_THREADS;
                some[i] = id < p.vocab ? logits[id] : 0.0f;
            }
#pragma unroll
            for (u32 i = 0; i < AT_ONCE; i++) {
                u32 id = first + i * LIMIT_THREADS;
                u64 key = key_of(some[i], id);
                if (id >= p.vocab || key < floor || (shift < 56 && (key ^ prefix) >> (shift + 8))) continue;
                u64 weight = k ? 1 : weight_of(some[i], max, per_temperature, 0);
                if (weight) add(bins, warp, (u32)(key >> shift) & (BINS - 1), weight);
            }
        }
        sync_block();
        // Sums from the largest digit on.
        u64 sum = 0;
        if (digit < BINS) {
            for (u32 i = 0; i < LIMIT_THREADS / 32; i++) sum += (u64)bins.high[i][digit] << 32 | bins.low[i][digit];
            bins.sums[digit] = sum;
        }
        u64 own = sum;
#pragma unroll 1
        for (u32 n = 1; n < BINS; n *= 2) {
            sync_block();
            if (digit + n < BINS) sum += bins.sums[digit + n];
            sync_block();
            if (digit < BINS) bins.sums[digit] = sum;
        }
        sync_block();
        if (!k && shift == 56) {
            u64 total = bins.sums[0];
            left = (u64)ceil(share * (double)total);
            left = left < 1 ? 1 : left < total ? left : total;
        }
        if (digit < BINS && sum >= left && sum - own < left) {
            bins.prefix = prefix | (u64)digit << shift;
            bins.left = left - (sum - own);
            bins.all = sum == left;
        }
        sync_block();
        prefix = bins.prefix;
        left = bins.left;
        if (bins.all) break; // whatever the digits to come
    }
    return prefix;
}
/// The limit of top-k and top-p.
KERNEL_BLOCKS(LIMIT_THREADS, 1, draw_limit, Draw) {
    SHARED Bins bins;
    const u32* how = (const u32*)p.how + blockIdx.x * HOW;
    u64 best = best_of(p), limit = 0;
    double share = as_double(pair(how + 6));
    bool odd = best == ~0ull || logit_of(best) == -INFINITE;
    if (!how[8] && !odd) {
        double max = (double)logit_of(best), per_temperature = as_double(pair(how));
        if (how[9]) limit = select(p, 0, how[9], 0.0, max, per_temperature, bins);
        if (share < 1.0) limit = select(p, limit, 0, share, max, per_temperature, bins);
    }
    if (threadIdx.x == 0) ((u64*)p.limits)[blockIdx.x] = limit;
}

/// The sum of the weights of each part.
KERNEL(THREADS, draw_sums, Draw) {
    SHARED u64 sums[THREADS];
    const u32* how = (const u32*)p.how + blockIdx.x * HOW;
    if (how[8]) return;
    const float* logits = (const float*)p.logits + (u64)blockIdx.x * p.vocab;
    double max = (double)logit_of(best_of(p)), per_temperature = as_double(pair(how));
    u64 least = pair(how + 2), limit = limit_of(p), sum = 0;
    u32 length = part_length(p), first = blockIdx.y * length;
    for (u32 i = threadIdx.x; i < length; i += THREADS) {
        u32 id = first + i;
        if (id < p.vocab) sum += kept(logits[id], id, max, per_temperature, least, limit);
    }
    sums[threadIdx.x] = sum;
#pragma unroll 1
    for (u32 n = THREADS / 2; n > 0; n /= 2) {
        sync_block();
        if (threadIdx.x < n) sums[threadIdx.x] += sums[threadIdx.x + n];
    }
    if (threadIdx.x == 0) ((u64*)p.sums)[blockIdx.x * p.parts + blockIdx.y] = sums[0];
}

/// The token at which the sum of weights, by ascending id, exceeds the coin times their total.
KERNEL(THREADS, draw_pick, Draw) {
    SHARED u64 sums[THREADS];
    const u32* how = (const u32*)p.how + blockIdx.x * HOW;
    u32* out = (u32*)p.out + blockIdx.x;
    u64 best = best_of(p);
    bool nothing = logit_of(best) == -INFINITE;
    if (best == ~0ull || nothing || how[8]) {
        if (threadIdx.x == 0) *out = best == ~0ull ? NOT_FINITE : nothing ? NOTHING : ~(u32)best;
        return;
    }
    const u64* parts = (const u64*)p.sums + blockIdx.x * p.parts;
    u64 total = 0;
    for (u32 i = 0; i < p.parts; i++) total += parts[i];
    u64 left = (u64)(as_double(pair(how + 4)) * (double)total);
    left = left < total - 1 ? left : total - 1;
    u32 part = 0;
    while (left >= parts[part]) left -= parts[part++];
    // Neighbours in this part to each thread.
    const float* logits = (const float*)p.logits + (u64)blockIdx.x * p.vocab;
    double max = (double)logit_of(best), per_temperature = as_double(pair(how));
    u32 length = part_length(p), each = (length + THREADS - 1) / THREADS;
    u32 end = (part + 1) * length < p.vocab ? (part + 1) * length : p.vocab;
    u32 id = part * length + threadIdx.x * each, last = id + each < end ? id + each : end;
    u64 least = pair(how + 2), limit = limit_of(p), sum = 0;
    for (u32 i = id; i < last; i++) sum += kept(logits[i], i, max, per_temperature, least, limit);
    sums[threadIdx.x] = sum;
    sync_block();
    if (threadIdx.x) return;
    u32 thread = 0;
    while (left >= sums[thread]) left -= sums[thread++];
    id = part * length + thread * each;
    for (;;) {
        u64 weight = kept(logits[id], id, max, per_temperature, least, limit);
        if (left < weight) break;
        left -= weight;
        id++;
    }
    *out = id;
}
