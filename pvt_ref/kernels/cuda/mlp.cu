// The middle of an MLP (blocks/mlp.py): hidden = GELU(h + bias), where h = x W_1^T is a product. h
// is the largest array of a block, so the bias is added when h is read anyway, and the backward
// recomputes hidden rather than keeping it.
//
// Numbers are read in pieces of four: a row of h has columns pieces.

#include "gelu.h"

static __device__ __forceinline__ float4 add(float4 a, float4 b)
{
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

extern "C" __global__ void bias_gelu(const float4 *h, const float4 *bias, float4 *hidden, int count,
                                     int columns)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) hidden[i] = gelu_of(add(h[i], bias[i % columns]));
}

#define COLUMNS 32
#define ROWS 8

// Replaces d, which is dhidden, by dh = dhidden * (Phi(z) + z phi(z)) with z = h + bias, and
// recomputes hidden. The gradient of the bias is the sum of dh over the rows: parts (gridDim.y,
// 4 * columns), as in sum_rows.cu. Blocks of (32, 8) threads, for 32 neighbouring pieces and 8 rows
// at a time.
extern "C" __global__ void bias_gelu_backward(const float4 *h, const float4 *bias, float4 *d,
                                              float4 *hidden, double *parts, int rows, int columns)
{
    __shared__ double shared[ROWS][COLUMNS][4];
    int column = blockIdx.x * COLUMNS + threadIdx.x;
    double total[4] = {};
    if (column < columns)
        for (int row = blockIdx.y * ROWS + threadIdx.y; row < rows; row += gridDim.y * ROWS) {
            size_t i = (size_t)row * columns + column;
            float4 z = add(h[i], bias[column]), dh = times_slope(d[i], z);
            hidden[i] = gelu_of(z);
            d[i] = dh;
            total[0] += dh.x, total[1] += dh.y, total[2] += dh.z, total[3] += dh.w;
        }
    for (int e = 0; e < 4; e++) shared[threadIdx.y][threadIdx.x][e] = total[e];
    __syncthreads();
    if (threadIdx.y >= 4 || column >= columns) return;
    double s = 0; // number threadIdx.y of each piece
    for (int row = 0; row < ROWS; row++) s += shared[row][threadIdx.x][threadIdx.y];
    parts[((size_t)blockIdx.y * columns + column) * 4 + threadIdx.y] = s;
}
