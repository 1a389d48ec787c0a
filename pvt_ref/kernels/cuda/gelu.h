// Phi(x) = (1 + erf(x / sqrt(2))) / 2, with erf(x / sqrt(2)) ~ tanh(x Q(x^2)) and the polynomial Q
// that was fitted for the CPU kernels (kernels/cpu/gelu.py). Since (1 + tanh(z)) / 2 =
// 1 / (1 + exp(-2 z)), it takes one exponential and one division.
static __device__ __forceinline__ float normal_cdf(float x)
{
    float s = x * x;
    float q = 1.80558411e-09f;
    q = q * s - 1.33445104e-07f;
    q = q * s + 3.96908944e-06f;
    q = q * s - 5.52400197e-05f;
    q = q * s - 3.31304164e-05f;
    q = q * s + 0.0363342841f;
    q = q * s + 0.797884216f;
    return __fdividef(1.0f, 1.0f + exp2f(-2.8853900817779268f * x * q)); // 2 / log(2)
}

static __device__ __forceinline__ float gelu_of(float x) { return x * normal_cdf(x); }

static __device__ __forceinline__ float slope(float x)
{
    float density = 0.39894228040143268f * expf(-0.5f * x * x); // phi(x), 1 / sqrt(2 pi) at 0
    return normal_cdf(x) + x * density;
}

static __device__ __forceinline__ float4 gelu_of(float4 a)
{
    return make_float4(gelu_of(a.x), gelu_of(a.y), gelu_of(a.z), gelu_of(a.w));
}

// d * (Phi(a) + a phi(a)).
static __device__ __forceinline__ float4 times_slope(float4 d, float4 a)
{
    return make_float4(d.x * slope(a.x), d.y * slope(a.y), d.z * slope(a.z), d.w * slope(a.w));
}
