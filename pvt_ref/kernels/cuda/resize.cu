// Resizing (layers/resize.py) and pooling (layers/pool.py): A_h x A_w^T for every channel of a map,
// in one launch. Only the non-zero entries of each row of the two matrices are read: the taps, at
// most K per row. With both matrices transposed, this is the backward.
//
// Compiled with PIECE: float, or float4 if C is divisible by four. Then C and count count pieces.

#include "piece.h"

static __device__ __forceinline__ void add_times(float &x, float s, float y) { x += s * y; }
static __device__ __forceinline__ void add_times(float4 &x, float s, float4 y)
{
    x.x += s * y.x, x.y += s * y.y, x.z += s * y.z, x.w += s * y.w;
}

// y (B, H, W, C) from x (B, h, w, C). cells holds (K_h, H) indices, the lines of x that contribute
// to each line of y, then (K_w, W), the same for the pixels of a line; weights has their weights in
// the same order. A thread has one piece of y.
extern "C" __global__ void resize(const PIECE *x, const int *cells, const float *weights, PIECE *y,
                                  int count, int h, int w, int H, int W, int C, int K_h, int K_w)
{
    int index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= count) return;
    int rest = index;
    int c = last_index(rest, C), j = last_index(rest, W), i = last_index(rest, H), b = rest;
    PIECE total;
    set_zero(total);
    for (int u = 0; u < K_h; u++) {
        const PIECE *line = x + ((size_t)b * h + cells[u * H + i]) * w * C + c;
        PIECE mixed;
        set_zero(mixed);
        for (int v = 0; v < K_w; v++) {
            int tap = K_h * H + v * W + j;
            add_times(mixed, weights[tap], line[(size_t)cells[tap] * C]);
        }
        add_times(total, weights[u * H + i], mixed);
    }
    y[index] = total;
}
