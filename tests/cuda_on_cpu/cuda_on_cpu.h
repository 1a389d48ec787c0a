// CUDA C++ on a CPU: the part of it that this project's kernels use, so that g++ compiles them
// unchanged.
//
// The threads of a block are fibers that take turns. A fiber runs until it reaches a barrier or an
// exchange within its warp, and goes on when all other participants have reached it. Blocks run one
// after the other. The caller chooses the order of threads and blocks. So a kernel that relies on
// an order that CUDA does not guarantee gives different results for some choices.
//
// An asynchronous copy completes as late as possible: when its thread waits for it. A tensor core
// reads 10 bits of each mantissa, and rounds each sum toward zero.
//
// Refused with a message: different barriers reached by one block, threads that wait for ever, a
// lane in an exchange whose mask does not name it, memory accesses outside the arrays, an index
// beyond an array of known size, an int that overflows, a copy that is not aligned or that no
// thread waits for. Not emulated: speed, registers, caches and banks, memory ordering between
// blocks, and the compiler of the GPU.
#pragma once
#define CUDA_ON_CPU // mma.h then leaves its functions to this file
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static __attribute__((section("cuda_shared"))) // one block runs at a time

extern "C" char __start_cuda_shared[] __attribute__((weak)),
    __stop_cuda_shared[] __attribute__((weak));

struct dim3 {
    unsigned x, y, z;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline float __int_as_float(int i)
{
    float x;
    memcpy(&x, &i, 4);
    return x;
}
static inline float __uint_as_float(unsigned i) { return __int_as_float((int)i); }
static inline unsigned __float_as_uint(float x)
{
    unsigned i;
    memcpy(&i, &x, 4);
    return i;
}
static inline float __fdividef(float x, float y) { return x / y; }
static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }

namespace cuda_on_cpu
{

enum State { READY, AT_BARRIER, IN_EXCHANGE, DONE };
enum Kind { SHUFFLE, MATRICES, TENSOR_CORE }; // of an exchange

struct Copy { // a copy under way; copies zeros if from is null
    void *to;
    const void *from;
    int bytes, group;
};

constexpr int MOST_COPIES = 128; // of a thread, under way at once

struct Fiber {
    ucontext_t context; // for its first turn; later ones use place, which is faster
    jmp_buf place;
    bool begun;
    State state;
    int number; // in its block
    dim3 index;
    int line;      // of the barrier at which it waits
    unsigned mask; // lanes of the exchange in which it waits
    Kind kind;     // of that exchange
    int from;      // the lane whose value it needs
    alignas(8) unsigned char value[48], got[16];
    Copy copies[MOST_COPIES]; // the oldest first
    int copies_under_way, groups; // groups: how many were committed
};

// The report on a kernel that was stopped. A Python structure has the same fields.
struct Fault {
    char what[200];
    void *address; // that was touched
    unsigned block[3], thread[3];
};

// Stacks and dynamic shared memory. All compiled files share them: a process may have 65,530
// mappings, and the stacks with their protected pages take 2,048. A Python structure has the same
// fields.
struct Memory {
    char *stacks, *shared;
    void *owner; // the file whose fibers have begun on the stacks
    int poison;  // the byte that shared memory is filled with when a block begins
};

constexpr int MOST = 1024;        // threads of a block
constexpr size_t STACK = 1 << 16; // bytes of a fiber's stack, the last page of which is protected
constexpr size_t MOST_SHARED = 48 << 10;

inline Fiber fibers[MOST];
inline char *stacks = nullptr;
inline Fiber *current = nullptr;
inline jmp_buf scheduler;
inline sigjmp_buf way_out; // taken by a kernel that is stopped
inline ucontext_t unused;
inline dim3 grid_size, block_size, block_index;
inline int in_block, waiting, poison;
inline char *dynamic; // ends where a protected page begins
inline size_t dynamic_bytes;
inline Fault *fault;
inline void (*call)(void **);
inline void **arguments;

inline void tell_place()
{
    dim3 thread = current ? current->index : dim3{0, 0, 0};
    unsigned block[3] = {block_index.x, block_index.y, block_index.z};
    memcpy(fault->block, block, sizeof block);
    memcpy(fault->thread, &thread, sizeof thread);
}

template <class... T> [[noreturn]] inline void stop(const char *format, T... values)
{
    snprintf(fault->what, sizeof fault->what, format, values...);
    tell_place();
    siglongjmp(way_out, 1);
}

inline void on_signal(int number, siginfo_t *info, void *)
{
    bool memory = number == SIGSEGV || number == SIGBUS;
    const char *what = memory ? "touches memory that is not its own"
                       : number == SIGFPE
                           ? "divides by zero"
                           : "has an index beyond its array, or an int that overflows";
    snprintf(fault->what, sizeof fault->what, "%s", what);
    fault->address = memory ? info->si_addr : nullptr;
    tell_place();
    siglongjmp(way_out, 1);
}

// Lets another fiber take its turn.
inline __attribute__((noinline)) void hand_on()
{
    if (!_setjmp(current->place)) _longjmp(scheduler, 1);
}

inline void barrier(int line)
{
    for (int i = 0; i < in_block; i++)
        if (fibers[i].state == AT_BARRIER && fibers[i].line != line)
            stop("reaches the barrier of line %d while thread %d waits at that of line %d", line, i,
                 fibers[i].line);
    current->line = line;
    current->state = AT_BARRIER;
    if (++waiting == in_block) {
        for (int i = 0; i < in_block; i++) fibers[i].state = READY;
        waiting = 0;
    }
    hand_on();
}

// Takes part in an exchange of the lanes that mask names. The last of them to arrive calls finish,
// which computes what each of them gets.
template <class F> inline void come_together(unsigned mask, Kind kind, F finish)
{
    Fiber *warp = fibers + current->number / 32 * 32;
    int lane = current->number % 32, lanes = min(32, in_block - current->number / 32 * 32);
    if (!(mask >> lane & 1))
        stop("is lane %d of an exchange whose mask %#x does not name it", lane, mask);
    current->mask = mask;
    current->kind = kind;
    current->state = IN_EXCHANGE;
    bool complete = true;
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1) {
            if (i >= lanes) stop("names lane %d in a mask, and its warp has %d", i, lanes);
            // lane i may have to finish another exchange first, but not one that waits for this
            // lane
            bool here = warp[i].state == IN_EXCHANGE;
            if (here && warp[i].mask != mask && warp[i].mask >> lane & 1)
                stop("gives the mask %#x, and lane %d gave %#x", mask, i, warp[i].mask);
            if (here && warp[i].mask == mask && warp[i].kind != kind)
                stop("exchanges otherwise than lane %d, which waits for it", i);
            complete = complete && here && warp[i].mask == mask;
        }
    if (complete) {
        finish(warp);
        for (int i = 0; i < 32; i++)
            if (mask >> i & 1) warp[i].state = READY;
    }
    hand_on();
}

// Gives value, and returns that of lane from, once all lanes that the mask names have given theirs.
template <class T> inline T exchange(unsigned mask, T value, int from)
{
    static_assert(sizeof(T) <= 8, "a value of at most 8 bytes");
    if (mask >> current->number % 32 & 1 && (from < 0 || from > 31 || !(mask >> from & 1)))
        stop("asks lane %d, which the mask %#x does not name", from, mask);
    current->from = from;
    memcpy(current->value, &value, sizeof value);
    come_together(mask, SHUFFLE, [=](Fiber *warp) {
        for (int i = 0; i < 32; i++)
            if (mask >> i & 1) memcpy(warp[i].got, warp[warp[i].from].value, 8);
    });
    T result;
    memcpy(&result, current->got, sizeof result);
    return result;
}

inline void begin_copy(void *to, const void *from, int bytes)
{
    if (((uintptr_t)to | (uintptr_t)from) % bytes)
        stop("copies %d bytes between places that are not aligned to them", bytes);
    if (current->copies_under_way == MOST_COPIES)
        stop("has more than %d copies under way", MOST_COPIES);
    current->copies[current->copies_under_way++] = {to, from, bytes, current->groups};
}

// Completes the copies of all groups except the last ones.
inline void land(int but_the_last)
{
    int landed = 0;
    for (; landed < current->copies_under_way; landed++) {
        Copy &copy = current->copies[landed];
        if (copy.group >= current->groups - but_the_last) break;
        if (copy.from)
            memcpy(copy.to, copy.from, copy.bytes);
        else
            memset(copy.to, 0, copy.bytes);
    }
    current->copies_under_way -= landed;
    memmove(current->copies, current->copies + landed, current->copies_under_way * sizeof(Copy));
}

inline float of_tensor_core(float x) { return __uint_as_float(__float_as_uint(x) & 0xffffe000u); }

inline float toward_zero(double x)
{
    float y = (float)x;
    return isfinite(y) && fabs((double)y) > fabs(x) ? nextafterf(y, 0.0f) : y;
}

// c (16, 8) += a (16, 8) b (8, 8)^T, from the a, b and c of all lanes.
inline void multiply(Fiber *warp)
{
    float a[16][8], b[8][8];
    for (int lane = 0; lane < 32; lane++) {
        float x[6];
        memcpy(x, warp[lane].value, sizeof x);
        int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; i++) a[g + i % 2 * 8][t + i / 2 * 4] = of_tensor_core(x[i]);
        for (int i = 0; i < 2; i++) b[g][t + i * 4] = of_tensor_core(x[4 + i]);
    }
    for (int lane = 0; lane < 32; lane++) {
        float c[4];
        memcpy(c, warp[lane].value + 24, sizeof c);
        for (int e = 0; e < 4; e++) {
            double total = c[e];
            const float *x = a[lane / 4 + e / 2 * 8], *y = b[lane % 4 * 2 + e % 2];
            for (int k = 0; k < 8; k++) total += (double)x[k] * y[k];
            c[e] = toward_zero(total);
        }
        memcpy(warp[lane].got, c, sizeof c);
    }
}

// The main function of a fiber: it runs the kernel once for every block.
inline void live()
{
    for (;;) {
        call(arguments);
        if (current->copies_under_way) stop("ends while copies are under way");
        current->state = DONE;
        hand_on();
    }
}

inline __attribute__((noinline)) void take_turn(Fiber &fiber)
{
    current = &fiber;
    if (_setjmp(scheduler)) return;
    if (fiber.begun) _longjmp(fiber.place, 1);
    fiber.begun = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack = {stacks + fiber.number * STACK, 0, STACK};
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, live, 0);
    swapcontext(&unused, &fiber.context);
}

[[noreturn]] inline void stop_waiting()
{
    for (int i = 0; i < in_block; i++) {
        current = &fibers[i];
        if (current->state == AT_BARRIER)
            stop("waits for ever at the barrier of line %d, which not all reach", current->line);
        if (current->state == IN_EXCHANGE)
            stop("waits for ever in an exchange of the lanes %#x", current->mask);
    }
    stop("waits for ever");
}

inline unsigned next_random(unsigned &seed) { return (seed = seed * 1664525u + 1013904223u) >> 8; }

inline void run_block(unsigned order)
{
    static int turns[MOST];
    unsigned seed = order;
    waiting = 0;
    if (__start_cuda_shared)
        memset(__start_cuda_shared, poison, __stop_cuda_shared - __start_cuda_shared);
    memset(dynamic, poison, dynamic_bytes);
    for (int i = 0; i < in_block; i++) {
        fibers[i].number = i;
        fibers[i].state = READY;
        fibers[i].copies_under_way = fibers[i].groups = 0;
        unsigned n = i;
        fibers[i].index = {n % block_size.x, n / block_size.x % block_size.y,
                           n / (block_size.x * block_size.y)};
        turns[i] = order == 1 ? in_block - 1 - i : i;
    }
    for (int left = in_block; left;) {
        if (order > 1)
            for (int i = in_block - 1; i > 0; i--) {
                int j = next_random(seed) % (i + 1), t = turns[i];
                turns[i] = turns[j];
                turns[j] = t;
            }
        bool moved = false;
        for (int i = 0; i < in_block; i++) {
            Fiber &fiber = fibers[turns[i]];
            if (fiber.state != READY) continue;
            take_turn(fiber);
            moved = true;
            if (fiber.state == DONE) left--;
        }
        if (!moved) stop_waiting();
    }
    current = nullptr;
}

// Runs a grid, and returns 0 if there was no fault. order of threads and blocks: 0 ascending, 1
// descending, others are seeds of a shuffle.
inline int run(void (*kernel)(void **), void **values, const unsigned *grid, const unsigned *block,
               unsigned order, unsigned shared, Fault *told, Memory *memory)
{
    constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP};
    static char signal_stack[1 << 15];
    call = kernel, arguments = values, fault = told;
    grid_size = {grid[0], grid[1], grid[2]}, block_size = {block[0], block[1], block[2]};
    in_block = block[0] * block[1] * block[2];
    block_index = {0, 0, 0}, current = nullptr;
    if (!memory->stacks) {
        memory->stacks = (char *)mmap(nullptr, MOST * STACK, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        memory->shared = (char *)mmap(nullptr, 2 * MOST_SHARED, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory->stacks == MAP_FAILED || memory->shared == MAP_FAILED)
            return snprintf(told->what, sizeof told->what, "finds no memory");
        for (int i = 0; i < MOST; i++) mprotect(memory->stacks + i * STACK, 4096, PROT_NONE);
        mprotect(memory->shared + MOST_SHARED, MOST_SHARED, PROT_NONE);
    }
    stacks = memory->stacks, poison = memory->poison;
    if (memory->owner != fibers)
        for (int i = 0; i < MOST; i++) fibers[i].begun = false;
    memory->owner = fibers;
    dynamic_bytes = (shared + 15) / 16 * 16;
    dynamic = memory->shared + MOST_SHARED - dynamic_bytes;
    struct sigaction mine = {}, before[5];
    stack_t for_signals = {}, old_stack;
    for_signals.ss_sp = signal_stack;
    for_signals.ss_size = sizeof signal_stack;
    mine.sa_sigaction = on_signal;
    mine.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaltstack(&for_signals, &old_stack);
    for (int i = 0; i < 5; i++) sigaction(SIGNALS[i], &mine, &before[i]);
    int stopped = sigsetjmp(way_out, 1);
    if (!stopped) {
        size_t in_file = __start_cuda_shared ? __stop_cuda_shared - __start_cuda_shared : 0;
        if (in_file + shared > MOST_SHARED)
            stop("has more shared memory than the %d bytes of a block", (int)MOST_SHARED);
        unsigned count = grid[0] * grid[1] * grid[2], seed = order;
        for (unsigned i = 0; i < count; i++) {
            unsigned n = order == 0 ? i : order == 1 ? count - 1 - i : (i + order) % count;
            block_index = {n % grid[0], n / grid[0] % grid[1], n / (grid[0] * grid[1])};
            run_block(order > 1 ? next_random(seed) | 2 : order);
        }
    } else {
        for (int i = 0; i < MOST; i++) fibers[i].begun = false; // they stopped inside the kernel
    }
    for (int i = 0; i < 5; i++) sigaction(SIGNALS[i], &before[i], nullptr);
    sigaltstack(&old_stack, nullptr);
    return stopped;
}

} // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::current->index)
#define blockIdx (cuda_on_cpu::block_index)
#define blockDim (cuda_on_cpu::block_size)
#define gridDim (cuda_on_cpu::grid_size)
#define __syncthreads() cuda_on_cpu::barrier(__LINE__)

template <class T> static inline T __shfl_xor_sync(unsigned mask, T x, int lanes)
{
    return cuda_on_cpu::exchange(mask, x, cuda_on_cpu::current->number % 32 ^ lanes);
}
template <class T> static inline T __shfl_sync(unsigned mask, T x, int lane)
{
    return cuda_on_cpu::exchange(mask, x, lane);
}
static inline void __syncwarp(unsigned mask = 0xffffffffu)
{ cuda_on_cpu::exchange(mask, 0, cuda_on_cpu::current->number % 32); }

// The functions that mma.h has for a GPU.

template <int BYTES> static inline void copy_async(void *shared, const void *global, bool there)
{ cuda_on_cpu::begin_copy(shared, there ? global : nullptr, BYTES); }
static inline void commit_copies() { cuda_on_cpu::current->groups++; }
template <int GROUPS> static inline void wait_copies() { cuda_on_cpu::land(GROUPS); }

static inline void load_matrices(float (&x)[4], const float *row)
{
    using namespace cuda_on_cpu;
    if ((uintptr_t)row % 16) stop("loads a row of a matrix that is not aligned to 16 bytes");
    memcpy(current->value, row, 16);
    come_together(0xffffffffu, MATRICES, [](Fiber *warp) {
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i++)
                memcpy(warp[lane].got + 4 * i, warp[8 * i + lane / 4].value + lane % 4 * 4, 4);
    });
    memcpy(x, current->got, sizeof x);
}

static inline void mma_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2])
{
    using namespace cuda_on_cpu;
    memcpy(current->value, a, sizeof a);
    memcpy(current->value + 16, b, sizeof b);
    memcpy(current->value + 24, c, sizeof c);
    come_together(0xffffffffu, TENSOR_CORE, multiply);
    memcpy(c, current->got, sizeof c);
}

// x with bits fewer bits of mantissa, rounded to nearest, ties to even.
static inline unsigned shortened(unsigned x, int bits)
{ return (x + (1u << (bits - 1)) - 1 + (x >> bits & 1)) >> bits; }

static inline unsigned short to_bfloat16(float x)
{ return x != x ? 0x7fff : shortened(__float_as_uint(x), 16); }

static inline unsigned short to_float16(float x)
{
    unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
    if (x != x) return 0x7fff;
    if (size < 0x38800000u) // below 2^-14, multiples of 2^-24, to which adding 0.5 rounds
        return sign | (__float_as_uint(__uint_as_float(size) + 0.5f) - 0x3f000000u);
    unsigned half = shortened(size - 0x38000000u, 13);
    return sign | (half > 0x7c00u ? 0x7c00u : half);
}
