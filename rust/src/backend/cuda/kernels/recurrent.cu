// variants: sm80
// Layers that keep a state: a causal convolution, and the recurrence over a matrix of each head, position by position.
// Formulas: rust/src/backend/recurrent.rs; orders: rust/src/kernels/recurrent.rs. States lie as on the CPU: what the
// convolution remembers, then for each 16 columns of a head [key_dim][16].
#include "spans.cuh"

struct Conv {
    u64 x, taps, bias, states, out;
    Spans spans;
    /// Numbers of a row of x; the first channel of it that is convolved; channels; positions seen; f32 of a state; 1: a
    /// gate, whose B are the first numbers of a row and C those behind.
    u32 row, first, channels, width, size, gated;
};
/// 256 channels of row blockIdx.x.
KERNEL(256, conv, Conv) {
    u32 c = blockIdx.y * 256 + threadIdx.x, r = blockIdx.x, n = p.channels;
    if (c >= n) return;
    const u32* words = (const u32*)p.spans.words;
    const u32* span = words + 4 * words[p.spans.of_row + r];
    const u32* table = words + p.spans.tables + span[3];
    u32 i = r - span[0], past = p.width - 1;
    const float* before = span[2] > 0 ? (const float*)p.states + (u64)table[0] * p.size + c : nullptr;
    const float* x = (const float*)p.x + (u64)span[0] * p.row;
    float y = p.bias ? ((const float*)p.bias)[c] : 0.0f, u = 0.0f;
    bool last = i + 1 == span[1];
    float* after = (float*)p.states + (u64)table[1] * p.size + c;
    for (u32 j = 0; j < p.width; j++) {
        if (i + j >= past) {
            const float* row = x + (u64)(i + j - past) * p.row;
            u = p.gated ? row[p.first + c] * row[c] : row[p.first + c];
        } else {
            u = before ? before[(u64)(i + j) * n] : 0.0f;
        }
        y = fmaf(u, ((const float*)p.taps)[(u64)j * n + c], y);
        if (last && j > 0) after[(u64)(j - 1) * n] = u;
    }
    if (p.gated) y = y * x[(u64)i * p.row + n + c];
    else y = y * sigmoid(y);
    ((float*)p.out)[(u64)r * n + c] = y;
}

/// ln(1 + e^x) = max(x, 0) + 2 artanh(z), z = y / (2 + y), y = e^-|x|.
DEVICE float softplus(float x) {
    float y = exp_(-fabsf(x)), z = y / (2.0f + y), t = z * z;
    float s = fmaf(as_float(0x3d888889u), t, as_float(0x3d9d89d9u)); // 1 / 15, 1 / 13
    s = fmaf(s, t, as_float(0x3dba2e8cu));                          // 1 / 11
    s = fmaf(s, t, as_float(0x3de38e39u));                          // 1 / 9
    s = fmaf(s, t, as_float(0x3e124925u));                          // 1 / 7
    s = fmaf(s, t, as_float(0x3e4ccccdu));                          // 1 / 5
    s = fmaf(s, t, as_float(0x3eaaaaabu));                          // 1 / 3
    s = fmaf(s, t, 1.0f);
    return fmaf(2.0f * z, s, fmaxf(x, 0.0f));
}

struct Recur {
    /// Projection, rates, what the convolution gave; vectors of heads; decay and strength of each head of each row.
    u64 x, rates, conv, decay, dt_bias, skip, states, scalars, out;
    Spans spans;
    /// Heads; groups of keys; 1: head h is of group h % groups; rows and columns of a state.
    u32 heads, groups, tiled, key_dim, value_dim;
    /// 1: a delta net; numbers of a row of x, of conv, of rates; f32 of a state, of them the convolution's; spans.
    u32 delta, x_row, row, rates_row, size, conv_size, count;
};
DEVICE u32 group_of(const Recur& p, u32 head) { return p.tiled ? head % p.groups : head / (p.heads / p.groups); }

/// Decay and strength of the heads of row blockIdx.x; of a delta net keys and queries get their lengths.
KERNEL(256, rates, Recur) {
    u32 r = blockIdx.x;
    const float* rates = (const float*)p.rates + (u64)r * p.rates_row;
    for (u32 h = threadIdx.x; h < p.heads; h += 256) {
        float dt = softplus(rates[p.rates_row - p.heads + h] + ((const float*)p.dt_bias)[h]);
        float* to = (float*)p.scalars + 2 * ((u64)r * p.heads + h);
        to[0] = exp_(((const float*)p.decay)[h] * dt);
        to[1] = p.delta ? sigmoid(rates[h]) : dt;
    }
    if (!p.delta) return;
    float d = (float)p.key_dim;
    for (u32 i = threadIdx.x / 32; i < 2 * p.groups; i += 8) {
        float* x = (float*)p.conv + (u64)r * p.row + (u64)i * p.key_dim;
        float inv = 1.0f / sqrtf(mean_square(x, (int)p.key_dim, 0.0f) + 1e-6f / d);
        float gain = i < p.groups ? 1.0f / d : 1.0f / sqrtf(d);
        sync_warp();
        for (u32 j = threadIdx.x % 32; j < p.key_dim; j += 32) x[j] = x[j] * inv * gain;
    }
}

/// Rows of a state at most.
#define MAX_KEY 256
/// Columns blockIdx.x * 16 to + 16 of all heads side by side, of span blockIdx.y: four threads a column, one for each chain.
KERNEL(64, recur, Recur) {
    SHARED float state[MAX_KEY * 16];
    u32 j = threadIdx.x % 4, column = threadIdx.x / 4, head = blockIdx.x * 16 / p.value_dim, d = p.key_dim;
    const u32* words = (const u32*)p.spans.words;
    const u32* span = words + 4 * blockIdx.y;
    const u32* table = words + p.spans.tables + span[3];
    u64 at = p.conv_size + (u64)blockIdx.x * 16 * d;
    const float* before = (const float*)p.states + (u64)table[0] * p.size + at;
    float* after = (float*)p.states + (u64)table[1] * p.size + at;
    for (u32 i = threadIdx.x; i < 16 * d; i += 64) state[i] = span[2] > 0 ? before[i] : 0.0f;
    sync_block();
    u32 keys = p.groups * d, values = p.heads * p.value_dim, group = group_of(p, head) * d;
    u32 q_at = (p.delta ? 0 : values + keys) + group, k_at = (p.delta ? keys : values) + group;
    u32 v_at = (p.delta ? 2 * keys : 0) + blockIdx.x * 16 + column;
    for (u32 r = span[0]; r < span[0] + span[1]; r++) {
        const float* row = (const float*)p.conv + (u64)r * p.row;
        const float* scalars = (const float*)p.scalars + 2 * ((u64)r * p.heads + head);
        float decay = scalars[0], u = row[v_at], sum = 0.0f;
        if (p.delta) {
            for (u32 i = j; i < d; i += 4) sum = fmaf(state[i * 16 + column], row[k_at + i], sum);
            sum = sum + shuffle_xor(sum, 1);
            sum = sum + shuffle_xor(sum, 2);
            u = fmaf(sum, -decay, u);
            sum = 0.0f;
        }
        u = u * scalars[1];
        for (u32 i = j; i < d; i += 4) {
            float s = fmaf(row[k_at + i], u, state[i * 16 + column] * decay);
            state[i * 16 + column] = s;
            sum = fmaf(s, row[q_at + i], sum);
        }
        sum = sum + shuffle_xor(sum, 1);
        sum = sum + shuffle_xor(sum, 2);
        if (j == 0) ((float*)p.out)[(u64)r * values + blockIdx.x * 16 + column] = sum;
    }
    sync_block();
    for (u32 i = threadIdx.x; i < 16 * d; i += 64) after[i] = state[i];
}

/// out = silu(z) * (out + skip * v), z the columns of x behind `q, k, v` or before them.
KERNEL(256, recur_gate, Recur) {
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    u32 values = p.heads * p.value_dim;
    if (i >= (u64)p.count * values) return;
    u64 r = i / values, c = i % values;
    float* out = (float*)p.out + i;
    float y = *out, z = ((const float*)p.x)[r * p.x_row + (p.delta ? 2 * p.groups * p.key_dim + values : 0) + c];
    if (p.skip) y = y + ((const float*)p.skip)[c / p.value_dim] * ((const float*)p.conv)[r * p.row + c];
    Act silu = {SILU, 0.0f, 0.0f, 0.0f, 0.0f};
    *out = gate(silu, z, y);
}
