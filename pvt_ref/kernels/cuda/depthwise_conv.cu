// Depth-wise 3 x 3 convolution (layers/depthwise_conv.py) of a map x (B, H, W, C), zeros outside.
//
// kernel is (9, C), with index 3 u + v first, so that neighbouring channels are side by side.

// y_ij = sum_uv kernel_uv x_(i+u-1, j+v-1) + bias; bias may be null. A thread has four channels of
// one pixel; C and count count pieces of four. With the kernel rotated by 180 degrees and dy in
// place of x, y is dx.
extern "C" __global__ void depthwise_conv(const float4 *x, const float4 *kernel, const float4 *bias,
                                          float4 *y, int count, int H, int W, int C)
{
    int index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= count) return;
    int c = index % C, j = index / C % W, i = index / C / W % H;
    float4 total = bias ? bias[c] : make_float4(0, 0, 0, 0);
#pragma unroll
    for (int u = 0; u < 3; u++)
#pragma unroll
        for (int v = 0; v < 3; v++) {
            if (i + u < 1 || i + u > H || j + v < 1 || j + v > W) continue;
            float4 a = x[index + ((u - 1) * W + v - 1) * C], k = kernel[(3 * u + v) * C + c];
            total.x += a.x * k.x;
            total.y += a.y * k.y;
            total.z += a.z * k.z;
            total.w += a.w * k.w;
        }
    y[index] = total;
}

#define COLUMNS 32
#define ROWS 8
#define FEW 8 // terms are added in float32, FEW at a time, and these sums in double

// dkernel_uv = sum_ij dy_ij x_(i+u-1, j+v-1) and dbias = sum_ij dy_ij: ten sums over all pixels of
// the batch. parts (gridDim.y, 10, C) gets parts of them, as in sum_rows.cu. Blocks of (32, 8)
// threads, for 32 neighbouring channels; here C counts single channels. A block has consecutive
// pixels, so that what it reads repeatedly is in the cache.
extern "C" __global__ void depthwise_conv_sums(const float *x, const float *dy, double *parts,
                                               int pixels, int H, int W, int C)
{
    __shared__ double shared[ROWS][COLUMNS];
    int c = blockIdx.x * COLUMNS + threadIdx.x;
    int share = (pixels + gridDim.y - 1) / gridDim.y;
    int begin = blockIdx.y * share, end = min(begin + share, pixels);
    double total[10] = {};
    if (c < C)
        for (int first = begin + threadIdx.y; first < end; first += FEW * ROWS) {
            float few[10] = {};
            for (int n = 0; n < FEW; n++) {
                int pixel = first + n * ROWS;
                if (pixel >= end) break;
                int j = pixel % W, i = pixel / W % H;
                float d = dy[(size_t)pixel * C + c];
                few[9] += d;
#pragma unroll
                for (int u = 0; u < 3; u++)
#pragma unroll
                    for (int v = 0; v < 3; v++)
                        if (i + u >= 1 && i + u <= H && j + v >= 1 && j + v <= W)
                            few[3 * u + v] += d * x[(size_t)(pixel + (u - 1) * W + v - 1) * C + c];
            }
#pragma unroll
            for (int k = 0; k < 10; k++) total[k] += few[k];
        }
    for (int k = 0; k < 10; k++) {
        __syncthreads(); // the previous sum has been read
        shared[threadIdx.y][threadIdx.x] = total[k];
        __syncthreads();
        if (threadIdx.y == 0 && c < C) {
            double s = 0;
            for (int row = 0; row < ROWS; row++) s += shared[row][threadIdx.x];
            parts[((size_t)blockIdx.y * 10 + k) * C + c] = s;
        }
    }
}
