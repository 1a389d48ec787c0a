// The GPU instructions (sm_80 and later) that are written as inline PTX. The tests, which emulate
// CUDA on a CPU, have functions of their own in their place.

typedef unsigned short half_bits; // the 16 bits of a float16 or bfloat16

#ifndef CUDA_ON_CPU

// Begins to copy BYTES (4 or 16) from global to shared memory; zeros if !there. The thread goes on.
template <int BYTES>
static __device__ __forceinline__ void copy_async(void *shared, const void *global, bool there)
{
    unsigned to = (unsigned)__cvta_generic_to_shared(shared);
    int bytes = there ? BYTES : 0;
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global),
                     "r"(bytes)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(global),
                     "r"(bytes)
                     : "memory");
}

// Puts all copies that this thread has begun, and that are in no group yet, into a new group.
static __device__ __forceinline__ void commit_copies()
{ asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all copies of this thread are complete, except those of the last GROUPS groups.
template <int GROUPS> static __device__ __forceinline__ void wait_copies()
{ asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory"); }

// Loads four matrices (8, 4) from shared memory. Lane 8 i + r passes the address of row r of matrix
// i, 16 bytes; lane 4 r + c gets element (r, c) of each matrix.
static __device__ __forceinline__ void load_matrices(float (&x)[4], const float *row)
{
    unsigned from = (unsigned)__cvta_generic_to_shared(row), y[4];
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(y[0]), "=r"(y[1]), "=r"(y[2]), "=r"(y[3])
                 : "r"(from)
                 : "memory");
    for (int i = 0; i < 4; i++) x[i] = __uint_as_float(y[i]);
}

// c (16, 8) += a (16, 8) b (8, 8)^T by a warp on a tensor core, which reads only the first 10 bits
// of the mantissas of a and b (TF32). With g = lane / 4 and t = lane % 4, a lane holds a(g, t),
// a(g+8, t), a(g, t+4), a(g+8, t+4); b(g, t), b(g, t+4); c(g, 2t), c(g, 2t+1), c(g+8, 2t),
// c(g+8, 2t+1).
static __device__ __forceinline__ void mma_tf32(float (&c)[4], const float (&a)[4],
                                                const float (&b)[2])
{
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
          "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}

// x rounded to the nearest float16 or bfloat16, ties to even.
static __device__ __forceinline__ half_bits to_float16(float x)
{
    half_bits y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
static __device__ __forceinline__ half_bits to_bfloat16(float x)
{
    half_bits y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

#endif
