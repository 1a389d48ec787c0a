// The sum over rows, third version: a block has 32 neighbouring columns and a share of the rows, 8
// at a time. Its sums are parts, which a second launch adds up (add_parts of sum_rows.cu).
//
// Now there are enough threads, and whole lines are read. But every number is added in double.
// An A100 or H100 has half as many units for double as for float, a consumer GPU a sixty-fourth.

#define COLUMNS 32
#define ROWS 8

// parts (gridDim.y, columns) of the sums of x (rows, columns).
extern "C" __global__ void sum_rows_3(const float *x, int rows, int columns, double *parts)
{
    __shared__ double shared[ROWS][COLUMNS + 1];
    int column = blockIdx.x * COLUMNS + threadIdx.x;
    double total = 0;
    if (column < columns)
        for (int row = blockIdx.y * ROWS + threadIdx.y; row < rows; row += gridDim.y * ROWS)
            total += x[(size_t)row * columns + column];
    shared[threadIdx.y][threadIdx.x] = total;
    __syncthreads();
    if (threadIdx.y > 0 || column >= columns) return;
    for (int i = 1; i < ROWS; i++) total += shared[i][threadIdx.x];
    parts[(size_t)blockIdx.y * columns + column] = total;
}
