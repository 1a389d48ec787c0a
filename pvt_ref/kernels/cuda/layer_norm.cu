// Layer norm (layers/layer_norm.py): LANES neighbouring threads share a row of C numbers.
//
// A row consists of pieces of four numbers. A thread holds every LANES-th piece, so neighbouring
// threads read neighbouring pieces. It keeps them in registers, so x is read only once, although
// the variance can be computed only after the mean.
//
// Compiled with LANES, and with PIECES = C / 4 / LANES, rounded up.

#include "lanes.h"
#include "order.h"

struct Row {
    float4 piece[PIECES];
};

// Piece i of this thread is piece i * LANES + lane of the row, or zeros beyond the last one.
static __device__ __forceinline__ Row load(const float4 *row, int lane, int pieces)
{
    Row x;
#pragma unroll
    for (int i = 0; i < PIECES; i++)
        x.piece[i] = i * LANES + lane < pieces ? row[i * LANES + lane] : zeros();
    return x;
}

static __device__ __forceinline__ float sum(const Row &x)
{
    float total = 0;
#pragma unroll
    for (int i = 0; i < PIECES; i++) total += sum(x.piece[i]);
    return over_lanes(total);
}

// x becomes x_hat = (x - mean) * rstd, 0 beyond the last piece. Returns
// rstd = 1 / sqrt(variance + eps).
static __device__ __forceinline__ float normalise(Row &x, int lane, int pieces, float eps)
{
    float mean = sum(x) / (4 * pieces);
    float squares = 0;
#pragma unroll
    for (int i = 0; i < PIECES; i++)
        if (i * LANES + lane < pieces) {
            x.piece[i] = x.piece[i] - mean;
            squares += dot(x.piece[i], x.piece[i]);
        }
    float rstd = 1.0f / sqrtf(over_lanes(squares) / (4 * pieces) + eps);
#pragma unroll
    for (int i = 0; i < PIECES; i++) x.piece[i] = rstd * x.piece[i];
    return rstd;
}

// Writes x_hat * weight + bias to y. The n tokens of each image, from a map of width W, are stored
// in R x R blocks (order.h), which gives the row's position in y.
static __device__ __forceinline__ void store(float4 *y, const Row &x_hat, const float4 *weight,
                                             const float4 *bias, int row, int lane, int pieces,
                                             int n, int W, int R)
{
    int t = row % n;
    y += (size_t)(row - t + in_blocks(t, W, R)) * pieces;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        int k = i * LANES + lane;
        if (k < pieces) y[k] = x_hat.piece[i] * weight[k] + bias[k];
    }
}

// y = LN(x), for rows of 4 * pieces numbers.
extern "C" __global__ void layer_norm(const float4 *x, const float4 *weight, const float4 *bias,
                                      float eps, float4 *y, int rows, int pieces, int n, int W,
                                      int R)
{
    int lane = threadIdx.x % LANES;
    int row = blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES;
    bool mine = row < rows;
    if (!mine) row = rows - 1; // all threads of a warp take part in its sums
    Row a = load(x + (size_t)row * pieces, lane, pieces);
    normalise(a, lane, pieces, eps);
    if (mine) store(y, a, weight, bias, row, lane, pieces, n, W, R);
}

// total = x + branch, stored in raster order, and y = LN(total): a norm that follows a residual sum
// (blocks/transformer.py).
extern "C" __global__ void add_layer_norm(const float4 *x, const float4 *branch,
                                          const float4 *weight, const float4 *bias, float eps,
                                          float4 *total, float4 *y, int rows, int pieces, int n,
                                          int W, int R)
{
    int lane = threadIdx.x % LANES;
    int row = blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES;
    bool mine = row < rows;
    if (!mine) row = rows - 1;
    Row a = load(x + (size_t)row * pieces, lane, pieces);
    Row b = load(branch + (size_t)row * pieces, lane, pieces);
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        int k = i * LANES + lane;
        a.piece[i] = a.piece[i] + b.piece[i];
        if (mine && k < pieces) total[(size_t)row * pieces + k] = a.piece[i];
    }
    normalise(a, lane, pieces, eps);
    if (mine) store(y, a, weight, bias, row, lane, pieces, n, W, R);
}

// dx = rstd * (g - mean(g) - x_hat mean(g * x_hat)) with g = dy * weight; mean, rstd and x_hat are
// recomputed from x. If skip is not null, it is added to dx: it is the gradient from the skip
// connection around the norm's branch. The rows of dy are stored in R x R blocks, as those of y.
//
// parts (gridDim.x, 2, C) gets the sums over rows of dy * x_hat and of dy, whose totals are the
// gradients of weight and bias. Each thread sums its own columns in double. Then the groups of
// LANES threads in a block add their sums in shared memory, (2, C) doubles, one after the other.
extern "C" __global__ void layer_norm_backward(const float4 *x, const float4 *weight, float eps,
                                               const float4 *dy, const float4 *skip, float4 *dx,
                                               double *parts, int rows, int pieces, int n, int W,
                                               int R)
{
    extern __shared__ double totals[];
    int lane = threadIdx.x % LANES, group = threadIdx.x / LANES, groups = blockDim.x / LANES;
    double dweight[PIECES][4] = {}, dbias[PIECES][4] = {};
    for (int first = blockIdx.x * groups; first < rows; first += gridDim.x * groups) {
        int row = first + group;
        bool mine = row < rows;
        if (!mine) row = rows - 1;
        Row x_hat = load(x + (size_t)row * pieces, lane, pieces);
        float rstd = normalise(x_hat, lane, pieces, eps);
        int t = row % n;
        Row g = load(dy + (size_t)(row - t + in_blocks(t, W, R)) * pieces, lane, pieces);
        float along = 0;
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            int k = i * LANES + lane;
            if (k < pieces) {
                float4 d = g.piece[i], products = d * x_hat.piece[i];
                if (mine) {
                    dweight[i][0] += products.x, dbias[i][0] += d.x;
                    dweight[i][1] += products.y, dbias[i][1] += d.y;
                    dweight[i][2] += products.z, dbias[i][2] += d.z;
                    dweight[i][3] += products.w, dbias[i][3] += d.w;
                }
                g.piece[i] = d * weight[k];
                along += dot(g.piece[i], x_hat.piece[i]);
            }
        }
        float mean_g = sum(g) / (4 * pieces);
        along = over_lanes(along) / (4 * pieces);
        if (!mine) continue;
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            int k = i * LANES + lane;
            if (k < pieces) {
                float4 d = rstd * (g.piece[i] - mean_g + -along * x_hat.piece[i]);
                size_t at = (size_t)row * pieces + k;
                dx[at] = skip ? d + skip[at] : d;
            }
        }
    }
    int C = 4 * pieces;
    for (int turn = 0; turn < groups; turn++) {
        if (turn == group)
#pragma unroll
            for (int i = 0; i < PIECES; i++)
                for (int e = 0; e < 4; e++) {
                    int column = 4 * (i * LANES + lane) + e;
                    if (column < C) {
                        totals[column] = (turn ? totals[column] : 0) + dweight[i][e];
                        totals[C + column] = (turn ? totals[C + column] : 0) + dbias[i][e];
                    }
                }
        __syncthreads();
    }
    for (int column = threadIdx.x; column < 2 * C; column += blockDim.x)
        parts[(size_t)blockIdx.x * 2 * C + column] = totals[column];
}
