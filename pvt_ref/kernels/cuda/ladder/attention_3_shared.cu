// Attention, third version: like the second, but all queries of a block use the same keys, so the
// block loads the keys once, KEYS at a time, into shared memory, in pieces of four numbers.
//
// One thread still has a whole query and a whole result, 2 D registers, so few threads fit on a
// multiprocessor; and every key costs two exponentials and a scaling of the whole result. In
// attention.cu, LANES threads share a query, and the result is scaled once for eight keys.
//
// Shapes as in the first version, D divisible by 4. Grid: (queries / THREADS, heads).

#define THREADS 128
#define PIECES (D / 4)
#define KEYS 32

static __device__ __forceinline__ float dot(float4 a, float4 b)
{
    return (a.x * b.x + a.y * b.y) + (a.z * b.z + a.w * b.w);
}

// s * a + t * b
static __device__ __forceinline__ float4 mixed(float s, float4 a, float t, float4 b)
{
    return make_float4(s * a.x + t * b.x, s * a.y + t * b.y, s * a.z + t * b.z, s * a.w + t * b.w);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    attention_3(const float4 *q, const float4 *k, const float4 *v, float scale, float4 *y, int n,
                int m)
{
    __shared__ float4 keys[KEYS * PIECES], values[KEYS * PIECES];
    float4 zero = make_float4(0, 0, 0, 0);
    int t = blockIdx.x * THREADS + threadIdx.x, head = blockIdx.y;
    bool mine = t < n;
    if (!mine) t = n - 1; // it helps to load keys
    q += ((size_t)head * n + t) * PIECES;
    k += (size_t)head * m * PIECES;
    v += (size_t)head * m * PIECES;
    float4 query[PIECES], result[PIECES];
    float peak = __int_as_float(0xff800000), total = 0; // -infinity
#pragma unroll
    for (int c = 0; c < PIECES; c++) query[c] = mixed(scale, q[c], 0, zero), result[c] = zero;
    for (int first = 0; first < m; first += KEYS) {
        int here = min(KEYS, m - first);
        __syncthreads(); // all are done with the previous keys
        for (int i = threadIdx.x; i < here * PIECES; i += THREADS) {
            keys[i] = k[first * PIECES + i];
            values[i] = v[first * PIECES + i];
        }
        __syncthreads();
        for (int j = 0; j < here; j++) {
            float score = 0;
#pragma unroll
            for (int c = 0; c < PIECES; c++) score += dot(query[c], keys[j * PIECES + c]);
            float top = fmaxf(peak, score);
            float shrink = expf(peak - top), weight = expf(score - top);
            peak = top;
            total = shrink * total + weight;
#pragma unroll
            for (int c = 0; c < PIECES; c++)
                result[c] = mixed(shrink, result[c], weight, values[j * PIECES + c]);
        }
    }
    if (!mine) return;
    y += ((size_t)head * n + t) * PIECES;
#pragma unroll
    for (int c = 0; c < PIECES; c++) y[c] = mixed(1.0f / total, result[c], 0, zero);
}
