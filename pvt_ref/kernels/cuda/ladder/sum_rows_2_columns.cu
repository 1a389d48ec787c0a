// The sum over rows, second version: a block of 256 threads adds up a column, each thread every
// 256th row.
//
// Now there are enough threads. But those of a warp read numbers that are a whole row apart, and
// memory delivers at least 32 bytes at a time: seven of eight numbers are fetched for nothing.

#define THREADS 256

extern "C" __global__ void __launch_bounds__(THREADS)
    sum_rows_2(const float *x, int rows, int columns, float *y)
{
    __shared__ double shared[THREADS];
    double total = 0;
    for (int row = threadIdx.x; row < rows; row += THREADS)
        total += x[(size_t)row * columns + blockIdx.x];
    shared[threadIdx.x] = total;
    // halves are added until one sum is left, in the same order every time
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    }
    if (threadIdx.x == 0) y[blockIdx.x] = (float)shared[0];
}
