// The CUDA kernels with 128 threads of a CPU for those of a block, for ThreadSanitizer to watch: what
// csrc/emulate.cpp, which takes one thread for all of them, cannot see. Argument: a case of main.
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#define __CUDACC__ 1
#define __device__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
thread_local struct { int x; } threadIdx;

struct Warp {
    std::barrier<> here{32};
    float a[32][4], b[32][2];
};
struct Block {
    std::barrier<> here{128};
    Warp warps[4];
};
static Block* block;
static void __syncthreads() { block->here.arrive_and_wait(); }

namespace wkv7 {
// mma.m16n8k8 from the registers of a warp's lanes; see tile.h for who holds what.
static void mma(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
    Warp& warp = block->warps[threadIdx.x / 32];
    const int lane = threadIdx.x % 32;
    memcpy(warp.a[lane], a, sizeof(a));
    memcpy(warp.b[lane], b, sizeof(b));
    warp.here.arrive_and_wait();
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        for (int k = 0; k < 8; ++k)
            c[i] += warp.a[row % 8 * 4 + k % 4][row / 8 + 2 * (k / 4)] *
                    warp.b[column * 4 + k % 4][k / 4];
    }
    warp.here.arrive_and_wait();
}
}  // namespace wkv7

#define WKV7_MMA_IS_GIVEN
#define WKV7_DEFINE_SIZES
#include "launch.h"
using namespace wkv7;

template <typename T, int N>
void launch(const Arguments& args, int kernel, Mode mode) {
    const int blocks = wkv7_blocks(&args, kernel, mode, N), bytes = wkv7_shared_bytes(kernel, N);
    for (int b = 0; b < blocks; ++b) {
        std::vector<Quad<float>> memory(bytes / 16 + 1);
        Block here;
        block = &here;
        std::vector<std::thread> threads;
        for (int t = 0; t < THREADS; ++t)
            threads.emplace_back([&, t] {
                threadIdx.x = t;
                if (kernel == FORWARD)
                    forward_block<T, N>(args, mode, b, memory.data());
                else if (kernel == BACKWARD)
                    backward_block<T, N>(args, mode, b, memory.data());
                else
                    scan_block<N>(args, kernel == SCAN_BACK, b, memory.data());
            });
        for (auto& thread : threads) thread.join();
    }
}

// All launches of cuda.py, in its order, for one clip and head in both directions.
template <typename T, int N>
void pass(int frames, int length, int segment, bool split) {
    const int segments = (frames + segment - 1) / segment, parts = 2 * (N / 32);
    const size_t size = size_t(frames) * N, state = size_t(N) * N;
    auto numbers = [](size_t n, float mean) {
        std::vector<T> x(n);
        for (auto& one : x) one = from_float<T>(mean + rand() / float(RAND_MAX) - 0.5f);
        return x;
    };
    std::vector<T> r = numbers(size, 0), w = numbers(size, -1), k = numbers(size, 0);
    std::vector<T> v = numbers(size, 0), a = numbers(size, 0), b = numbers(size, 0);
    std::vector<T> grad_y = numbers(2 * size, 0), y(2 * size), grads[6];
    std::vector<float> initial(2 * state, 0.1f), grad_last(initial), last(initial);
    std::vector<float> states(2 * segments * state), adjoints(states), transitions(states);
    Arguments args{r.data(), w.data(), k.data(), v.data(), a.data(), b.data(), grad_y.data(), y.data()};
    for (int i = 0; i < 6; ++i) args.grads[i] = (grads[i].resize(parts * size), grads[i].data());
    args.lengths = &length;
    args.initial = initial.data();
    args.last = last.data();
    args.grad_last = grad_last.data();
    args.states = states.data();
    args.adjoints = adjoints.data();
    args.transitions = transitions.data();
    args.batch = args.heads = 1;
    args.frames = frames;
    args.segments = segments;
    args.segment = segment;
    args.directions = args.reversed = 2;
    if (split) launch<T, N>(args, FORWARD, CONTRIBUTION);
    if (split) launch<T, N>(args, FORWARD, TRANSITION);
    if (split) launch<T, N>(args, SCAN, WHOLE);
    launch<T, N>(args, FORWARD, split ? REPLAY : WHOLE);
    if (split) launch<T, N>(args, BACKWARD, CONTRIBUTION);
    if (split) launch<T, N>(args, SCAN_BACK, WHOLE);
    const Mode mode = split ? REPLAY : WHOLE;
    std::vector<float> scratch(size_t(wkv7_blocks(&args, BACKWARD, mode, N)) * (segment / C) * N * 32);
    args.scratch = scratch.data();
    launch<T, N>(args, BACKWARD, mode);
}

int main(int, char** argv) {
    switch (atoi(argv[1])) {
        case 0: pass<float, 32>(40, 35, 32, false); break;
        case 1: pass<float, 32>(72, 66, 32, true); break;
        case 2: pass<wkv7::bf16, 64>(34, 34, 32, false); break;
        case 3: pass<wkv7::bf16, 64>(50, 40, 32, true); break;
        case 4: pass<wkv7::bf16, 128>(20, 20, 16, false); break;
    }
    puts("done");
}
