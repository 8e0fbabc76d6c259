// Products with the weights of one format.

// Up to three matrices that take the same activations: their rows one after another.
struct Products {
    Mat w[3];
    float *out[3];
    const float *bias[3];
    int end[3];
    int add;
};

#if !FLOAT

// The product of a row with tokens `0..M` (of which `m` exist), the same in all lanes.
// Codes `xq` `[m][k]`, scales `xd` `[m][k / 32]`, scaled sums of halves `xs` likewise.
template <int M>
__device__ __forceinline__ void dot(const Mat &w, u64 row, const i8 *xq, const float *xd,
                                    const float2 *xs, int m, float (&acc)[M]) {
    int groups = w.k / 32;
#pragma unroll
    for (int t = 0; t < M; t++) acc[t] = 0.0f;
#pragma unroll(M == 1 ? 2 : 1)
    for (int kb = threadIdx.x & 31; kb < groups; kb += 32) {
        Group g = decode(w, row * groups + kb);
#pragma unroll
        for (int t = 0; t < M; t++) {
            if (t < m) {
                const int4 *x = (const int4 *)(xq + (u64)t * w.k + kb * 32);
                int4 a = x[0], b = x[1];
                int low = __dp4a(g.q[0], a.x, 0), high = __dp4a(g.q[4], b.x, 0);
                low = __dp4a(g.q[1], a.y, low);
                high = __dp4a(g.q[5], b.y, high);
                low = __dp4a(g.q[2], a.z, low);
                high = __dp4a(g.q[6], b.z, high);
                low = __dp4a(g.q[3], a.w, low);
                high = __dp4a(g.q[7], b.w, high);
                float d = xd[(u64)t * groups + kb];
                acc[t] = fmaf((float)low, g.s[0] * d, acc[t]);
                acc[t] = fmaf((float)high, g.s[1] * d, acc[t]);
#if HAS_MIN
                float2 s = xs[(u64)t * groups + kb];
                acc[t] = fmaf(g.m[0], s.x, acc[t]);
                acc[t] = fmaf(g.m[1], s.y, acc[t]);
#endif
            }
        }
    }
#pragma unroll
    for (int t = 0; t < M; t++) acc[t] = warp_sum(acc[t]);
}

template <int M>
__device__ __forceinline__ void mul_vec(const Products &p, const i8 *xq, const float *xd,
                                        const float2 *xs, int m) {
    int row = blockIdx.x * 4 + threadIdx.x / 32;
    if (row >= p.end[2]) return;
    int i = row >= p.end[1] ? 2 : row >= p.end[0] ? 1 : 0;
    row -= i == 0 ? 0 : p.end[i - 1];
    float acc[M];
    dot<M>(p.w[i], row, xq, xd, xs, m, acc);
    if (threadIdx.x & 31) return;
    float bias = p.bias[i] ? p.bias[i][row] : 0.0f;
#pragma unroll
    for (int t = 0; t < M; t++) {
        if (t < m) {
            float *out = p.out[i] + (u64)t * p.w[i].n + row;
            *out = (p.add ? *out : 0.0f) + (acc[t] + bias);
        }
    }
}

extern "C" __global__ void __launch_bounds__(128)
mul_vec_1(Products p, const i8 *xq, const float *xd, const float2 *xs, int m) {
    mul_vec<1>(p, xq, xd, xs, m);
}

extern "C" __global__ void __launch_bounds__(128)
mul_vec_8(Products p, const i8 *xq, const float *xd, const float2 *xs, int m) {
    mul_vec<8>(p, xq, xd, xs, m);
}

// hidden[t][row] = silu(gate * x) * (up * x)
template <int M>
__device__ __forceinline__ void gate_up(const Mat &gate, const Mat &up, const i8 *xq,
                                        const float *xd, const float2 *xs, int m, float *hidden) {
    int row = blockIdx.x * 4 + threadIdx.x / 32;
    if (row >= gate.n) return;
    float g[M], u[M];
    dot<M>(gate, row, xq, xd, xs, m, g);
    dot<M>(up, row, xq, xd, xs, m, u);
    if (threadIdx.x & 31) return;
#pragma unroll
    for (int t = 0; t < M; t++)
        if (t < m) hidden[(u64)t * gate.n + row] = silu(g[t]) * u[t];
}

extern "C" __global__ void __launch_bounds__(128)
gate_up_1(Mat gate, Mat up, const i8 *xq, const float *xd, const float2 *xs, int m,
          float *hidden) {
    gate_up<1>(gate, up, xq, xd, xs, m, hidden);
}

extern "C" __global__ void __launch_bounds__(128)
gate_up_8(Mat gate, Mat up, const i8 *xq, const float *xd, const float2 *xs, int m,
          float *hidden) {
    gate_up<8>(gate, up, xq, xd, xs, m, hidden);
}

// The same for pairs of a token and an expert, one per blockIdx.y: hidden `[pair][ff]`.
extern "C" __global__ void __launch_bounds__(128)
experts_gate_up(Mat gate, Mat up, const u32 *ids, int used, const i8 *xq, const float *xd,
                const float2 *xs, float *hidden) {
    int row = blockIdx.x * 4 + threadIdx.x / 32, pair = blockIdx.y;
    if (row >= gate.n) return;
    int t = pair / used, groups = gate.k / 32;
    u64 at = (u64)ids[pair] * gate.n + row;
    xq += (u64)t * gate.k, xd += (u64)t * groups, xs += (u64)t * groups;
    float g[1], u[1];
    dot<1>(gate, at, xq, xd, xs, 1, g);
    dot<1>(up, at, xq, xd, xs, 1, u);
    if ((threadIdx.x & 31) == 0) hidden[(u64)pair * gate.n + row] = silu(g[0]) * u[0];
}

// out[pair] = w of the pair's expert * x[pair / share]
extern "C" __global__ void __launch_bounds__(128)
experts_mul(Mat w, const u32 *ids, int share, const i8 *xq, const float *xd, const float2 *xs,
            float *out) {
    int row = blockIdx.x * 4 + threadIdx.x / 32, pair = blockIdx.y;
    if (row >= w.n) return;
    int t = pair / share, groups = w.k / 32;
    u64 at = (u64)ids[pair] * w.n + row;
    float acc[1];
    dot<1>(w, at, xq + (u64)t * w.k, xd + (u64)t * groups, xs + (u64)t * groups, 1, acc);
    if ((threadIdx.x & 31) == 0) out[(u64)pair * w.n + row] = acc[0];
}

#else

// Plain floats with f32 activations; tokens by eights in blockIdx.y.
extern "C" __global__ void __launch_bounds__(128)
mul_float(Products p, const float *x, int m) {
    int row = blockIdx.x * 4 + threadIdx.x / 32, first = blockIdx.y * 8;
    if (row >= p.end[2]) return;
    int i = row >= p.end[1] ? 2 : row >= p.end[0] ? 1 : 0;
    row -= i == 0 ? 0 : p.end[i - 1];
    const Mat &w = p.w[i];
    x += (u64)first * w.k;
    m -= first;
    float acc[8];
#pragma unroll
    for (int t = 0; t < 8; t++) acc[t] = 0.0f;
    for (int c = threadIdx.x & 31; c < w.k; c += 32) {
        float v = weight(w, (u64)row * w.k + c);
#pragma unroll
        for (int t = 0; t < 8; t++)
            if (t < m) acc[t] = fmaf(v, x[(u64)t * w.k + c], acc[t]);
    }
    float bias = p.bias[i] ? p.bias[i][row] : 0.0f;
#pragma unroll
    for (int t = 0; t < 8; t++) {
        acc[t] = warp_sum(acc[t]);
        if (t < m && (threadIdx.x & 31) == 0) {
            float *out = p.out[i] + (u64)(first + t) * w.n + row;
            *out = (p.add ? *out : 0.0f) + (acc[t] + bias);
        }
    }
}

// out[pair] = w of the pair's expert * x[pair / share]
extern "C" __global__ void __launch_bounds__(128)
experts_float(Mat w, const u32 *ids, int share, const float *x, float *out) {
    int row = blockIdx.x * 4 + threadIdx.x / 32, pair = blockIdx.y;
    if (row >= w.n) return;
    u64 at = ((u64)ids[pair] * w.n + row) * w.k;
    x += (u64)(pair / share) * w.k;
    float acc = 0.0f;
    for (int c = threadIdx.x & 31; c < w.k; c += 32) acc = fmaf(weight(w, at + c), x[c], acc);
    acc = warp_sum(acc);
    if ((threadIdx.x & 31) == 0) out[(u64)pair * w.n + row] = acc;
}

#endif

// Row-major `[rows][k]` of bf16 from any format: what a library's product takes.
extern "C" __global__ void __launch_bounds__(256)
to_bf16(Mat w, u64 first, u64 groups, u32 *out) {
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i >= groups) return;
    u32 v[16];
    decode_bf16(w, first + i, v);
#pragma unroll
    for (int t = 0; t < 4; t++)
        ((uint4 *)(out + i * 16))[t] =
            make_uint4(v[4 * t], v[4 * t + 1], v[4 * t + 2], v[4 * t + 3]);
}

// Tensor cores: a tile of 128 rows of weights by N tokens, 64 inputs at a time. Weights are
// decoded to bf16 on their way to shared memory; sums are f32.
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
    __shared__ __align__(16) u32 sw[TM * LD];
    __shared__ __align__(16) u32 sx[N * LD];
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
    bool wlive = row0 + wrow < w.n;
    u64 wat = ((u64)expert * w.n + row0 + wrow) * groups;
    // Pieces of 16 bytes of x: N rows of 8.
    constexpr int XP = N * 8 / 256;
    const u32 *xrow[XP];
#pragma unroll
    for (int i = 0; i < XP; i++) {
        int r = (tid + i * 256) >> 3;
        int t = first + r;
        if (r >= count) xrow[i] = 0;
        else xrow[i] = x + (u64)(order ? order[t] / share : t) * (w.k / 2);
    }
    constexpr int NT = N / 16;
    float acc[2][NT][4];
#pragma unroll
    for (int a = 0; a < 2; a++)
#pragma unroll
        for (int b = 0; b < NT; b++)
#pragma unroll
            for (int c = 0; c < 4; c++) acc[a][b][c] = 0.0f;
    int wm = (warp & 3) * 32, wn = (warp >> 2) * (N / 2);
    int gid = lane >> 2, tig = lane & 3;
    for (int kb = 0; kb < groups; kb += 2) {
        u32 v[16];
        if (wlive && kb + wpart < groups) {
            decode_bf16(w, wat + kb + wpart, v);
        } else {
#pragma unroll
            for (int t = 0; t < 16; t++) v[t] = 0;
        }
        uint4 xv[XP];
#pragma unroll
        for (int i = 0; i < XP; i++) {
            int c = (tid + i * 256) & 7;
            bool live = xrow[i] && kb * 4 + c < groups * 4;
            xv[i] = live ? ((const uint4 *)xrow[i])[kb * 4 + c] : make_uint4(0, 0, 0, 0);
        }
        __syncthreads();
#pragma unroll
        for (int t = 0; t < 4; t++)
            *(uint4 *)&sw[wrow * LD + wpart * 16 + t * 4] =
                make_uint4(v[4 * t], v[4 * t + 1], v[4 * t + 2], v[4 * t + 3]);
#pragma unroll
        for (int i = 0; i < XP; i++) {
            int r = (tid + i * 256) >> 3, c = (tid + i * 256) & 7;
            *(uint4 *)&sx[r * LD + c * 4] = xv[i];
        }
        __syncthreads();
#pragma unroll 1
        for (int k = 0; k < TK / 16; k++) {
            u32 a[2][4], b[NT][2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const u32 *s = sw + (wm + i * 16 + gid) * LD + k * 8 + tig;
                a[i][0] = s[0];
                a[i][1] = s[8 * LD];
                a[i][2] = s[4];
                a[i][3] = s[8 * LD + 4];
            }
#pragma unroll
            for (int j = 0; j < NT; j++) {
                const u32 *s = sx + (wn + j * 8 + gid) * LD + k * 8 + tig;
                b[j][0] = s[0];
                b[j][1] = s[4];
            }
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int j = 0; j < NT; j++)
                    asm volatile(
                        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                        : "+f"(acc[i][j][0]), "+f"(acc[i][j][1]), "+f"(acc[i][j][2]),
                          "+f"(acc[i][j][3])
                        : "r"(a[i][0]), "r"(a[i][1]), "r"(a[i][2]), "r"(a[i][3]), "r"(b[j][0]),
                          "r"(b[j][1]));
        }
    }
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

extern "C" __global__ void __launch_bounds__(256)
mul_mat_64(Mat w, const u32 *x, int m, float *out, const float *bias, int add, const int *tiles,
           const int *order, int share) {
    mul_mat<64>(w, x, m, out, bias, add, tiles, order, share);
}

extern "C" __global__ void __launch_bounds__(256)
mul_mat_128(Mat w, const u32 *x, int m, float *out, const float *bias, int add, const int *tiles,
            const int *order, int share) {
    mul_mat<128>(w, x, m, out, bias, add, tiles, order, share);
}
