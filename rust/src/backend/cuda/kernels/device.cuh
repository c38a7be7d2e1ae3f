// What the kernels share: the few instructions that CUDA C++ has no name for, as inline PTX, and the scalar
// functions of rust/src/kernels, operation by operation. Includes nothing, so that NVRTC needs no headers.
//
// tests/cuda/emulator.h defines EMULATED, gives the same names in plain C++, and leaves out the first part.
//
// Compiled with -fmad=false: a multiplication and an addition are fused exactly where the CPU fuses them.
#pragma once

#ifndef EMULATED
typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef signed char i8;

/// A kernel takes one struct by value; rust/src/backend/cuda/launch.rs has the same struct.
#define KERNEL(threads, name, Params) \
    extern "C" __global__ void __launch_bounds__(threads) name(const Params p)
/// The same, for so many blocks on a multiprocessor: without it ptxas spills a few bytes to save a few registers.
#define KERNEL_BLOCKS(threads, blocks, name, Params) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const Params p)
#define DEVICE __device__ __forceinline__
#define MEMBER DEVICE
#define SHARED __shared__
#define ALL 0xffffffffu

DEVICE int dp4a(u32 a, u32 b, int c) {
    int d;
    asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
/// d[16 x 8] += a[16 x 32] * b[32 x 8], int8, by a warp.
DEVICE void mma_i8(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE float f16_to_f32(u16 x) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x));
    return f;
}
/// Rounds to nearest, ties to even.
DEVICE u16 f32_to_f16(float x) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
    return h;
}
/// Weights: read once, so not kept in L1.
DEVICE uint4 stream(const void* at) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
    return v;
}
/// Zeros where there is nothing to read.
DEVICE uint4 stream_if(bool there, const void* at) {
    uint4 v;
    asm("{.reg .pred p; setp.ne.u32 p, %4, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;"
        "@p ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%5];}"
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w) : "r"((u32)there), "l"(at));
    return v;
}
DEVICE float stream_f32(const float* at) {
    float v;
    asm("ld.global.nc.L1::no_allocate.f32 %0, [%1];" : "=f"(v) : "l"(at));
    return v;
}
/// What every lane reads alike, and other blocks too.
DEVICE uint4 read16(const void* at) { return __ldg((const uint4*)at); }
/// The same, and never taken from an earlier read.
DEVICE uint4 reload16(const void* at) {
    uint4 v;
    asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
    return v;
}
DEVICE u32 read4(const void* at) { return __ldg((const u32*)at); }
/// Four of the bytes of b and a, those of a first, as the low three bits of the nibbles of `which` say.
DEVICE u32 permute(u32 a, u32 b, u32 which) {
    u32 d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(which));
    return d;
}
DEVICE float as_float(u32 x) { return __uint_as_float(x); }
DEVICE u32 as_bits(float x) { return __float_as_uint(x); }
DEVICE double as_double(u64 x) { return __longlong_as_double((long long)x); }
DEVICE u64 as_word(double x) { return (u64)__double_as_longlong(x); }
DEVICE float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(ALL, x, lanes); }
DEVICE int shuffle_xor(int x, int lanes) { return __shfl_xor_sync(ALL, x, lanes); }
DEVICE float shuffle(float x, int lane) { return __shfl_sync(ALL, x, lane); }
/// What was there.
DEVICE u32 add(u32* to, u32 x) { return atomicAdd(to, x); }
DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
#endif

#define INFINITE as_float(0x7f800000u)

/// A word of a vector; `i` is known to the compiler wherever this is used.
DEVICE u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }
DEVICE float bf16_to_f32(u16 x) { return as_float((u32)x << 16); }

// rust/src/kernels/activation.rs

/// q and s with e^x = (1 + q) s.
DEVICE void exp_parts(float x, float& q, float& s) {
    const float magic = 12582912.0f;
    float z = fminf(fmaxf(x, -88.0f), 88.8f);
    float shifted = fmaf(z, as_float(0x3fb8aa3bu), magic); // log2(e)
    float n = shifted - magic;
    float r = fmaf(n, 2.1219444e-4f, fmaf(n, -0.6933594f, z));
    float p = fmaf(1.9875691e-4f, r, 1.3981999e-3f);
    p = fmaf(p, r, 8.333452e-3f);
    p = fmaf(p, r, 4.1665796e-2f);
    p = fmaf(p, r, 1.6666665e-1f);
    p = fmaf(p, r, 0.5f);
    q = fmaf(p, r * r, r);
    s = as_float((as_bits(shifted) << 23) + as_bits(1.0f));
}
DEVICE float exp_(float x) {
    float q, s;
    exp_parts(x, q, s);
    return x < -87.3f ? 0.0f : (q + 1.0f) * s;
}
DEVICE float sigmoid(float x) { return 1.0f / (1.0f + exp_(-x)); }

/// An activation: its number in launch.rs, and the numbers of xIELU.
struct Act {
    u32 kind;
    float alpha_p, alpha_n, beta, eps;
};
#define SILU 0
#define GELU 1
#define GELU_TANH 2
#define RELU2 3
#define XIELU 4
#define SIGMOID 5
#define NONE 6
#define CLAMPED_SWIGLU 7

/// act(g) * u. All have one exponential, so its code is here once.
DEVICE float gate(const Act& act, float g, float u) {
    float x = act.kind == CLAMPED_SWIGLU ? fminf(g, 7.0f) : g, z = -x;
    if (act.kind == GELU) {
        float t = fabsf(x);
        float p = fmaf(1.3103856e-6f, t, -1.9795973e-5f);
        p = fmaf(p, t, 9.53955e-5f);
        p = fmaf(p, t, 1.704748e-4f);
        p = fmaf(p, t, -4.985739e-3f);
        p = fmaf(p, t, 3.6442306e-2f);
        p = fmaf(p, t, 0.31828374f);
        p = fmaf(p, t, 0.79788667f);
        z = -(p * t);
    } else if (act.kind == GELU_TANH) {
        z = -(1.595769f * fmaf(x * x * x, 0.044715f, x));
    } else if (act.kind == XIELU) {
        z = fminf(x, act.eps);
    } else if (act.kind == CLAMPED_SWIGLU) {
        z = -(1.702f * x);
    }
    float q, s;
    exp_parts(z, q, s);
    float e = z < -87.3f ? 0.0f : (q + 1.0f) * s, sigmoid = 1.0f / (1.0f + e);
    switch (act.kind) {
        case GELU: {
            float below = 0.5f * e;
            return x * (x < 0.0f ? below : 1.0f - below) * u;
        }
        case RELU2: return fmaxf(x, 0.0f) * fmaxf(x, 0.0f) * u;
        case XIELU: {
            float bend = x > 0.0f ? act.alpha_p * x * x : act.alpha_n * (fmaf(q, s, s - 1.0f) - x);
            return fmaf(act.beta, x, bend) * u;
        }
        case SIGMOID: return sigmoid * u;
        case NONE: return x * u;
        case CLAMPED_SWIGLU: return x * sigmoid * (fminf(fmaxf(u, -7.0f), 7.0f) + 1.0f);
        default: return x * sigmoid * u;
    }
}

// rust/src/kernels/float.rs

DEVICE float softcap(float x, float cap, float twice) {
    return cap * fmaf(sigmoid(x * twice), 2.0f, -1.0f);
}
/// The tree 8-4-2-1 over what lanes 0..16 of a warp hold (lanes 16..32 the same again); every lane gets the sum.
/// A pair's sum does not depend on its order, so the exchange gives the CPU's bits.
DEVICE float tree(float x) {
#pragma unroll
    for (int n = 8; n > 0; n /= 2) x = x + shuffle_xor(x, n);
    return x;
}
/// Sums of x by index modulo 16, ascending, and the tree; by one warp, for all its lanes.
DEVICE float sum16(const float* x, int n) {
    float sum = 0.0f;
    for (int i = threadIdx.x % 16; i < n; i += 16) sum = sum + x[i];
    return tree(sum);
}
/// mean((x - from)^2), likewise.
DEVICE float mean_square(const float* x, int n, float from) {
    float sum = 0.0f;
    for (int i = threadIdx.x % 16; i < n; i += 16) sum = fmaf(x[i] - from, x[i] - from, sum);
    return tree(sum) / (float)n;
}

/// Scale of integers up to `most` for numbers of largest magnitude amax, and its inverse; 0 for (nearly) zeros.
DEVICE void integer_scale(float amax, float most, float& inv, float& scale) {
    bool tiny = amax < as_float(0x17800000u); // 2^-80
    inv = tiny ? 0.0f : most / amax;
    scale = tiny ? 0.0f : amax / most;
}
/// x rounded to an integer, ties to even, in the low byte.
DEVICE u32 round_i8(float x) { return as_bits(x + 12582912.0f) & 255u; }

/// Quantized activations: values [rows][blocks * 256], scales [rows][blocks], sums of 32 values [rows][blocks][8].
struct Acts {
    u64 q, s, sums;
};
/// Quantizes block b of row r, whose numbers begin at x and of which `n` exist; by one warp, 8 numbers a lane.
DEVICE void quantize_block(const float* x, int n, const Acts& acts, u32 r, u32 b, u32 blocks) {
    int lane = threadIdx.x % 32;
    float v[8], amax = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        v[i] = lane * 8 + i < n ? x[lane * 8 + i] : 0.0f;
        amax = fmaxf(amax, fabsf(v[i]));
    }
#pragma unroll
    for (int m = 16; m > 0; m /= 2) amax = fmaxf(amax, shuffle_xor(amax, m));
    float inv, scale;
    integer_scale(amax, 127.0f, inv, scale);
    u32 words[2] = {0, 0};
    int sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        u32 q = round_i8(v[i] * inv);
        words[i / 4] |= q << (8 * (i % 4));
        sum += (int)(i8)q;
    }
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    u64 at = (u64)r * blocks + b;
    u32* q = (u32*)(acts.q + at * 256) + lane * 2;
    q[0] = words[0];
    q[1] = words[1];
    if (lane % 4 == 0) ((short*)acts.sums)[at * 8 + lane / 4] = (short)sum;
    if (lane == 0) ((float*)acts.s)[at] = scale;
}
