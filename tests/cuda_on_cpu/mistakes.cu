// Kernels that do what CUDA forbids, and a few that do not: the emulation must tell them apart. A
// test launches each on arrays of n numbers, with 64 threads per block unless stated otherwise.

extern "C" __global__ void places(int *y)
{
    unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    y[block * blockDim.x * blockDim.y * blockDim.z + thread] += block * 1000 + thread + 1;
}

extern "C" __global__ void reads_behind(const float *x, float *y, int n)
{ y[threadIdx.x] = x[threadIdx.x + n - 63]; }
extern "C" __global__ void writes_behind(float *y, int n) { y[threadIdx.x + n - 63] = 1; }
extern "C" __global__ void writes_before(float *y, int n) { y[(int)threadIdx.x - 1] = 1; }
extern "C" __global__ void writes_far_before(float *y, int n) { y[(int)threadIdx.x - 1024] = 1; }
extern "C" __global__ void writes_far_behind(float *y, int n) { y[threadIdx.x + 1000000] = 1; }
extern "C" __global__ void reads_null(const float *x, float *y, int n) { y[0] = x[threadIdx.x]; }
extern "C" __global__ void whole_pieces(const float4 *x, float *y, int n)
{ y[threadIdx.x] = x[threadIdx.x].w; }

extern "C" __global__ void leaves_before_the_barrier(float *y, int n)
{
    if (threadIdx.x == 5) return;
    __syncthreads();
    y[threadIdx.x] = 1;
}

extern "C" __global__ void two_barriers(float *y, int n)
{
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
}

extern "C" __global__ void leaves_before_the_exchange(float *y, int n)
{
    if (threadIdx.x == 40) return;
    y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

extern "C" __global__ void is_not_named(float *y, int n)
{ y[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.0f, 1); }
extern "C" __global__ void asks_others(float *y, int n)
{
    unsigned mine = threadIdx.x % 32 < 16 ? 0xffffu : 0xffff0000u;
    y[threadIdx.x] = __shfl_xor_sync(mine, 1.0f, 16);
}

extern "C" __global__ void other_masks(float *y, int n)
{ y[threadIdx.x] = __shfl_xor_sync(threadIdx.x % 32 ? 0xffffffffu : 0x3u, 1.0f, 1); }

// Right: the halves of a warp, separately and not equally often, then all together.
extern "C" __global__ void halves(const float *x, float *y, int n)
{
    int half = threadIdx.x % 32 / 16;
    float a = x[threadIdx.x];
    for (int i = 0; i <= half; i++) a = __shfl_xor_sync(0xffffu << 16 * half, a, 1);
    y[threadIdx.x] = __shfl_sync(0xffffffffu, a, 31 - threadIdx.x % 32);
}

extern "C" __global__ void index_of_shared(float *y, int n)
{
    __shared__ float shared[64];
    shared[threadIdx.x + n - 63] = 1;
    __syncthreads();
    y[threadIdx.x] = shared[threadIdx.x];
}

extern "C" __global__ void beyond_dynamic(float *y, int n)
{
    extern __shared__ float more[];
    more[threadIdx.x + n - 63] = 1;
    __syncthreads();
    y[threadIdx.x] = more[threadIdx.x];
}

extern "C" __global__ void reads_unwritten(float *y, int n)
{
    __shared__ float shared[64];
    if (threadIdx.x) shared[threadIdx.x] = 1;
    __syncthreads();
    y[threadIdx.x] = shared[threadIdx.x];
}

// Wrong: reads the value of the neighbour, which may not have been written yet.
extern "C" __global__ void lacks_a_barrier(float *y, int n)
{
    __shared__ float shared[64];
    shared[threadIdx.x] = threadIdx.x;
    y[threadIdx.x] = shared[63 - threadIdx.x];
}

// Wrong: relies on blocks that run one after the other.
extern "C" __global__ void waits_for_blocks(float *y, int n)
{
    if (threadIdx.x == 0) y[blockIdx.x] = blockIdx.x ? y[blockIdx.x - 1] + 1 : 1;
}

extern "C" __global__ void overflows(int *y, int n) { y[threadIdx.x] = (n << 10) * (n << 10); }
extern "C" __global__ void divides_by_zero(int *y, int n) { y[threadIdx.x] = n / (n - 64); }
extern "C" __global__ void __launch_bounds__(64) bounded(float *y, int n) { y[threadIdx.x] = 1; }

// The instructions of mma.h.
extern "C" __global__ void copies_unaligned(float *y, int n)
{
    __shared__ __align__(16) float shared[64];
    copy_async<16>(shared + 1, y, true);
    wait_copies<0>();
}

extern "C" __global__ void does_not_wait(float *y, int n)
{
    __shared__ __align__(16) float shared[64];
    copy_async<4>(shared + threadIdx.x, y + threadIdx.x, true);
    commit_copies();
    wait_copies<1>();
}

extern "C" __global__ void loads_unaligned(float *y, int n)
{
    __shared__ __align__(16) float shared[64];
    float x[4];
    load_matrices(x, shared + 2);
}

extern "C" __global__ void half_a_tensor_core(float *y, int n)
{
    float a[4] = {}, b[2] = {}, c[4] = {};
    mma_tf32(c, a, b);
}

extern "C" __global__ void mixes_exchanges(float *y, int n)
{
    float a[4] = {}, b[2] = {}, c[4] = {};
    if (threadIdx.x % 2)
        mma_tf32(c, a, b);
    else
        y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 0);
}

// Right: shared memory before any wait for copies, then after a wait for all but the last group.
extern "C" __global__ void copies_in_groups(const float *x, float *y)
{
    __shared__ __align__(16) float first[32], second[32];
    int i = threadIdx.x;
    copy_async<4>(first + i, x + i, true);
    commit_copies();
    copy_async<4>(second + i, x + 32 + i, true);
    commit_copies();
    y[i] = first[i];
    wait_copies<1>();
    y[32 + i] = first[i];
    wait_copies<0>();
    y[64 + i] = second[i];
}

// Right: one tensor-core multiplication, y (16, 8) = c + a (16, 8) b (8, 8)^T.
extern "C" __global__ void tensor_core(const float *a, const float *b, const float *c, float *y)
{
    int g = threadIdx.x / 4, t = threadIdx.x % 4;
    float own_a[4], own_b[2], own_c[4];
    for (int i = 0; i < 4; i++) own_a[i] = a[(g + i % 2 * 8) * 8 + t + i / 2 * 4];
    for (int i = 0; i < 2; i++) own_b[i] = b[g * 8 + t + 4 * i];
    for (int i = 0; i < 4; i++) own_c[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
    mma_tf32(own_c, own_a, own_b);
    for (int i = 0; i < 4; i++) y[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = own_c[i];
}
