// One half of the backward of attention.cu, for A = Softmax(S), S = scale * q k^T, y = A v:
//
//     dA = dy v^T      dS = A * (dA - <dA, A>)      dq = scale * dS k
//
// For each query <dA, A> = <dy, y>, so no sum over keys is needed first. A is recomputed from S,
// which is rounded as in the forward, and the forward's log_sum. A and scale * dS are stored with
// the keys first, (images, heads, m, n), for the other half, which is two matrix products:
// dv = A^T dy and dk = scale * dS^T q.

#include "lanes.h"
#include "attention.h"
#include "order.h"

// q, k, v and dy may have any memory layout, as in attention.cu; y and dq are (images, n, heads,
// D). The queries and dq are stored in R x R blocks (order.h), y and dy in raster order. The
// columns of weights and dscores have the order of what these are multiplied by: dy and q.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_backward(const float4 *q, int q_image, int q_head, int q_row, const float4 *k,
                       int k_image, int k_head, int k_row, const float4 *v, int v_image, int v_head,
                       int v_row, const float4 *dy, int dy_image, int dy_head, int dy_row,
                       float scale, const float4 *y, const float *log_sum, float4 *dq,
                       float *weights, float *dscores, int n, int m, int W, int R)
{
    __shared__ float4 keys[KEYS * PIECES], values[KEYS * PIECES];
    int lane = threadIdx.x % LANES, blocks = (n + QUERIES - 1) / QUERIES; // of an image and head
    int image = blockIdx.x / blocks, head = blockIdx.y;
    int t = blockIdx.x % blocks * QUERIES + threadIdx.x / LANES;
    bool mine = t < n;
    if (!mine) t = n - 1;
    size_t own_head = (size_t)image * gridDim.y + head;
    int out = in_raster(t, W, R);
    size_t row_of_y = (((size_t)image * n + out) * gridDim.y + head) * PIECES;
    size_t row_of_q = (((size_t)image * n + t) * gridDim.y + head) * PIECES;
    q += (size_t)image * q_image + (size_t)head * q_head + (size_t)t * q_row;
    k += (size_t)image * k_image + (size_t)head * k_head;
    v += (size_t)image * v_image + (size_t)head * v_head;
    dy += (size_t)image * dy_image + (size_t)head * dy_head + (size_t)out * dy_row;

    float4 query[OWN], slope[OWN], result[OWN];
    float along = 0; // <dy, y>
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        query[i] = inside(i, lane) ? scale * LOG2E * q[i * LANES + lane] : zeros();
        slope[i] = inside(i, lane) ? dy[i * LANES + lane] : zeros();
        result[i] = zeros();
        if (inside(i, lane)) along += dot(slope[i], y[row_of_y + i * LANES + lane]);
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
            float weight = exp2f(over_lanes(score) - of_all);
            float dscore = scale * weight * (over_lanes(dweight) - along);
#pragma unroll
            for (int i = 0; i < OWN; i++)
                if (inside(i, lane))
                    result[i] = result[i] + dscore * keys[j * PIECES + i * LANES + lane];
            if (mine && lane == j % LANES) {
                weights[(own_head * m + first + j) * n + out] = weight;
                dscores[(own_head * m + first + j) * n + t] = dscore;
            }
        }
    }
    if (!mine) return;
#pragma unroll
    for (int i = 0; i < OWN; i++)
        if (inside(i, lane)) dq[row_of_q + i * LANES + lane] = result[i];
}
