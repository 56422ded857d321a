// The sequential design, to measure against: a block a clip and head, a thread a row of the state,
// one frame after another. Heads 64 wide, bfloat16, one direction; forward only.
#include <cuda_bf16.h>

constexpr int N = 64;
using bf16 = __nv_bfloat16;

__global__ void __launch_bounds__(N) sequential(int frames, int heads, const bf16* r, const bf16* w,
                                                const bf16* k, const bf16* v, const bf16* a,
                                                const bf16* b, bf16* y) {
    const int head = blockIdx.x % heads, clip = blockIdx.x / heads, i = threadIdx.x;
    __shared__ float row[5][N];
    float state[N] = {};
    for (int t = 0; t < frames; ++t) {
        const long long at = ((long long)(clip)*frames + t) * heads * N + head * N + i;
        __syncthreads();
        row[0][i] = __bfloat162float(r[at]);
        row[1][i] = __expf(-__expf(__bfloat162float(w[at])));
        row[2][i] = __bfloat162float(k[at]);
        row[3][i] = __bfloat162float(a[at]);
        row[4][i] = __bfloat162float(b[at]);
        __syncthreads();
        const float value = __bfloat162float(v[at]);
        float sa = 0.f, out = 0.f;
#pragma unroll
        for (int n = 0; n < N; ++n) sa += state[n] * row[3][n];
#pragma unroll
        for (int n = 0; n < N; ++n) {
            state[n] = state[n] * row[1][n] + sa * row[4][n] + value * row[2][n];
            out += state[n] * row[0][n];
        }
        y[at] = __float2bfloat16(out);
    }
}

extern "C" int wkv7_sequential(int batch, int frames, int heads, const void* r, const void* w,
                               const void* k, const void* v, const void* a, const void* b, void* y,
                               void* stream) {
    sequential<<<batch * heads, N, 0, static_cast<cudaStream_t>(stream)>>>(
        frames, heads, (const bf16*)r, (const bf16*)w, (const bf16*)k, (const bf16*)v,
        (const bf16*)a, (const bf16*)b, (bf16*)y);
    return cudaGetLastError();
}
