// WKV7 by chunks of 16 frames: what a block does for one clip, head, direction and set of value
// columns. The mathematics and its names are those of chunked.py:
//
//     U = T (A~ M + A_ak V),  Y = R~ M + A_rk V + A_rb U,  M' = diag(d) M + K-^T V + B-^T U
//
// with the same tree of decay products, so no decay is ever divided by. Everything of a chunk lies
// in shared memory, the state M (key, value) too; products run on tensor cores (tile.h). Inputs are
// read where they lie, (B, T, H, N): the reverse direction only walks the frames the other way.
#pragma once
#include "tile.h"

namespace wkv7 {

constexpr int C = 16;  // frames of a chunk

// What the launchers take; cuda.py fills the same struct, field for field.
struct Arguments {
    const void *r, *w, *k, *v, *a, *b;    // (B, T, H, N)
    const void* grad_y;                   // (D, B, T, H, N)
    void* y;                              // (D, B, T, H, N), 0 beyond the lengths
    void* grads[6];                       // of r, w, k, v, a, b: (parts, B, T, H, N), to be summed
    const int* lengths;                   // (B,), or null
    const float* initial;                 // (D, B, H, N, N), [value, key], or null
    float* last;                          // (D, B, H, N, N), [value, key]: last state, or in
                                          // backward the gradient of the first
    const float* grad_last;               // (D, B, H, N, N), [value, key], or null
    float* states;                        // (D, S, B, H, N, N), [key, value]: at segment starts
    float* adjoints;                      // (D, S, B, H, N, N): gradients at segment ends
    float* transitions;                   // (D, S, B, H, N, N): M' = P M + ... of each segment
    float* scratch;                       // (blocks, segment / C, N, VB)
    int batch, frames, heads, segments, segment;  // segment: frames, a multiple of C
    int directions, reversed;             // D; bit i: direction i is reverse
};

enum Mode {
    WHOLE,         // a clip from its start to its end
    CONTRIBUTION,  // a segment from a zero state: its exit state to `states`
    TRANSITION,    // a segment from the identity with v = 0: its exit state to `transitions`
    REPLAY,        // a segment from its entry state in `states`
};

DEVICE int at_most(int x, int y) { return x < y ? x : y; }

template <int N, int VB>
struct Shared {
    static constexpr int Q = N + 4, V = VB + 8;  // row lengths that spread over the banks
    float query[2][C][Q];    // a, r; from `scale` on, with the decay since the chunk's start
    float key[2][C][Q];      // k, b; from `scale` on, with the decay to the chunk's end
    float decay[C][Q];
    union {
        float factor[3][C][Q];  // of blocks of 2, 4, 8 frames: decay since the start of a right
                                // block, or to the end of a left one
        float x[2 * C][V];      // A~ M + A_ak V, R~ M + A_rk V
        float grad_query[2][C][Q];
    };
    float value[2][C][V];    // v, u
    float score[4][C][20];   // A_ak, A_ab, A_rk, A_rb
    float inverse[C][20];
    float state[N][V];
    float total[N];          // the chunk's decay
};

template <int N, int VB>
struct SharedBackward : Shared<N, VB> {
    float grad_state[N][VB + 8];
    float product_grad[2][C][VB + 8];  // of A~ M + A_ak V; of y
    float grad_u[C][VB + 8];
    float grad_score[C][C][4];         // of A_ak, A_ab, A_rk, A_rb
    float grad_key[2][C][N + 4];
    float grad_total[N];
};

// A block's place: clip and head, direction, value columns, and the frames it walks.
template <typename T, int N, int VB, bool PRECISE>
struct Walk {
    static constexpr int PER_ROW = N / 4, ITEMS = (C * PER_ROW + THREADS - 1) / THREADS;
    static constexpr int LEVELS = 4;

    const Arguments& args;
    const int head, clip, direction, column;  // column: first value column
    int length;
    bool reverse;
    Quad<T> next[6][ITEMS];  // the next chunk, on its way from memory

    DEVICE Walk(const Arguments& args, int clip_head, int direction, int part)
        : args(args), head(clip_head % args.heads), clip(clip_head / args.heads),
          direction(direction), column(part * VB) {
        length = args.lengths ? args.lengths[clip] : args.frames;
        length = length < 0 ? 0 : at_most(length, args.frames);
        reverse = (args.reversed >> direction) & 1;
    }

    DEVICE int chunks() const { return (length + C - 1) / C; }

    // Index into (B, T, H, N) of a position of the recurrence.
    DEVICE int64_t row(int position) const {
        return row_of(args, clip, head, reverse ? length : 0, position);
    }
    // reversed_length: the clip's length in the reverse direction, 0 in the other.
    DEVICE static int64_t row_of(const Arguments& args, int clip, int head, int reversed_length,
                                 int position) {
        int frame = reversed_length ? reversed_length - 1 - position : position;
        return ((int64_t(clip) * args.frames + frame) * args.heads + head) * N;
    }
    DEVICE int64_t whole() const {  // elements of a (B, T, H, N)
        return int64_t(args.batch) * args.frames * args.heads * N;
    }
    // A state of this clip and head in (D, [S,] B, H, N, N).
    DEVICE int64_t state_index() const {
        return ((int64_t(direction) * args.batch + clip) * args.heads + head) * N * N;
    }
    DEVICE int64_t state_index(int segment) const {
        return (((int64_t(direction) * args.segments + segment) * args.batch + clip) * args.heads +
                head) * N * N;
    }

    DEVICE void fetch(int chunk) {
        const void* from[6] = {args.a, args.r, args.k, args.b, args.w, args.v};
        UNROLL for (int x = 0; x < 6; ++x) UNROLL for (int i = 0; i < ITEMS; ++i) {
            int item = thread() + i * THREADS;
            int t = item / PER_ROW, n = item % PER_ROW * 4;
            bool wanted = item < C * PER_ROW && chunk * C + t < length;
            if (x == 5) wanted = wanted && n >= column && n < column + VB;
            if (wanted)
                next[x][i] = *reinterpret_cast<const Quad<T>*>(static_cast<const T*>(from[x]) +
                                                               row(chunk * C + t) + n);
        }
    }

    // From registers to shared memory; frames beyond the clip keep the state as it is.
    template <class S>
    DEVICE void put(S& s, int chunk, bool with_values) {
        UNROLL for (int i = 0; i < ITEMS; ++i) {
            int item = thread() + i * THREADS;
            int t = item / PER_ROW, n = item % PER_ROW * 4;
            if (item >= C * PER_ROW) break;
            bool valid = chunk * C + t < length;
            UNROLL for (int j = 0; j < 4; ++j) {
                s.query[0][t][n + j] = valid ? to_float(next[0][i].x[j]) : 0.f;
                s.query[1][t][n + j] = valid ? to_float(next[1][i].x[j]) : 0.f;
                s.key[0][t][n + j] = valid ? to_float(next[2][i].x[j]) : 0.f;
                s.key[1][t][n + j] = valid ? to_float(next[3][i].x[j]) : 0.f;
                s.decay[t][n + j] = valid ? decay_of(to_float(next[4][i].x[j])) : 1.f;
                if (n >= column && n < column + VB)
                    s.value[0][t][n + j - column] =
                        valid && with_values ? to_float(next[5][i].x[j]) : 0.f;
            }
        }
        for (int i = thread(); i < 4 * C * 20; i += THREADS) (&s.score[0][0][0])[i] = 0.f;
    }

    DEVICE static float log_decay_of(float w) { return -exponential(w < 80.f ? w : 80.f); }
    DEVICE static float decay_of(float w) { return exponential(log_decay_of(w)); }

    // After `put` and a barrier: scores, (I - A_ab)^-1, scaled queries and keys. Ends on a barrier.
    template <class S>
    DEVICE void prepare(S& s) {
        for (int n = thread(); n < N; n += THREADS) {
            UNROLL for (int level = 1; level < LEVELS; ++level) {
                const int size = 1 << level;
                UNROLL for (int start = 0; start < C; start += 2 * size) {
                    float p = 1.f;
                    UNROLL for (int t = start + size; t < start + 2 * size; ++t) {
                        s.factor[level - 1][t][n] = p;
                        p *= s.decay[t][n];
                    }
                    p = 1.f;
                    UNROLL for (int t = start + size - 1; t >= start; --t) {
                        s.factor[level - 1][t][n] = p;
                        p *= s.decay[t][n];
                    }
                }
            }
        }
        barrier();
        // A frame with itself: r as it is, no decay.
        product<C, 2 * C, N, PRECISE>(
            [&](int t, int n) { return s.query[1][t][n]; },
            [&](int n, int j) { return s.key[j / C][j % C][n]; },
            [&](int t, int j, float x) {
                if (t == j % C) s.score[2 + j / C][t][t] = x;
            });
        UNROLL for (int level = 0; level < LEVELS; ++level) {
            // Row 8 q + i is the i-th frame of a right block, column 8 k + j of a left one; a
            // product of all pairs of blocks at once, of which those of one node are kept.
            const int size = 1 << level;
            auto right = [=](int i) { return i / size * 2 * size + size + i % size; };
            auto left = [=](int j) { return j / size * 2 * size + j % size; };
            product<C, C, N, PRECISE>(
                [&](int i, int n) {
                    int q = i / 8, t = right(i % 8);
                    float x = s.query[q][t][n];
                    if (level) x *= s.factor[level ? level - 1 : 0][t][n];
                    return q ? x * s.decay[t][n] : x;
                },
                [&](int n, int j) {
                    int t = left(j % 8);
                    float x = s.key[j / 8][t][n];
                    return level ? x * s.factor[level ? level - 1 : 0][t][n] : x;
                },
                [&](int i, int j, float x) {
                    if (i % 8 / size == j % 8 / size)
                        s.score[i / 8 * 2 + j / 8][right(i % 8)][left(j % 8)] = x;
                },
                1 + level);
        }
        barrier();
        // The first warp inverts while the others scale.
        for (int j = thread(); j < C; j += THREADS) {
            float x[C];
            UNROLL for (int i = 0; i < C; ++i) {
                x[i] = i == j ? 1.f : 0.f;
                UNROLL for (int m = 0; m < i; ++m) x[i] += s.score[1][i][m] * x[m];
                s.inverse[i][j] = x[i];
            }
        }
        constexpr int OTHERS = THREADS > 32 ? THREADS - 32 : 1;
        if (THREADS == 1 || thread() >= 32)
            for (int n = THREADS == 1 ? 0 : thread() - 32; n < N; n += OTHERS) {
                float p = 1.f;
                UNROLL for (int t = 0; t < C; ++t) {
                    s.query[0][t][n] *= p;
                    p *= s.decay[t][n];
                    s.query[1][t][n] *= p;
                }
                s.total[n] = p;
                p = 1.f;
                UNROLL for (int t = C - 1; t >= 0; --t) {
                    s.key[0][t][n] *= p;
                    s.key[1][t][n] *= p;
                    p *= s.decay[t][n];
                }
            }
        barrier();
    }

    // From the state before the chunk: x, then u. Ends on a barrier.
    template <class S>
    DEVICE void solve(S& s) {
        product<2 * C, VB, N + C, PRECISE>(
            [&](int i, int m) {
                return m < N ? s.query[i / C][i % C][m] : s.score[i / C * 2][i % C][m - N];
            },
            [&](int m, int j) { return m < N ? s.state[m][j] : s.value[0][m - N][j]; },
            [&](int i, int j, float x) { s.x[i][j] = x; });
        barrier();
        product<C, VB, C, PRECISE>([&](int i, int m) { return s.inverse[i][m]; },
                                   [&](int m, int j) { return s.x[m][j]; },
                                   [&](int i, int j, float x) { s.value[1][i][j] = x; });
        barrier();
    }

    // The state after the chunk, in place. No barrier.
    template <class S>
    DEVICE void advance(S& s, int turn) {
        product<N, VB, 2 * C, PRECISE>(
            [&](int n, int m) { return s.key[m / C][m % C][n]; },
            [&](int m, int j) { return s.value[m / C][m % C][j]; },
            [&](int n, int j, float x) { s.state[n][j] = s.total[n] * s.state[n][j] + x; }, turn);
    }

    template <class S>
    DEVICE void write_y(S& s, int chunk) {
        T* y = static_cast<T*>(args.y) + direction * whole() + column;
        product<C, VB, C, PRECISE>(
            [&](int i, int m) { return s.score[3][i][m]; },
            [&](int m, int j) { return s.value[1][m][j]; },
            [&](int i, int j, float x) {
                if (chunk * C + i < length)
                    y[row(chunk * C + i) + j] = from_float<T>(x + s.x[C + i][j]);
            });
    }

    // N x VB between shared memory and a state in memory, [key, value] or [value, key].
    DEVICE void read(float (*state)[VB + 8], const float* from, bool value_first) {
        for (int i = thread(); i < N * VB; i += THREADS) {
            int n = value_first ? i % N : i / VB, j = value_first ? i / N : i % VB;
            int at = value_first ? (column + j) * N + n : n * N + column + j;
            state[n][j] = from ? from[at] : 0.f;
        }
    }
    DEVICE void write(float* to, float (*state)[VB + 8], bool value_first) {
        for (int i = thread(); i < N * VB; i += THREADS) {
            int n = value_first ? i % N : i / VB, j = value_first ? i / N : i % VB;
            to[value_first ? (column + j) * N + n : n * N + column + j] = state[n][j];
        }
    }

    DEVICE void forward(Shared<N, VB>& s, Mode mode, int segment) {
        const int per_segment = args.segment / C;
        int first = 0, last = chunks();
        if (mode != WHOLE) {
            first = segment * per_segment;
            last = at_most(last, first + per_segment);
            if (first >= last) return;
        }
        const bool writes_y = mode == WHOLE || mode == REPLAY;
        if (mode == TRANSITION) {
            for (int i = thread(); i < N * VB; i += THREADS)
                s.state[i / VB][i % VB] = i / VB == column + i % VB;
        } else if (mode == REPLAY) {
            read(s.state, args.states + state_index(segment), false);
        } else {
            const float* initial = mode == WHOLE ? args.initial : nullptr;
            read(s.state, initial ? initial + state_index() : nullptr, true);
        }
        if (first < last) fetch(first);
        for (int chunk = first; chunk < last; ++chunk) {
            put(s, chunk, mode != TRANSITION);
            barrier();
            if (mode == WHOLE && args.states && chunk % per_segment == 0)
                write(args.states + state_index(chunk / per_segment), s.state, false);
            if (chunk + 1 < last) fetch(chunk + 1);
            prepare(s);
            solve(s);
            if (writes_y) write_y(s, chunk);
            advance(s, writes_y ? VB / 32 : 0);
            barrier();
        }
        if (first == last) barrier();
        if (mode == WHOLE) write(args.last + state_index(), s.state, true);
        if (mode == CONTRIBUTION) write(args.states + state_index(segment), s.state, false);
        if (mode == TRANSITION) write(args.transitions + state_index(segment), s.state, false);
    }
};

// Turns the contributions of the segments into their entry states, in place, one after the other:
// M_j+1 = P_j M_j + contribution_j; in reverse order with P^T for the gradients of exit states.
template <int N, int VB>
struct SharedScan {
    float transition[N][N + 4];
    float state[N][VB + 8];
    float next[N][VB + 8];
};

template <int N, int VB>
DEVICE void scan(const Arguments& args, SharedScan<N, VB>& s, int clip_head, int direction, int part,
                 bool adjoint) {
    Walk<float, N, VB, true> walk(args, clip_head, direction, part);
    const int per_segment = args.segment / C;
    const int segments = (walk.chunks() + per_segment - 1) / per_segment;
    const float* entry = adjoint ? args.grad_last : args.initial;
    walk.read(s.state, entry ? entry + walk.state_index() : nullptr, true);
    for (int i = 0; i < segments; ++i) {
        const int segment = adjoint ? segments - 1 - i : i;
        float* own = (adjoint ? args.adjoints : args.states) + walk.state_index(segment);
        const float* transition = args.transitions + walk.state_index(segment);
        for (int j = thread(); j < N * N; j += THREADS) {
            // Transposed on the way in where P^T is wanted: the product below is one code.
            if (adjoint)
                s.transition[j % N][j / N] = transition[j];
            else
                s.transition[j / N][j % N] = transition[j];
        }
        walk.read(s.next, own, false);
        barrier();
        walk.write(own, s.state, false);
        product<N, VB, N, true>([&](int n, int m) { return s.transition[n][m]; },
                                [&](int m, int j) { return s.state[m][j]; },
                                [&](int n, int j, float x) { s.next[n][j] += x; });
        barrier();
        for (int j = thread(); j < N * VB; j += THREADS) s.state[j / VB][j % VB] = s.next[j / VB][j % VB];
        barrier();
    }
    barrier();
    if (args.last) walk.write(args.last + walk.state_index(), s.state, true);
}

}  // namespace wkv7
