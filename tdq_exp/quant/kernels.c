// Fake quantization and its gradients, one pass over memory for each direction. Formulas: see ops.py.
//
// A tensor is `rows` rows of `width` numbers that lie one after another; step size and zero point are one for all rows
// (step 0 between them) or one for each (step 1). Sums are taken over chunks of fixed length, in double precision between
// chunks, and added in their order: they are the same bits for any number of threads.

#include <math.h>
#include <stddef.h>
#include <stdint.h>

enum { CHUNK = 4096, SMALL = 16384 };
enum { LEARNED, CLIPPED, NOISE };

static inline long least(long a, long b) { return a < b ? a : b; }

// x_hat = s round(clip(x / s, n - z, p - z)); with noise u: x + s u inside of the range. A NaN stays one.
void forward(const float *restrict x, const float *restrict u, float *restrict x_hat, const float *restrict s,
             const float *restrict z, long rows, long width, long s_step, long z_step, float n, float p, int threads) {
    const long chunks = (width + CHUNK - 1) / CHUNK;
#pragma omp parallel for collapse(2) num_threads(threads) if (rows * width > SMALL)
    for (long row = 0; row < rows; row++) {
        for (long chunk = 0; chunk < chunks; chunk++) {
            const float step = s[row * s_step], zero = z ? z[row * z_step] : 0.0f;
            const float low = n - zero, high = p - zero;
            const long first = row * width + chunk * CHUNK, last = row * width + least((chunk + 1) * CHUNK, width);
            if (u) {
#pragma omp simd
                for (long i = first; i < last; i++) {
                    const float v = x[i] / step;
                    const float bounded = v < low ? low : v > high ? high : v;
                    x_hat[i] = (v > low && v < high ? v + u[i] : bounded) * step;
                }
            } else {
#pragma omp simd
                for (long i = first; i < last; i++) {
                    const float v = x[i] / step;
                    const float bounded = v < low ? low : v > high ? high : v;
                    x_hat[i] = nearbyintf(bounded) * step;
                }
            }
        }
    }
}

// g_x = m g;  g_s = scale sum g e;  g_z = -s sum (1 - m) g.  `sums` holds two doubles for each chunk of each row; g_s and
// g_z have one element or one per row, as s_step and z_step say, and g_z may be null.
void backward(const float *restrict g, const float *restrict x, const float *restrict u, float *restrict g_x,
              float *restrict g_s, float *restrict g_z, const float *restrict s, const float *restrict z,
              double *restrict sums, long rows, long width, long s_step, long z_step, float n, float p, float scale,
              int kind, int threads) {
    const long chunks = (width + CHUNK - 1) / CHUNK;
#pragma omp parallel for collapse(2) num_threads(threads) if (rows * width > SMALL)
    for (long row = 0; row < rows; row++) {
        for (long chunk = 0; chunk < chunks; chunk++) {
            const float step = s[row * s_step], zero = z ? z[row * z_step] : 0.0f;
            const float low = n - zero, high = p - zero;
            const long first = row * width + chunk * CHUNK, last = row * width + least((chunk + 1) * CHUNK, width);
            float error = 0.0f, outside = 0.0f;
#define PASS(INSIDE)                                                           \
    _Pragma("omp simd reduction(+ : error, outside)")                          \
    for (long i = first; i < last; i++) {                                      \
        const float v = x[i] / step;                                           \
        const int inside = v > low && v < high;                                \
        const float bounded = v < low ? low : v > high ? high : v;             \
        g_x[i] = inside ? g[i] : 0.0f;                                         \
        error += g[i] * (inside ? (INSIDE) : bounded);                         \
        outside += inside ? 0.0f : g[i];                                       \
    }
            if (kind == LEARNED) {
                PASS(nearbyintf(v) - v)
            } else if (kind == CLIPPED) {
                PASS(0.0f)
            } else {
                PASS(u[i])
            }
#undef PASS
            sums[2 * (row * chunks + chunk)] = error;
            sums[2 * (row * chunks + chunk) + 1] = outside;
        }
    }
    double total_s = 0.0, total_z = 0.0;
    for (long row = 0; row < rows; row++) {
        double error = 0.0, outside = 0.0;
        for (long chunk = 0; chunk < chunks; chunk++) {
            error += sums[2 * (row * chunks + chunk)];
            outside += sums[2 * (row * chunks + chunk) + 1];
        }
        outside *= -(double)s[row * s_step];
        if (s_step) g_s[row] = (float)(error * scale);
        if (z_step && g_z) g_z[row] = (float)outside;
        total_s += error;
        total_z += outside;
    }
    if (!s_step) g_s[0] = (float)(total_s * scale);
    if (!z_step && g_z) g_z[0] = (float)total_z;
}

// round(clip(x / s, n - z, p - z)) + z + shift as bytes: codes of one step size for the whole tensor. The sum lies in
// 0..255; a NaN, which has no code, becomes the smallest one.
void codes(const float *restrict x, uint8_t *restrict q, long count, float s, float z, float n, float p, float shift,
           int threads) {
    const float low = n - z, high = p - z, offset = z + shift;
#pragma omp parallel for simd num_threads(threads) if (parallel : count > SMALL)
    for (long i = 0; i < count; i++) {
        const float v = x[i] / s;
        const float bounded = v > low ? v < high ? v : high : low;
        q[i] = (uint8_t)(int)(nearbyintf(bounded) + offset);
    }
}
