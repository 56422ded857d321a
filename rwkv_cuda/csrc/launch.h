// From arguments to blocks: which block does what, for the GPU (wkv7.cu) and for the CPU
// (emulate.cpp), and the few functions of plain C that cuda.py calls.
#pragma once
#include "backward.h"

namespace wkv7 {

enum Kernel { FORWARD, BACKWARD, SCAN, SCAN_BACK };

// Value columns of a block. Fewer fill the card better, and a state of 128 x 64 does not fit beside
// the rest; but each block of a head computes the scores.
template <int N>
constexpr int FORWARD_COLUMNS = N == 64 ? 64 : 32;
constexpr int BACKWARD_COLUMNS = 32, SCAN_COLUMNS = 32;

// Block x of (segments, clips and heads, directions, parts), parts innermost: neighbours read the
// same frames at about the same time, so the second of two directions finds them in the L2 cache.
struct Place {
    int clip_head, direction, part, segment;
    DEVICE Place(const Arguments& args, int block, int parts, int segments) {
        part = block % parts;
        block /= parts;
        direction = block % args.directions;
        block /= args.directions;
        clip_head = block % (args.batch * args.heads);
        segment = block / (args.batch * args.heads);
        // A reverse direction counts its segments from the clip's end.
        if ((args.reversed >> direction) & 1) segment = segments - 1 - segment;
    }
};

template <typename T, int N>
DEVICE void forward_block(const Arguments& args, Mode mode, int block, void* memory) {
    constexpr int VB = FORWARD_COLUMNS<N>;
    Place at(args, block, N / VB, mode == WHOLE ? 1 : args.segments);
    Walk<T, N, VB, sizeof(T) == 4> walk(args, at.clip_head, at.direction, at.part);
    walk.forward(*static_cast<Shared<N, VB>*>(memory), mode, at.segment);
}

template <typename T, int N>
DEVICE void backward_block(const Arguments& args, Mode mode, int block, void* memory) {
    constexpr int VB = BACKWARD_COLUMNS;
    Place at(args, block, N / VB, mode == WHOLE ? 1 : args.segments);
    WalkBack<T, N, VB, sizeof(T) == 4> walk(args, at.clip_head, at.direction, at.part);
    walk.backward(*static_cast<SharedBackward<N, VB>*>(memory), mode, at.segment, block);
}

template <int N>
DEVICE void scan_block(const Arguments& args, bool adjoint, int block, void* memory) {
    constexpr int VB = SCAN_COLUMNS;
    Place at(args, block, N / VB, 1);
    scan<N, VB>(args, *static_cast<SharedScan<N, VB>*>(memory), at.clip_head, at.direction, at.part,
                adjoint);
}

}  // namespace wkv7

#ifndef __CUDACC_RTC__  // which takes no functions of the host
// Each returns 0, or an error of the CUDA runtime (-1: a width that is not compiled in).
// kernel and mode: Kernel, Mode; bf16: 0 for float; width: N.
extern "C" int wkv7_launch(const wkv7::Arguments* args, int kernel, int mode, int bf16, int width,
                           void* stream);
extern "C" int wkv7_blocks(const wkv7::Arguments* args, int kernel, int mode, int width);
extern "C" int wkv7_shared_bytes(int kernel, int width);
extern "C" const char* wkv7_error(int code);
#endif

#ifdef WKV7_DEFINE_SIZES
extern "C" int wkv7_blocks(const wkv7::Arguments* args, int kernel, int mode, int width) {
    using namespace wkv7;
    int columns = kernel == FORWARD && width == 64 ? FORWARD_COLUMNS<64> : BACKWARD_COLUMNS;
    int segments = kernel < SCAN && mode != WHOLE ? args->segments : 1;
    return segments * args->batch * args->heads * args->directions * (width / columns);
}

template <int N>
static int shared_bytes(int kernel) {
    using namespace wkv7;
    return kernel == FORWARD    ? int(sizeof(Shared<N, FORWARD_COLUMNS<N>>))
           : kernel == BACKWARD ? int(sizeof(SharedBackward<N, BACKWARD_COLUMNS>))
                                : int(sizeof(SharedScan<N, SCAN_COLUMNS>));
}

extern "C" int wkv7_shared_bytes(int kernel, int width) {
    return width == 32    ? shared_bytes<32>(kernel)
           : width == 64  ? shared_bytes<64>(kernel)
           : width == 128 ? shared_bytes<128>(kernel)
                          : -1;
}
#endif
