// The tokens of a map of width W are stored in raster order, or in R x R blocks: one block after
// the other, each in raster order. The second order is that of the patches of spatial reduction
// (paper eq. 3), so cutting such tokens into patches moves no data. With R = 1 the orders agree.

// The position in block order of token t of the raster order.
static __device__ __forceinline__ int in_blocks(int t, int W, int R)
{
    if (R == 1) return t;
    int i = t / W, j = t % W;
    return (i / R * (W / R) + j / R) * R * R + i % R * R + j % R;
}

// The position in raster order of token t of the block order.
static __device__ __forceinline__ int in_raster(int t, int W, int R)
{
    if (R == 1) return t;
    int block = t / (R * R), within = t % (R * R);
    return (block / (W / R) * R + within / R) * W + block % (W / R) * R + within % R;
}
