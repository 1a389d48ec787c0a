// The common part of attention.cu and attention_backward.cu. LANES threads share a query: of its
// D / 4 pieces of four numbers, each thread has every LANES-th. Keys and values are loaded into
// shared memory, KEYS at a time.
//
// Compiled with D, divisible by 4, and LANES. Grid: (images * blocks of queries, heads), because a
// grid may have 2^31 - 1 blocks along x, but only 65,535 along y and z.

#define THREADS 128
#define QUERIES (THREADS / LANES)                // per block
#define PIECES (D / 4)                           // per row
#define OWN ((PIECES + LANES - 1) / LANES)       // pieces per thread
#define KEYS (D <= 64 ? 64 : D <= 128 ? 32 : 16) // in shared memory at a time
#define LOG2E 1.4426950408889634f                // exp(x) = exp2(x log2(e))

static __device__ __forceinline__ bool inside(int i, int lane) { return i * LANES + lane < PIECES; }

// Loads KEYS rows of keys and values, from row first on, into shared memory; zeros beyond the last.
static __device__ __forceinline__ void load_keys(float4 *keys, float4 *values, const float4 *k,
                                                 const float4 *v, int k_step, int v_step, int first,
                                                 int m)
{
    for (int i = threadIdx.x; i < KEYS * PIECES; i += THREADS) {
        int j = first + i / PIECES, c = i % PIECES;
        keys[i] = j < m ? k[(size_t)j * k_step + c] : zeros();
        values[i] = j < m ? v[(size_t)j * v_step + c] : zeros();
    }
}
