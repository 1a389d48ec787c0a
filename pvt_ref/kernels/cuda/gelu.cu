// GELU (layers/gelu.py): y = x Phi(x), and its derivative Phi(x) + x phi(x). Each thread has four
// numbers.

#include "gelu.h"

// y = gelu(x), for 4 * count numbers.
extern "C" __global__ void gelu(const float4 *x, float4 *y, int count)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    y[i] = gelu_of(x[i]);
}

// dx = dy * (Phi(x) + x phi(x)).
extern "C" __global__ void gelu_backward(const float4 *x, const float4 *dy, float4 *dx, int count)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    dx[i] = times_slope(dy[i], x[i]);
}
