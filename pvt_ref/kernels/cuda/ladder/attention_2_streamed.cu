// Attention, second version: one launch, a thread for each query, and no array of scores.
//
// The softmax is updated key by key. From the scores s_1, ..., s_j seen so far, a thread has
//
//     peak = max s_i      total = sum exp(s_i - peak)      result = sum exp(s_i - peak) v_i
//
// When a larger score comes, total and result are multiplied by exp(old peak - new peak). At the
// end, y = result / total. A thread keeps its query and its result in registers.
//
// Shapes as in the first version. Grid: (queries / threads, heads). Compiled with D.

extern "C" __global__ void __launch_bounds__(128)
    attention_2(const float *q, const float *k, const float *v, float scale, float *y, int n, int m)
{
    int t = blockIdx.x * blockDim.x + threadIdx.x, head = blockIdx.y;
    if (t >= n) return;
    q += ((size_t)head * n + t) * D;
    k += (size_t)head * m * D;
    v += (size_t)head * m * D;
    float query[D], result[D];
    float peak = __int_as_float(0xff800000), total = 0; // -infinity
#pragma unroll
    for (int c = 0; c < D; c++) query[c] = scale * q[c], result[c] = 0;
    for (int j = 0; j < m; j++) {
        float score = 0;
#pragma unroll
        for (int c = 0; c < D; c++) score += query[c] * k[j * D + c];
        float top = fmaxf(peak, score);
        float shrink = expf(peak - top), weight = expf(score - top); // shrink is 0 at first
        peak = top;
        total = shrink * total + weight;
#pragma unroll
        for (int c = 0; c < D; c++) result[c] = shrink * result[c] + weight * v[j * D + c];
    }
    y += ((size_t)head * n + t) * D;
#pragma unroll
    for (int c = 0; c < D; c++) y[c] = result[c] / total;
}
