// The windows of a map (unfold in layers/conv.py), and the transpose (fold). Patches are windows
// that do not overlap. Windows are (B, h, w, k_h, k_w, C), a map is (B, H, W, C), and 0 outside.
//
// Compiled with PIECE: float, or float4 if C and all strides in memory are divisible by four. Then
// C, count and these strides count pieces. Each thread writes one piece, so no two threads add to
// the same one.

#include "piece.h"

// windows_(b, i, j, u, v, c) = x_(b, i s + u - padding, j s + v - padding, c), with s the stride. x
// may have any memory layout: the last four arguments are the steps from image to image, line to
// line, pixel to pixel and channel to channel.
extern "C" __global__ void unfold(const PIECE *x, PIECE *windows, int count, int H, int W, int C,
                                  int h, int w, int k_h, int k_w, int stride, int padding,
                                  int image_step, int line_step, int pixel_step, int channel_step)
{
    int index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= count) return;
    int rest = index;
    int c = last_index(rest, C), v = last_index(rest, k_w), u = last_index(rest, k_h);
    int j = last_index(rest, w), i = last_index(rest, h), b = rest;
    int line = i * stride + u - padding, pixel = j * stride + v - padding;
    PIECE value;
    set_zero(value);
    if (line >= 0 && line < H && pixel >= 0 && pixel < W)
        value = x[(size_t)b * image_step + (size_t)line * line_step + (size_t)pixel * pixel_step +
                  (size_t)c * channel_step];
    windows[index] = value;
}

// x_(b, line, pixel, c) is the sum over all windows that contain it: those (i, j) with a row u such
// that i s + u - padding = line, and likewise a column v. They are added in the order of u, then v.
extern "C" __global__ void fold(const PIECE *windows, PIECE *x, int count, int H, int W, int C,
                                int h, int w, int k_h, int k_w, int stride, int padding)
{
    int index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= count) return;
    int rest = index;
    int c = last_index(rest, C), pixel = last_index(rest, W) + padding;
    int line = last_index(rest, H) + padding, b = rest;
    PIECE total;
    set_zero(total);
    for (int u = line % stride; u < k_h; u += stride) {
        int i = (line - u) / stride;
        if (u > line || i >= h) continue;
        for (int v = pixel % stride; v < k_w; v += stride) {
            int j = (pixel - v) / stride;
            if (v > pixel || j >= w) continue;
            add(total, windows[((((size_t)(b * h + i) * w + j) * k_h + u) * k_w + v) * C + c]);
        }
    }
    x[index] = total;
}
