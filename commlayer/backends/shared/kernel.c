/* What ranks that share memory do faster in C than through Python and torch: meet, and add up.

   Built at run time by the C compiler that is there (kernel.py); without one, meeting.py and sums.py do the same. */

#define _GNU_SOURCE
#include <linux/futex.h>
#include <math.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#if defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif

/* One per rank, apart from the others' by two cache lines, since processors fetch them in pairs. */
typedef struct {
    _Atomic uint32_t step;     /* how many meetings this rank has come to */
    _Atomic uint32_t sleeping; /* 1 + the rank whose step it sleeps on; 0 while it is awake */
    char apart[120];
} Line;

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

static int has_come(Line *line, uint32_t step) {
    return (int32_t)(atomic_load_explicit(&line->step, memory_order_acquire) - step) >= 0;
}

/* Say that this rank has come to meeting `step`, and wait for all others: by spinning for `spin` nanoseconds, then
   asleep. Returns 0, or 1 where somebody is missing after `limit` nanoseconds; it may be called again then. */
int meet(Line *lines, int size, int rank, uint32_t step, int64_t spin, int64_t limit) {
    Line *mine = &lines[rank];
    if (atomic_load_explicit(&mine->step, memory_order_relaxed) != step) {
        atomic_store(&mine->step, step);
        for (int r = 0; r < size; r++)
            if (atomic_load(&lines[r].sleeping) == (uint32_t)rank + 1) {
                syscall(SYS_futex, &mine->step, FUTEX_WAKE, size, NULL, NULL, 0);
                break;
            }
    }
    int64_t start = 0;
    for (int k = 1; k < size; k++) {
        int r = (rank + k) % size;
        if (has_come(&lines[r], step)) continue;
        if (!start) start = now();
        for (int64_t spent = 0; spent < spin && !has_come(&lines[r], step); spent = now() - start)
            for (int i = 0; i < 32 && !has_come(&lines[r], step); i++) relax();
        while (!has_come(&lines[r], step)) {
            int64_t left = limit - (now() - start);
            if (left <= 0) return 1;
            struct timespec rest = {left / 1000000000, left % 1000000000};
            uint32_t seen = atomic_load(&lines[r].step);
            atomic_store(&mine->sleeping, r + 1);
            if ((int32_t)(seen - step) < 0) syscall(SYS_futex, &lines[r].step, FUTEX_WAIT, seen, &rest, NULL, 0);
            atomic_store(&mine->sleeping, 0);
        }
    }
    return 0;
}

/* Copy without bringing the target into the caches, which costs a third less of the memory's time: for what is too
   large to stay there until it is read. */
void copy_past(char *to, const char *from, size_t size) {
#ifdef __AVX2__
    size_t head = (32 - (uintptr_t)to % 32) % 32;
    if (head > size) head = size;
    memcpy(to, from, head);
    size_t i = head;
    for (; i + 128 <= size; i += 128) {
        __m256i a = _mm256_loadu_si256((const __m256i *)(from + i));
        __m256i b = _mm256_loadu_si256((const __m256i *)(from + i + 32));
        __m256i c = _mm256_loadu_si256((const __m256i *)(from + i + 64));
        __m256i d = _mm256_loadu_si256((const __m256i *)(from + i + 96));
        _mm256_stream_si256((__m256i *)(to + i), a);
        _mm256_stream_si256((__m256i *)(to + i + 32), b);
        _mm256_stream_si256((__m256i *)(to + i + 64), c);
        _mm256_stream_si256((__m256i *)(to + i + 96), d);
    }
    _mm_sfence();
    memcpy(to + i, from + i, size - i);
#else
    memcpy(to, from, size);
#endif
}

/* Sums, element by element in the order of `from`, written to each of `to`, any of which may be one of `from`.
   `parts` is 1, or for the mean the number that each element is divided by. */

enum { BLOCK = 512 }; /* elements that are added up at a time, in the nearest cache */

static float from_bfloat16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

static uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)rounded;
}

/* WIDE adds up; READ and WRITE go between it and the element type. Halves are divided before they are added, since the
   sum of bfloat16's largest overflows even in float; other floats after. */
#define SUM(NAME, TYPE, WIDE, READ, WRITE, BEFORE, AFTER)                                                \
    static void NAME(char **to, int tos, char **from, int froms, size_t count, double parts) {           \
        const WIDE by = (WIDE)parts;                                                                     \
        WIDE sum[BLOCK];                                                                                 \
        (void)by;                                                                                        \
        for (size_t start = 0; start < count; start += BLOCK) {                                          \
            const size_t here = count - start < BLOCK ? count - start : BLOCK;                           \
            for (int f = 0; f < froms; f++) {                                                            \
                const TYPE *x = (const TYPE *)from[f] + start;                                           \
                if (f == 0)                                                                              \
                    for (size_t i = 0; i < here; i++) sum[i] = READ(x[i]) BEFORE;                        \
                else                                                                                     \
                    for (size_t i = 0; i < here; i++) sum[i] += READ(x[i]) BEFORE;                       \
            }                                                                                            \
            for (int t = 0; t < tos; t++) {                                                              \
                TYPE *out = (TYPE *)to[t] + start;                                                       \
                for (size_t i = 0; i < here; i++) out[i] = WRITE(sum[i] AFTER);                          \
            }                                                                                            \
        }                                                                                                \
    }

#define SAME(x) (x)
SUM(sum_float32, float, float, SAME, SAME, , )
SUM(mean_float32, float, float, SAME, SAME, , / by)
SUM(sum_float64, double, double, SAME, SAME, , )
SUM(mean_float64, double, double, SAME, SAME, , / by)
SUM(sum_bfloat16, uint16_t, float, from_bfloat16, to_bfloat16, , )
SUM(mean_bfloat16, uint16_t, float, from_bfloat16, to_bfloat16, / by, )
SUM(sum_int8, uint8_t, uint8_t, SAME, SAME, , )
SUM(sum_int16, uint16_t, uint16_t, SAME, SAME, , )
SUM(sum_int32, uint32_t, uint32_t, SAME, SAME, , )
SUM(sum_int64, uint64_t, uint64_t, SAME, SAME, , )

#ifdef __F16C__
#define FLOAT16 1
static void any_float16(char **to, int tos, char **from, int froms, size_t count, double parts) {
    const __m256 by = _mm256_set1_ps((float)parts);
    for (size_t i = 0; i < count; i += 8) {
        const size_t bytes = 2 * (count - i < 8 ? count - i : 8);
        __m256 sum = _mm256_setzero_ps();
        for (int f = 0; f < froms; f++) {
            __m128i bits = _mm_setzero_si128();
            if (bytes == 16)
                bits = _mm_loadu_si128((const __m128i *)(from[f] + 2 * i));
            else
                memcpy(&bits, from[f] + 2 * i, bytes);
            __m256 x = _mm256_cvtph_ps(bits);
            if (parts != 1) x = _mm256_div_ps(x, by);
            sum = f ? _mm256_add_ps(sum, x) : x;
        }
        __m128i out = _mm256_cvtps_ph(sum, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        for (int t = 0; t < tos; t++) {
            if (bytes == 16)
                _mm_storeu_si128((__m128i *)(to[t] + 2 * i), out);
            else
                memcpy(to[t] + 2 * i, &out, bytes);
        }
    }
}
#else
#define FLOAT16 0
static void any_float16(char **to, int tos, char **from, int froms, size_t count, double parts) {
    (void)to, (void)tos, (void)from, (void)froms, (void)count, (void)parts;
}
#endif

const int has_float16 = FLOAT16;

/* `kind` is the place in kernel.py's KINDS. */
void add_up(char **to, int tos, char **from, int froms, size_t count, int kind, double parts) {
    static void (*const sums[])(char **, int, char **, int, size_t, double) = {
        sum_float32, mean_float32, sum_float64, mean_float64, sum_bfloat16, mean_bfloat16,
        any_float16, any_float16,  sum_int8,    sum_int16,    sum_int32,    sum_int64,
    };
    sums[kind](to, tos, from, froms, count, parts);
}
