// Tokens of a map W wide stand in raster order, or in R x R blocks, one block after the other, each
// in raster order: as the patches of spatial reduction (paper eq. 3) want them, so that to cut
// patches out of such tokens nothing has to move. With R = 1 both orders are the same.

// Where token t of the raster stands among the blocks.
static __device__ __forceinline__ int in_blocks(int t, int W, int R)
{
    if (R == 1) return t;
    int i = t / W, j = t % W;
    return (i / R * (W / R) + j / R) * R * R + i % R * R + j % R;
}

// Where token t of the blocks stands in the raster.
static __device__ __forceinline__ int in_raster(int t, int W, int R)
{
    if (R == 1) return t;
    int block = t / (R * R), within = t % (R * R);
    return (block / (W / R) * R + within / R) * W + block % (W / R) * R + within % R;
}
