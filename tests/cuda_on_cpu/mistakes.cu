// Kernels that do what CUDA forbids, and a few that do not: what the emulation must tell apart.
// A test launches each with 64 threads a block, where nothing else is said, on arrays of n numbers.

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

// Right: halves of a warp, each on its own and not equally often, then all together.
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

// The value of the neighbour, which may not have been written yet.
extern "C" __global__ void lacks_a_barrier(float *y, int n)
{
    __shared__ float shared[64];
    shared[threadIdx.x] = threadIdx.x;
    y[threadIdx.x] = shared[63 - threadIdx.x];
}

// As if blocks came one after the other.
extern "C" __global__ void waits_for_blocks(float *y, int n)
{
    if (threadIdx.x == 0) y[blockIdx.x] = blockIdx.x ? y[blockIdx.x - 1] + 1 : 1;
}

extern "C" __global__ void overflows(int *y, int n) { y[threadIdx.x] = (n << 10) * (n << 10); }
extern "C" __global__ void divides_by_zero(int *y, int n) { y[threadIdx.x] = n / (n - 64); }
extern "C" __global__ void __launch_bounds__(64) bounded(float *y, int n) { y[threadIdx.x] = 1; }
