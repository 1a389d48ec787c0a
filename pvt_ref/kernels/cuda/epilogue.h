// What is done to an element of a product before it is stored: + bias, GELU, + residual, each only
// if wanted. A bias has one number per column; a residual has the shape of the product.
struct Epilogue {
    const float *bias, *residual; // or null
    int has_gelu;
};

static __device__ __forceinline__ float finished(float x, const Epilogue &epilogue, int column,
                                                 size_t at)
{
    if (epilogue.bias) x += epilogue.bias[column];
    if (epilogue.has_gelu) x = gelu_of(x);
    if (epilogue.residual) x += epilogue.residual[at];
    return x;
}
