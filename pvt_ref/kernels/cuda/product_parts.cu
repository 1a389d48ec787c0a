// Adds the parts of a product (product.cu), one after the other, so that the bits are the same each
// time; then bias, GELU and residual.

#include "gelu.h"
#include "epilogue.h"

// y (size,), in rows of N numbers, from parts (count, size).
extern "C" __global__ void add_products(const float *parts, int count, const float *bias,
                                        const float *residual, int has_gelu, float *y, int size,
                                        int N)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= size) return;
    double total = 0;
    for (int part = 0; part < count; part++) total += parts[(size_t)part * size + i];
    Epilogue epilogue = {bias, residual, has_gelu};
    y[i] = finished((float)total, epilogue, i % N, i);
}
