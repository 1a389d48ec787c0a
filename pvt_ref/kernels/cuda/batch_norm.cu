// Batch norm (layers/batch_norm.py) of rows of C numbers, with or without the ReLU that follows it
// in heads, and its backward. The statistics are given: those of the batch, or the running ones.
//
// All kernels: blocks of (32, 8) threads. A thread has one channel, whose parameters it loads once,
// and every (8 * gridDim.y)-th row. The threads of a warp have neighbouring channels.

#define COLUMNS 32
#define ROWS 8
#define FEW 8 // terms are added in float32, FEW at a time, and these sums in double

// The parameters of a channel: y = weight * x_hat + bias with x_hat = (x - mean) * rstd.
struct Channel {
    float mean, rstd, weight, bias;
};

static __device__ __forceinline__ Channel channel(const float *mean, const float *variance,
                                                  const float *weight, const float *bias,
                                                  float eps, int c)
{
    return {mean[c], 1.0f / sqrtf(variance[c] + eps), weight[c], bias[c]};
}

// y before the ReLU. Every kernel rounds it alike, so that the backward sees the forward's sign.
static __device__ __forceinline__ float normed(float x, const Channel &of)
{
    return fmaf(x - of.mean, of.weight * of.rstd, of.bias);
}

// The gradient with respect to y before the ReLU: 0 where that y is not positive.
static __device__ __forceinline__ float passed(float dy, float x, const Channel &of, int has_relu)
{
    return has_relu && !(normed(x, of) > 0) ? 0 : dy;
}

// y = x_hat * weight + bias, or max(y, 0).
extern "C" __global__ void batch_norm(const float *x, const float *mean, const float *variance,
                                      const float *weight, const float *bias, float eps, float *y,
                                      int rows, int C, int has_relu)
{
    int c = blockIdx.x * COLUMNS + threadIdx.x;
    if (c >= C) return;
    Channel of = channel(mean, variance, weight, bias, eps, c);
    for (int row = blockIdx.y * ROWS + threadIdx.y; row < rows; row += gridDim.y * ROWS) {
        size_t at = (size_t)row * C + c;
        float value = normed(x[at], of);
        y[at] = has_relu && value <= 0 ? 0 : value; // NaN stays
    }
}

// Adds each of n sums over the rows of a block, and writes them to this block's (n, C) in parts.
static __device__ __forceinline__ void store_sums(const double *sums, int n, double *parts, int c,
                                                  int C)
{
    __shared__ double shared[ROWS][COLUMNS];
    for (int k = 0; k < n; k++) {
        __syncthreads(); // the previous sum has been read
        shared[threadIdx.y][threadIdx.x] = sums[k];
        __syncthreads();
        if (threadIdx.y == 0 && c < C) {
            double s = 0;
            for (int row = 0; row < ROWS; row++) s += shared[row][threadIdx.x];
            parts[((size_t)blockIdx.y * n + k) * C + c] = s;
        }
    }
}

// parts (gridDim.y, C) of the sums over rows of (x - mean)^2, for the variance.
extern "C" __global__ void batch_norm_squares(const float *x, const float *mean, int rows, int C,
                                              double *parts)
{
    int c = blockIdx.x * COLUMNS + threadIdx.x, step = gridDim.y * ROWS;
    double total[1] = {};
    if (c < C)
        for (int first = blockIdx.y * ROWS + threadIdx.y; first < rows; first += FEW * step) {
            float few = 0;
            for (int row = first, n = 0; n < FEW && row < rows; row += step, n++) {
                float d = x[(size_t)row * C + c] - mean[c];
                few += d * d;
            }
            total[0] += few;
        }
    store_sums(total, 1, parts, c, C);
}

// parts (gridDim.y, 2, C) of the gradients of weight and bias: the sums over rows of g * x_hat and
// of g, with g the gradient before the ReLU.
extern "C" __global__ void batch_norm_sums(const float *x, const float *dy, const float *mean,
                                           const float *variance, const float *weight,
                                           const float *bias, float eps, int rows, int C,
                                           int has_relu, double *parts)
{
    int c = blockIdx.x * COLUMNS + threadIdx.x, step = gridDim.y * ROWS;
    double total[2] = {};
    if (c < C) {
        Channel of = channel(mean, variance, weight, bias, eps, c);
        for (int first = blockIdx.y * ROWS + threadIdx.y; first < rows; first += FEW * step) {
            float dweight = 0, dbias = 0;
            for (int row = first, n = 0; n < FEW && row < rows; row += step, n++) {
                size_t at = (size_t)row * C + c;
                float g = passed(dy[at], x[at], of, has_relu);
                dweight += g * ((x[at] - of.mean) * of.rstd);
                dbias += g;
            }
            total[0] += dweight, total[1] += dbias;
        }
    }
    store_sums(total, 2, parts, c, C);
}

// dx = rstd * weight * (g - (dbias + x_hat * dweight) / N), with N rows, and with dweight and dbias
// in sums (2, C): the mean and variance of the batch depend on x. If sums is null, they are
// constants, and dx = rstd * weight * g.
extern "C" __global__ void batch_norm_backward(const float *x, const float *dy, const float *mean,
                                               const float *variance, const float *weight,
                                               const float *bias, float eps, const float *sums,
                                               float *dx, int rows, int C, int has_relu)
{
    int c = blockIdx.x * COLUMNS + threadIdx.x;
    if (c >= C) return;
    Channel of = channel(mean, variance, weight, bias, eps, c);
    float dweight = sums ? sums[c] / rows : 0, dbias = sums ? sums[C + c] / rows : 0;
    for (int row = blockIdx.y * ROWS + threadIdx.y; row < rows; row += gridDim.y * ROWS) {
        size_t at = (size_t)row * C + c;
        float g = passed(dy[at], x[at], of, has_relu);
        if (sums) g -= dbias + (x[at] - of.mean) * of.rstd * dweight;
        dx[at] = of.weight * of.rstd * g;
    }
}
