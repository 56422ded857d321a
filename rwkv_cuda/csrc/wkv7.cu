// The kernels on a GPU. No torch headers: compiles with nvcc alone, for sm_80 and later; and for
// nvrtc.py with NVRTC, which takes the kernels and leaves the launches to the driver.
#ifndef __CUDACC_RTC__
#define WKV7_DEFINE_SIZES
#include <cuda_runtime.h>
#endif

#include "launch.h"

using namespace wkv7;

template <typename T, int N>
__global__ void __launch_bounds__(THREADS, 2) forward_kernel(const __grid_constant__ Arguments args, Mode mode) {
    extern __shared__ float4 memory[];
    forward_block<T, N>(args, mode, blockIdx.x, memory);
}

template <typename T, int N>
__global__ void __launch_bounds__(THREADS, 2) backward_kernel(const __grid_constant__ Arguments args, Mode mode) {
    extern __shared__ float4 memory[];
    backward_block<T, N>(args, mode, blockIdx.x, memory);
}

template <int N>
__global__ void __launch_bounds__(THREADS, 2) scan_kernel(const __grid_constant__ Arguments args, bool adjoint) {
    extern __shared__ float4 memory[];
    scan_block<N>(args, adjoint, blockIdx.x, memory);
}

#ifdef __CUDACC_RTC__
// Bytes of shared memory by kernel, of the one width that is compiled at a time.
extern "C" __device__ const int wkv7_bytes[] = {
    int(sizeof(Shared<WKV7_WIDTH, FORWARD_COLUMNS<WKV7_WIDTH>>)),
    int(sizeof(SharedBackward<WKV7_WIDTH, BACKWARD_COLUMNS>)),
    int(sizeof(SharedScan<WKV7_WIDTH, SCAN_COLUMNS>)),
};
#else
template <class F, class... Rest>
static int launch(F* function, int blocks, int bytes, void* stream, const Arguments& args,
                  Rest... rest) {
    if (blocks == 0) return 0;
    cudaError_t error =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) {
        cudaGetLastError();  // not for the next caller to find
        return error;
    }
    function<<<blocks, THREADS, bytes, static_cast<cudaStream_t>(stream)>>>(args, rest...);
    return cudaGetLastError();
}

template <int N>
static int run(const Arguments& args, int kernel, Mode mode, int bf16, void* stream) {
    const int blocks = wkv7_blocks(&args, kernel, mode, N), bytes = wkv7_shared_bytes(kernel, N);
    if (kernel == SCAN || kernel == SCAN_BACK)
        return launch(scan_kernel<N>, blocks, bytes, stream, args, kernel == SCAN_BACK);
    if (kernel == FORWARD)
        return bf16 ? launch(forward_kernel<wkv7::bf16, N>, blocks, bytes, stream, args, mode)
                    : launch(forward_kernel<float, N>, blocks, bytes, stream, args, mode);
    return bf16 ? launch(backward_kernel<wkv7::bf16, N>, blocks, bytes, stream, args, mode)
                : launch(backward_kernel<float, N>, blocks, bytes, stream, args, mode);
}

extern "C" int wkv7_launch(const Arguments* args, int kernel, int mode, int bf16, int width,
                           void* stream) {
#ifdef WKV7_WIDTH  // this one alone: for tests that the compilers take the sources
    return width == WKV7_WIDTH ? run<WKV7_WIDTH>(*args, kernel, Mode(mode), bf16, stream) : -1;
#else
    return width == 32    ? run<32>(*args, kernel, Mode(mode), bf16, stream)
           : width == 64  ? run<64>(*args, kernel, Mode(mode), bf16, stream)
           : width == 128 ? run<128>(*args, kernel, Mode(mode), bf16, stream)
                          : -1;
#endif
}

extern "C" const char* wkv7_error(int code) { return cudaGetErrorString(cudaError_t(code)); }
#endif
