// Fake quantization and its gradients, one pass over memory for each direction. Formulas: see ops.py.
//
// A tensor is `rows` rows of `width` numbers that lie one after another; step size and zero point are one for all rows
// (step 0 between them) or one for each (step 1). Sums are taken over chunks of fixed length, in double precision between
// chunks, and added in their order: they are the same bits for any number of threads.

#include <math.h>
#include <stddef.h>
#include <stdint.h>

enum { CHUNK = 4096, SMALL = 16384, BLOCK = 64 };
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

// round(clip(x / s, n - z, p - z)) + z + shift as bytes. The sum lies in 0..255; a NaN, which has no code, becomes the
// smallest one. Step size and zero point are one for all rows (step 0) or one for each (step 1). Returns whether there
// was a NaN.
int codes(const float *restrict x, uint8_t *restrict q, const float *restrict s, const float *restrict z, long rows,
          long width, long step, float n, float p, float shift, int threads) {
    const long chunks = (width + CHUNK - 1) / CHUNK;
    int broken = 0;
#pragma omp parallel for collapse(2) num_threads(threads) reduction(| : broken) if (rows * width > SMALL)
    for (long row = 0; row < rows; row++) {
        for (long chunk = 0; chunk < chunks; chunk++) {
            const float size = s[row * step], zero = z[row * step], low = n - zero, high = p - zero, add = zero + shift;
            const long first = row * width + chunk * CHUNK, last = row * width + least((chunk + 1) * CHUNK, width);
            int nan = 0;
#pragma omp simd reduction(| : nan)
            for (long i = first; i < last; i++) {
                const float v = x[i] / size;
                const float bounded = v > low ? v < high ? v : high : low;
                nan |= v != v;
                q[i] = (uint8_t)(int)(nearbyintf(bounded) + add);
            }
            broken |= nan;
        }
    }
    return broken;
}

#ifdef __FMA__
#define MULTIPLY_ADD(a, b, c) __builtin_fmaf(a, b, c)
#else
#define MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
#endif

// e^x within 2 units of the last place, in a form that compilers turn into vector instructions (Cephes' polynomial).
static inline float exponential(float x) {
    x = x > -87.0f ? x : -87.0f;
    x = x < 88.0f ? x : 88.0f;
    const float k = nearbyintf(x * 1.44269504088896341f);
    const float r = MULTIPLY_ADD(k, 2.12194440e-4f, MULTIPLY_ADD(k, -0.693359375f, x));
    float y = 1.9875691500e-4f;
    y = MULTIPLY_ADD(y, r, 1.3981999507e-3f);
    y = MULTIPLY_ADD(y, r, 8.3334519073e-3f);
    y = MULTIPLY_ADD(y, r, 4.1665795894e-2f);
    y = MULTIPLY_ADD(y, r, 1.6666665459e-1f);
    y = MULTIPLY_ADD(y, r, 5.0000001201e-1f);
    y = MULTIPLY_ADD(y, r * r, r + 1.0f);
    union { int32_t bits; float value; } power = {.bits = ((int32_t)k + 127) << 23};
    return y * power.value;
}

// scale and offset of a group norm, [channels] each: y = x scale + offset. rows: [pixels, channels]. One pass: sums of
// d = x - first pixel and of d^2, by channel, in single precision within a block of rows and in double between blocks.
// Returns whether a group holds a NaN or an infinity, of which the norm makes NaNs.
static int normalisation(const float *restrict rows, float *restrict scale, float *restrict offset,
                         const float *restrict weight, const float *restrict bias, long pixels, long channels,
                         long groups, double eps) {
    int broken = 0;
    const long width = channels / groups;
    float part[channels], squares[channels];
    double total[channels], spread[channels];
    for (long c = 0; c < channels; c++) total[c] = spread[c] = 0.0;
    for (long first = 0; first < pixels; first += BLOCK) {
        const long last = least(first + BLOCK, pixels);
        for (long c = 0; c < channels; c++) part[c] = squares[c] = 0.0f;
        long row = first;
        for (; row + 4 <= last; row += 4) {
            const float *restrict v = rows + row * channels;
#pragma omp simd
            for (long c = 0; c < channels; c++) {
                const float base = rows[c], a = v[c] - base, b = v[c + channels] - base,
                            d = v[c + 2 * channels] - base, e = v[c + 3 * channels] - base;
                part[c] += (a + b) + (d + e);
                squares[c] += (a * a + b * b) + (d * d + e * e);
            }
        }
        for (; row < last; row++) {
            const float *restrict v = rows + row * channels;
            for (long c = 0; c < channels; c++) {
                const float a = v[c] - rows[c];
                part[c] += a;
                squares[c] += a * a;
            }
        }
        for (long c = 0; c < channels; c++) {
            total[c] += part[c];
            spread[c] += squares[c];
        }
    }
    for (long group = 0; group < groups; group++) {
        double mean = 0.0, variance = 0.0;
        for (long c = group * width; c < (group + 1) * width; c++) {
            const double of_d = total[c] / (double)pixels;
            spread[c] = spread[c] / (double)pixels - of_d * of_d;
            total[c] = of_d + rows[c];
            mean += total[c] / (double)width;
        }
        for (long c = group * width; c < (group + 1) * width; c++) {
            const double apart = total[c] - mean;
            variance += (spread[c] + apart * apart) / (double)width;
        }
        broken |= variance != variance;
        const float rstd = (float)(1.0 / sqrt((variance > 0.0 ? variance : 0.0) + eps));
        for (long c = group * width; c < (group + 1) * width; c++) {
            scale[c] = rstd * (weight ? weight[c] : 1.0f);
            offset[c] = (bias ? bias[c] : 0.0f) - scale[c] * (float)mean;
            broken |= !isfinite(scale[c]) || !isfinite(offset[c]);
        }
    }
    return broken;
}

// scale and offset of every sample, in `scratch`: 2 batch channels floats. Returns the same for all of them.
static int normalisations(const float *restrict x, float *restrict scratch, const float *restrict weight,
                          const float *restrict bias, long batch, long pixels, long channels, long groups, double eps,
                          int threads) {
    int broken = 0;
#pragma omp parallel for num_threads(threads) reduction(| : broken) if (batch > 1 && batch * pixels * channels > SMALL)
    for (long sample = 0; sample < batch; sample++) {
        float *scale = scratch + 2 * sample * channels;
        const float *rows = x + sample * pixels * channels;
        broken |= normalisation(rows, scale, scale + channels, weight, bias, pixels, channels, groups, eps);
    }
    return broken;
}

// found[c] of every value v of group_norm(x): one statement for silu(v), another for v itself.
#define EACH_NORMALISED(TYPE, OUT, WITH_SILU, WITHOUT)                                                             \
    const long blocks = (pixels + BLOCK - 1) / BLOCK;                                                              \
    const int broken = normalisations(x, scratch, weight, bias, batch, pixels, channels, groups, eps, threads);    \
    _Pragma("omp parallel for collapse(2) num_threads(threads) if (batch * pixels * channels > SMALL)")            \
    for (long sample = 0; sample < batch; sample++) {                                                              \
        for (long block = 0; block < blocks; block++) {                                                            \
            const float *restrict scale = scratch + 2 * sample * channels, *restrict offset = scale + channels;    \
            for (long row = block * BLOCK; row < least((block + 1) * BLOCK, pixels); row++) {                      \
                const float *restrict values = x + (sample * pixels + row) * channels;                             \
                TYPE *restrict found = OUT + (sample * pixels + row) * channels;                                   \
                if (silu) {                                                                                        \
                    EACH_CHANNEL(WITH_SILU)                                                                        \
                } else {                                                                                           \
                    EACH_CHANNEL(WITHOUT)                                                                          \
                }                                                                                                  \
            }                                                                                                      \
        }                                                                                                          \
    }
#define EACH_CHANNEL(STATEMENT)                                                                                    \
    _Pragma("omp simd") for (long c = 0; c < channels; c++) {                                                      \
        const float v = values[c] * scale[c] + offset[c];                                                          \
        STATEMENT;                                                                                                 \
    }

// Codes of silu(group_norm(x)), or of group_norm(x), for x [batch, pixels, channels] with channels innermost. Returns
// whether the norm holds a NaN.
int norm_codes(const float *restrict x, uint8_t *restrict q, float *restrict scratch, const float *restrict weight,
               const float *restrict bias, long batch, long pixels, long channels, long groups, double eps, int silu,
               float s, float z, float n, float p, float shift, int threads) {
    const float low = n - z, high = p - z, add = z + shift;
#define QUANTIZE(DIVIDED)                                                                                          \
    const float w = (DIVIDED);                                                                                     \
    const float bounded = w > low ? w < high ? w : high : low;                                                     \
    found[c] = (uint8_t)(int)(nearbyintf(bounded) + add)
    EACH_NORMALISED(uint8_t, q, QUANTIZE(v / ((1.0f + exponential(-v)) * s)), QUANTIZE(v / s))
#undef QUANTIZE
    return broken;
}

// silu(group_norm(x)), or group_norm(x), itself.
void norm(const float *restrict x, float *restrict y, float *restrict scratch, const float *restrict weight,
          const float *restrict bias, long batch, long pixels, long channels, long groups, double eps, int silu,
          int threads) {
    EACH_NORMALISED(float, y, found[c] = v / (1.0f + exponential(-v)), found[c] = v)
    (void)broken;
}

// Smallest and largest value of each row; 0 lies within.
void ranges(const float *restrict x, float *restrict low, float *restrict high, long rows, long width, int threads) {
#pragma omp parallel for num_threads(threads) if (rows > 1 && rows * width > SMALL)
    for (long row = 0; row < rows; row++) {
        float least_seen = 0.0f, most_seen = 0.0f;
#pragma omp simd reduction(min : least_seen) reduction(max : most_seen)
        for (long i = row * width; i < (row + 1) * width; i++) {
            least_seen = x[i] < least_seen ? x[i] : least_seen;
            most_seen = x[i] > most_seen ? x[i] : most_seen;
        }
        low[row] = least_seen;
        high[row] = most_seen;
    }
}
