// Products with the weights of one format.

// Up to three matrices that take the same activations: their rows one after another, counted
// as a warp takes them.
struct Products {
    Mat w[3];
    float *out[3];
    const float *bias[3];
    int end[3];
    int add;
};

// Which of them unit `unit` belongs to; the unit becomes its number among its matrix's.
__device__ __forceinline__ int matrix_of(const Products &p, int &unit) {
    int i = unit >= p.end[1] ? 2 : unit >= p.end[0] ? 1 : 0;
    unit -= i == 0 ? 0 : p.end[i - 1];
    return i;
}

#if !FLOAT

// The products of R rows, of matrices with the same k, with M tokens of which `m` exist, the
// same in all lanes. `at` are the rows' first groups, `first` the first token's row of x.
template <int M, int R>
__device__ __forceinline__ void dots(const Mat *const (&w)[R], const u64 (&at)[R], const Q8 &x,
                                     u64 first, int m, float (&acc)[R][M]) {
    int k = w[0]->k, groups = k / 32;
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int t = 0; t < M; t++) acc[r][t] = 0.0f;
    // Loads of several steps are under way at once.
#pragma unroll(M > 1 ? 1 : R <= 2 ? 4 : 2)
    for (int kb = threadIdx.x & 31; kb < groups; kb += 32) {
        Group g[R];
#pragma unroll
        for (int r = 0; r < R; r++) g[r] = decode(*w[r], at[r] + kb);
#pragma unroll
        for (int t = 0; t < M; t++) {
            // One token is always there: nothing branches, so that loads can be issued early.
            if (M == 1 || t < m) {
                const i8 *q = x.q + (first + t) * k + kb * 16;
                int4 a = *(const int4 *)q, b = *(const int4 *)(q + k / 2);
                float d = x.d[(first + t) * groups + kb];
#if HAS_MIN
                float2 s = x.s[(first + t) * groups + kb];
#endif
#pragma unroll
                for (int r = 0; r < R; r++) {
                    int low = __dp4a(g[r].q[0], a.x, 0), high = __dp4a(g[r].q[4], b.x, 0);
                    low = __dp4a(g[r].q[1], a.y, low);
                    high = __dp4a(g[r].q[5], b.y, high);
                    low = __dp4a(g[r].q[2], a.z, low);
                    high = __dp4a(g[r].q[6], b.z, high);
                    low = __dp4a(g[r].q[3], a.w, low);
                    high = __dp4a(g[r].q[7], b.w, high);
                    acc[r][t] = fmaf((float)low, g[r].s[0] * d, acc[r][t]);
                    acc[r][t] = fmaf((float)high, g[r].s[1] * d, acc[r][t]);
#if HAS_MIN
                    acc[r][t] = fmaf(g[r].m[0], s.x, acc[r][t]);
                    acc[r][t] = fmaf(g[r].m[1], s.y, acc[r][t]);
#endif
                }
            }
        }
    }
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int t = 0; t < M; t++) acc[r][t] = warp_sum(acc[r][t]);
}

// A warp takes two rows.
template <int M>
__device__ __forceinline__ void mul_vec(const Products &p, const Q8 &x, int m) {
    int row = blockIdx.x * 4 + threadIdx.x / 32;
    if (row >= p.end[2]) return;
    int i = matrix_of(p, row);
    row *= 2;
    const Mat &w = p.w[i];
    int lane = threadIdx.x & 31, groups = w.k / 32, n = w.n;
    int last = min(row + 1, n - 1);
    const Mat *const both[2] = {&w, &w};
    const u64 at[2] = {(u64)row * groups, (u64)last * groups};
    float acc[2][M];
    dots<M, 2>(both, at, x, 0, m, acc);
    int mine = row + lane;
    if (lane >= 2 || mine >= n) return;
    float bias = p.bias[i] ? p.bias[i][mine] : 0.0f;
#pragma unroll
    for (int t = 0; t < M; t++) {
        if (t < m) {
            float *out = p.out[i] + (u64)t * n + mine;
            *out = (p.add ? *out : 0.0f) + ((lane ? acc[1][t] : acc[0][t]) + bias);
        }
    }
}

extern "C" __global__ void __launch_bounds__(128, 5)
mul_vec_1(Products p, Q8 x, int m) {
    mul_vec<1>(p, x, m);
}

extern "C" __global__ void __launch_bounds__(128)
mul_vec_8(Products p, Q8 x, int m) {
    mul_vec<8>(p, x, m);
}

// hidden[t] = silu(gate * x) * (up * x) for M tokens of which `m` exist, from row `first` of
// x, and the same as q8, where there is a place for it. A block of 8 warps takes 32 rows, one
// group of the q8 form; `base` is the first row of the matrices in their stacks.
template <int M>
__device__ __forceinline__ void gate_up(const Mat &gate, const Mat &up, u64 base, const Q8 &x,
                                        u64 first, int m, float *hidden, const Q8 &q8,
                                        u64 to) {
    __shared__ float h[M][32];
    int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    int row0 = blockIdx.x * 32, n = gate.n;
    u64 groups = gate.k / 32;
    auto at = [&](int row) { return (base + min(row, n - 1)) * groups; };
    constexpr int R = M == 1 ? 4 : 2;
#pragma unroll 1
    for (int i = 0; i < 4; i += R / 2) {
        int row = warp * 4 + i;
        float acc[R][M];
        if constexpr (M == 1) {
            const Mat *const w[4] = {&gate, &gate, &up, &up};
            u64 a = at(row0 + row), b = at(row0 + row + 1);
            const u64 rows[4] = {a, b, a, b};
            dots<M, 4>(w, rows, x, first, m, acc);
        } else {
            const Mat *const w[2] = {&gate, &up};
            u64 a = at(row0 + row);
            const u64 rows[2] = {a, a};
            dots<M, 2>(w, rows, x, first, m, acc);
        }
        if (lane == 0)
#pragma unroll
            for (int r = 0; r < R / 2; r++)
#pragma unroll
                for (int t = 0; t < M; t++)
                    h[t][row + r] = silu(acc[r][t]) * acc[R / 2 + r][t];
    }
    __syncthreads();
    // A warp per token.
    if (warp >= m) return;
    float v = h[warp][lane];
    if (hidden && row0 + lane < n) hidden[(to + warp) * n + row0 + lane] = v;
    if (q8.q) put_q8(q8, to + warp, n, blockIdx.x, v);
}

extern "C" __global__ void __launch_bounds__(256, 3)
gate_up_1(Mat gate, Mat up, Q8 x, int m, float *hidden, Q8 q8) {
    gate_up<1>(gate, up, 0, x, 0, m, hidden, q8, 0);
}

extern "C" __global__ void __launch_bounds__(256)
gate_up_8(Mat gate, Mat up, Q8 x, int m, float *hidden, Q8 q8) {
    gate_up<8>(gate, up, 0, x, 0, m, hidden, q8, 0);
}

// The same for pairs of a token and an expert, one per blockIdx.y.
extern "C" __global__ void __launch_bounds__(256, 3)
experts_gate_up(Mat gate, Mat up, const u32 *ids, int used, Q8 x, float *hidden, Q8 q8) {
    int pair = blockIdx.y;
    gate_up<1>(gate, up, (u64)ids[pair] * gate.n, x, pair / used, 1, hidden, q8, pair);
}

// out[t] += the sum over t's experts of weight * (w of the expert * x[pair]), in the routing's
// order. A warp per expert of the token, four rows per block.
extern "C" __global__ void __launch_bounds__(512)
experts_down(Mat w, const u32 *ids, const float *weights, Q8 x, float *out) {
    __shared__ float y[16][4];
    int used = blockDim.x / 32, e = threadIdx.x / 32, t = blockIdx.y;
    int row0 = blockIdx.x * 4, n = w.n;
    u64 pair = (u64)t * used + e, groups = w.k / 32;
    u64 base = (u64)ids[pair] * n;
    const Mat *const same[4] = {&w, &w, &w, &w};
    u64 at[4];
#pragma unroll
    for (int r = 0; r < 4; r++) at[r] = (base + min(row0 + r, n - 1)) * groups;
    float acc[4][1];
    dots<1, 4>(same, at, x, pair, 1, acc);
    if ((threadIdx.x & 31) == 0)
#pragma unroll
        for (int r = 0; r < 4; r++) y[e][r] = acc[r][0];
    __syncthreads();
    int row = row0 + threadIdx.x;
    if (threadIdx.x >= 4 || row >= n) return;
    float sum = 0.0f;
    for (int i = 0; i < used; i++) sum = fmaf(weights[(u64)t * used + i], y[i][threadIdx.x], sum);
    out[(u64)t * n + row] += sum;
}

// out[pair] = w of the pair's expert * x[pair / share]
extern "C" __global__ void __launch_bounds__(128)
experts_mul(Mat w, const u32 *ids, int share, Q8 x, float *out) {
    int row = blockIdx.x * 4 + threadIdx.x / 32, pair = blockIdx.y;
    if (row >= w.n) return;
    const Mat *const one[1] = {&w};
    const u64 at[1] = {((u64)ids[pair] * w.n + row) * (w.k / 32)};
    float acc[1][1];
    dots<1, 1>(one, at, x, pair / share, 1, acc);
    if ((threadIdx.x & 31) == 0) out[(u64)pair * w.n + row] = acc[0][0];
}

#else

// A row of plain floats with M tokens, of which `m` exist, the same in all lanes; `at` is the
// row's first weight.
template <int M>
__device__ __forceinline__ void dot_float(const Mat &w, u64 at, const float *x, int m,
                                          float (&acc)[M]) {
    int lane = threadIdx.x & 31, k = w.k;
#pragma unroll
    for (int t = 0; t < M; t++) acc[t] = 0.0f;
    int whole = k & 3 ? 0 : k;
#pragma unroll(M == 1 ? 8 : 1)
    for (int c = lane * 4; c < whole; c += 128) {
        float4 v = weights4(w, at + c);
#pragma unroll
        for (int t = 0; t < M; t++) {
            if (M == 1 || t < m) {
                float4 a = *(const float4 *)(x + (u64)t * k + c);
                acc[t] = fmaf(v.x, a.x, acc[t]);
                acc[t] = fmaf(v.y, a.y, acc[t]);
                acc[t] = fmaf(v.z, a.z, acc[t]);
                acc[t] = fmaf(v.w, a.w, acc[t]);
            }
        }
    }
    for (int c = whole + lane; c < k; c += 32) {
        float v = weight(w, at + c);
#pragma unroll
        for (int t = 0; t < M; t++)
            if (t < m) acc[t] = fmaf(v, x[(u64)t * k + c], acc[t]);
    }
#pragma unroll
    for (int t = 0; t < M; t++) acc[t] = warp_sum(acc[t]);
}

// Plain floats with f32 activations, a warp per row; tokens by M in blockIdx.y.
template <int M>
__device__ __forceinline__ void mul_float(const Products &p, const float *x, int m) {
    int row = blockIdx.x * 4 + threadIdx.x / 32, first = blockIdx.y * M;
    if (row >= p.end[2]) return;
    int i = matrix_of(p, row);
    const Mat &w = p.w[i];
    m = min(m - first, M);
    float acc[M];
    dot_float<M>(w, (u64)row * w.k, x + (u64)first * w.k, m, acc);
    if (threadIdx.x & 31) return;
    float bias = p.bias[i] ? p.bias[i][row] : 0.0f;
#pragma unroll
    for (int t = 0; t < M; t++) {
        if (t < m) {
            float *out = p.out[i] + (u64)(first + t) * w.n + row;
            *out = (p.add ? *out : 0.0f) + (acc[t] + bias);
        }
    }
}

extern "C" __global__ void __launch_bounds__(128)
mul_float_1(Products p, const float *x, int m) {
    mul_float<1>(p, x, m);
}

extern "C" __global__ void __launch_bounds__(128)
mul_float_8(Products p, const float *x, int m) {
    mul_float<8>(p, x, m);
}

// A router's product with one normalised row, which each block makes for itself in shared memory
// while its first weights are on their way, and the choice of experts by the last block to end.
// Each block leaves its share of the row to the kernels behind.
template <int PER>
__device__ __forceinline__ void norm_route(const Mat &w, const Norm &norm, float *logits, int used,
                                           int normalize, float scale, u32 *ids, float *weights,
                                           u32 *counter) {
    extern __shared__ uint4 stages[];
    float *x = (float *)stages;
    constexpr int ASKED = 16;
    int warp = threadIdx.x / 32, lane = threadIdx.x & 31, k = w.k;
    int row = blockIdx.x * 4 + warp, whole = k & 3 ? 0 : k;
    u64 at = (u64)min(row, w.n - 1) * k;
    float4 asked[ASKED];
#pragma unroll
    for (int j = 0; j < ASKED; j++) {
        int c = lane * 4 + j * 128;
        asked[j] = c < whole ? weights4(w, at + c) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    normalise<16>(norm.x, norm.w, norm.eps, k, [&](int i, float v) { x[i] = v; });
    __syncthreads();
    float acc = 0.0f;
    auto add = [&](float4 v, int c) {
        float4 a = *(const float4 *)(x + c);
        acc = fmaf(v.x, a.x, acc);
        acc = fmaf(v.y, a.y, acc);
        acc = fmaf(v.z, a.z, acc);
        acc = fmaf(v.w, a.w, acc);
    };
#pragma unroll
    for (int j = 0; j < ASKED; j++) {
        int c = lane * 4 + j * 128;
        if (c < whole) add(asked[j], c);
    }
    for (int c = lane * 4 + ASKED * 128; c < whole; c += 128) add(weights4(w, at + c), c);
    for (int c = whole + lane; c < k; c += 32) acc = fmaf(weight(w, at + c), x[c], acc);
    acc = warp_sum(acc);
    if (row < w.n && lane == 0) logits[row] = acc;
    // Warps of all blocks take groups in turns.
    for (int g = blockIdx.x * 4 + warp; g * 32 < k; g += gridDim.x * 4) {
        int i = g * 32 + lane;
        if (i < k) norm.out[i] = x[i];
        if (norm.q8.q) put_q8(norm.q8, 0, k, g, x[i]);
    }
    if (last_of(gridDim.x, counter) && warp == 0)
        choose<PER>(logits, w.n, used, normalize, scale, ids, weights);
}

extern "C" __global__ void __launch_bounds__(128)
norm_route_128(Mat w, Norm norm, float *logits, int used, int normalize, float scale, u32 *ids,
               float *weights, u32 *counter) {
    norm_route<4>(w, norm, logits, used, normalize, scale, ids, weights, counter);
}

extern "C" __global__ void __launch_bounds__(128)
norm_route_256(Mat w, Norm norm, float *logits, int used, int normalize, float scale, u32 *ids,
               float *weights, u32 *counter) {
    norm_route<8>(w, norm, logits, used, normalize, scale, ids, weights, counter);
}

// out[pair] = w of the pair's expert * x[pair / share]
extern "C" __global__ void __launch_bounds__(128)
experts_float(Mat w, const u32 *ids, int share, const float *x, float *out) {
    int row = blockIdx.x * 4 + threadIdx.x / 32, pair = blockIdx.y;
    if (row >= w.n) return;
    float acc[1];
    dot_float<1>(w, ((u64)ids[pair] * w.n + row) * w.k, x + (u64)(pair / share) * w.k, 1, acc);
    if ((threadIdx.x & 31) == 0) out[(u64)pair * w.n + row] = acc[0];
}

#endif

// Row-major `[rows][k]` of bf16 from any format, 32 weights a thread: what a library's product
// takes. Stores go through shared memory, so that a warp's are whole lines.
extern "C" __global__ void __launch_bounds__(256)
to_bf16(Mat w, u64 first, u64 groups, uint4 *out) {
    __shared__ uint4 part[256 * 4];
    int tid = threadIdx.x;
    u64 start = (u64)blockIdx.x * 256;
    if (start + tid < groups) {
        u32 v[16];
        decode_bf16(w, first + start + tid, v);
#pragma unroll
        for (int t = 0; t < 4; t++)
            part[tid * 4 + (t ^ ((tid >> 1) & 3))] =
                make_uint4(v[4 * t], v[4 * t + 1], v[4 * t + 2], v[4 * t + 3]);
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 4; j++) {
        int i = j * 256 + tid, from = i >> 2;
        if (start + from < groups)
            out[start * 4 + i] = part[from * 4 + ((i & 3) ^ ((from >> 1) & 3))];
    }
}

// Tensor cores: a tile of 128 rows of weights by N tokens, 64 inputs at a time. Weights are
// decoded to bf16 on their way to shared memory; sums are f32. Two stages of shared memory:
// the next inputs are brought while the present ones are multiplied.
//
// Without `tiles` the tokens are blockIdx.y's; with them blockIdx.y is a tile of an expert,
// (expert, first, count), whose tokens `order` lists: row `order[i] / share` of x goes to row
// `order[i]` of out.
#define TM 128
#define TK 64
#define LD (TK / 2 + 4)

template <int N>
__device__ __forceinline__ void mul_mat(const Mat &w, const u32 *x, int m, float *out,
                                        const float *bias, int add, const int *tiles,
                                        const int *order, int share) {
    extern __shared__ uint4 stages[];
    constexpr int STAGE = (TM + N) * LD;
    u32 *sw = (u32 *)stages, *sx = sw + TM * LD;
    int first = blockIdx.y * N, count = m - first, expert = 0;
    if (tiles) {
        expert = tiles[3 * blockIdx.y];
        first = tiles[3 * blockIdx.y + 1];
        count = tiles[3 * blockIdx.y + 2];
        if (count == 0) return;
    }
    if (count > N) count = N;
    int tid = threadIdx.x, lane = tid & 31, warp = tid / 32;
    int groups = w.k / 32, row0 = blockIdx.x * TM;
    // One group of weights per thread and step.
    int wrow = tid >> 1, wpart = tid & 1;
    u64 wat = ((u64)expert * w.n + min(row0 + wrow, w.n - 1)) * groups;
    // Pieces of 16 bytes of x: N rows of 8.
    constexpr int XP = N / 32;
    const u32 *xrow[XP];
#pragma unroll
    for (int i = 0; i < XP; i++) {
        int r = (tid + i * 256) >> 3;
        int t = first + r;
        xrow[i] = r < count ? x + (u64)(order ? order[t] / share : t) * (w.k / 2) : 0;
    }
    auto load_x = [&](int kb, u32 *to) {
#pragma unroll
        for (int i = 0; i < XP; i++) {
            int r = (tid + i * 256) >> 3, c = tid & 7;
            bool live = xrow[i] && kb * 4 + c < groups * 4;
            const u32 *from = live ? xrow[i] + kb * 16 + c * 4 : x;
            cp_async16(to + r * LD + c * 4, from, live);
        }
        cp_async_commit();
    };
    // Behind the last row and the last group there are others' weights: rows that are not
    // stored, inputs that are zero. So nothing branches, and the loads can be issued early.
    auto load_w = [&](int kb, u32 (&v)[16]) {
        decode_bf16(w, wat + min(kb + wpart, groups - 1), v);
    };
    auto store_w = [&](const u32 (&v)[16], u32 *to) {
#pragma unroll
        for (int t = 0; t < 4; t++)
            *(uint4 *)&to[wrow * LD + wpart * 16 + t * 4] =
                make_uint4(v[4 * t], v[4 * t + 1], v[4 * t + 2], v[4 * t + 3]);
    };
    constexpr int NT = N / 16;
    float acc[2][NT][4];
#pragma unroll
    for (int a = 0; a < 2; a++)
#pragma unroll
        for (int b = 0; b < NT; b++)
#pragma unroll
            for (int c = 0; c < 4; c++) acc[a][b][c] = 0.0f;
    int wm = (warp & 3) * 32, wn = (warp >> 2) * (N / 2);
    // Where this lane's rows of matrices are.
    int arow = (wm + (lane & 15)) * LD + (lane >> 4) * 4;
    int brow = (wn + (lane & 7) + (lane >> 4) * 8) * LD + ((lane >> 3) & 1) * 4;
    {
        u32 v[16];
        load_x(0, sx);
        load_w(0, v);
        store_w(v, sw);
    }
    cp_async_wait<0>();
    __syncthreads();
    int now = 0;
    for (int kb = 0; kb < groups; kb += 2) {
        int next = STAGE - now;
        load_x(kb + 2, sx + next);
#pragma unroll
        for (int k = 0; k < TK / 16; k++) {
            u32 a[2][4];
#pragma unroll
            for (int i = 0; i < 2; i++) ldmatrix(a[i], sw + now + arow + i * 16 * LD + k * 8);
#pragma unroll
            for (int j = 0; j < NT; j += 2) {
                u32 b[4];
                ldmatrix(b, sx + now + brow + j * 8 * LD + k * 8);
                const u32 low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    mma_bf16(acc[i][j], a[i], low);
                    mma_bf16(acc[i][j + 1], a[i], high);
                }
            }
        }
        u32 v[16];
        load_w(kb + 2, v);
        store_w(v, sw + next);
        cp_async_wait<0>();
        __syncthreads();
        now = next;
    }
    int gid = lane >> 2, tig = lane & 3;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
            for (int c = 0; c < 4; c++) {
                int row = row0 + wm + i * 16 + gid + (c >> 1) * 8;
                int t = wn + j * 8 + tig * 2 + (c & 1);
                if (row < w.n && t < count) {
                    int to = order ? order[first + t] : first + t;
                    float *p = out + (u64)to * w.n + row;
                    float v = acc[i][j][c] + (bias ? bias[row] : 0.0f);
                    *p = (add ? *p : 0.0f) + v;
                }
            }
}

extern "C" __global__ void __launch_bounds__(256, 2)
mul_mat_32(Mat w, const u32 *x, int m, float *out, const float *bias, int add, const int *tiles,
           const int *order, int share) {
    mul_mat<32>(w, x, m, out, bias, add, tiles, order, share);
}

extern "C" __global__ void __launch_bounds__(256, 2)
mul_mat_64(Mat w, const u32 *x, int m, float *out, const float *bias, int add, const int *tiles,
           const int *order, int share) {
    mul_mat<64>(w, x, m, out, bias, add, tiles, order, share);
}

extern "C" __global__ void __launch_bounds__(256, 2)
mul_mat_128(Mat w, const u32 *x, int m, float *out, const float *bias, int add, const int *tiles,
            const int *order, int share) {
    mul_mat<128>(w, x, m, out, bias, add, tiles, order, share);
}
