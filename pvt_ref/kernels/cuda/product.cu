// y (M, N) = a (M, K) b (N, K)^T on tensor cores, with the accuracy of float32: the products of a
// linear layer (layers/linear.py), forward and backward.
//
// A tensor core reads only 10 of the 23 bits of a float32 mantissa (TF32). So each number is split
// into big, the part that it can read, and small, the rest. Then
//
//     a b = big big + big small + small big    (+ small small, 2^-22 of it: left out).
//
// A tensor core also rounds its sums toward zero, so rounding errors would accumulate. Therefore it
// adds only 8 CHAIN products at a time, and those sums are added in float32 (Ootomo and Yokota
// 2022, arXiv 2203.03341). Infinity has no small part (inf - inf), nor does a number whose big part
// rounds up to infinity: an element that is not finite is computed again in plain float32. With
// TERMS 1, only big big is computed: TF32.
//
// Four warps compute TILE x TILE elements of y, a quarter each. Tiles of a and b, DEPTH columns of
// each, are copied to shared memory while the previous tiles are multiplied.
//
// Compiled with TILE (64 or 32); TERMS (3 or 1); A_IN_COLUMNS and B_IN_COLUMNS, 1 if the columns of
// the matrix are contiguous in memory, 0 if the rows are; and PIECE, the number of contiguous
// elements that can be copied at once: 4 or 1.

#include "mma.h"
#include "gelu.h"
#include "epilogue.h"

#define THREADS 128
#define DEPTH 32
#define STAGES 2          // tiles of each operand in shared memory
#define CHAIN 2           // times 8 products that a tensor core adds up
#define PART (TILE / 2)   // rows and columns of a warp
#define ROW (DEPTH + 4)   // from row to row of a tile: eight rows of four numbers are in 32 banks
#define COLUMN (TILE + 8) // from column to column: so are four columns of eight numbers
#define TILES_M (PART / 16)
#define TILES_N (PART / 8)
#define OWN (4 * TILES_M * TILES_N) // elements of a thread, at most 32
#define SPACE (TILE * ROW > DEPTH * COLUMN ? TILE * ROW : DEPTH * COLUMN)

// The part of x that a tensor core can read, rounded to nearest. The addition may turn a NaN into
// 0. Then the small part is NaN; with TERMS 1, which has no small part, x itself is returned.
static __device__ __forceinline__ float big_part(float x)
{
    float big = __uint_as_float((__float_as_uint(x) + 0x1000u) & 0xffffe000u);
    return TERMS == 1 && x != x ? x : big;
}

// Replaces x by its big part, and sets small to the rest.
template <int COUNT>
static __device__ __forceinline__ void split(float (&x)[COUNT], float (&small)[COUNT])
{
#pragma unroll
    for (int e = 0; e < COUNT; e++) {
        float big = big_part(x[e]);
        small[e] = x[e] - big;
        x[e] = big;
    }
}

// The offset of element (i, k) of a matrix; step is from row to row, or from column to column.
template <bool IN_COLUMNS>
static __device__ __forceinline__ size_t place(int i, int k, int step)
{ return IN_COLUMNS ? (size_t)k * step + i : (size_t)i * step + k; }

// Begins to copy a tile of x: TILE rows from row0 on, and columns k0 to k0 + DEPTH - 1. Beyond the
// last row, and from column k_end on, the tile gets zeros.
template <bool IN_COLUMNS>
static __device__ __forceinline__ void copy_tile(float *tile, const float *x, int step, int row0,
                                                 int rows, int k0, int k_end)
{
    constexpr int PIECES = (IN_COLUMNS ? TILE : DEPTH) / PIECE; // of a line in memory
#pragma unroll
    for (int index = threadIdx.x; index < TILE * DEPTH / PIECE; index += THREADS) {
        int line = index / PIECES, along = index % PIECES * PIECE;
        int i = IN_COLUMNS ? along : line, k = IN_COLUMNS ? line : along;
        bool there = row0 + i < rows && k0 + k < k_end;
        const float *from = there ? x + place<IN_COLUMNS>(row0 + i, k0 + k, step) : x;
        copy_async<4 * PIECE>(tile + line * (IN_COLUMNS ? COLUMN : ROW) + along, from, there);
    }
}

// Loads 16 x 8 elements of a tile, from (i, k) on, in the layout that mma_tf32 needs for its a. For
// its b, the first and third number are those of 8 rows, the others those of the next 8.
template <bool IN_COLUMNS>
static __device__ __forceinline__ void load(float (&x)[4], const float *tile, int i, int k)
{
    int lane = threadIdx.x % 32;
    if (!IN_COLUMNS) {
        load_matrices(x, tile + (i + lane % 16) * ROW + k + lane / 16 * 4);
    } else {
        const float *from = tile + (k + lane % 4) * COLUMN + i + lane / 4;
        x[0] = from[0], x[1] = from[8], x[2] = from[4 * COLUMN], x[3] = from[4 * COLUMN + 8];
    }
}

// Element (i, j) of the product over k_first to k_end - 1 in plain float32.
static __device__ __forceinline__ float plain(const float *a, int a_step, const float *b,
                                              int b_step, int i, int j, int k_first, int k_end)
{
    float total = 0;
    for (int k = k_first; k < k_end; k++)
        total += a[place<A_IN_COLUMNS>(i, k, a_step)] * b[place<B_IN_COLUMNS>(j, k, b_step)];
    return total;
}

// The row and the column of a thread's element n, relative to its first element.
static __device__ __forceinline__ int row_of(int n)
{ return n / (4 * TILES_N) * 16 + n % 4 / 2 * 8; }
static __device__ __forceinline__ int column_of(int n) { return n / 4 % TILES_N * 8 + n % 2; }

// Blocks along x are the tiles of y, row by row. Blocks along z are the products of a batch:
// product (o, i) has matrices at offset outer * o + inner * i, with inner_count values of i for
// each o. Or, if parts > 1, they are parts of one product, each over share (a multiple of DEPTH) of
// its K columns; product_parts.cu adds them. The results follow one another in y.
extern "C" __global__ void __launch_bounds__(THREADS)
    product(const float *a, int a_step, int a_outer, int a_inner, const float *b, int b_step,
            int b_outer, int b_inner, int inner_count, const float *bias, const float *residual,
            int has_gelu, float *y, int M, int N, int K, int parts, int share)
{
    __shared__ __align__(16) float a_tiles[STAGES][SPACE];
    __shared__ __align__(16) float b_tiles[STAGES][SPACE];
    int columns = (N + TILE - 1) / TILE; // of tiles
    int row0 = blockIdx.x / columns * TILE, column0 = blockIdx.x % columns * TILE;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int warp_row = warp / 2 * PART, warp_column = warp % 2 * PART;
    int k_first = 0, k_end = K;
    if (parts > 1) {
        k_first = blockIdx.z * share;
        k_end = min(K, k_first + share);
    } else {
        int outer = blockIdx.z / inner_count, inner = blockIdx.z % inner_count;
        a += (size_t)outer * a_outer + (size_t)inner * a_inner;
        b += (size_t)outer * b_outer + (size_t)inner * b_inner;
    }
    y += (size_t)blockIdx.z * M * N;

    float sum[TILES_M][TILES_N][4] = {};
    int steps = (k_end - k_first + DEPTH - 1) / DEPTH;
    copy_tile<A_IN_COLUMNS>(a_tiles[0], a, a_step, row0, M, k_first, k_end);
    copy_tile<B_IN_COLUMNS>(b_tiles[0], b, b_step, column0, N, k_first, k_end);
    commit_copies();
    for (int step = 0; step < steps; step++) {
        wait_copies<0>();
        __syncthreads(); // this step's tiles are there, and no thread reads the other ones any more
        int now = step % STAGES, next = (step + 1) % STAGES;
        if (step + 1 < steps) {
            int k = k_first + (step + 1) * DEPTH;
            copy_tile<A_IN_COLUMNS>(a_tiles[next], a, a_step, row0, M, k, k_end);
            copy_tile<B_IN_COLUMNS>(b_tiles[next], b, b_step, column0, N, k, k_end);
        }
        commit_copies();
#pragma unroll
        for (int k0 = 0; k0 < DEPTH; k0 += 8 * CHAIN) {
            float few[TILES_M][TILES_N][4] = {};
#pragma unroll
            for (int k = k0; k < k0 + 8 * CHAIN; k += 8) {
                float x[TILES_N][2], x_small[TILES_N][2];
#pragma unroll
                for (int j = 0; j < TILES_N; j += 2) {
                    float two[4];
                    load<B_IN_COLUMNS>(two, b_tiles[now], warp_column + 8 * j, k);
                    x[j][0] = two[0], x[j][1] = two[2];
                    x[j + 1][0] = two[1], x[j + 1][1] = two[3];
                    split(x[j], x_small[j]);
                    split(x[j + 1], x_small[j + 1]);
                }
#pragma unroll
                for (int i = 0; i < TILES_M; i++) {
                    float w[4], w_small[4];
                    load<A_IN_COLUMNS>(w, a_tiles[now], warp_row + 16 * i, k);
                    split(w, w_small);
#pragma unroll
                    for (int j = 0; j < TILES_N; j++) {
                        if (TERMS == 3) { // the small ones first
                            mma_tf32(few[i][j], w_small, x[j]);
                            mma_tf32(few[i][j], w, x_small[j]);
                        }
                        mma_tf32(few[i][j], w, x[j]);
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < TILES_M; i++)
#pragma unroll
                for (int j = 0; j < TILES_N; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++) sum[i][j][e] += few[i][j][e];
        }
    }

    Epilogue epilogue = {bias, residual, has_gelu};
    row0 += warp_row + g, column0 += warp_column + 2 * t; // of this thread's first element
    unsigned not_finite = 0;                              // a bit for each of its elements
#pragma unroll
    for (int n = 0; n < OWN; n += 2) { // two side by side
        int row = row0 + row_of(n), column = column0 + column_of(n);
        if (row >= M || column >= N) continue;
        size_t at = (size_t)row * N + column;
        float two[2] = {};
#pragma unroll
        for (int e = 0; e < 2; e++)
            if (column + e < N) {
                float value = sum[n / (4 * TILES_N)][n / 4 % TILES_N][n % 4 + e];
                if (!isfinite(value)) not_finite |= 1u << (n + e);
                two[e] = finished(value, epilogue, column + e, at + e);
            }
        if (N % 2 == 0)
            *(float2 *)(y + at) = make_float2(two[0], two[1]);
        else
            for (int e = 0; e < 2 && column + e < N; e++) y[at + e] = two[e];
    }
    for (int n = 0; not_finite; n++, not_finite >>= 1)
        if (not_finite & 1) {
            int row = row0 + row_of(n), column = column0 + column_of(n);
            float value = plain(a, a_step, b, b_step, row, column, k_first, k_end);
            size_t at = (size_t)row * N + column;
            y[at] = finished(value, epilogue, column, at);
        }
}
