// One step of the optimiser for all arrays of a model: AdamW (train/adamw.py), and clipping by the
// norm of all gradients (train/gradients.py). A model has hundreds of arrays, most of them small,
// so launching a kernel for each would take longer than the computation.
//
// arrays holds addresses: row a has those of w, g, m, v and of the new w, m, v of array a. chunks
// (gridDim.x, 3) says what each block updates: the array, its first index there, and the index
// behind its last.

#define THREADS 256
#define MOST 3.402823466e+38f  // the largest float

// m' = beta_1 m + (1 - beta_1) g        v' = beta_2 v + (1 - beta_2) g^2
// w' = w (1 - lr lambda) - lr / bias_1 * m' / (sqrt(v') / sqrt(bias_2) + eps)
//
// rates (arrays, 3): the factor of w, the signed factor of the quotient, and 1 / sqrt(bias_2). If
// clip is not null, all gradients are first multiplied by clip[0]; if clip[1], their norm, is not
// finite, w, m and v keep their values. The new arrays may be the old ones.
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

// The sum over the threads of a block, valid in thread 0: halves are added until one is left.
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

// parts (gridDim.x): the sum of g^2 over each chunk, in double, since g^2 could overflow a float.
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

// clip[0]: min(1, max_norm / (norm + 1e-6)), or 1 if the norm is NaN. clip[1]: the norm, the square
// root of the sum of parts (count). If scale is not null, the gradients are scale[0] times too
// large: the norm is that of the unscaled gradients, and clip[0] is divided by scale[0]. One block.
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
