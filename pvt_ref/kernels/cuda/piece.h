// A piece of a map: one number, or four neighbouring numbers that are read at once.

static __device__ __forceinline__ void set_zero(float &x) { x = 0; }
static __device__ __forceinline__ void set_zero(float4 &x) { x = make_float4(0, 0, 0, 0); }
static __device__ __forceinline__ void add(float &x, float y) { x += y; }
static __device__ __forceinline__ void add(float4 &x, float4 y)
{
    x.x += y.x, x.y += y.y, x.z += y.z, x.w += y.w;
}

// Splits a flat index: returns the index along the last axis, of size n, and leaves the flat index
// over the other axes in rest.
static __device__ __forceinline__ int last_index(int &rest, int n)
{
    int index = rest % n;
    rest /= n;
    return index;
}
