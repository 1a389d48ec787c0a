// y (M, N) = a (M, K) b (N, K)^T, second version: tiles in shared memory, results in registers.
//
// A block computes TILE x TILE elements. It copies DEPTH columns of TILE rows of a and of b to
// shared memory at a time, so each number that it reads from global memory is used TILE times. A
// thread computes 4 x 4 elements, so each number that it reads from shared memory is used four
// times. In product.cu, tensor cores multiply, while the next tiles are being copied.

#define TILE 64
#define DEPTH 16
#define SIDE 16 // blocks of 16 x 16 threads; a thread's rows and columns are 16 apart

// Loads DEPTH columns, from k0 on, of the tile's rows, transposed; zeros beyond the matrix.
static __device__ __forceinline__ void load_tile(float (*tile)[TILE + 1], const float *x, int row0,
                                                 int rows, int k0, int K)
{
    for (int index = threadIdx.y * SIDE + threadIdx.x; index < TILE * DEPTH; index += SIDE * SIDE) {
        int i = index / DEPTH, k = index % DEPTH; // neighbours read neighbouring numbers
        bool there = row0 + i < rows && k0 + k < K;
        tile[k][i] = there ? x[(size_t)(row0 + i) * K + k0 + k] : 0.0f;
    }
}

extern "C" __global__ void product_2(const float *a, const float *b, float *y, int M, int N,
                                         int K)
{
    __shared__ float a_tile[DEPTH][TILE + 1], b_tile[DEPTH][TILE + 1];
    int row0 = blockIdx.y * TILE, column0 = blockIdx.x * TILE;
    float sum[4][4] = {};
    for (int k0 = 0; k0 < K; k0 += DEPTH) {
        __syncthreads(); // all are done with the previous tiles
        load_tile(a_tile, a, row0, M, k0, K);
        load_tile(b_tile, b, column0, N, k0, K);
        __syncthreads();
        for (int k = 0; k < DEPTH; k++) {
            float own_a[4], own_b[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                own_a[i] = a_tile[k][threadIdx.y + SIDE * i];
                own_b[i] = b_tile[k][threadIdx.x + SIDE * i];
            }
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) sum[i][j] += own_a[i] * own_b[j];
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int row = row0 + threadIdx.y + SIDE * i, column = column0 + threadIdx.x + SIDE * j;
            if (row < M && column < N) y[(size_t)row * N + column] = sum[i][j];
        }
}
