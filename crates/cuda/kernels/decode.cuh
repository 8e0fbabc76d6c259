// Block formats. A matrix is stored plane by plane: equal fields of all blocks together.
// A group is 32 neighbouring weights of a row: weight i is s[i / 16] * q[i] + m[i / 16], with
// the codes q as packed signed bytes, exactly as the CPU's definition has them.
//
// TYPE is the format's number in GGUF files.

#define F32 0
#define F16 1
#define Q4_0 2
#define Q4_1 3
#define Q5_0 6
#define Q5_1 7
#define Q8_0 8
#define Q2_K 10
#define Q3_K 11
#define Q4_K 12
#define Q5_K 13
#define Q6_K 14
#define IQ2_XXS 16
#define IQ2_XS 17
#define IQ3_XXS 18
#define IQ1_S 19
#define IQ4_NL 20
#define IQ3_S 21
#define IQ2_S 22
#define IQ4_XS 23
#define IQ1_M 29
#define BF16 30
#define MXFP4 39
#define NVFP4 40

// Where a stack of matrices lies, and the codebooks.
struct Mat {
    const u8 *p[5];
    const u8 *grids;
    int n;
    int k;
};

struct Group {
    int q[8];
    float s[2];
    float m[2];
};

// Offsets of the codebooks.
#define GRID_IQ2_XXS 0
#define GRID_IQ2_XS 2048
#define GRID_IQ2_S 6144
#define GRID_IQ1 14336
#define GRID_IQ3_XXS 30720
#define GRID_IQ3_S 31744
#define GRID_SIGNS 33792

#define HAS_MIN (TYPE == Q4_1 || TYPE == Q5_1 || TYPE == Q2_K || TYPE == Q4_K || TYPE == Q5_K)
#define SUPER (TYPE == Q2_K || TYPE == Q3_K || TYPE == Q4_K || TYPE == Q5_K || TYPE == Q6_K || \
    TYPE == IQ2_XXS || TYPE == IQ2_XS || TYPE == IQ2_S || TYPE == IQ3_XXS || TYPE == IQ3_S || \
    TYPE == IQ1_S || TYPE == IQ1_M || TYPE == IQ4_XS)
#define FLOAT (TYPE == F32 || TYPE == F16 || TYPE == BF16)

__device__ __forceinline__ float half_at(const u8 *p, u64 i) {
    return f16_to_f32(((const u16 *)p)[i]);
}

// Bytes below 128, less a constant, as signed bytes. No byte carries into the next.
__device__ __forceinline__ int minus(u32 x, u32 c) {
    return (int)((x + (0x80u - c) * 0x01010101u) ^ 0x80808080u);
}

// Four bits as the low bits of four bytes.
__device__ __forceinline__ u32 spread(u32 bits) {
    return ((bits & 15u) * 0x00204081u) & 0x01010101u;
}

// Magnitudes of at least one, negated where a bit is set.
__device__ __forceinline__ int with_signs(u32 grid, u32 bits) {
    u32 ones = spread(bits);
    return (int)((grid ^ (ones * 255u)) + ones);
}

// Four nibbles in the low halves of bytes, looked up among 16 signed bytes.
__device__ __forceinline__ int lookup(u32 n, u32 t0, u32 t1, u32 t2, u32 t3) {
    u32 low = n & 0x07070707u;
    u32 sel = (low & 7u) | (low >> 4 & 0x70u) | (low >> 8 & 0x700u) | (low >> 12 & 0x7000u);
    u32 a = __byte_perm(t0, t1, sel), b = __byte_perm(t2, t3, sel);
    u32 mask = ((n >> 3) & 0x01010101u) * 255u;
    return (int)((a & ~mask) | (b & mask));
}

// -127 -104 -83 -65 | -49 -35 -22 -10 | 1 13 25 38 | 53 69 89 113
__device__ __forceinline__ int iq4(u32 n) {
    return lookup(n, 0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u);
}

// 0 1 2 3 | 4 6 8 12 and the same negated
__device__ __forceinline__ int mxfp4(u32 n) {
    return lookup(n, 0x03020100u, 0x0c080604u, 0xfdfeff00u, 0xf4f8fafcu);
}

// Half of an unsigned E4M3 number; 127 is zero, and the eighth bit is ignored.
__device__ __forceinline__ float ue4m3_half(u32 x) {
    u32 e = (x >> 3) & 15u, m = (x & 7u) | (e ? 8u : 0u);
    return x == 127u ? 0.0f : (float)m * __int_as_float(((e ? e : 1u) + 116u) << 23);
}

__device__ __forceinline__ void load16(const u8 *p, u32 (&v)[4]) {
    uint4 w = *(const uint4 *)p;
    v[0] = w.x; v[1] = w.y; v[2] = w.z; v[3] = w.w;
}

__device__ __forceinline__ void load32(const u8 *p, u32 (&v)[8]) {
    uint4 a = ((const uint4 *)p)[0], b = ((const uint4 *)p)[1];
    v[0] = a.x; v[1] = a.y; v[2] = a.z; v[3] = a.w;
    v[4] = b.x; v[5] = b.y; v[6] = b.z; v[7] = b.w;
}

// Scale and minimum of sub-block j among the 8 of Q4_K and Q5_K; h is d, dmin, 12 bytes.
__device__ __forceinline__ void k4_scale(const u8 *h, int j, Group &g) {
    uint4 w = *(const uint4 *)h;
    float d = f16_to_f32((u16)w.x), dmin = f16_to_f32((u16)(w.x >> 16));
    int shift = 8 * (j & 3);
    u32 a = (w.y >> shift) & 255u, b = (w.z >> shift) & 255u, c = (w.w >> shift) & 255u;
    u32 s = j < 4 ? a & 63u : (c & 15u) | (a >> 6) << 4;
    u32 m = j < 4 ? b & 63u : (c >> 4) | (b >> 6) << 4;
    g.s[0] = g.s[1] = d * (float)s;
    g.m[0] = g.m[1] = -(dmin * (float)m);
}

// Group `i` of the stack: (expert * n + row) * (k / 32) + group of the row.
__device__ __forceinline__ Group decode(const Mat &w, u64 i) {
    Group g;
    g.m[0] = g.m[1] = 0.0f;
#if SUPER
    u64 b = i >> 3;
    int j = (int)(i & 7);
    (void)j;
#endif
#if TYPE == Q4_0 || TYPE == Q4_1 || TYPE == Q5_0 || TYPE == Q5_1 || TYPE == MXFP4 || TYPE == IQ4_NL
    u32 v[4];
    load16(w.p[0] + i * 16, v);
#pragma unroll
    for (int t = 0; t < 4; t++) {
        g.q[t] = v[t] & 0x0f0f0f0f;
        g.q[t + 4] = (v[t] >> 4) & 0x0f0f0f0f;
    }
#if TYPE == Q5_0 || TYPE == Q5_1
    u32 qh = ((const u32 *)w.p[1])[i];
#pragma unroll
    for (int t = 0; t < 8; t++) g.q[t] |= spread(qh >> (4 * t)) << 4;
#endif
#if TYPE == Q4_0 || TYPE == Q5_0
#pragma unroll
    for (int t = 0; t < 8; t++) g.q[t] = minus(g.q[t], TYPE == Q4_0 ? 8 : 16);
#elif TYPE == MXFP4
#pragma unroll
    for (int t = 0; t < 8; t++) g.q[t] = mxfp4(g.q[t]);
#elif TYPE == IQ4_NL
#pragma unroll
    for (int t = 0; t < 8; t++) g.q[t] = iq4(g.q[t]);
#endif
#if TYPE == MXFP4
    u32 e = w.p[1][i];
    g.s[0] = g.s[1] = __int_as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23);
#elif TYPE == Q4_1 || TYPE == Q5_1
    u32 dm = ((const u32 *)w.p[TYPE == Q4_1 ? 1 : 2])[i];
    g.s[0] = g.s[1] = f16_to_f32((u16)dm);
    g.m[0] = g.m[1] = f16_to_f32((u16)(dm >> 16));
#else
    g.s[0] = g.s[1] = half_at(w.p[TYPE == Q5_0 ? 2 : 1], i);
#endif
#elif TYPE == NVFP4
    // Of each 16 weights the first eight are the low nibbles.
    u32 v[4];
    load16(w.p[0] + i * 16, v);
#pragma unroll
    for (int t = 0; t < 8; t++) {
        g.q[t] = mxfp4((v[t / 4 * 2 + (t & 1)] >> (2 * (t & 2))) & 0x0f0f0f0fu);
    }
    u32 sc = ((const u16 *)w.p[1])[i];
    g.s[0] = ue4m3_half(sc & 255u);
    g.s[1] = ue4m3_half(sc >> 8);
#elif TYPE == Q8_0
    u32 v[8];
    load32(w.p[0] + i * 32, v);
#pragma unroll
    for (int t = 0; t < 8; t++) g.q[t] = (int)v[t];
    g.s[0] = g.s[1] = half_at(w.p[1], i);
#elif TYPE == Q2_K || TYPE == Q3_K
    u32 v[8];
    load32(w.p[0] + b * 64 + (j >> 2) * 32, v);
#pragma unroll
    for (int t = 0; t < 8; t++) g.q[t] = (v[t] >> (2 * (j & 3))) & 0x03030303;
#if TYPE == Q2_K
    u32 sc = ((const u16 *)w.p[1])[i];
    u32 dm = ((const u32 *)w.p[2])[b];
    float d = f16_to_f32((u16)dm), dmin = f16_to_f32((u16)(dm >> 16));
    g.s[0] = d * (float)(sc & 15);
    g.m[0] = -(dmin * (float)((sc >> 4) & 15));
    g.s[1] = d * (float)((sc >> 8) & 15);
    g.m[1] = -(dmin * (float)(sc >> 12));
#else
    u32 h[8];
    load32(w.p[1] + b * 32, h);
#pragma unroll
    for (int t = 0; t < 8; t++)
        g.q[t] = minus(g.q[t] | ((h[t] >> j) & 0x01010101) << 2, 4);
    const u32 *packed = (const u32 *)(w.p[2] + b * 12);
    float d = half_at(w.p[3], b);
#pragma unroll
    for (int t = 0; t < 2; t++) {
        int e = 2 * j + t;
        u32 low = packed[(e & 7) >> 2] >> (8 * (e & 3) + 4 * (e >> 3)) & 15u;
        u32 high = packed[2] >> (8 * (e & 3) + 2 * (e >> 2)) & 3u;
        g.s[t] = d * ((float)(low | high << 4) - 32.0f);
    }
#endif
#elif TYPE == Q4_K || TYPE == Q5_K
    u32 v[8];
    load32(w.p[0] + b * 128 + (j >> 1) * 32, v);
#pragma unroll
    for (int t = 0; t < 8; t++) g.q[t] = (v[t] >> (4 * (j & 1))) & 0x0f0f0f0f;
#if TYPE == Q5_K
    u32 h[8];
    load32(w.p[1] + b * 32, h);
#pragma unroll
    for (int t = 0; t < 8; t++) g.q[t] |= ((h[t] >> j) & 0x01010101) << 4;
#endif
    k4_scale(w.p[TYPE == Q4_K ? 1 : 2] + b * 16, j, g);
#elif TYPE == Q6_K
    u32 v[8], h[8];
    load32(w.p[0] + b * 128 + (j >> 2) * 64 + (j & 1) * 32, v);
    load32(w.p[1] + b * 64 + (j >> 2) * 32, h);
#pragma unroll
    for (int t = 0; t < 8; t++) {
        u32 low = (v[t] >> (2 * (j & 2))) & 0x0f0f0f0fu;
        u32 high = (h[t] >> (2 * (j & 3))) & 0x03030303u;
        g.q[t] = minus(low | high << 4, 32);
    }
    u32 sc = ((const u16 *)w.p[2])[i];
    float d = half_at(w.p[3], b);
    g.s[0] = d * (float)(i8)sc;
    g.s[1] = d * (float)(i8)(sc >> 8);
#elif TYPE == IQ4_XS
    u32 v[4];
    load16(w.p[0] + i * 16, v);
#pragma unroll
    for (int t = 0; t < 4; t++) {
        g.q[t] = iq4(v[t] & 0x0f0f0f0fu);
        g.q[t + 4] = iq4((v[t] >> 4) & 0x0f0f0f0fu);
    }
    uint2 head = ((const uint2 *)w.p[1])[b];
    u32 low = head.y >> (4 * j) & 15u, high = head.x >> (16 + 2 * j) & 3u;
    g.s[0] = g.s[1] = f16_to_f32((u16)head.x) * ((float)(low | high << 4) - 32.0f);
#elif TYPE == IQ2_XXS
    uint2 v = ((const uint2 *)w.p[0])[i];
    g.s[0] = g.s[1] = half_at(w.p[1], b) * (0.5f + (float)(v.y >> 28)) * 0.25f;
#pragma unroll
    for (int t = 0; t < 4; t++) {
        uint2 row = ((const uint2 *)(w.grids + GRID_IQ2_XXS))[(v.x >> (8 * t)) & 255u];
        u32 sign = w.grids[GRID_SIGNS + ((v.y >> (7 * t)) & 127u)];
        g.q[2 * t] = with_signs(row.x, sign);
        g.q[2 * t + 1] = with_signs(row.y, sign >> 4);
    }
#elif TYPE == IQ2_XS
    uint2 v = ((const uint2 *)w.p[0])[i];
    u32 sc = w.p[1][i];
    float d = half_at(w.p[2], b);
    g.s[0] = d * (0.5f + (float)(sc & 15)) * 0.25f;
    g.s[1] = d * (0.5f + (float)(sc >> 4)) * 0.25f;
#pragma unroll
    for (int t = 0; t < 4; t++) {
        u32 q = ((t < 2 ? v.x : v.y) >> (16 * (t & 1))) & 0xffffu;
        uint2 row = ((const uint2 *)(w.grids + GRID_IQ2_XS))[q & 511u];
        u32 sign = w.grids[GRID_SIGNS + (q >> 9)];
        g.q[2 * t] = with_signs(row.x, sign);
        g.q[2 * t + 1] = with_signs(row.y, sign >> 4);
    }
#elif TYPE == IQ2_S
    u32 qs = ((const u32 *)w.p[0])[i], signs = ((const u32 *)w.p[1])[i];
    u32 qh = w.p[2][i], sc = w.p[3][i];
    float d = half_at(w.p[4], b);
    g.s[0] = d * (0.5f + (float)(sc & 15)) * 0.25f;
    g.s[1] = d * (0.5f + (float)(sc >> 4)) * 0.25f;
#pragma unroll
    for (int t = 0; t < 4; t++) {
        u32 index = ((qs >> (8 * t)) & 255u) | ((qh >> (2 * t)) & 3u) << 8;
        uint2 row = ((const uint2 *)(w.grids + GRID_IQ2_S))[index];
        u32 sign = signs >> (8 * t);
        g.q[2 * t] = with_signs(row.x, sign);
        g.q[2 * t + 1] = with_signs(row.y, sign >> 4);
    }
#elif TYPE == IQ3_XXS
    uint2 v = ((const uint2 *)w.p[0])[i];
    u32 aux = ((const u32 *)w.p[1])[i];
    g.s[0] = g.s[1] = half_at(w.p[2], b) * (0.5f + (float)(aux >> 28)) * 0.5f;
#pragma unroll
    for (int t = 0; t < 8; t++) {
        u32 index = ((t < 4 ? v.x : v.y) >> (8 * (t & 3))) & 255u;
        u32 sign = w.grids[GRID_SIGNS + ((aux >> (7 * (t >> 1))) & 127u)];
        u32 row = ((const u32 *)(w.grids + GRID_IQ3_XXS))[index];
        g.q[t] = with_signs(row, sign >> (4 * (t & 1)));
    }
#elif TYPE == IQ3_S
    uint2 v = ((const uint2 *)w.p[0])[i];
    u32 qh = w.p[1][i], signs = ((const u32 *)w.p[2])[i];
    u32 sc = w.p[3][i >> 1] >> (4 * (i & 1)) & 15u;
    g.s[0] = g.s[1] = half_at(w.p[4], b) * (float)(1 + 2 * sc);
#pragma unroll
    for (int t = 0; t < 8; t++) {
        u32 index = (((t < 4 ? v.x : v.y) >> (8 * (t & 3))) & 255u) | ((qh >> t) & 1u) << 8;
        u32 row = ((const u32 *)(w.grids + GRID_IQ3_S))[index];
        g.q[t] = with_signs(row, signs >> (4 * t));
    }
#elif TYPE == IQ1_S || TYPE == IQ1_M
    u32 qs = ((const u32 *)w.p[0])[i], qh = ((const u16 *)w.p[1])[i];
#if TYPE == IQ1_S
    g.s[0] = g.s[1] = half_at(w.p[2], b) * (float)(2 * ((qh >> 12) & 7) + 1) * 0.125f;
#else
    const u16 *packed = (const u16 *)(w.p[2] + b * 8);
    u16 bits = 0;
#pragma unroll
    for (int t = 0; t < 4; t++) bits |= (u16)((packed[t] >> 12) << (4 * t));
    float d = f16_to_f32(bits);
#pragma unroll
    for (int t = 0; t < 2; t++) {
        int e = 2 * j + t;
        g.s[t] = d * (float)(2 * ((packed[e >> 2] >> (3 * (e & 3))) & 7) + 1) * 0.125f;
    }
#endif
#pragma unroll
    for (int t = 0; t < 4; t++) {
#if TYPE == IQ1_S
        u32 high = (qh >> (3 * t)) & 7u, down = qh >> 15;
#else
        u32 high = (qh >> (4 * t)) & 7u, down = (qh >> (4 * t + 3)) & 1u;
#endif
        uint2 row = ((const uint2 *)(w.grids + GRID_IQ1))[((qs >> (8 * t)) & 255u) | high << 8];
        u32 x = (row.x << 3) & 0xf8f8f8f8u, y = (row.y << 3) & 0xf8f8f8f8u;
        u32 shift = down ? 0xffffffffu : 0x01010101u;
        g.q[2 * t] = (int)__vadd4(x, shift);
        g.q[2 * t + 1] = (int)__vadd4(y, shift);
    }
#endif
    return g;
}

// Weight `i` of the stack, of a type of plain floats.
__device__ __forceinline__ float weight(const Mat &w, u64 i) {
#if TYPE == F32
    return ((const float *)w.p[0])[i];
#elif TYPE == F16
    return half_at(w.p[0], i);
#elif TYPE == BF16
    return bf16_to_f32(((const u16 *)w.p[0])[i]);
#else
    return NAN_;
#endif
}

// Four weights from number `i`, a multiple of four, of a type of plain floats.
__device__ __forceinline__ float4 weights4(const Mat &w, u64 i) {
#if TYPE == F32
    return ((const float4 *)w.p[0])[i / 4];
#elif TYPE == F16
    uint2 v = ((const uint2 *)w.p[0])[i / 4];
    return make_float4(f16_to_f32((u16)v.x), f16_to_f32((u16)(v.x >> 16)), f16_to_f32((u16)v.y),
                       f16_to_f32((u16)(v.y >> 16)));
#elif TYPE == BF16
    uint2 v = ((const uint2 *)w.p[0])[i / 4];
    return make_float4(bf16_to_f32((u16)v.x), bf16_to_f32((u16)(v.x >> 16)),
                       bf16_to_f32((u16)v.y), bf16_to_f32((u16)(v.y >> 16)));
#else
    return make_float4(NAN_, NAN_, NAN_, NAN_);
#endif
}

// Byte t of a word of signed bytes as a float, without an integer conversion: its bits
// behind those of 2^23.
__device__ __forceinline__ float byte_float(u32 biased, int t) {
    return __int_as_float(__byte_perm(biased, 0x4b000000u, 0x7650 | t)) - 8388736.0f;
}

// 32 weights as pairs of bf16.
__device__ __forceinline__ void decode_bf16(const Mat &w, u64 i, u32 (&out)[16]) {
#if TYPE == BF16
    const u8 *p = w.p[0] + i * 64;
#pragma unroll
    for (int t = 0; t < 4; t++) {
        uint4 v = ((const uint4 *)p)[t];
        out[4 * t] = v.x; out[4 * t + 1] = v.y; out[4 * t + 2] = v.z; out[4 * t + 3] = v.w;
    }
#elif TYPE == F16 || TYPE == F32
#pragma unroll
    for (int t = 0; t < 16; t++)
        out[t] = bf16_pair(weight(w, i * 32 + 2 * t), weight(w, i * 32 + 2 * t + 1));
#else
    Group g = decode(w, i);
#pragma unroll
    for (int t = 0; t < 8; t++) {
        u32 biased = (u32)g.q[t] ^ 0x80808080u;
        float s = g.s[t >> 2];
        float a = byte_float(biased, 0), b = byte_float(biased, 1);
        float c = byte_float(biased, 2), d = byte_float(biased, 3);
#if HAS_MIN
        float m = g.m[t >> 2];
        out[2 * t] = bf16_pair(fmaf(a, s, m), fmaf(b, s, m));
        out[2 * t + 1] = bf16_pair(fmaf(c, s, m), fmaf(d, s, m));
#else
        out[2 * t] = bf16_pair(a * s, b * s);
        out[2 * t + 1] = bf16_pair(c * s, d * s);
#endif
    }
#endif
}
