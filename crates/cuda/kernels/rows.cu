// Operations on rows: norms, rotation, other forms of activations, routing.

// out = x / rms(x) * w, one block per row, and the same in the forms that the next product
// takes: q8 and pairs of bf16, where there is a place for them; then k is whole groups.
extern "C" __global__ void __launch_bounds__(1024)
rms_norm(const float *x, const float *w, float eps, int k, float *out, Q8 q8, u16 *bf16) {
    u64 row = blockIdx.x;
    x += row * k;
    out += row * k;
    normalise<8>(x, w, eps, k, [&](int i, float v) {
        out[i] = v;
        if (q8.q) put_q8(q8, row, k, i / 32, v);
        if (bf16) bf16[row * k + i] = f32_to_bf16(v);
    });
}

// Rows of k values in the q8 form, a warp per group.
extern "C" __global__ void __launch_bounds__(256)
quantize(const float *x, u64 groups, int k, Q8 q8) {
    u64 g = (u64)blockIdx.x * 8 + threadIdx.x / 32;
    if (g >= groups) return;
    u64 row = g / (k / 32);
    put_q8(q8, row, k, (int)(g - row * (k / 32)), x[g * 32 + (threadIdx.x & 31)]);
}

// Pairs of bf16.
extern "C" __global__ void __launch_bounds__(256)
round_bf16(const float2 *x, u64 pairs, u32 *out) {
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i < pairs) out[i] = bf16_pair(x[i].x, x[i].y);
}

extern "C" __global__ void __launch_bounds__(256)
add(float *dst, const float *x, u64 len) {
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i < len) dst[i] += x[i];
}

// Words of several buffers, one row of blocks each; some may be in the host's memory, where
// copies that are as small take longer to begin than to make.
struct Parts {
    u32 *to[6];
    const u32 *from[6];
    int words[6];
};

extern "C" __global__ void __launch_bounds__(256) copy_parts(Parts p) {
    int part = blockIdx.y;
    for (int i = blockIdx.x * 256 + threadIdx.x; i < p.words[part]; i += gridDim.x * 256)
        p.to[part][i] = p.from[part][i];
}

// gate = silu(gate) * up
extern "C" __global__ void __launch_bounds__(256)
swiglu(float *gate, const float *up, u64 len) {
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i < len) gate[i] = silu(gate[i]) * up[i];
}

// The same as pairs of bf16.
extern "C" __global__ void __launch_bounds__(256)
swiglu_bf16(const float2 *gate, const float2 *up, u64 pairs, u32 *out) {
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i >= pairs) return;
    float2 g = gate[i], u = up[i];
    out[i] = bf16_pair(silu(g.x) * u.x, silu(g.y) * u.y);
}

extern "C" __global__ void __launch_bounds__(256)
gather(const float *x, const u32 *rows, int k, float *out) {
    x += (u64)rows[blockIdx.x] * k;
    out += (u64)blockIdx.x * k;
    for (int i = threadIdx.x; i < k; i += 256) out[i] = x[i];
}

// From blocks as a file has them to planes. Field f of a block: `len[f]` bytes at `at[f]`.
struct Planes {
    u8 *to[5];
    int at[5];
    int len[5];
    int count;
    int block;
};

extern "C" __global__ void __launch_bounds__(256)
to_planes(const u8 *raw, u64 first, u64 bytes, Planes p) {
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i >= bytes) return;
    u64 block = i / p.block;
    int off = (int)(i - block * p.block);
    for (int f = 0; f < p.count; f++) {
        int in = off - p.at[f];
        if (in >= 0 && in < p.len[f]) p.to[f][(first + block) * p.len[f] + in] = raw[i];
    }
}

// `choose` for any number of experts, a warp per token.
extern "C" __global__ void __launch_bounds__(32)
route(const float *logits, int experts, int used, int normalize, float scale, u32 *ids,
      float *weights) {
    extern __shared__ float left[];
    int lane = threadIdx.x, t = blockIdx.x;
    logits += (u64)t * experts;
    ids += (u64)t * used;
    weights += (u64)t * used;
    float largest = -INF;
    for (int i = lane; i < experts; i += 32) {
        float v = logits[i];
        left[i] = isnan(v) ? -INF : v;
        largest = fmaxf(largest, v);
    }
    largest = warp_max(largest);
    float total = 0.0f;
    for (int i = lane; i < experts; i += 32) total += expf(logits[i] - largest);
    total = warp_sum(total);
    float sum = 0.0f;
    for (int c = 0; c < used; c++) {
        __syncwarp();
        float best = -INF;
        int at = experts;
        for (int i = lane; i < experts; i += 32)
            // A taken one is NaN and loses every comparison.
            if (left[i] > best || (left[i] == best && i < at)) best = left[i], at = i;
#pragma unroll
        for (int i = 16; i > 0; i >>= 1) {
            float other = __shfl_xor_sync(0xffffffffu, best, i);
            int from = __shfl_xor_sync(0xffffffffu, at, i);
            if (from < experts && (at >= experts || other > best || (other == best && from < at)))
                best = other, at = from;
        }
        float weight = expf(logits[at] - largest) / total;
        sum += weight;
        if (lane == 0) {
            ids[c] = at;
            weights[c] = weight;
            left[at] = NAN_;
        }
    }
    __syncwarp();
    for (int c = lane; c < used; c += 32)
        weights[c] = (normalize ? weights[c] / sum : weights[c]) * scale;
}

extern "C" __global__ void __launch_bounds__(32)
route_256(const float *logits, int experts, int used, int normalize, float scale, u32 *ids,
          float *weights) {
    u64 t = blockIdx.x;
    choose<8>(logits + t * experts, experts, used, normalize, scale, ids + t * used,
              weights + t * used);
}

// Pairs of token and expert grouped by expert, in one block of up to 32 warps: `order` lists the
// pairs, by expert and then by number; `tiles` (expert, first, count), each at most `tile`
// pairs, and (0, 0, 0) up to `most`. Each warp counts a run of pairs, then places them behind
// what the warps before it counted.
extern "C" __global__ void __launch_bounds__(1024)
group_experts(const u32 *ids, int pairs, int experts, int tile, int most, int *order,
              int *tiles) {
    extern __shared__ int counts[];  // [warps][experts], then three per expert
    int threads = blockDim.x, warps = threads / 32, warp = threadIdx.x / 32;
    int lane = threadIdx.x & 31;
    int *totals = counts + warps * experts, *starts = totals + experts;
    int *firsts = starts + experts, *own = counts + warp * experts;
    int run = (pairs + warps - 1) / warps, from = warp * run, to = min(from + run, pairs);
    for (int i = threadIdx.x; i < warps * experts; i += threads) counts[i] = 0;
    __syncthreads();
    for (int i = from + lane; i - lane < to; i += 32) {
        u32 e = i < to ? ids[i] : 0xffffffffu;
        u32 same = __match_any_sync(0xffffffffu, e);
        // The first lane of an expert counts for all of them.
        if (i < to && (same & ((1u << lane) - 1)) == 0) atomicAdd(own + e, __popc(same));
    }
    __syncthreads();
    for (int e = threadIdx.x; e < experts; e += threads) {
        int n = 0;
        for (int i = 0; i < warps; i++) {
            int here = counts[i * experts + e];
            counts[i * experts + e] = n;
            n += here;
        }
        totals[e] = n;
    }
    __syncthreads();
    if (warp == 0) {
        int at = 0, tiled = 0;
        for (int first = 0; first < experts; first += 32) {
            int e = first + lane;
            int n = e < experts ? totals[e] : 0, t = (n + tile - 1) / tile;
            int upto = n, upto_t = t;
            for (int i = 1; i < 32; i <<= 1) {
                int a = __shfl_sync(0xffffffffu, upto, lane >= i ? lane - i : lane);
                int b = __shfl_sync(0xffffffffu, upto_t, lane >= i ? lane - i : lane);
                if (lane >= i) upto += a, upto_t += b;
            }
            if (e < experts) starts[e] = at + upto - n, firsts[e] = tiled + upto_t - t;
            at += __shfl_sync(0xffffffffu, upto, 31);
            tiled += __shfl_sync(0xffffffffu, upto_t, 31);
        }
        if (lane == 0) firsts[experts] = tiled;
    }
    __syncthreads();
    for (int i = from + lane; i - lane < to; i += 32) {
        u32 e = i < to ? ids[i] : 0xffffffffu;
        u32 same = __match_any_sync(0xffffffffu, e);
        int before = __popc(same & ((1u << lane) - 1)), held = 0;
        if (i < to && before == 0) held = atomicAdd(own + e, __popc(same));
        held = __shfl_sync(0xffffffffu, held, __ffs(same) - 1);
        if (i < to) order[starts[e] + held + before] = i;
    }
    for (int e = threadIdx.x; e < experts; e += threads) {
        int n = totals[e];
        for (int done = 0, i = firsts[e]; done < n; done += tile, i++) {
            tiles[3 * i] = e;
            tiles[3 * i + 1] = starts[e] + done;
            tiles[3 * i + 2] = min(tile, n - done);
        }
    }
    for (int i = firsts[experts] + threadIdx.x; i < most; i += threads)
        tiles[3 * i] = tiles[3 * i + 1] = tiles[3 * i + 2] = 0;
}

// x[t] += the sum over t's experts of weight * y[pair], in the routing's order.
extern "C" __global__ void __launch_bounds__(256)
combine(float *x, const float *y, const float *weights, int used, int n) {
    int c = blockIdx.x * 256 + threadIdx.x, t = blockIdx.y;
    if (c >= n) return;
    float sum = 0.0f;
    for (int i = 0; i < used; i++)
        sum = fmaf(weights[t * used + i], y[((u64)t * used + i) * n + c], sum);
    x[(u64)t * n + c] += sum;
}

// The largest value's index, the lowest of equals; a NaN is less than any number. One block
// per row.
extern "C" __global__ void __launch_bounds__(1024)
argmax(const float *x, int n, u32 *out) {
    __shared__ float values[32];
    __shared__ int places[32];
    x += (u64)blockIdx.x * n;
    float best = -INF;
    int at = 0x7fffffff;
    for (int i = threadIdx.x; i < n; i += 1024) {
        float v = isnan(x[i]) ? -INF : x[i];
        if (v > best || (v == best && i < at)) best = v, at = i;
    }
    for (int pass = 0; pass < 2; pass++) {
#pragma unroll
        for (int i = 16; i > 0; i >>= 1) {
            float other = __shfl_xor_sync(0xffffffffu, best, i);
            int from = __shfl_xor_sync(0xffffffffu, at, i);
            if (other > best || (other == best && from < at)) best = other, at = from;
        }
        if (pass == 1) break;
        if ((threadIdx.x & 31) == 0) {
            values[threadIdx.x / 32] = best;
            places[threadIdx.x / 32] = at;
        }
        __syncthreads();
        best = values[threadIdx.x & 31];
        at = places[threadIdx.x & 31];
    }
    if (threadIdx.x == 0) out[blockIdx.x] = at;
}

// A number that orders as its logit does: a NaN as -inf, and both zeros alike.
__device__ inline u32 order_of(float v) {
    u32 bits = isnan(v) ? 0xff800000u : __float_as_uint(v + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The digit of the `need`-th of so many as `counts` says that have each, the first digit first;
// `need` becomes its number among those with that digit. For the whole block.
__device__ inline int digit_of(const int *counts, int digits, int *need, int *found) {
    if (threadIdx.x < 32) {
        int lane = threadIdx.x, each = digits / 32, sum = 0;
        for (int i = 0; i < each; i++) sum += counts[lane * each + i];
        int before = sum;
        for (int i = 1; i < 32; i <<= 1) {
            int other = __shfl_up_sync(0xffffffffu, before, i);
            if (lane >= i) before += other;
        }
        before -= sum;
        int wanted = *need;
        __syncwarp();
        if (before < wanted && wanted <= before + sum) {
            int at = lane * each;
            while (before + counts[at] < wanted) before += counts[at++];
            found[0] = at;
            *need = wanted - before;
        }
    }
    __syncthreads();
    return found[0];
}

// The `k` largest of n values, largest first and the lowest index first among equals; a NaN
// is as little as -inf. One block per row; k is at most 512 and at most n. The k-th is found digit by
// digit of its order, then by its index, so no two runs differ.
extern "C" __global__ void __launch_bounds__(1024)
top_k(const float *x, int n, int k, u32 *ids, float *values) {
    constexpr int DIGITS = 2048, MOST = 512;
    __shared__ int counts[DIGITS];
    __shared__ unsigned long long best[MOST];
    __shared__ int need, found[1], taken;
    x += (u64)blockIdx.x * n;
    if (threadIdx.x == 0) need = k, taken = 0;
    // Of orders 11, 11 and 10 bits; of indices twice 11 and the rest: all are less than 2^31.
    u32 order = 0, index = 0x7fffffffu;
    const int bits[3] = {11, 11, 10};
    int known = 0;
    for (int pass = 0; pass < 3; pass++) {
        int shift = 32 - known - bits[pass];
        for (int i = threadIdx.x; i < DIGITS; i += 1024) counts[i] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < n; i += 1024) {
            u32 o = order_of(x[i]);
            // Largest first.
            int digit = (1 << bits[pass]) - 1 - (int)((o >> shift) & ((1u << bits[pass]) - 1));
            if (known == 0 || (o ^ order) >> (32 - known) == 0) atomicAdd(counts + digit, 1);
        }
        __syncthreads();
        int digit = digit_of(counts, DIGITS, &need, found);
        order |= (u32)((1 << bits[pass]) - 1 - digit) << shift;
        known += bits[pass];
        __syncthreads();
    }
    // Of those that equal the k-th, `need` are taken: the ones with the lowest indices.
    int equal = counts[1023 - (int)(order & 1023u)];
    __syncthreads();
    if (equal > need) {
        index = 0;
        known = 0;
        for (int pass = 0; pass < 3; pass++) {
            int width = pass == 2 ? 10 : 11, shift = 32 - known - width;
            for (int i = threadIdx.x; i < DIGITS; i += 1024) counts[i] = 0;
            __syncthreads();
            for (int i = threadIdx.x; i < n; i += 1024) {
                if (order_of(x[i]) != order) continue;
                if (known == 0 || ((u32)i ^ index) >> (32 - known) == 0)
                    atomicAdd(counts + (((u32)i >> shift) & ((1u << width) - 1)), 1);
            }
            __syncthreads();
            int digit = digit_of(counts, DIGITS, &need, found);
            index |= (u32)digit << shift;
            known += width;
            __syncthreads();
        }
    }
    for (int i = threadIdx.x; i < MOST; i += 1024) best[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += 1024) {
        u32 o = order_of(x[i]);
        if (o > order || (o == order && (u32)i <= index)) {
            int at = atomicAdd(&taken, 1);
            best[at] = (unsigned long long)o << 32 | (0xffffffffu - (u32)i);
        }
    }
    __syncthreads();
    // Sorted by a network: the place where a value was put does not matter. Larger ones first.
    for (int size = 2; size <= MOST; size <<= 1)
        for (int step = size / 2; step > 0; step >>= 1) {
            for (int i = threadIdx.x; i < MOST; i += 1024) {
                int other = i ^ step;
                bool down = (i & size) == 0;
                if (other > i && (best[i] < best[other]) == down) {
                    unsigned long long held = best[i];
                    best[i] = best[other];
                    best[other] = held;
                }
            }
            __syncthreads();
        }
    for (int i = threadIdx.x; i < k; i += 1024) {
        u32 at = 0xffffffffu - (u32)best[i];
        float v = x[at];
        ids[(u64)blockIdx.x * k + i] = at;
        values[(u64)blockIdx.x * k + i] = isnan(v) ? -INF : v;
    }
}

// The values of each of so many rows of n at the same `count` indices.
extern "C" __global__ void __launch_bounds__(256)
pick(const float *x, int n, const u32 *ids, int count, float *out) {
    for (int i = threadIdx.x; i < count; i += 256)
        out[(u64)blockIdx.x * count + i] = x[(u64)blockIdx.x * n + ids[i]];
}
