// Attention (layers/attention.py, paper eq. 4): y = Softmax(scale * q k^T) v, without an array of
// scores.
//
// The softmax is updated key by key. A thread keeps peak, the largest score so far, and the sums of
// exp(score - peak) and of exp(score - peak) * v. When a larger score comes, both sums are
// multiplied by exp(old peak - new peak). See Milakov and Gimelshein 2018 (arXiv 1805.02867) and
// Dao et al. 2022 (arXiv 2205.14135).

#include "lanes.h"
#include "attention.h"
#include "order.h"

#define GROUP 8                            // keys whose scores are computed together
#define NOTHING __int_as_float(0xff800000) // -infinity

// q, k and v may have any memory layout: the arguments after each are the steps from image to
// image, head to head and row to row, in pieces. The queries, from a map of width W, are stored in
// R x R blocks (order.h); y (images, n, heads, D) is in raster order. If log_sum (images, heads, n)
// is not null, it gets log2 of each query's sum of exp(score), for the backward.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention(const float4 *q, int q_image, int q_head, int q_row, const float4 *k, int k_image,
              int k_head, int k_row, const float4 *v, int v_image, int v_head, int v_row,
              float scale, float4 *y, float *log_sum, int n, int m, int W, int R)
{
    __shared__ float4 keys[KEYS * PIECES], values[KEYS * PIECES];
    int lane = threadIdx.x % LANES, blocks = (n + QUERIES - 1) / QUERIES; // of an image and head
    int image = blockIdx.x / blocks, head = blockIdx.y;
    int t = blockIdx.x % blocks * QUERIES + threadIdx.x / LANES;
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
        __syncthreads(); // all are done with the previous keys
        load_keys(keys, values, k, v, k_row, v_row, first, m);
        __syncthreads();
        for (int j = 0; j < here; j += GROUP) {
            float score[GROUP], top = peak;
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                float products = 0;
#pragma unroll
                for (int i = 0; i < OWN; i++)
                    if (inside(i, lane))
                        products += dot(query[i], keys[(j + g) * PIECES + i * LANES + lane]);
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
                        result[i] =
                            result[i] + weight * values[(j + g) * PIECES + i * LANES + lane];
            }
        }
    }
    if (!mine) return;
    if (log_sum && lane == 0)
        log_sum[((size_t)image * gridDim.y + head) * n + t] = peak + log2f(total);
    y += (((size_t)image * n + in_raster(t, W, R)) * gridDim.y + head) * PIECES;
#pragma unroll
    for (int i = 0; i < OWN; i++)
        if (inside(i, lane)) y[i * LANES + lane] = 1.0f / total * result[i];
}
