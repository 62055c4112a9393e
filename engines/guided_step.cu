/* Guidance and a linear scheduler's update, on latents that stay on the GPU between the calls of the UNet.

   The state is `vectors` arrays of `count` floats, the latents first, then what the scheduler remembers. After a step
   each of them is a sum of all of them, the model's output and fresh noise, weighted by one row of `weights`:
   ipa.runtime.linear_steps makes these of the numpy scheduler. The arithmetic is float32, as there.

   As C it runs on the host (tests/fake_libcuda.c); as CUDA it becomes guided_step.ptx, which the driver compiles for
   its GPU. Make that again after a change, with NVRTC 12 (`pip install nvidia-cuda-nvrtc-cu12==12.1.105`):

       python -m ipa.export.compile_kernels */
#ifdef __CUDACC_RTC__
#define KERNEL extern "C" __global__ void
#define INDEX (blockIdx.x * blockDim.x + threadIdx.x)
__device__ static float from_half(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
__device__ static unsigned short to_half(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#define INLINE __device__ static
#else
#define KERNEL static void
#define INDEX host_index
static unsigned host_index;
static float from_half(unsigned short bits) { union { unsigned short bits; _Float16 value; } of = {bits}; return of.value; }
static unsigned short to_half(float value) { union { _Float16 value; unsigned short bits; } of = {value}; return of.bits; }
#define INLINE static
#endif
#define MOST_VECTORS 8 /* ipa.engines.linear_run.MOST_ARRAYS */

INLINE float load(const void *array, int index, int is_half) {
    return is_half ? from_half(((const unsigned short *)array)[index]) : ((const float *)array)[index];
}

/* The UNet's input: the latents times what the scheduler wants, once for each half of a guidance batch. */
KERNEL write_sample(const float *state, void *sample, float scale, int count, int halves, int is_half) {
    int i = INDEX;
    if (i >= count) return;
    float value = scale * state[i];
    for (int half = 0; half < halves; half++) {
        if (is_half) ((unsigned short *)sample)[half * count + i] = to_half(value);
        else ((float *)sample)[half * count + i] = value;
    }
}

/* The state after a step. `noise` is read only if `has_noise`; `guidance` counts with two halves, the negative first. */
KERNEL guided_step(float *state, const void *noise_pred, const float *noise, const float *weights, float guidance,
                   int count, int vectors, int halves, int is_half, int has_noise) {
    int i = INDEX;
    if (i >= count) return;
    float before[MOST_VECTORS + 2];
    float output = load(noise_pred, i, is_half);
    if (halves == 2) output += guidance * (load(noise_pred, count + i, is_half) - output);
    for (int v = 0; v < vectors; v++) before[v] = state[v * count + i];
    before[vectors] = output;
    before[vectors + 1] = has_noise ? noise[i] : 0.0f;
    for (int v = 0; v < vectors; v++) {
        float sum = 0.0f;
        for (int u = 0; u < vectors + 2; u++) sum += weights[v * (vectors + 2) + u] * before[u];
        state[v * count + i] = sum;
    }
}
