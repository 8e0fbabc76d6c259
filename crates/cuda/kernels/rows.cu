// Operations on rows: norms, rotation, other forms of activations, routing.

// out = x / rms(x) * w, one block per row.
extern "C" __global__ void __launch_bounds__(256)
rms_norm(const float *x, const float *w, float eps, int k, float *out) {
    __shared__ float part[8];
    x += (u64)blockIdx.x * k;
    out += (u64)blockIdx.x * k;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < k; i += 256) sum = fmaf(x[i], x[i], sum);
    sum = warp_sum(sum);
    if ((threadIdx.x & 31) == 0) part[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) sum += part[i];
    float scale = 1.0f / sqrtf(sum / (float)k + eps);
    for (int i = threadIdx.x; i < k; i += 256) out[i] = x[i] * scale * w[i];
}

// Each head of x, `[m][heads][dim]`: normalised by w, if there is one, then rotated. A warp
// per head, up to 1024 dimensions.
extern "C" __global__ void __launch_bounds__(32)
heads(float *x, const float *w, float eps, int heads, int dim, int neox, const float *cos,
      const float *sin, int pairs) {
    extern __shared__ float row[];
    int t = blockIdx.y, lane = threadIdx.x;
    x += ((u64)t * heads + blockIdx.x) * dim;
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
        x[p] = a * cos[i] - b * sin[i];
        x[q] = a * sin[i] + b * cos[i];
    }
    if (w)
        for (int i = 2 * pairs + lane; i < dim; i += 32) x[i] = row[i];
}

// The q8 form: 32 values a lane group, as the CPU computes it, bit for bit. A warp takes 32
// values; `xs` gets the scaled sums of its halves.
extern "C" __global__ void __launch_bounds__(256)
quantize(const float *x, u64 groups, i8 *xq, float *xd, float2 *xs) {
    u64 g = (u64)blockIdx.x * 8 + threadIdx.x / 32;
    if (g >= groups) return;
    int lane = threadIdx.x & 31;
    float v = x[g * 32 + lane];
    u32 bits = __float_as_int(v) & 0x7fffffffu;
    bits = __reduce_max_sync(0xffffffffu, bits);
    float largest = __int_as_float(bits);
    float d, inverse;
    if (bits >= 0x7f800000u) d = NAN_, inverse = 0.0f;
    else if (largest < 1e-30f) d = 0.0f, inverse = 0.0f;
    else d = __fdiv_rn(largest, 127.0f), inverse = __fdiv_rn(127.0f, largest);
    int code = inverse == 0.0f ? 0 : __float2int_rn(__fmul_rn(v, inverse));
    xq[g * 32 + lane] = (i8)code;
    int half = code;
#pragma unroll
    for (int i = 8; i > 0; i >>= 1) half += __shfl_xor_sync(0xffffffffu, half, i);
    int high = __shfl_sync(0xffffffffu, half, 16);
    if (lane == 0) {
        xd[g] = d;
        xs[g] = make_float2((float)half * d, (float)high * d);
    }
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

// gate = silu(gate) * up
extern "C" __global__ void __launch_bounds__(256)
swiglu(float *gate, const float *up, u64 len) {
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i < len) gate[i] = silu(gate[i]) * up[i];
}

// x[t][row] += bias[row], or x = y + bias.
extern "C" __global__ void __launch_bounds__(256)
add_rows(float *x, const float *y, const float *bias, int n, u64 len, int accumulate) {
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i >= len) return;
    float v = y[i] + (bias ? bias[i % n] : 0.0f);
    x[i] = accumulate ? x[i] + v : v;
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

// The best `used` experts of a token by their logits, a warp per token: ties go to the lower
// number, a NaN is less than any number. Weights are a softmax over all, renormalised.
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

// Pairs of token and expert grouped by expert, in one block: `order` lists the pairs, by
// expert and then by number; `tiles` (expert, first, count), each at most `tile` pairs, and
// (0, 0, 0) up to `most`.
extern "C" __global__ void __launch_bounds__(1024)
group_experts(const u32 *ids, int pairs, int experts, int tile, int most, int *order,
              int *tiles) {
    extern __shared__ int counts[];
    int *starts = counts + experts, *firsts = starts + experts;
    for (int e = threadIdx.x; e < experts; e += 1024) {
        int n = 0;
        for (int i = 0; i < pairs; i++) n += ids[i] == (u32)e;
        counts[e] = n;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        int at = 0, tiled = 0;
        for (int e = 0; e < experts; e++) {
            starts[e] = at;
            firsts[e] = tiled;
            at += counts[e];
            tiled += (counts[e] + tile - 1) / tile;
        }
        firsts[experts] = tiled;
    }
    __syncthreads();
    for (int e = threadIdx.x; e < experts; e += 1024) {
        int at = starts[e];
        for (int i = 0; i < pairs; i++)
            if (ids[i] == (u32)e) order[at++] = i;
        for (int done = 0, i = firsts[e]; done < counts[e]; done += tile, i++) {
            tiles[3 * i] = e;
            tiles[3 * i + 1] = starts[e] + done;
            tiles[3 * i + 2] = min(tile, counts[e] - done);
        }
    }
    for (int i = firsts[experts] + threadIdx.x; i < most; i += 1024)
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
