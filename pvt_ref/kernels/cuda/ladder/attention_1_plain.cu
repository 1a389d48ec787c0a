// Attention (layers/attention.py, paper eq. 4), y = Softmax(scale * q k^T) v, first version: three
// launches, one for each step of the equation. The scores (n, m) of each head are written to
// memory, read three times and written once by the softmax, and read again by the last product.
//
// q (heads, n, D), k and v (heads, m, D), scores (heads, n, m); heads counts those of all images.
// Compiled with D.

// scores = scale * q k^T, a thread for each score.
extern "C" __global__ void attention_1_scores(const float *q, const float *k, float scale,
                                              float *scores, int n, int m, int count)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    int row = i / m, j = i % m, head = row / n;
    q += (size_t)row * D;
    k += ((size_t)head * m + j) * D;
    float products = 0;
    for (int c = 0; c < D; c++) products += q[c] * k[c];
    scores[i] = scale * products;
}

// Replaces each row of scores by its softmax, a thread for each row.
extern "C" __global__ void attention_1_softmax(float *scores, int m, int rows)
{
    int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    scores += (size_t)row * m;
    float peak = scores[0], total = 0;
    for (int j = 1; j < m; j++) peak = fmaxf(peak, scores[j]);
    for (int j = 0; j < m; j++) total += expf(scores[j] - peak);
    for (int j = 0; j < m; j++) scores[j] = expf(scores[j] - peak) / total;
}

// y = weights v, a thread for each element of y.
extern "C" __global__ void attention_1_values(const float *weights, const float *v, float *y, int n,
                                              int m, int count)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    int row = i / D, c = i % D, head = row / n;
    weights += (size_t)row * m;
    v += (size_t)head * m * D;
    float total = 0;
    for (int j = 0; j < m; j++) total += weights[j] * v[j * D + c];
    y[i] = total;
}
