// The kernels on a CPU, block after block: for tests of what a GPU would compute (see tile.h).
#define WKV7_DEFINE_SIZES
#include "launch.h"

#include <cstdlib>
#include <vector>

using namespace wkv7;

template <typename T, int N>
static void run_block(const Arguments& args, int kernel, Mode mode, int block, void* memory) {
    if (kernel == FORWARD)
        forward_block<T, N>(args, mode, block, memory);
    else if (kernel == BACKWARD)
        backward_block<T, N>(args, mode, block, memory);
    else
        scan_block<N>(args, kernel == SCAN_BACK, block, memory);
}

template <int N>
static int run(const Arguments& args, int kernel, Mode mode, int bf16) {
    const int blocks = wkv7_blocks(&args, kernel, mode, N), bytes = wkv7_shared_bytes(kernel, N);
    for (int block = 0; block < blocks; ++block) {
        std::vector<float> memory(bytes / 4, NAN);  // what is read before it is written shows
        if (bf16)
            run_block<wkv7::bf16, N>(args, kernel, mode, block, memory.data());
        else
            run_block<float, N>(args, kernel, mode, block, memory.data());
    }
    return 0;
}

extern "C" int wkv7_launch(const Arguments* args, int kernel, int mode, int bf16, int width, void*) {
    return width == 32    ? run<32>(*args, kernel, Mode(mode), bf16)
           : width == 64  ? run<64>(*args, kernel, Mode(mode), bf16)
           : width == 128 ? run<128>(*args, kernel, Mode(mode), bf16)
                          : -1;
}

extern "C" const char* wkv7_error(int) { return "emulated"; }
