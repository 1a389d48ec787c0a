// Casts float32 to float16 or bfloat16, rounding to nearest: the operands of a half-precision
// product.
//
// Compiled with CAST: to_float16 or to_bfloat16.

#include "mma.h"

extern "C" __global__ void cast(const float *x, half_bits *y, int count)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) y[i] = CAST(x[i]);
}
