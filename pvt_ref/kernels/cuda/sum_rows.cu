// y_j = sum_r x_rj (layers/sum_rows.py), in two launches: the first computes parts of each sum, the
// second adds the parts.
//
// The threads of a warp have neighbouring columns, so they read neighbouring numbers. There are no
// atomic additions: the order of every sum, and so every bit, is the same each time.
//
// Both kernels: blocks of (32, 8) threads, for 32 neighbouring columns and 8 rows at a time. Along
// x, the grid has a block for every 32 columns.

#define COLUMNS 32
#define ROWS 8
#define FEW 8 // terms are added in float32, FEW at a time, and these sums in double

// The sum over the rows of a block, for each column. Only the threads of row 0 get it.
static __device__ __forceinline__ double over_rows(double x)
{
    __shared__ double shared[ROWS][COLUMNS + 1];
    shared[threadIdx.y][threadIdx.x] = x;
    __syncthreads();
    if (threadIdx.y == 0)
        for (int i = 1; i < ROWS; i++) x += shared[i][threadIdx.x];
    return x;
}

// parts (gridDim.y, columns) of the sums of x (rows, columns). A block has every gridDim.y-th group
// of 8 rows.
extern "C" __global__ void partial_sums(const float *x, int rows, int columns, double *parts)
{
    int column = blockIdx.x * COLUMNS + threadIdx.x;
    int step = gridDim.y * ROWS;
    double total = 0;
    if (column < columns) {
        int row = blockIdx.y * ROWS + threadIdx.y;
        for (; row < rows - (FEW - 1) * step; row += FEW * step) {
            float few[FEW];
#pragma unroll
            for (int i = 0; i < FEW; i++) few[i] = x[(size_t)(row + i * step) * columns + column];
            total +=
                ((few[0] + few[1]) + (few[2] + few[3])) + ((few[4] + few[5]) + (few[6] + few[7]));
        }
        for (; row < rows; row += step) total += x[(size_t)row * columns + column];
    }
    total = over_rows(total);
    if (threadIdx.y == 0 && column < columns) parts[(size_t)blockIdx.y * columns + column] = total;
}

// y (columns), the sum of parts (count, columns).
extern "C" __global__ void add_parts(const double *parts, int count, int columns, float *y)
{
    int column = blockIdx.x * COLUMNS + threadIdx.x;
    double total = 0;
    if (column < columns)
        for (int i = threadIdx.y; i < count; i += ROWS)
            total += parts[(size_t)i * columns + column];
    total = over_rows(total);
    if (threadIdx.y == 0 && column < columns) y[column] = (float)total;
}
