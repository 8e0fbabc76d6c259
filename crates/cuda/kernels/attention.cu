// The KV cache, in the CPU's layout (pages of 64 positions), and attention over it.
//
// K is `[dim][64]` and V `[64][dim]` in f16; in bf16 pairs along dim and along positions; in
// q8_0 codes as in f16, then f32 scales `[dim / 32][64]` and `[64][dim / 32]`.

enum { KV_F16 = 0, KV_BF16 = 1, KV_Q8_0 = 2 };

struct Kv {
    u8 *cache;
    int k_type, v_type;
    int heads, dim;
    // Bytes of a page of K; of a head's K and V; of a page.
    int k_bytes, head_bytes, page_bytes;
};

// Token t: the first of its sequence's pages in `pages`, its position.
struct Where {
    const u32 *tokens;
    const u32 *pages;
};

__device__ __forceinline__ float k_at(const Kv &c, const u8 *k, int slot, int d) {
    if (c.k_type == KV_F16) return f16_to_f32(((const u16 *)k)[d * 64 + slot]);
    if (c.k_type == KV_BF16)
        return bf16_to_f32(((const u16 *)k)[(d / 2 * 64 + slot) * 2 + (d & 1)]);
    float scale = ((const float *)(k + c.dim * 64))[d / 32 * 64 + slot];
    return (float)((const i8 *)k)[d * 64 + slot] * scale;
}

__device__ __forceinline__ float v_at(const Kv &c, const u8 *v, int slot, int d) {
    if (c.v_type == KV_F16) return f16_to_f32(((const u16 *)v)[slot * c.dim + d]);
    if (c.v_type == KV_BF16)
        return bf16_to_f32(((const u16 *)v)[(slot / 2 * c.dim + d) * 2 + (slot & 1)]);
    float scale = ((const float *)(v + c.dim * 64))[slot * (c.dim / 32) + d / 32];
    return (float)((const i8 *)v)[slot * c.dim + d] * scale;
}

__device__ __forceinline__ void put(int type, u8 *to, int at, int scale_at, int dim, int d,
                                    float x) {
    if (type == KV_F16) {
        ((u16 *)to)[at] = f32_to_f16(x);
    } else if (type == KV_BF16) {
        ((u16 *)to)[at] = f32_to_bf16(x);
    } else {
        // A warp holds 32 neighbouring dimensions.
        u32 bits = __reduce_max_sync(0xffffffffu, __float_as_int(x) & 0x7fffffffu);
        float largest = __int_as_float(bits);
        float inverse = largest > 0.0f ? __fdiv_rn(127.0f, largest) : 0.0f;
        ((i8 *)to)[at] = (i8)__float2int_rn(__fmul_rn(x, inverse));
        if ((d & 31) == 0) ((float *)(to + dim * 64))[scale_at] = __fdiv_rn(largest, 127.0f);
    }
}

// Writes k and v, `[m][heads][dim]`: a warp per (head, token).
extern "C" __global__ void __launch_bounds__(32)
kv_store(Kv c, Where w, const float *k, const float *v) {
    int head = blockIdx.x, t = blockIdx.y;
    u32 position = w.tokens[2 * t + 1];
    u32 page = w.pages[w.tokens[2 * t] + position / 64];
    int slot = position & 63, dim = c.dim;
    u8 *to = c.cache + (u64)page * c.page_bytes + (u64)head * c.head_bytes;
    u64 from = ((u64)t * c.heads + head) * dim;
    for (int d = threadIdx.x; d < dim; d += 32) {
        int at = c.k_type == KV_BF16 ? (d / 2 * 64 + slot) * 2 + (d & 1) : d * 64 + slot;
        put(c.k_type, to, at, d / 32 * 64 + slot, dim, d, k[from + d]);
        at = c.v_type == KV_BF16 ? (slot / 2 * dim + d) * 2 + (slot & 1) : slot * dim + d;
        put(c.v_type, to + c.k_bytes, at, slot * (dim / 32) + d / 32, dim, d, v[from + d]);
    }
}

// Up to 8 query heads that share a KV head.
#define HEADS 8

// One token, one KV head, up to 8 of its query heads, one run of pages; 128 threads. With one
// run the result goes to out, `[m][heads][dim]`; with more its parts: sums `[m][heads][runs]
// [dim]` and (maximum, sum) `[m][heads][runs]`.
//
// Flash attention over pages: scores of 64 positions (two threads share a position), their
// softmax (a warp takes two heads), then every thread adds values in its dimensions.
extern "C" __global__ void __launch_bounds__(128)
attention(Kv c, Where w, const float *q, int heads, float scale, int run_pages, int runs,
          float *out, float *sums, float2 *stats) {
    extern __shared__ float4 shared[];
    int group = heads / c.heads, parts = (group + HEADS - 1) / HEADS;
    int head = blockIdx.x / parts, first = blockIdx.x % parts * HEADS;
    int live = min(HEADS, group - first), run = blockIdx.y, t = blockIdx.z;
    int dim = c.dim, tid = threadIdx.x, lane = tid & 31, warp = tid / 32;
    float4 *sq = shared;                  // [dim][8]
    float *ss = (float *)(sq + 2 * dim);  // [64][8]
    float *part = ss + 64 * HEADS;        // [64][8]: the second halves of scores
    float *top = part + 64 * HEADS;       // [8] maxima, [8] sums, [8] factors
    int seen = (int)w.tokens[2 * t + 1] + 1;
    const u32 *pages = w.pages + w.tokens[2 * t];
    int q0 = head * group + first;
    for (int i = tid; i < dim * HEADS; i += 128) {
        int h = i / dim, d = i % dim;
        float v = h < live ? q[((u64)t * heads + q0 + h) * dim + d] * scale : 0.0f;
        ((float *)sq)[d * HEADS + h] = v;
    }
    if (tid < HEADS) top[tid] = -INF, top[HEADS + tid] = 0.0f;
    float acc[2][HEADS];
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int h = 0; h < HEADS; h++) acc[i][h] = 0.0f;
    int end = min((run + 1) * run_pages, (seen + 63) / 64);
    for (int page = run * run_pages; page < end; page++) {
        const u8 *k = c.cache + (u64)pages[page] * c.page_bytes + (u64)head * c.head_bytes;
        const u8 *v = k + c.k_bytes;
        int visible = min(64, seen - page * 64);
        __syncthreads();
        {
            int slot = tid & 63, half = tid >> 6;
            float s[HEADS];
#pragma unroll
            for (int h = 0; h < HEADS; h++) s[h] = 0.0f;
            int middle = dim / 2, last = half ? dim : middle;
            for (int d = half ? middle : 0; d < last; d++) {
                float x = k_at(c, k, slot, d);
                float4 a = sq[2 * d], b = sq[2 * d + 1];
                s[0] = fmaf(a.x, x, s[0]);
                s[1] = fmaf(a.y, x, s[1]);
                s[2] = fmaf(a.z, x, s[2]);
                s[3] = fmaf(a.w, x, s[3]);
                s[4] = fmaf(b.x, x, s[4]);
                s[5] = fmaf(b.y, x, s[5]);
                s[6] = fmaf(b.z, x, s[6]);
                s[7] = fmaf(b.w, x, s[7]);
            }
            float *to = half ? part : ss;
#pragma unroll
            for (int h = 0; h < HEADS; h++) to[slot * HEADS + h] = s[h];
        }
        __syncthreads();
        for (int h = warp; h < HEADS; h += 4) {
            float a = lane < visible ? ss[lane * HEADS + h] + part[lane * HEADS + h] : -INF;
            int two = lane + 32;
            float b = two < visible ? ss[two * HEADS + h] + part[two * HEADS + h] : -INF;
            float old = top[h];
            float now = fmaxf(old, warp_max(fmaxf(a, b)));
            a = expf(a - now);
            b = expf(b - now);
            ss[lane * HEADS + h] = lane < visible ? a : 0.0f;
            ss[two * HEADS + h] = two < visible ? b : 0.0f;
            float sum = warp_sum((lane < visible ? a : 0.0f) + (two < visible ? b : 0.0f));
            __syncwarp();
            if (lane == 0) {
                float factor = old == -INF ? 0.0f : expf(old - now);
                top[h] = now;
                top[HEADS + h] = top[HEADS + h] * factor + sum;
                top[2 * HEADS + h] = factor;
            }
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int d = tid + 128 * i;
            if (d < dim) {
#pragma unroll
                for (int h = 0; h < HEADS; h++) acc[i][h] *= top[2 * HEADS + h];
                for (int slot = 0; slot < visible; slot++) {
                    float x = v_at(c, v, slot, d);
                    float4 a = ((float4 *)ss)[2 * slot], b = ((float4 *)ss)[2 * slot + 1];
                    acc[i][0] = fmaf(a.x, x, acc[i][0]);
                    acc[i][1] = fmaf(a.y, x, acc[i][1]);
                    acc[i][2] = fmaf(a.z, x, acc[i][2]);
                    acc[i][3] = fmaf(a.w, x, acc[i][3]);
                    acc[i][4] = fmaf(b.x, x, acc[i][4]);
                    acc[i][5] = fmaf(b.y, x, acc[i][5]);
                    acc[i][6] = fmaf(b.z, x, acc[i][6]);
                    acc[i][7] = fmaf(b.w, x, acc[i][7]);
                }
            }
        }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int d = tid + 128 * i;
        if (d < dim) {
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                u64 row = (u64)t * heads + q0 + h;
                if (h < live) {
                    if (runs == 1) out[row * dim + d] = acc[i][h] * (1.0f / top[HEADS + h]);
                    else sums[(row * runs + run) * dim + d] = acc[i][h];
                }
            }
        }
    }
    if (runs > 1 && tid < live)
        stats[((u64)t * heads + q0 + tid) * runs + run] = make_float2(top[tid], top[HEADS + tid]);
}

// Merges the runs of each head, in order. Runs that saw nothing have a sum of zero.
extern "C" __global__ void __launch_bounds__(128)
merge(const float *sums, const float2 *stats, int runs, int dim, float *out) {
    u64 row = blockIdx.x;
    stats += row * runs;
    sums += row * runs * dim;
    float largest = -INF;
    for (int r = 0; r < runs; r++) largest = fmaxf(largest, stats[r].x);
    float total = 0.0f;
    for (int r = 0; r < runs; r++)
        if (stats[r].y > 0.0f) total += stats[r].y * expf(stats[r].x - largest);
    for (int d = threadIdx.x; d < dim; d += 128) {
        float v = 0.0f;
        for (int r = 0; r < runs; r++)
            if (stats[r].y > 0.0f) v += sums[(u64)r * dim + d] * expf(stats[r].x - largest);
        out[row * dim + d] = v / total;
    }
}
