// What all kernels share. Compiled by NVRTC without any header.

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define INF __int_as_float(0x7f800000)
#define NAN_ __int_as_float(0x7fffffff)

__device__ __forceinline__ float f16_to_f32(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}

__device__ __forceinline__ u16 f32_to_f16(float f) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

__device__ __forceinline__ float bf16_to_f32(u16 h) { return __int_as_float((u32)h << 16); }

// Two bf16, the first one low, rounded to nearest even.
__device__ __forceinline__ u32 bf16_pair(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

// Two f16, likewise.
__device__ __forceinline__ u32 f16_pair(float low, float high) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

// c += a * b on tensor cores: 16 rows by 8 columns, 16 inputs, sums in f32. Registers are those
// of mma.m16n8k16.
__device__ __forceinline__ void mma_bf16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_f16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// An address in shared memory as the instructions below take it.
__device__ __forceinline__ u32 shared_at(const void *p) {
    u64 a;
    asm("cvta.to.shared.u64 %0, %1;" : "=l"(a) : "l"(p));
    return (u32)a;
}

// Four matrices of 8 rows of 16 bytes; lane i names row i % 8 of matrix i / 8.
__device__ __forceinline__ void ldmatrix(u32 (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_at(row)));
}

// The same, each matrix transposed.
__device__ __forceinline__ void ldmatrix_trans(u32 (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_at(row)));
}

// 16 bytes to shared memory behind the thread's back; zeros unless `live`.
__device__ __forceinline__ void cp_async16(void *to, const void *from, bool live) {
    int bytes = live ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_at(to)), "l"(from), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most N of the thread's groups are under way.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__device__ __forceinline__ u16 f32_to_bf16(float f) { return (u16)bf16_pair(f, 0.0f); }

// The sum over a warp, the same in every lane.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int i = 16; i > 0; i >>= 1) v += __shfl_xor_sync(0xffffffffu, v, i);
    return v;
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
    for (int i = 16; i > 0; i >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, i));
    return v;
}

// True, for the whole block, in the last of `blocks` that come here with this counter: it can read
// what all of them wrote before, past the L1 (`__ldcg`). The counter is zero before and after.
__device__ __forceinline__ bool last_of(u32 blocks, u32 *counter) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        // What the barrier has shown to this thread comes before its count, for all to see.
        __threadfence();
        last = atomicInc(counter, blocks - 1) == blocks - 1;
        __threadfence();
    }
    __syncthreads();
    return last;
}

__device__ __forceinline__ float silu(float g) { return g / (1.0f + expf(-g)); }

// Activations in the q8 form: groups of 32 values, code * d. Per row of k codes the first
// halves of all groups, then the second ones, so that a warp's loads are whole lines; `d` and
// the sums of codes of both halves times d, `s`, are [row][k / 32].
struct Q8 {
    i8 *q;
    float *d;
    float2 *s;
};

// The q8 form of 32 values, one a lane: as the CPU computes it, bit for bit. `row` counts rows
// of k values, `group` the row's groups.
__device__ __forceinline__ void put_q8(const Q8 &to, u64 row, int k, int group, float v) {
    int lane = threadIdx.x & 31;
    u32 bits = __float_as_int(v) & 0x7fffffffu;
    bits = __reduce_max_sync(0xffffffffu, bits);
    float largest = __int_as_float(bits);
    float d, inverse;
    if (bits >= 0x7f800000u) d = NAN_, inverse = 0.0f;
    else if (largest < 1e-30f) d = 0.0f, inverse = 0.0f;
    else d = __fdiv_rn(largest, 127.0f), inverse = __fdiv_rn(127.0f, largest);
    int code = inverse == 0.0f ? 0 : __float2int_rn(__fmul_rn(v, inverse));
    to.q[row * k + (u64)(lane >> 4) * (k / 2) + group * 16 + (lane & 15)] = (i8)code;
    int half = code;
#pragma unroll
    for (int i = 8; i > 0; i >>= 1) half += __shfl_xor_sync(0xffffffffu, half, i);
    int high = __shfl_sync(0xffffffffu, half, 16);
    if (lane == 0) {
        u64 at = row * (k / 32) + group;
        to.d[at] = d;
        to.s[at] = make_float2((float)half * d, (float)high * d);
    }
}

// A row of k values on its way to a product, by the whole block: `put(i, value)` takes
// x[i] / rms(x) * w[i], a warp 32 neighbours at a time.
struct Norm {
    const float *x;
    const float *w;
    float eps;
    int k;
    float *out;
    Q8 q8;
};

// A thread keeps KEPT values of x and w, so that both are read once and together.
template <int KEPT, class Put>
__device__ __forceinline__ void normalise(const float *x, const float *w, float eps, int k,
                                          Put put) {
    __shared__ float part[32];
    int threads = blockDim.x;
    float own[KEPT], weight[KEPT], sum = 0.0f;
#pragma unroll
    for (int j = 0; j < KEPT; j++) {
        int i = threadIdx.x + j * threads;
        own[j] = i < k ? x[i] : 0.0f;
        weight[j] = i < k ? w[i] : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < KEPT; j++) sum = fmaf(own[j], own[j], sum);
    for (int i = threadIdx.x + KEPT * threads; i < k; i += threads) sum = fmaf(x[i], x[i], sum);
    sum = warp_sum(sum);
    if ((threadIdx.x & 31) == 0) part[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0.0f;
    for (int i = 0; i < threads / 32; i++) sum += part[i];
    float scale = 1.0f / sqrtf(sum / (float)k + eps);
#pragma unroll
    for (int j = 0; j < KEPT; j++) {
        int i = threadIdx.x + j * threads;
        if (i < k) put(i, own[j] * scale * weight[j]);
    }
    for (int i = threadIdx.x + KEPT * threads; i < k; i += threads) put(i, x[i] * scale * w[i]);
}

// The best `used` experts of a token by their logits, by one warp: ties go to the lower number, a
// NaN is less than any number. Weights are a softmax over all, renormalised. Lane i has logits
// i, i + 32, …, PER of them; there are no more, and at most 32 are used.
template <int PER>
__device__ __forceinline__ void choose(const float *logits, int experts, int used, int normalize,
                                       float scale, u32 *ids, float *weights) {
    int lane = threadIdx.x & 31;
    float left[PER], largest = -INF;
#pragma unroll
    for (int j = 0; j < PER; j++) {
        // What is not there loses every comparison, as what is taken does. Other blocks may just
        // have written these: not from the first-level cache.
        left[j] = NAN_;
        if (lane + 32 * j < experts)
            asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(left[j]) : "l"(logits + lane + 32 * j));
        largest = fmaxf(largest, left[j]);
    }
    largest = warp_max(largest);
    float total = 0.0f;
    // Keys are ordered as numbers are; 0 is what is taken or not there.
    u32 key[PER];
#pragma unroll
    for (int j = 0; j < PER; j++) {
        key[j] = 0;
        if (lane + 32 * j >= experts) continue;
        total += expf(left[j] - largest);
        // Zeros of both signs are equal.
        int bits = __float_as_int(left[j] + 0.0f);
        key[j] = isnan(left[j]) ? 1u : (u32)bits ^ ((u32)(bits >> 31) | 0x80000000u);
    }
    total = warp_sum(total);
    u32 mine = 0;
    int chosen = 0;
    for (int c = 0; c < used; c++) {
        u32 best = 0;
#pragma unroll
        for (int j = 0; j < PER; j++) best = max(best, key[j]);
        best = __reduce_max_sync(0xffffffffu, best);
        int at = experts;
#pragma unroll
        for (int j = PER - 1; j >= 0; j--)
            if (key[j] == best) at = lane + 32 * j;
        at = __reduce_min_sync(0xffffffffu, at);
        if (lane == c) mine = best, chosen = at;
#pragma unroll
        for (int j = 0; j < PER; j++)
            if (at == lane + 32 * j) key[j] = 0;
    }
    float weight = 0.0f;
    if (mine > 1) {
        u32 bits = mine & 0x80000000u ? mine & 0x7fffffffu : ~mine;
        weight = expf(__int_as_float((int)bits) - largest);
    }
    weight /= total;
    float sum = warp_sum(lane < used ? weight : 0.0f);
    if (lane < used) {
        ids[lane] = chosen;
        weights[lane] = (normalize ? weight / sum : weight) * scale;
    }
}
