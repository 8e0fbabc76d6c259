// The KV cache, in the CPU's layout (pages of 64 positions), and attention over it.
//
// K is `[dim][64]` and V `[64][dim]` in f16; in bf16 pairs along dim and along positions; in
// q8_0 codes as in f16, then f32 scales `[dim / 32][64]` and `[64][dim / 32]`.

enum { KV_F16 = 0, KV_BF16 = 1, KV_Q8_0 = 2, KV_ANY = 3 };

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

// Writes one head's k, or v, of a token, from `row`: a warp.
__device__ __forceinline__ void put_head(const Kv &c, const Where &w, int head, int t, bool v,
                                         const float *row) {
    u32 position = w.tokens[2 * t + 1];
    u32 page = w.pages[w.tokens[2 * t] + position / 64];
    int slot = position & 63, dim = c.dim;
    u8 *to = c.cache + (u64)page * c.page_bytes + (u64)head * c.head_bytes;
    for (int d = threadIdx.x & 31; d < dim; d += 32) {
        if (v) {
            int at = c.v_type == KV_BF16 ? (slot / 2 * dim + d) * 2 + (slot & 1) : slot * dim + d;
            put(c.v_type, to + c.k_bytes, at, slot * (dim / 32) + d / 32, dim, d, row[d]);
        } else {
            int at = c.k_type == KV_BF16 ? (d / 2 * 64 + slot) * 2 + (d & 1) : d * 64 + slot;
            put(c.k_type, to, at, d / 32 * 64 + slot, dim, d, row[d]);
        }
    }
}

// Writes k and v, `[m][heads][dim]`: a warp per head of either and token.
extern "C" __global__ void __launch_bounds__(32)
kv_store(Kv c, Where w, const float *k, const float *v) {
    bool second = blockIdx.x >= (u32)c.heads;
    int head = second ? blockIdx.x - c.heads : blockIdx.x, t = blockIdx.y;
    u64 from = ((u64)t * c.heads + head) * c.dim;
    put_head(c, w, head, t, second, (second ? v : k) + from);
}

// The heads of one projection, `[m][heads][dim]`: normalised by w, if there is one, then
// rotated, in place.
struct Heads {
    float *x;
    const float *w;
    int heads;
};

// All heads of two projections; if there is a cache, those of k go there as well, and those of
// v. A warp per head, up to 1024 dimensions.
extern "C" __global__ void __launch_bounds__(32)
heads(Heads q, Heads k, float eps, int dim, int neox, const float *cos, const float *sin,
      int pairs, Kv c, Where at, const float *v) {
    extern __shared__ float row[];
    int t = blockIdx.y, lane = threadIdx.x, head = blockIdx.x;
    if (head >= q.heads + k.heads) {
        head -= q.heads + k.heads;
        put_head(c, at, head, t, true, v + ((u64)t * c.heads + head) * dim);
        return;
    }
    bool store = head >= q.heads && c.cache;
    if (head >= q.heads) head -= q.heads, q = k;
    const float *w = q.w;
    float *x = q.x + ((u64)t * q.heads + head) * dim;
    float sum = 0.0f;
    for (int i = lane; i < dim; i += 32) {
        row[i] = x[i];
        sum = fmaf(row[i], row[i], sum);
    }
    if (w) {
        float scale = 1.0f / sqrtf(warp_sum(sum) / (float)dim + eps);
        for (int i = lane; i < dim; i += 32) row[i] = row[i] * scale * w[i];
    }
    __syncwarp();
    cos += (u64)t * pairs;
    sin += (u64)t * pairs;
    for (int i = lane; i < pairs; i += 32) {
        int p = neox ? i : 2 * i, q = neox ? i + pairs : 2 * i + 1;
        float a = row[p], b = row[q];
        row[p] = a * cos[i] - b * sin[i];
        row[q] = a * sin[i] + b * cos[i];
    }
    __syncwarp();
    for (int i = lane; i < dim; i += 32) x[i] = row[i];
    if (store) put_head(c, at, head, t, false, row);
}

// x times what HEADS query heads have at `f`, which is a whole number of vectors.
template <int HEADS>
__device__ __forceinline__ void add_scaled(float (&to)[HEADS], const float *f, float x) {
#pragma unroll
    for (int i = 0; i < HEADS / 4; i++) {
        float4 a = ((const float4 *)f)[i];
        to[4 * i + 0] = fmaf(a.x, x, to[4 * i + 0]);
        to[4 * i + 1] = fmaf(a.y, x, to[4 * i + 1]);
        to[4 * i + 2] = fmaf(a.z, x, to[4 * i + 2]);
        to[4 * i + 3] = fmaf(a.w, x, to[4 * i + 3]);
    }
}

__device__ __forceinline__ float half_of(u32 two, int which) {
    return f16_to_f32((u16)(which ? two >> 16 : two));
}

__device__ __forceinline__ float bf16_of(u32 two, int which) {
    return __int_as_float(which ? two & 0xffff0000u : two << 16);
}

// A result of attention, `[m][heads][dim]`, and the forms of it that the next product takes, where
// there is a place for them: then heads are whole groups.
struct Attended {
    float *out;
    Q8 q8;
    u16 *bf16;
};

// Dimension `d` of a head of a token: a warp's are neighbours.
__device__ __forceinline__ void put_attended(const Attended &to, int t, int head, int heads, int dim,
                                             int d, float v) {
    u64 at = ((u64)t * heads + head) * dim + d;
    to.out[at] = v;
    if (to.q8.q) put_q8(to.q8, t, heads * dim, (head * dim + d) / 32, v);
    if (to.bf16) to.bf16[at] = f32_to_bf16(v);
}

// One token, one KV head, up to HEADS of its query heads, one run of pages; 128 threads. With one
// run the result goes to `to`; with more its parts: sums `[m][heads][runs][dim]` and (maximum, sum)
// `[m][heads][runs]`.
//
// Flash attention over pages: scores of 64 positions, of which each warp adds a quarter of the
// dimensions; their softmax (a warp takes every fourth head); then threads add values in their
// dimensions, pairs of them, and groups of threads share the positions.
//
// A block waits for memory more than it computes, so what it can know is asked for at once: up to 32
// words of a thread's keys and of its values, and the next page's keys once the present ones are
// used. Eight of them are multiplied without a branch. KV is the type of both caches; with KV_ANY
// they are read number by number: mixed types, and heads that are not whole groups for a warp.
template <int HEADS, int KV>
__device__ __forceinline__ void attention(const Kv &c, const Where &w, const float *q, int heads,
                                          float scale, int run_pages, int runs, const Attended &to,
                                          float *sums, float2 *stats) {
    constexpr int ASKED = 32, STEP = 8;
    extern __shared__ float shared[];
    int group = heads / c.heads, parts = (group + HEADS - 1) / HEADS;
    int head = blockIdx.x / parts, first = blockIdx.x % parts * HEADS;
    int live = min(HEADS, group - first), run = blockIdx.y, t = blockIdx.z;
    int dim = c.dim, tid = threadIdx.x, lane = tid & 31, warp = tid / 32;
    float *sq = shared;                  // [dim][HEADS]
    float *ss = sq + dim * HEADS;        // [64][HEADS]
    float *part = ss + 64 * HEADS;       // [4][64][HEADS]: quarters of scores, then of sums
    float *top = part + 4 * 64 * HEADS;  // [HEADS] maxima, sums, factors
    int seen = (int)w.tokens[2 * t + 1] + 1;
    const u32 *pages = w.pages + w.tokens[2 * t];
    int page = run * run_pages, end = min(page + run_pages, (seen + 63) / 64);
    // This warp's dimensions of keys; two neighbouring ones of values, and which share of the
    // positions.
    int d0 = warp * dim / 4, d1 = (warp + 1) * dim / 4;
    int pairs = dim / 2, shares = 128 / pairs, share = tid / pairs, pair = tid % pairs;
    constexpr bool FAST = KV != KV_ANY;
    auto keys_of = [&](int page) {
        return c.cache + (u64)pages[page] * c.page_bytes + (u64)head * c.head_bytes;
    };
    // Positions 2 * lane and the one behind it, of dimensions from `d` on, and the scales of those.
    u32 kx[ASKED];
    float2 k_scale = make_float2(1.0f, 1.0f);
    auto ask_keys = [&](const u8 *k, int d) {
#pragma unroll
        for (int i = 0; i < ASKED; i++) {
            bool there = d + i < d1;
            if constexpr (KV == KV_F16) {
                kx[i] = there ? ((const u32 *)k)[(d + i) * 32 + lane] : 0;
            } else if constexpr (KV == KV_Q8_0) {
                kx[i] = there ? ((const u16 *)k)[(d + i) * 32 + lane] : 0;
            } else if (i % 2 == 0) {
                uint2 x = there ? ((const uint2 *)k)[(d + i) / 2 * 32 + lane] : make_uint2(0, 0);
                kx[i] = x.x, kx[i + 1] = x.y;
            }
        }
        if constexpr (KV == KV_Q8_0)
            k_scale = ((const float2 *)(k + dim * 64))[d / 32 * 32 + lane];
    };
    auto key = [&](int i, int which) {
        if constexpr (KV == KV_F16) return half_of(kx[i], which);
        else if constexpr (KV == KV_Q8_0)
            return (float)(i8)(kx[i] >> 8 * which) * (which ? k_scale.y : k_scale.x);
        else return bf16_of(kx[(i & ~1) + which], i & 1);
    };
    // This thread's two dimensions of its share of the positions, from the `from`th on.
    u32 vx[ASKED];
    float v_scale[KV == KV_Q8_0 ? ASKED : 1];
    auto slot_of = [&](int from, int i) {
        if constexpr (KV == KV_BF16) return 2 * (share + (from + i) / 2 * shares) + (i & 1);
        return share + (from + i) * shares;
    };
    auto ask_values = [&](const u8 *v, int from, int visible) {
#pragma unroll
        for (int i = 0; i < ASKED; i++) {
            int at = slot_of(from, i);
            bool there = at < visible;
            if constexpr (KV == KV_F16) {
                vx[i] = there ? ((const u32 *)v)[at * pairs + pair] : 0;
            } else if constexpr (KV == KV_Q8_0) {
                vx[i] = there ? ((const u16 *)v)[at * pairs + pair] : 0;
                const float *scales = (const float *)(v + dim * 64);
                v_scale[i] = there ? scales[at * (dim / 32) + pair / 16] : 0.0f;
            } else if (i % 2 == 0) {
                uint2 x = there ? ((const uint2 *)v)[at / 2 * pairs + pair] : make_uint2(0, 0);
                // What is behind the last position may be no number.
                u32 mask = at + 1 < visible ? 0xffffffffu : 0xffffu;
                vx[i] = x.x & mask, vx[i + 1] = x.y & mask;
            }
        }
    };
    auto value = [&](int i, int which) {
        if constexpr (KV == KV_F16) return half_of(vx[i], which);
        else if constexpr (KV == KV_Q8_0) return (float)(i8)(vx[i] >> 8 * which) * v_scale[i];
        else return bf16_of(vx[(i & ~1) + which], i & 1);
    };
    const u8 *k = page < end ? keys_of(page) : 0;
    if (FAST && k) ask_keys(k, d0);
    int q0 = head * group + first;
    for (int i = tid; i < dim * HEADS; i += 128) {
        int h = i % HEADS, d = i / HEADS;
        sq[i] = h < live ? q[((u64)t * heads + q0 + h) * dim + d] * scale : 0.0f;
    }
    if (tid < HEADS) top[tid] = -INF, top[HEADS + tid] = 0.0f;
    float acc[2][HEADS];
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int h = 0; h < HEADS; h++) acc[i][h] = 0.0f;
    for (; page < end; page++) {
        const u8 *v = k + c.k_bytes, *next = page + 1 < end ? keys_of(page + 1) : 0;
        int visible = min(64, seen - page * 64);
        if (FAST && share < shares) ask_values(v, 0, visible);
        __syncthreads();
        float score[2][HEADS];
#pragma unroll
        for (int h = 0; h < HEADS; h++) score[0][h] = score[1][h] = 0.0f;
        if constexpr (FAST) {
            for (int d = d0; d < d1; d += ASKED) {
                if (d > d0) ask_keys(k, d);
#pragma unroll
                for (int j = 0; j < ASKED; j += STEP) {
                    if (d + j >= d1) break;
#pragma unroll
                    for (int i = j; i < j + STEP; i++) {
                        add_scaled<HEADS>(score[0], sq + (d + i) * HEADS, key(i, 0));
                        add_scaled<HEADS>(score[1], sq + (d + i) * HEADS, key(i, 1));
                    }
                }
            }
            if (next) ask_keys(next, d0);
        } else {
            for (int d = d0; d < d1; d++) {
                add_scaled<HEADS>(score[0], sq + d * HEADS, k_at(c, k, 2 * lane, d));
                add_scaled<HEADS>(score[1], sq + d * HEADS, k_at(c, k, 2 * lane + 1, d));
            }
        }
        k = next;
        float4 *quarter = (float4 *)(part + (warp * 64 + 2 * lane) * HEADS);
#pragma unroll
        for (int i = 0; i < HEADS / 2; i++) {
            const float *s = &score[i / (HEADS / 4)][i % (HEADS / 4) * 4];
            quarter[i] = make_float4(s[0], s[1], s[2], s[3]);
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < HEADS; j += 4) {
            int h = j + warp;
            float s[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int slot = lane + 32 * i;
                float sum = 0.0f;
#pragma unroll
                for (int u = 0; u < 4; u++) sum += part[(u * 64 + slot) * HEADS + h];
                s[i] = slot < visible ? sum : -INF;
            }
            float old = top[h];
            float now = fmaxf(old, warp_max(fmaxf(s[0], s[1])));
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int slot = lane + 32 * i;
                float e = slot < visible ? expf(s[i] - now) : 0.0f;
                ss[slot * HEADS + h] = e;
                sum += e;
            }
            sum = warp_sum(sum);
            __syncwarp();
            if (lane == 0) {
                float factor = old == -INF ? 0.0f : expf(old - now);
                top[h] = now;
                top[HEADS + h] = top[HEADS + h] * factor + sum;
                top[2 * HEADS + h] = factor;
            }
        }
        __syncthreads();
        if (share >= shares) continue;
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int h = 0; h < HEADS; h++) acc[i][h] *= top[2 * HEADS + h];
        if constexpr (FAST) {
            for (int from = 0; slot_of(from, 0) < visible; from += ASKED) {
                if (from > 0) ask_values(v, from, visible);
#pragma unroll
                for (int j = 0; j < ASKED; j += STEP) {
                    if (slot_of(from, j) >= visible) break;
#pragma unroll
                    for (int i = j; i < j + STEP; i++) {
                        // Behind the last position there is a weight of some position and 0.
                        const float *p = ss + min(slot_of(from, i), 63) * HEADS;
                        add_scaled<HEADS>(acc[0], p, value(i, 0));
                        add_scaled<HEADS>(acc[1], p, value(i, 1));
                    }
                }
            }
        } else {
            for (int slot = share; slot < visible; slot += shares) {
                const float *p = ss + slot * HEADS;
                add_scaled<HEADS>(acc[0], p, v_at(c, v, slot, 2 * pair));
                add_scaled<HEADS>(acc[1], p, v_at(c, v, slot, 2 * pair + 1));
            }
        }
    }
    __syncthreads();
    // The shares' sums, [shares][dim][HEADS].
    if (share < shares)
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int h = 0; h < HEADS; h++)
                part[(share * dim + 2 * pair + i) * HEADS + h] = acc[i][h];
    __syncthreads();
    for (int d = tid; d < dim; d += 128) {
        float v[HEADS];
#pragma unroll
        for (int h = 0; h < HEADS; h++) v[h] = part[d * HEADS + h];
        for (int u = 1; u < shares; u++)
#pragma unroll
            for (int h = 0; h < HEADS; h++) v[h] += part[(u * dim + d) * HEADS + h];
        auto put = [&](int h) {
            if (runs == 1) put_attended(to, t, q0 + h, heads, dim, d, v[h] / top[HEADS + h]);
            else sums[(((u64)t * heads + q0 + h) * runs + run) * dim + d] = v[h];
        };
        // Without branches between them the heads' many steps overlap.
        if (live == HEADS) {
#pragma unroll
            for (int h = 0; h < HEADS; h++) put(h);
        } else {
#pragma unroll
            for (int h = 0; h < HEADS; h++)
                if (h < live) put(h);
        }
    }
    if (runs > 1 && tid < live)
        stats[((u64)t * heads + q0 + tid) * runs + run] = make_float2(top[tid], top[HEADS + tid]);
}

#define ATTENTION(HEADS, NAME, KV)                                                                \
    extern "C" __global__ void __launch_bounds__(128) attention_##HEADS##_##NAME(                 \
        Kv c, Where w, const float *q, int heads, float scale, int run_pages, int runs,           \
        Attended to, float *sums, float2 *stats) {                                                \
        attention<HEADS, KV>(c, w, q, heads, scale, run_pages, runs, to, sums, stats);            \
    }

ATTENTION(4, f16, KV_F16)
ATTENTION(4, bf16, KV_BF16)
ATTENTION(4, q8_0, KV_Q8_0)
ATTENTION(4, any, KV_ANY)
ATTENTION(8, f16, KV_F16)
ATTENTION(8, bf16, KV_BF16)
ATTENTION(8, q8_0, KV_Q8_0)
ATTENTION(8, any, KV_ANY)

// Merges the runs of each head, RUNS at most; a block per token and head. Runs that saw nothing have
// a sum of zero.
#define RUNS 264

extern "C" __global__ void __launch_bounds__(128)
merge(const float *sums, const float2 *stats, int heads, int runs, int dim, Attended to) {
    __shared__ float factors[RUNS];
    u64 row = blockIdx.x;
    stats += row * runs;
    sums += row * runs * dim;
    if (threadIdx.x < 32) {
        float largest = -INF, total = 0.0f;
        for (int r = threadIdx.x; r < runs; r += 32) largest = fmaxf(largest, stats[r].x);
        largest = warp_max(largest);
        for (int r = threadIdx.x; r < runs; r += 32) {
            float2 of = stats[r];
            factors[r] = of.y > 0.0f ? expf(of.x - largest) : 0.0f;
            total += of.y * factors[r];
        }
        total = warp_sum(total);
        for (int r = threadIdx.x; r < runs; r += 32) factors[r] /= total;
    }
    __syncthreads();
    int t = (int)(row / heads), head = (int)(row - (u64)t * heads);
    for (int d = threadIdx.x; d < dim; d += 128) {
        float v = 0.0f;
#pragma unroll 8
        for (int r = 0; r < runs; r++) v = fmaf(sums[(u64)r * dim + d], factors[r], v);
        put_attended(to, t, head, heads, dim, d, v);
    }
}

// Values beyond what f16 holds become its largest.
__device__ __forceinline__ u16 saturated(float v) {
    return f32_to_f16(fminf(fmaxf(v, -65504.0f), 65504.0f));
}

// Many tokens: 64 rows, each a token's query head, of neighbouring tokens and the heads that
// share a KV head; a warp takes 16 of them. Pages are brought to shared memory as f16 and
// multiplied on tensor cores. Tokens of another sequence than the first one's come in a pass
// of their own.
template <int DIM>
__device__ __forceinline__ void attention_tiles(const Kv &c, const Where &w, const float *q,
                                                int heads, float scale, int m, float *out,
                                                u32 *bf16) {
    constexpr int STAGES = DIM > 128 ? 1 : 2, KP = 72, VP = DIM + 8;
    extern __shared__ uint4 tiles[];
    u16 *sq = (u16 *)tiles;            // [64][VP]
    u16 *sk = sq + 64 * VP;            // [STAGES][DIM][KP]
    u16 *sv = sk + STAGES * DIM * KP;  // [STAGES][64][VP]
    int tid = threadIdx.x, lane = tid & 31, warp = tid / 32, gid = lane >> 2, tig = lane & 3;
    int head = blockIdx.x, group = heads / c.heads, per = 64 / group;
    // The last tokens see most: first.
    int t0 = (int)(gridDim.y - 1 - blockIdx.y) * per, count = min(per, m - t0);
    int live = count * group;
    for (int i = tid; i < 64 * DIM / 2; i += 128) {
        int r = i / (DIM / 2), d = i % (DIM / 2) * 2;
        u32 two = 0;
        if (r < live) {
            u64 row = (u64)(t0 + r / group) * heads + head * group + r % group;
            float2 x = *(const float2 *)(q + row * DIM + d);
            two = f16_pair(x.x * scale, x.y * scale);
        }
        *(u32 *)&sq[r * VP + d] = two;
    }
    // This thread's rows.
    int mine[2], position[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int r = warp * 16 + gid + 8 * i;
        mine[i] = r < live ? r / group : -1;
        position[i] = r < live ? (int)w.tokens[2 * (t0 + mine[i]) + 1] : -1;
    }
    float acc[DIM / 8][4], top[2] = {-INF, -INF}, total[2] = {0.0f, 0.0f};
#pragma unroll
    for (int j = 0; j < DIM / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) acc[j][i] = 0.0f;
    auto load = [&](const u32 *pages, int page, int last, int stage) {
        const u8 *k = c.cache + (u64)pages[page] * c.page_bytes + (u64)head * c.head_bytes;
        const u8 *v = k + c.k_bytes;
        u16 *to_k = sk + stage * DIM * KP, *to_v = sv + stage * 64 * VP;
        if (c.k_type == KV_F16) {
            for (int i = tid; i < DIM * 8; i += 128)
                cp_async16(to_k + i / 8 * KP + i % 8 * 8, k + i * 16, true);
        } else {
            for (int i = tid; i < DIM * 64; i += 128)
                to_k[i / 64 * KP + i % 64] = saturated(k_at(c, k, i % 64, i / 64));
        }
        // What lies behind the last position is not multiplied, not even by zero.
        if (c.v_type == KV_F16) {
            for (int i = tid; i < DIM * 8; i += 128) {
                int slot = i / (DIM / 8);
                cp_async16(to_v + slot * VP + i % (DIM / 8) * 8, v + i * 16,
                           page * 64 + slot <= last);
            }
        } else {
            for (int i = tid; i < DIM * 64; i += 128) {
                int slot = i / DIM, d = i % DIM;
                bool there = page * 64 + slot <= last;
                to_v[slot * VP + d] = there ? saturated(v_at(c, v, slot, d)) : 0;
            }
        }
        cp_async_commit();
    };
    int arow = (warp * 16 + (lane & 15)) * VP + (lane >> 4) * 8;
    // Rows of transposed matrices: inputs, then columns.
    int trow = (lane & 7) + ((lane >> 3) & 1) * 8, tcol = (lane >> 4) * 8;
    for (int seg = 0, next = 0; seg < count; seg = next) {
        u32 start = w.tokens[2 * (t0 + seg)];
        int last = -1;
        for (next = seg; next < count && w.tokens[2 * (t0 + next)] == start; next++)
            last = max(last, (int)w.tokens[2 * (t0 + next) + 1]);
        const u32 *pages = w.pages + start;
        int limit[2];
#pragma unroll
        for (int i = 0; i < 2; i++)
            limit[i] = mine[i] >= seg && mine[i] < next ? position[i] : -1;
        int end = last / 64 + 1;
        __syncthreads();
        load(pages, 0, last, 0);
        for (int page = 0; page < end; page++) {
            int stage = STAGES == 2 ? page & 1 : 0;
            if (STAGES == 2 && page + 1 < end) {
                load(pages, page + 1, last, stage ^ 1);
                cp_async_wait<1>();
            } else {
                cp_async_wait<0>();
            }
            __syncthreads();
            const u16 *kt = sk + stage * DIM * KP, *vt = sv + stage * 64 * VP;
            float s[8][4];
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) s[j][i] = 0.0f;
#pragma unroll
            for (int d = 0; d < DIM; d += 16) {
                u32 a[4];
                ldmatrix(a, sq + arow + d);
#pragma unroll
                for (int j = 0; j < 8; j += 2) {
                    u32 b[4];
                    ldmatrix_trans(b, kt + (d + trow) * KP + j * 8 + tcol);
                    const u32 low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
                    mma_f16(s[j], a, low);
                    mma_f16(s[j + 1], a, high);
                }
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float now = top[i];
#pragma unroll
                for (int j = 0; j < 8; j++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        int at = page * 64 + j * 8 + tig * 2 + e;
                        float &v = s[j][2 * i + e];
                        v = at <= limit[i] ? v : -INF;
                        now = fmaxf(now, v);
                    }
                now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 1));
                now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 2));
                // A row that has seen nothing yet.
                float base = now == -INF ? 0.0f : now;
                float factor = exp2f(top[i] - base), sum = 0.0f;
                top[i] = now;
#pragma unroll
                for (int j = 0; j < 8; j++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        float &v = s[j][2 * i + e];
                        v = exp2f(v - base);
                        sum += v;
                    }
                total[i] = total[i] * factor + sum;
#pragma unroll
                for (int j = 0; j < DIM / 8; j++) acc[j][2 * i] *= factor, acc[j][2 * i + 1] *= factor;
            }
#pragma unroll
            for (int p = 0; p < 4; p++) {
                const u32 a[4] = {f16_pair(s[2 * p][0], s[2 * p][1]),
                                  f16_pair(s[2 * p][2], s[2 * p][3]),
                                  f16_pair(s[2 * p + 1][0], s[2 * p + 1][1]),
                                  f16_pair(s[2 * p + 1][2], s[2 * p + 1][3])};
#pragma unroll
                for (int j = 0; j < DIM / 8; j += 2) {
                    u32 b[4];
                    ldmatrix_trans(b, vt + (p * 16 + trow) * VP + j * 8 + tcol);
                    const u32 low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
                    mma_f16(acc[j], a, low);
                    mma_f16(acc[j + 1], a, high);
                }
            }
            __syncthreads();
            if (STAGES == 1 && page + 1 < end) load(pages, page + 1, last, 0);
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float sum = total[i] + __shfl_xor_sync(0xffffffffu, total[i], 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (mine[i] < 0) continue;
        int r = warp * 16 + gid + 8 * i;
        u64 row = (u64)(t0 + mine[i]) * heads + head * group + r % group;
        float inverse = 1.0f / sum;
#pragma unroll
        for (int j = 0; j < DIM / 8; j++) {
            float x = acc[j][2 * i] * inverse, y = acc[j][2 * i + 1] * inverse;
            u64 at = row * DIM + j * 8 + tig * 2;
            *(float2 *)(out + at) = make_float2(x, y);
            if (bf16) bf16[at / 2] = bf16_pair(x, y);
        }
    }
}

#define ATTENTION_TILES(DIM)                                                                     \
    extern "C" __global__ void __launch_bounds__(128) attention_tiles_##DIM(                     \
        Kv c, Where w, const float *q, int heads, float scale, int m, float *out, u32 *bf16) {   \
        attention_tiles<DIM>(c, w, q, heads, scale, m, out, bf16);                               \
    }

ATTENTION_TILES(32)
ATTENTION_TILES(64)
ATTENTION_TILES(96)
ATTENTION_TILES(128)
ATTENTION_TILES(256)
