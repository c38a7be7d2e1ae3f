// variants: sm80
// Operations on the rows of activations: embedding, norms, quantization, sums, gates. A row is a block's; blocks have
// 256 threads. Formulas: `Backend` in rust/src/backend/mod.rs.
#include "grouped.cuh"

/// Element k of row n of a packed matrix (pack.rs), as f32.
DEVICE float weight(u64 w, u32 form, const Grouped& how, u32 k_all, u32 n, u32 k) {
    u32 lane = n % 32, b = k / 256, i = k % 256;
    u32 groups = (k_all + 31) / 32, blocks = (k_all + 255) / 256;
    if (form == 0) {
        u64 tile = w + (u64)(n / 32) * 512 * (blocks + groups) + (u64)b * 9 * 512;
        const u32* header = (const u32*)(tile + lane * 16);
        u32 g = i / 32, j = i % 32;
        u32 code = *(const u8*)(tile + (1 + g) * 512 + lane * 16 + j % 16);
        int q = (int)(j < 16 ? code & 15 : code >> 4);
        int sc = (int)((header[1] >> (4 * g)) & 15) + 1;
        int mn = (int)(i8)(header[2 + g / 4] >> (8 * (g % 4)));
        return as_float(header[0]) * (float)(sc * q - mn);
    }
    if (form == 1) {
        u64 tile = w + (u64)(n / 32) * (128 * blocks + 1024 * groups) + (u64)b * (128 + 8 * 1024);
        float d = *(const float*)(tile + lane * 4);
        return d * (float)*(const i8*)(tile + 128 + (i / 16) * 512 + lane * 16 + i % 16);
    }
    if (form == 5) {
        u64 header = block_grouped(how, how.m.w, n / 32, b) + lane * 4, lines = header + 128 * how.header;
        u32 left = groups - b * 8, count = left < 8 ? left : 8, g = i / 32, j = i % 16, top = i % 32 / 16;
        u32 high = HIGH(how.how), table = TABLE(how.how);
        const u32 q = read4((const void*)(lines + lane * 12 + (u64)g * 512 + j / 4 * 4));
        u64 more = lines + (u64)count * 512 + (u64)g * high * 128;
        u32 first = high > 0 ? read4((const void*)more) : 0, second = high > 1 ? read4((const void*)(more + 128)) : 0;
        u32 unit = GROUP(how.how) == 16 ? 16 : 32, v[2];
        values(high, table, q, first, second, j / 4, v[0], v[1]);
        Step step = step_of(how, header, i / unit, unit);
        return step.s * (float)(int)(i8)((top ? v[1] : v[0]) >> (8 * (j % 4))) + step.o;
    }
    if (form == 4) {
        u64 tile = w + (u64)(n / 32) * 512 * ((k_all + 3) / 4);
        return *(const float*)(tile + (u64)(k / 4) * 512 + lane * 16 + (k % 4) * 4);
    }
    u64 tile = w + (u64)(n / 32) * 512 * ((k_all + 7) / 8);
    u16 h = *(const u16*)(tile + (u64)(k / 8) * 512 + lane * 16 + (k % 8) * 2);
    return form == 2 ? bf16_to_f32(h) : f16_to_f32(h);
}

struct Embed {
    u64 table, ids, out;
    u32 form, width;
    float scale;
    u32 pad;
    Grouped how;
};
/// out[r] = scale * table[ids[r]].
KERNEL(256, embed, Embed) {
    u32 id = ((const u32*)p.ids)[blockIdx.x];
    float* out = (float*)p.out + (u64)blockIdx.x * p.width;
    for (u32 k = threadIdx.x; k < p.width; k += 256) {
        out[k] = weight(p.table, p.form, p.how, p.width, id, k) * p.scale;
    }
}

struct Norm {
    u64 x, gain, bias, out;
    Acts acts;
    /// Numbers from a row to the next; of a piece; of the gain.
    u32 in_row, out_row, width, gain_width;
    float eps;
    /// 1: subtract the mean; blocks of quantized activations to write, or 0.
    u32 centred, blocks, pad;
};
/// Numbers of a row in shared memory at once: a multiple of 16.
#define STAGED 4096
/// In the first warp: the sum of a row, or of (x - from)^2, as sum16 and mean_square have it. The row comes by way of
/// shared memory, as a chain of sums that waited for each load would take a hundred times as long.
template <bool SQUARES>
DEVICE float reduce(const float* x, u32 n, float from, float* staged) {
    float sum = 0.0f;
#pragma unroll 1
    for (u32 first = 0; first < n; first += STAGED) {
        u32 count = n - first < STAGED ? n - first : STAGED;
        sync_block();
#pragma unroll 4
        for (u32 i = threadIdx.x; i < count; i += 256) staged[i] = x[first + i];
        sync_block();
        if (threadIdx.x < 32) {
#pragma unroll 8
            for (u32 i = threadIdx.x % 16; i < count; i += 16) {
                sum = SQUARES ? fmaf(staged[i] - from, staged[i] - from, sum) : sum + staged[i];
            }
        }
    }
    return threadIdx.x < 32 ? tree(sum) : 0.0f;
}
/// Piece blockIdx.y of row blockIdx.x. x and out may be the same.
KERNEL(256, norm, Norm) {
    SHARED float staged[STAGED], part[2];
    const float* x = (const float*)p.x + (u64)blockIdx.x * p.in_row + (u64)blockIdx.y * p.width;
    float* out = (float*)p.out + (u64)blockIdx.x * p.out_row + (u64)blockIdx.y * p.width;
    float mean = 0.0f;
    if (p.centred) {
        float sum = reduce<false>(x, p.width, 0.0f, staged);
        if (threadIdx.x == 0) part[0] = sum / (float)p.width;
        sync_block();
        mean = part[0];
    }
    float squares = reduce<true>(x, p.width, mean, staged);
    if (threadIdx.x == 0) part[1] = 1.0f / sqrtf(squares / (float)p.width + p.eps);
    sync_block();
    float inv = part[1];
    const float* gain = (const float*)p.gain + (u64)blockIdx.y * p.width % p.gain_width;
    const float* bias = (const float*)p.bias;
#pragma unroll 4
    for (u32 i = threadIdx.x; i < p.width; i += 256) {
        float y = (p.centred ? x[i] - mean : x[i]) * inv * gain[i];
        out[i] = bias ? y + bias[i] : y;
    }
    if (p.blocks == 0) return;
    sync_block();
    for (u32 b = threadIdx.x / 32; b < p.blocks; b += 8) {
        quantize_block(out + b * 256, (int)p.width - (int)b * 256, p.acts, blockIdx.x, b, p.blocks);
    }
}

struct Quantize {
    u64 x;
    Acts acts;
    u32 width, blocks;
};
KERNEL(256, quantize, Quantize) {
    u32 b = blockIdx.y * 8 + threadIdx.x / 32;
    if (b >= p.blocks) return;
    const float* x = (const float*)p.x + (u64)blockIdx.x * p.width + b * 256;
    quantize_block(x, (int)p.width - (int)b * 256, p.acts, blockIdx.x, b, p.blocks);
}

struct Each {
    u64 x, y, out;
    /// Of x and out; numbers from a row of y to the next, the first one's place in it.
    u32 width, y_row, y_first, kind;
    float scale;
    Act act;
    u32 rows, pad;
};
/// One number a thread.
KERNEL(256, each, Each) {
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i >= (u64)p.rows * p.width) return;
    u32 r = (u32)(i / p.width), c = (u32)(i % p.width);
    const float* ys = (const float*)p.y + (u64)r * p.y_row + p.y_first;
    float x = ((const float*)p.x)[i];
    float* out = (float*)p.out + i;
    switch (p.kind) {
        case 0: *out = x + ys[c]; break;                          // add
        case 1: *out = fmaf(p.scale, ys[c], x); break;            // add_scaled
        case 2: *out = x * p.scale; break;                        // scale
        case 3: *out = softcap(x, p.scale, 2.0f / p.scale); break;
        case 4: *out = x * ((const float*)p.y)[c]; break;         // multiply
        case 5: *out = gate(p.act, x, ys[c]); break;              // gate_with
        case 6: *out = fmaf(sigmoid(((const float*)p.y)[r]), x, *out); break; // add_gated: x is y, y the gate
        case 7: *out = sigmoid(ys[c / (u32)p.scale]) * x; break;  // gate_heads: as many columns share a gate
        case 8: { // act(gate) * up, interleaved
            const float* both = ys + c / 16 * 32 + c % 16;
            *out = gate(p.act, x, both[16]);
            break;
        }
        default: *out = x; break;                                 // copy
    }
}

struct Select {
    u64 x, rows, out;
    /// Numbers of a row of out; from a row of x to the next; parts of a row of x and positions, or 0.
    u32 width, row, heads, count;
};
/// out[r] = x[rows[r]], r = blockIdx.x; with heads all first parts of rows, then all second ones, and so on.
KERNEL(256, select_rows, Select) {
    u32 r = blockIdx.x, from = p.heads ? r % p.count * p.heads + r / p.count : ((const u32*)p.rows)[r];
    const float* x = (const float*)p.x + (u64)from * p.row;
    float* out = (float*)p.out + (u64)r * p.width;
    for (u32 i = threadIdx.x; i < p.width; i += 256) out[i] = x[i];
}

struct MatchPower {
    u64 x, to;
    u32 width;
    float least;
};
/// x[r] *= sqrt(mean(to[r]^2)) / sqrt(max(mean(x[r]^2), least)).
KERNEL(256, match_power, MatchPower) {
    SHARED float factor;
    float* x = (float*)p.x + (u64)blockIdx.x * p.width;
    const float* to = (const float*)p.to + (u64)blockIdx.x * p.width;
    if (threadIdx.x < 32) {
        float own = sqrtf(fmaxf(mean_square(x, p.width, 0.0f), p.least));
        float other = sqrtf(mean_square(to, p.width, 0.0f));
        if (threadIdx.x == 0) factor = other / own;
    }
    sync_block();
    for (u32 i = threadIdx.x; i < p.width; i += 256) x[i] = x[i] * factor;
}

struct Cut {
    u64 x, out;
    u32 width, in_row;
    float times;
    u32 pad;
};
/// The gates of interleaved rows, max(0, gate - mean - times * deviation).
KERNEL(256, cut, Cut) {
    SHARED float bar;
    const float* x = (const float*)p.x + (u64)blockIdx.x * p.in_row;
    float* out = (float*)p.out + (u64)blockIdx.x * p.width;
    for (u32 i = threadIdx.x; i < p.width; i += 256) out[i] = x[i / 16 * 32 + i % 16];
    sync_block();
    if (threadIdx.x < 32) {
        float mean = sum16(out, p.width) / (float)p.width;
        float deviation = sqrtf(mean_square(out, p.width, mean));
        if (threadIdx.x == 0) bar = fmaf(deviation, p.times, mean);
    }
    sync_block();
    for (u32 i = threadIdx.x; i < p.width; i += 256) out[i] = fmaxf(out[i] - bar, 0.0f);
}

struct AltUp {
    u64 streams[8];
    u64 coefficients, seen;
    u32 n, width, correct, rows;
};
/// predict: s[i] += sum over j of c[n i + j] * s[j]; correct: s[i] += (1 + c[i]) * (seen - s[0]).
KERNEL(256, altup, AltUp) {
    u64 at = (u64)blockIdx.x * 256 + threadIdx.x;
    if (at >= (u64)p.rows * p.width) return;
    u32 r = (u32)(at / p.width);
    float old[8];
#pragma unroll
    for (int j = 0; j < 8; j++) old[j] = j < p.n ? ((const float*)p.streams[j])[at] : 0.0f;
    const float* c = (const float*)p.coefficients + (u64)r * (p.correct ? p.n : p.n * p.n);
    float change = p.correct ? ((const float*)p.seen)[at] - old[0] : 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        if (i >= p.n) break;
        float x = old[i];
        if (p.correct) {
            x = fmaf(1.0f + c[i], change, x);
        } else {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                if (j < p.n) x = fmaf(c[i * p.n + j], old[j], x);
            }
        }
        ((float*)p.streams[i])[at] = x;
    }
}
