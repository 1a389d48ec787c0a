// One step of the optimiser for all arrays of a model: AdamW (train/adamw.py), and the norm of all
// gradients by which they are clipped (train/gradients.py). A model has hundreds of arrays, most of
// them small, so a launch for each would take longer than what it computes.
//
// arrays holds addresses: row a those of w, g, m, v and of the new w, m, v of array a. chunks
// (gridDim.x, 3) says what each block has: an array, its first number there, and the one behind its
// last.

#define THREADS 256
#define MOST 3.402823466e+38f  // of a float

// m' = beta_1 m + (1 - beta_1) g        v' = beta_2 v + (1 - beta_2) g^2
// w' = w (1 - lr lambda) - lr / bias_1 * m' / (sqrt(v') / sqrt(bias_2) + eps)
//
// rates (arrays, 3): the factor of w, that of the quotient, with its sign, and 1 / sqrt(bias_2).
// All gradients are multiplied by clip[0] first, if clip is not null. If clip[1], their norm, is not
// finite, everything stays as it was. The new arrays may be the old ones.
extern "C" __global__ void __launch_bounds__(THREADS)
    adamw(const size_t *arrays, const float *rates, const int *chunks, const float *clip,
          float beta_1, float rest_1, float beta_2, float rest_2, float eps)
{
    const int *chunk = chunks + 3 * blockIdx.x;
    const size_t *a = arrays + 7 * chunk[0];
    const float *rate = rates + 3 * chunk[0];
    const float *w = (const float *)a[0], *g = (const float *)a[1];
    const float *m = (const float *)a[2], *v = (const float *)a[3];
    float *new_w = (float *)a[4], *new_m = (float *)a[5], *new_v = (float *)a[6];
    float factor = clip ? clip[0] : 1.0f;
    bool stays = clip && !(clip[1] <= MOST);
    for (int i = chunk[1] + threadIdx.x; i < chunk[2]; i += THREADS) {
        if (stays) {
            new_w[i] = w[i], new_m[i] = m[i], new_v[i] = v[i];
            continue;
        }
        float slope = factor * g[i];
        float mean = beta_1 * m[i] + rest_1 * slope;
        float square = beta_2 * v[i] + rest_2 * (slope * slope);
        new_m[i] = mean;
        new_v[i] = square;
        new_w[i] = rate[0] * w[i] + rate[1] * (mean / (rate[2] * sqrtf(square) + eps));
    }
}

// The sum over the threads of a block, in thread 0: halves are added until one is left.
static __device__ __forceinline__ double over_block(double x)
{
    __shared__ double shared[THREADS];
    shared[threadIdx.x] = x;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    }
    return shared[0];
}

// parts (gridDim.x): the sum of g^2 of each chunk, in double: the square of a float could overflow.
extern "C" __global__ void __launch_bounds__(THREADS)
    sums_of_squares(const size_t *arrays, const int *chunks, double *parts)
{
    const int *chunk = chunks + 3 * blockIdx.x;
    const float *g = (const float *)arrays[7 * chunk[0] + 1];
    double total = 0;
    for (int i = chunk[1] + threadIdx.x; i < chunk[2]; i += THREADS) total += (double)g[i] * g[i];
    total = over_block(total);
    if (threadIdx.x == 0) parts[blockIdx.x] = total;
}

// clip: min(1, max_norm / (norm + 1e-6)), or 1 where the norm is no number; and the norm, the root
// of the sum of parts (count). If the gradients are scale[0] times too large, the norm is that of
// what they should be, and the factor divides by the scale too. One block.
extern "C" __global__ void __launch_bounds__(THREADS)
    clip_factor(const double *parts, int count, float max_norm, const float *scale, float *clip)
{
    double total = 0;
    for (int i = threadIdx.x; i < count; i += THREADS) total += parts[i];
    total = over_block(total);
    if (threadIdx.x > 0) return;
    double by = scale ? scale[0] : 1.0, norm = sqrt(total) / by;
    double factor = max_norm / (norm + 1e-6);
    clip[0] = (factor < 1 ? (float)factor : 1.0f) / (float)by;
    clip[1] = (float)norm;
}
