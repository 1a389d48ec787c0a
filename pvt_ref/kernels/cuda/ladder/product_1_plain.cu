// y (M, N) = a (M, K) b (N, K)^T, first version: a thread for each element.
//
// A thread reads a row of a and a row of b from global memory, two numbers for one multiplication
// and one addition. So it mostly waits for memory, and every row is read by many threads.

extern "C" __global__ void product_1(const float *a, const float *b, float *y, int M, int N,
                                         int K)
{
    int column = blockIdx.x * blockDim.x + threadIdx.x;
    int row = blockIdx.y * blockDim.y + threadIdx.y;
    if (row >= M || column >= N) return;
    float total = 0;
    for (int k = 0; k < K; k++) total += a[(size_t)row * K + k] * b[(size_t)column * K + k];
    y[(size_t)row * N + column] = total;
}
