// Blocks of threads, shared-memory products on tensor cores, and input and output of rows.
//
// The same code compiles for a GPU and, with a plain C++ compiler, for a CPU, where one thread takes
// the part of a whole block, barriers are nothing, and mma is computed lane by lane from the layout
// that the PTX manual gives (mma.m16n8k8, tf32). The tests run the kernels that way: index logic,
// fragment layouts and arithmetic are what the GPU gets; speed is not seen, and races by a test that
// has a thread for each of a block's and its own mma.
#pragma once
#ifdef __CUDACC_RTC__  // NVRTC brings no headers
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using int64_t = long long;
#else
#include <cmath>
#include <cstdint>
#include <cstring>
#endif

#ifdef __CUDACC__
#define DEVICE __device__ __forceinline__
#define DEVICE_CALL __device__ __noinline__  // a real call, with the registers all its own
#define UNROLL _Pragma("unroll")
#else
#define DEVICE inline
#define DEVICE_CALL inline
#define UNROLL
#endif

namespace wkv7 {

#ifdef __CUDACC__
constexpr int THREADS = 128;
DEVICE int thread() { return threadIdx.x; }
DEVICE void barrier() { __syncthreads(); }
DEVICE float exponential(float x) { return expf(x); }
#else
constexpr int THREADS = 1;
DEVICE int thread() { return 0; }
DEVICE void barrier() {}
DEVICE float exponential(float x) { return std::exp(x); }
#endif

struct bf16 {
    uint16_t bits;
};

DEVICE float bits_to_float(uint32_t x) {
    float y;
    memcpy(&y, &x, 4);
    return y;
}

DEVICE uint32_t float_to_bits(float x) {
    uint32_t y;
    memcpy(&y, &x, 4);
    return y;
}

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }

template <typename T>
DEVICE T from_float(float x);
template <>
DEVICE float from_float<float>(float x) {
    return x;
}
template <>
DEVICE bf16 from_float<bf16>(float x) {
    uint32_t u = float_to_bits(x);
    bool nan = (u & 0x7fffffffu) > 0x7f800000u;
    u += 0x7fffu + ((u >> 16) & 1u);  // to nearest, ties to even
    return bf16{uint16_t(nan ? 0x7fc0u : u >> 16)};
}

// Four neighbouring elements: one load or store of 16 (float) or 8 (bf16) bytes.
template <typename T>
struct alignas(4 * sizeof(T)) Quad {
    T x[4];
};

// The nearest tf32 (10 bits of mantissa), as a float.
DEVICE float to_tf32(float x) {
#ifdef __CUDA_ARCH__
    uint32_t y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return bits_to_float(y);
#else
    return bits_to_float((float_to_bits(x) + 0x1000u) & 0xffffe000u);
#endif
}

// Fragments of mma.m16n8k8 by lane: row and column of each register.
DEVICE int a_row(int lane, int i) { return (lane >> 2) + 8 * (i & 1); }
DEVICE int a_col(int lane, int i) { return (lane & 3) + 4 * (i >> 1); }
DEVICE int b_row(int lane, int i) { return (lane & 3) + 4 * i; }
DEVICE int b_col(int lane) { return lane >> 2; }
DEVICE int c_row(int lane, int i) { return (lane >> 2) + 8 * (i >> 1); }
DEVICE int c_col(int lane, int i) { return 2 * (lane & 3) + (i & 1); }

#if defined(__CUDACC__) && !defined(WKV7_MMA_IS_GIVEN)
DEVICE void mma(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(float_to_bits(a[0])), "r"(float_to_bits(a[1])), "r"(float_to_bits(a[2])),
          "r"(float_to_bits(a[3])), "r"(float_to_bits(b[0])), "r"(float_to_bits(b[1])));
}
#endif

// store(i, j, sum_k a(i, k) b(k, j)) for an M x N product, shared among the block's warps.
// PRECISE splits each factor into two tf32 parts: errors of float32 for three times the work.
// `turn` rotates which warp takes which tile, for products that share a phase between barriers.
template <int M, int N, int K, bool PRECISE, class A, class B, class Store>
DEVICE void product(A a, B b, Store store, int turn = 0) {
    static_assert(M % 16 == 0 && N % 8 == 0 && K % 8 == 0, "tiles are 16 x 8 x 8");
    constexpr int WIDE = N % 32 == 0 ? 4 : (N % 16 == 0 ? 2 : 1);  // mma side by side share a
    constexpr int TILES = (M / 16) * (N / 8 / WIDE);
#ifdef __CUDACC__
    constexpr int WARPS = THREADS / 32;
    // Opaque, so that the indices that follow from it are computed here, and not for all products
    // at once before the loop over chunks, to lie in registers or be spilled.
    int lane = thread() & 31;
    asm volatile("" : "+r"(lane));
    for (int tile = (thread() / 32 + turn) % WARPS; tile < TILES; tile += WARPS) {
        const int i0 = tile % (M / 16) * 16, j0 = tile / (M / 16) * 8 * WIDE;
        float c[WIDE][4] = {};
        // Not unrolled all the way: code size, and registers, for no gain.
        _Pragma("unroll 2") for (int k = 0; k < K; k += 8) {
            float high[4], low[4];
            UNROLL for (int i = 0; i < 4; ++i) {
                float x = a(i0 + a_row(lane, i), k + a_col(lane, i));
                high[i] = to_tf32(x);
                low[i] = PRECISE ? to_tf32(x - high[i]) : 0.f;
            }
            UNROLL for (int n = 0; n < WIDE; ++n) {
                float bh[2], bl[2];
                UNROLL for (int i = 0; i < 2; ++i) {
                    float x = b(k + b_row(lane, i), j0 + 8 * n + b_col(lane));
                    bh[i] = to_tf32(x);
                    bl[i] = PRECISE ? to_tf32(x - bh[i]) : 0.f;
                }
                if (PRECISE) {
                    mma(c[n], low, bh);
                    mma(c[n], high, bl);
                }
                mma(c[n], high, bh);
            }
        }
        UNROLL for (int n = 0; n < WIDE; ++n) UNROLL for (int i = 0; i < 4; ++i)
            store(i0 + c_row(lane, i), j0 + 8 * n + c_col(lane, i), c[n][i]);
    }
#else
    (void)turn;
    for (int tile = 0; tile < TILES; ++tile) {
        const int i0 = tile % (M / 16) * 16, j0 = tile / (M / 16) * 8 * WIDE;
        for (int n = 0; n < WIDE; ++n) {
            float c[16][8] = {};
            for (int k = 0; k < K; k += 8) {
                float high[2][16][8], low[2][16][8];  // as the lanes' registers say they are
                for (int lane = 0; lane < 32; ++lane) {
                    for (int i = 0; i < 4; ++i) {
                        float x = a(i0 + a_row(lane, i), k + a_col(lane, i)), h = to_tf32(x);
                        // PTX: a0 (g, t), a1 (g + 8, t), a2 (g, t + 4), a3 (g + 8, t + 4)
                        int row = lane / 4 + (i == 1 || i == 3 ? 8 : 0), col = lane % 4 + (i < 2 ? 0 : 4);
                        high[0][row][col] = h;
                        low[0][row][col] = PRECISE ? to_tf32(x - h) : 0.f;
                    }
                    for (int i = 0; i < 2; ++i) {
                        float x = b(k + b_row(lane, i), j0 + 8 * n + b_col(lane)), h = to_tf32(x);
                        // PTX: b0 (k = t, n = g), b1 (k = t + 4, n = g)
                        high[1][lane % 4 + 4 * i][lane / 4] = h;
                        low[1][lane % 4 + 4 * i][lane / 4] = PRECISE ? to_tf32(x - h) : 0.f;
                    }
                }
                for (int i = 0; i < 16; ++i)
                    for (int m = 0; m < 8; ++m)
                        for (int j = 0; j < 8; ++j)
                            c[i][j] += low[0][i][m] * high[1][m][j] + high[0][i][m] * low[1][m][j] +
                                       high[0][i][m] * high[1][m][j];
            }
            for (int lane = 0; lane < 32; ++lane)
                for (int i = 0; i < 4; ++i) {
                    // PTX: c0 (g, 2t), c1 (g, 2t + 1), c2 (g + 8, 2t), c3 (g + 8, 2t + 1)
                    float value = c[lane / 4 + (i < 2 ? 0 : 8)][2 * (lane % 4) + i % 2];
                    store(i0 + c_row(lane, i), j0 + 8 * n + c_col(lane, i), value);
                }
        }
    }
#endif
}

}  // namespace wkv7
