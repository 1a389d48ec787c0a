// A stand-in for cuBLASLt on a CPU: the calls that kernels/cuda/cublaslt.py makes, computed plainly.
//
// It is stricter than the library. What contradicts the manual is refused with a complaint: a
// descriptor that does not exist any more, an attribute of the wrong size, shapes and leading
// dimensions that do not fit, an algorithm that was proposed for another problem, arrays without
// the promised alignment, a workspace that is too small, a bias whose address is not set.
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID = 7, NOT_SUPPORTED = 15 };
enum Kind { HANDLE = 1, DESCRIPTION, LAYOUT, PREFERENCE };
enum { FLOAT32 = 0, FLOAT16 = 2, BFLOAT16 = 14, COMPUTE_FLOAT32 = 68, COMPUTE_TF32 = 77 };
enum { DEFAULT = 1, WITH_BIAS = 4 }; // epilogues

struct Object {
    uint64_t alive; // ALIVE, or nothing
    Kind kind;
    // of a description
    int compute, scale, transposed[2], epilogue;
    uint64_t bias;
    // of a layout
    int type, batch;
    uint64_t rows, columns;
    int64_t step, batch_step;
    // of a preference
    uint64_t workspace;
    uint32_t alignment[4];
};

struct Heuristic {
    uint64_t algorithm[8];
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

static const uint64_t ALIVE = 0x600dc0de600dc0deull;
static char complaint[300];
static int alive, calls, fail_status;
static char fail_name[64];
static size_t version = 130100;

static int refuse(int status, const char *format, ...)
{
    va_list values;
    va_start(values, format);
    vsnprintf(complaint, sizeof complaint, format, values);
    va_end(values);
    return status;
}

// For the tests: the last refusal, the number of existing descriptors, and that of products.
extern "C" const char *stand_in_complaint() { return complaint; }
extern "C" int stand_in_alive() { return alive; }
extern "C" int stand_in_calls() { return calls; }
extern "C" void stand_in_version(size_t other) { version = other; }
// From now on, the function with this name returns this status.
extern "C" void stand_in_fail(const char *name, int status)
{
    snprintf(fail_name, sizeof fail_name, "%s", name);
    fail_status = status;
}

#define MAY_FAIL() \
    if (!strcmp(fail_name, __func__)) return fail_status

static Object *is(const void *given, Kind kind)
{
    Object *object = (Object *)given;
    return object && object->alive == ALIVE && object->kind == kind ? object : nullptr;
}

static int make(void **made, Kind kind, Object **object)
{
    *object = (Object *)calloc(1, sizeof(Object));
    (*object)->alive = ALIVE, (*object)->kind = kind;
    *made = *object;
    alive += kind != HANDLE;
    return SUCCESS;
}

static int destroy(void *given, Kind kind)
{
    Object *object = is(given, kind);
    if (!object) return refuse(INVALID, "destroys what does not live");
    object->alive = 0; // not freed, so that a later use is noticed
    alive--;
    return SUCCESS;
}

// Sets an attribute, if the size is right.
template <class T> static int take(T &place, const void *value, size_t size)
{
    if (size != sizeof(T) || !value) return refuse(INVALID, "an attribute of %zu bytes", size);
    memcpy(&place, value, size);
    return SUCCESS;
}

extern "C" size_t cublasLtGetVersion() { return version; }

extern "C" int cublasLtCreate(void **handle)
{
    MAY_FAIL();
    Object *object;
    return make(handle, HANDLE, &object);
}

extern "C" int cublasLtMatmulDescCreate(void **made, int compute, int scale)
{
    MAY_FAIL();
    Object *object;
    make(made, DESCRIPTION, &object);
    object->compute = compute, object->scale = scale, object->epilogue = DEFAULT;
    return SUCCESS;
}
extern "C" int cublasLtMatmulDescDestroy(void *given) { return destroy(given, DESCRIPTION); }
extern "C" int cublasLtMatmulDescSetAttribute(void *given, int name, const void *value, size_t size)
{
    MAY_FAIL();
    Object *d = is(given, DESCRIPTION);
    if (!d) return refuse(INVALID, "no description");
    if (name == 3 || name == 4) return take(d->transposed[name - 3], value, size);
    if (name == 7) return take(d->epilogue, value, size);
    if (name == 8) return take(d->bias, value, size);
    return refuse(INVALID, "a description has no attribute %d here", name);
}

extern "C" int cublasLtMatrixLayoutCreate(void **made, int type, uint64_t rows, uint64_t columns,
                                          int64_t step)
{
    MAY_FAIL();
    if (!rows || !columns) return refuse(INVALID, "a matrix of nothing");
    if (step < (int64_t)rows) return refuse(INVALID, "columns of %d are closer", (int)rows);
    Object *object;
    make(made, LAYOUT, &object);
    object->type = type, object->rows = rows, object->columns = columns, object->step = step;
    object->batch = 1;
    return SUCCESS;
}
extern "C" int cublasLtMatrixLayoutDestroy(void *given) { return destroy(given, LAYOUT); }
extern "C" int cublasLtMatrixLayoutSetAttribute(void *given, int name, const void *value,
                                                size_t size)
{
    MAY_FAIL();
    Object *layout = is(given, LAYOUT);
    if (!layout) return refuse(INVALID, "no layout");
    if (name == 5) return take(layout->batch, value, size);
    if (name == 6) return take(layout->batch_step, value, size);
    return refuse(INVALID, "a layout has no attribute %d here", name);
}

extern "C" int cublasLtMatmulPreferenceCreate(void **made)
{
    MAY_FAIL();
    Object *object;
    make(made, PREFERENCE, &object);
    for (uint32_t &each : object->alignment) each = 256; // the default of the manual
    return SUCCESS;
}
extern "C" int cublasLtMatmulPreferenceDestroy(void *given) { return destroy(given, PREFERENCE); }
extern "C" int cublasLtMatmulPreferenceSetAttribute(void *given, int name, const void *value,
                                                    size_t size)
{
    MAY_FAIL();
    Object *preference = is(given, PREFERENCE);
    if (!preference) return refuse(INVALID, "no preference");
    if (name == 1) return take(preference->workspace, value, size);
    if (name >= 5 && name <= 8) return take(preference->alignment[name - 5], value, size);
    return refuse(INVALID, "a preference has no attribute %d here", name);
}

// A hash of all that an algorithm depends on, except addresses.
static uint64_t of_problem(const Object *d, Object *const *layouts)
{
    uint64_t hash = 1469598103934665603ull;
    auto add = [&](uint64_t x) { hash = (hash ^ x) * 1099511628211ull; };
    add(d->compute), add(d->scale), add(d->transposed[0]), add(d->transposed[1]), add(d->epilogue);
    for (int i = 0; i < 4; i++)
        add(layouts[i]->type), add(layouts[i]->rows), add(layouts[i]->columns),
            add(layouts[i]->step), add(layouts[i]->batch), add(layouts[i]->batch_step);
    return hash;
}

static int check(const Object *d, Object *const *layouts)
{
    for (int i = 0; i < 4; i++)
        if (!layouts[i]) return refuse(INVALID, "no layout of matrix %d", i);
    Object *a = layouts[0], *b = layouts[1], *c = layouts[2], *y = layouts[3];
    bool half = a->type == FLOAT16 || a->type == BFLOAT16;
    if (!half && a->type != FLOAT32) return refuse(NOT_SUPPORTED, "factors of type %d", a->type);
    if (b->type != a->type || c->type != FLOAT32 || y->type != FLOAT32 || d->scale != FLOAT32)
        return refuse(NOT_SUPPORTED, "types that do not go together");
    if (d->compute != COMPUTE_FLOAT32 && !(d->compute == COMPUTE_TF32 && !half))
        return refuse(NOT_SUPPORTED, "accumulation %d", d->compute);
    for (int i = 0; i < 2; i++)
        if (d->transposed[i] != 0 && d->transposed[i] != 1)
            return refuse(INVALID, "an operation %d", d->transposed[i]);
    uint64_t m = d->transposed[0] ? a->columns : a->rows, k = d->transposed[0] ? a->rows : a->columns;
    uint64_t n = d->transposed[1] ? b->rows : b->columns;
    if ((d->transposed[1] ? b->columns : b->rows) != k) return refuse(INVALID, "k differs");
    if (y->rows != m || y->columns != n || c->rows != m || c->columns != n)
        return refuse(INVALID, "a result of another shape");
    for (int i = 0; i < 4; i++)
        if (layouts[i]->batch != y->batch) return refuse(INVALID, "batches of different sizes");
    if (y->batch > 1 && y->batch_step < (int64_t)((n - 1) * y->step + m))
        return refuse(INVALID, "results of a batch overlap");
    if (d->epilogue != DEFAULT && d->epilogue != WITH_BIAS)
        return refuse(NOT_SUPPORTED, "an epilogue %d", d->epilogue);
    return SUCCESS;
}

extern "C" int cublasLtMatmulAlgoGetHeuristic(void *handle, void *description, void *a, void *b,
                                              void *c, void *y, void *given, int most,
                                              Heuristic *found, int *count)
{
    MAY_FAIL();
    Object *d = is(description, DESCRIPTION), *preference = is(given, PREFERENCE);
    if (!is(handle, HANDLE) || !d || !preference) return refuse(INVALID, "no descriptors");
    Object *layouts[] = {is(a, LAYOUT), is(b, LAYOUT), is(c, LAYOUT), is(y, LAYOUT)};
    int status = check(d, layouts);
    if (status) return status;
    if (most < 1) return refuse(INVALID, "no place for an algorithm");
    memset(found, 0, sizeof *found);
    uint64_t wanted = layouts[3]->rows > 8 ? 4096 : 0;
    if (preference->workspace < wanted) return refuse(NOT_SUPPORTED, "too little workspace");
    found->algorithm[0] = of_problem(d, layouts);
    found->algorithm[1] = found->workspace = wanted;
    for (int i = 0; i < 4; i++) found->algorithm[2 + i] = preference->alignment[i];
    *count = 1;
    return SUCCESS;
}

static float from_half(uint16_t half)
{
    int exponent = half >> 10 & 31, fraction = half & 1023;
    float size = exponent == 31  ? (fraction ? NAN : INFINITY)
                 : exponent == 0 ? ldexpf(fraction, -24)
                                 : ldexpf(1024 + fraction, exponent - 25);
    return half & 0x8000 ? -size : size;
}

// Element i of a matrix, as a tensor core would read it.
static double number(const void *x, int64_t i, int type, int compute)
{
    if (type == FLOAT16) return from_half(((const uint16_t *)x)[i]);
    float value;
    uint32_t bits;
    if (type == BFLOAT16) {
        bits = (uint32_t)((const uint16_t *)x)[i] << 16;
    } else {
        value = ((const float *)x)[i];
        if (compute == COMPUTE_FLOAT32 || !isfinite(value)) return value;
        memcpy(&bits, &value, 4);
        bits = (bits + 0x1000) & 0xffffe000;
    }
    memcpy(&value, &bits, 4);
    return value;
}

extern "C" int cublasLtMatmul(void *handle, void *description, const float *alpha, const void *a,
                              void *a_layout, const void *b, void *b_layout, const float *beta,
                              const float *c, void *c_layout, float *y, void *y_layout,
                              const uint64_t *algorithm, void *workspace, size_t workspace_size,
                              void *stream)
{
    MAY_FAIL();
    Object *d = is(description, DESCRIPTION);
    Object *layouts[] = {is(a_layout, LAYOUT), is(b_layout, LAYOUT), is(c_layout, LAYOUT),
                         is(y_layout, LAYOUT)};
    if (!is(handle, HANDLE) || !d || !alpha || !beta || !algorithm)
        return refuse(INVALID, "no descriptors");
    int status = check(d, layouts);
    if (status) return status;
    if (algorithm[0] != of_problem(d, layouts))
        return refuse(INVALID, "an algorithm that was proposed for another product");
    const void *places[] = {a, b, c, y};
    for (int i = 0; i < 4; i++)
        if (!places[i] || (uintptr_t)places[i] % algorithm[2 + i])
            return refuse(INVALID, "matrix %d is not aligned to %d", i, (int)algorithm[2 + i]);
    if (algorithm[1]) {
        if (!workspace || workspace_size < algorithm[1] || (uintptr_t)workspace % 16)
            return refuse(INVALID, "a workspace of %zu bytes", workspace_size);
        memset(workspace, 0xff, algorithm[1]);
    }
    const float *bias = (const float *)d->bias;
    if (d->epilogue == WITH_BIAS && d->bias < 65536)
        return refuse(INVALID, "the address of the bias is %d", (int)d->bias);
    Object *la = layouts[0], *lb = layouts[1], *ly = layouts[3];
    int64_t m = ly->rows, n = ly->columns, k = d->transposed[0] ? la->rows : la->columns;
    int half = la->type != FLOAT32;
    for (int batch = 0; batch < ly->batch; batch++) {
        const char *a_here = (const char *)a + batch * la->batch_step * (half ? 2 : 4);
        const char *b_here = (const char *)b + batch * lb->batch_step * (half ? 2 : 4);
        for (int64_t j = 0; j < n; j++)
            for (int64_t i = 0; i < m; i++) {
                double total = 0;
                for (int64_t l = 0; l < k; l++) {
                    int64_t in_a = d->transposed[0] ? i * la->step + l : l * la->step + i;
                    int64_t in_b = d->transposed[1] ? l * lb->step + j : j * lb->step + l;
                    total += number(a_here, in_a, la->type, d->compute) *
                             number(b_here, in_b, lb->type, d->compute);
                }
                int64_t at = batch * ly->batch_step + j * ly->step + i;
                total = (float)(*alpha * total);
                if (d->epilogue == WITH_BIAS) total = (float)(total + bias[i]);
                if (*beta != 0) total += *beta * c[batch * layouts[2]->batch_step +
                                                   j * layouts[2]->step + i];
                y[at] = total;
            }
    }
    calls++;
    return SUCCESS;
}
