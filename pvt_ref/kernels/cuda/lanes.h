// Arithmetic on four numbers at a time, and sums over the LANES threads that share a row. LANES is
// a power of two, at most 32.

#define EVERYONE 0xffffffffu // all threads of a warp

static __device__ __forceinline__ float4 zeros() { return make_float4(0, 0, 0, 0); }

static __device__ __forceinline__ float4 operator+(float4 a, float4 b)
{
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

static __device__ __forceinline__ float4 operator*(float4 a, float4 b)
{
    return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w);
}

static __device__ __forceinline__ float4 operator*(float s, float4 a)
{
    return make_float4(s * a.x, s * a.y, s * a.z, s * a.w);
}

static __device__ __forceinline__ float4 operator-(float4 a, float s)
{
    return make_float4(a.x - s, a.y - s, a.z - s, a.w - s);
}

static __device__ __forceinline__ float sum(float4 a) { return (a.x + a.y) + (a.z + a.w); }

static __device__ __forceinline__ float dot(float4 a, float4 b) { return sum(a * b); }

// The sum of x over the threads that share a row; each of them gets it. All threads of a warp must
// call it together.
static __device__ __forceinline__ float over_lanes(float x)
{
#pragma unroll
    for (int other = LANES / 2; other > 0; other /= 2) x += __shfl_xor_sync(EVERYONE, x, other);
    return x;
}
