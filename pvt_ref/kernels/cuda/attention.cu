// Attention (layers/attention.py, paper eq. 4): y = Softmax(scale * q k^T) v, without an array of scores.
//
// LANES threads share a query: each holds every LANES-th piece of four of its D numbers. Keys and values
// pass through shared memory, KEYS at a time, and the softmax is carried along: with the largest score so
// far, peak, the sum of exp(score - peak) and the sum of exp(score - peak) * v. Where a larger score
// comes, both are multiplied by exp(old peak - new peak). (Milakov and Gimelshein 2018, arXiv 1805.02867;
// Dao et al. 2022, arXiv 2205.14135.)
//
// Compiled with D, divisible by 4, and LANES. Grid: (queries / queries of a block, heads, images).

#include "lanes.h"

#define THREADS 128
#define PIECES (D / 4)                                   // of a row
#define OWN ((PIECES + LANES - 1) / LANES)               // of a thread
#define KEYS (D <= 64 ? 64 : D <= 128 ? 32 : 16)         // in shared memory at a time
#define GROUP 8                                          // keys whose scores are made together
#define LOG2E 1.4426950408889634f                        // exp(x) = exp2(x log2(e))
#define NOTHING __int_as_float(0xff800000)               // -infinity

static __device__ __forceinline__ bool inside(int i, int lane) { return i * LANES + lane < PIECES; }

// Rows first, first + 1, ... of keys and values to shared memory, zeros beyond the last.
static __device__ __forceinline__ void load_keys(float4 *keys, float4 *values, const float4 *k, const float4 *v,
                                                 int k_step, int v_step, int first, int m)
{
    for (int i = threadIdx.x; i < KEYS * PIECES; i += THREADS) {
        int j = first + i / PIECES, c = i % PIECES;
        keys[i] = j < m ? k[(size_t)j * k_step + c] : zeros();
        values[i] = j < m ? v[(size_t)j * v_step + c] : zeros();
    }
}

// q, k and v lie anywhere: their steps from image to image, head to head and row to row count pieces.
// y (images, n, heads, D). log_sum (images, heads, n), if it is not null, gets log2 of the sum of
// exp(score) of each query, from which the backward makes its weights again.
extern "C" __global__ void __launch_bounds__(THREADS)
attention(const float4 *q, int q_image, int q_head, int q_row, const float4 *k, int k_image, int k_head,
          int k_row, const float4 *v, int v_image, int v_head, int v_row, float scale, float4 *y,
          float *log_sum, int n, int m)
{
    __shared__ float4 keys[KEYS * PIECES], values[KEYS * PIECES];
    int lane = threadIdx.x % LANES, head = blockIdx.y, image = blockIdx.z;
    int t = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;
    bool mine = t < n;
    if (!mine) t = n - 1; // it helps to load keys, and takes part in the sums of its warp
    q += (size_t)image * q_image + (size_t)head * q_head + (size_t)t * q_row;
    k += (size_t)image * k_image + (size_t)head * k_head;
    v += (size_t)image * v_image + (size_t)head * v_head;

    float4 query[OWN], result[OWN];
    float peak = NOTHING, total = 0;
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        query[i] = inside(i, lane) ? scale * LOG2E * q[i * LANES + lane] : zeros();
        result[i] = zeros();
    }
    for (int first = 0; first < m; first += KEYS) {
        int here = min(KEYS, m - first);
        __syncthreads(); // all are done with the keys before
        load_keys(keys, values, k, v, k_row, v_row, first, m);
        __syncthreads();
        for (int j = 0; j < here; j += GROUP) {
            float score[GROUP], top = peak;
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                float products = 0;
#pragma unroll
                for (int i = 0; i < OWN; i++)
                    if (inside(i, lane)) products += dot(query[i], keys[(j + g) * PIECES + i * LANES + lane]);
                products = over_lanes(products);
                score[g] = j + g < here ? products : NOTHING;
                top = fmaxf(top, score[g]);
            }
            float shrink = exp2f(peak - top); // 0 at first
            peak = top;
            total *= shrink;
#pragma unroll
            for (int i = 0; i < OWN; i++) result[i] = shrink * result[i];
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                float weight = exp2f(score[g] - peak);
                total += weight;
#pragma unroll
                for (int i = 0; i < OWN; i++)
                    if (inside(i, lane))
                        result[i] = result[i] + weight * values[(j + g) * PIECES + i * LANES + lane];
            }
        }
    }
    if (!mine) return;
    if (log_sum && lane == 0) log_sum[((size_t)image * gridDim.y + head) * n + t] = peak + log2f(total);
    y += (((size_t)image * n + t) * gridDim.y + head) * PIECES;
#pragma unroll
    for (int i = 0; i < OWN; i++)
        if (inside(i, lane)) y[i * LANES + lane] = 1.0f / total * result[i];
}

// One half of the backward, for A = Softmax(S), S = scale * q k^T, y = A v:
//
//     dA = dy v^T      dS = A * (dA - <dA, A>)      dq = scale * dS k
//
// <dA, A> of a query is <dy, y>, so no sum over keys is needed first. A and scale * dS go out keys first,
// (images, heads, m, n), for the other half, dv = A^T dy and dk = scale * dS^T q, two matrix products.
// dy lies anywhere, as q does; dq is (images, n, heads, D), as y.
extern "C" __global__ void __launch_bounds__(THREADS)
attention_backward(const float4 *q, int q_image, int q_head, int q_row, const float4 *k, int k_image,
                   int k_head, int k_row, const float4 *v, int v_image, int v_head, int v_row,
                   const float4 *dy, int dy_image, int dy_head, int dy_row, float scale, const float4 *y,
                   const float *log_sum, float4 *dq, float *weights, float *dscores, int n, int m)
{
    __shared__ float4 keys[KEYS * PIECES], values[KEYS * PIECES];
    int lane = threadIdx.x % LANES, head = blockIdx.y, image = blockIdx.z;
    int t = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;
    bool mine = t < n;
    if (!mine) t = n - 1;
    size_t own_head = (size_t)image * gridDim.y + head;
    size_t own_row = (((size_t)image * n + t) * gridDim.y + head) * PIECES;
    q += (size_t)image * q_image + (size_t)head * q_head + (size_t)t * q_row;
    k += (size_t)image * k_image + (size_t)head * k_head;
    v += (size_t)image * v_image + (size_t)head * v_head;
    dy += (size_t)image * dy_image + (size_t)head * dy_head + (size_t)t * dy_row;

    float4 query[OWN], slope[OWN], result[OWN];
    float along = 0; // <dy, y>
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        query[i] = inside(i, lane) ? q[i * LANES + lane] : zeros();
        slope[i] = inside(i, lane) ? dy[i * LANES + lane] : zeros();
        result[i] = zeros();
        if (inside(i, lane)) along += dot(slope[i], y[own_row + i * LANES + lane]);
    }
    along = over_lanes(along);
    float of_all = log_sum[own_head * n + t];

    for (int first = 0; first < m; first += KEYS) {
        int here = min(KEYS, m - first);
        __syncthreads();
        load_keys(keys, values, k, v, k_row, v_row, first, m);
        __syncthreads();
        for (int j = 0; j < here; j++) {
            float score = 0, dweight = 0;
#pragma unroll
            for (int i = 0; i < OWN; i++)
                if (inside(i, lane)) {
                    score += dot(query[i], keys[j * PIECES + i * LANES + lane]);
                    dweight += dot(slope[i], values[j * PIECES + i * LANES + lane]);
                }
            float weight = exp2f(scale * LOG2E * over_lanes(score) - of_all);
            float dscore = scale * weight * (over_lanes(dweight) - along);
#pragma unroll
            for (int i = 0; i < OWN; i++)
                if (inside(i, lane)) result[i] = result[i] + dscore * keys[j * PIECES + i * LANES + lane];
            if (mine && lane == j % LANES) {
                weights[(own_head * m + first + j) * n + t] = weight;
                dscores[(own_head * m + first + j) * n + t] = dscore;
            }
        }
    }
    if (!mine) return;
#pragma unroll
    for (int i = 0; i < OWN; i++)
        if (inside(i, lane)) dq[own_row + i * LANES + lane] = result[i];
}
