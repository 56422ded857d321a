// Gradients of chunk.h, chunk after chunk from the last: states at the segment starts are given,
// those at the chunks between are computed again and kept in scratch.
#pragma once
#include "chunk.h"

namespace wkv7 {

template <typename T, int N, int VB, bool PRECISE>
struct WalkBack : Walk<T, N, VB, PRECISE> {
    using Base = Walk<T, N, VB, PRECISE>;
    using S = SharedBackward<N, VB>;
    static constexpr int PARTS = N / VB;
    const int part;

    DEVICE WalkBack(const Arguments& args, int clip_head, int direction, int part)
        : Base(args, clip_head, direction, part), part(part) {}

    DEVICE void put_grad_y(S& s, int chunk) {
        const T* from = static_cast<const T*>(this->args.grad_y) + this->direction * this->whole() +
                        this->column;
        for (int i = thread(); i < C * (VB / 4); i += THREADS) {
            const int t = i / (VB / 4), j = i % (VB / 4) * 4;
            const bool valid = chunk * C + t < this->length;
            Quad<T> x;
            if (valid) x = *reinterpret_cast<const Quad<T>*>(from + this->row(chunk * C + t) + j);
            UNROLL for (int e = 0; e < 4; ++e)
                s.product_grad[1][t][j + e] = valid ? to_float(x.x[e]) : 0.f;
        }
    }

    // Gradient of u, then of A~ M + A_ak V, from that of y and of the state after the chunk.
    DEVICE void solve_back(S& s) {
        product<C, VB, C + N, PRECISE>(
            [&](int i, int m) { return m < C ? s.score[3][m][i] : s.key[1][i][m - C]; },
            [&](int m, int j) { return m < C ? s.product_grad[1][m][j] : s.grad_state[m - C][j]; },
            [&](int i, int j, float x) { s.grad_u[i][j] = x; });
        barrier();
        product<C, VB, C, PRECISE>([&](int i, int m) { return s.inverse[m][i]; },
                                   [&](int m, int j) { return s.grad_u[m][j]; },
                                   [&](int i, int j, float x) { s.product_grad[0][i][j] = x; });
        barrier();
    }

    DEVICE void advance_back(S& s) {
        product<N, VB, 2 * C, PRECISE>(
            [&](int n, int m) { return s.query[m / C][m % C][n]; },
            [&](int m, int j) { return s.product_grad[m / C][m % C][j]; },
            [&](int n, int j, float x) { s.grad_state[n][j] = s.total[n] * s.grad_state[n][j] + x; });
    }

    // Products that end in gradients of values, scores, scaled queries and keys. No barrier.
    DEVICE void spread(S& s, int chunk) {
        T* grad_v = static_cast<T*>(this->args.grads[3]) + this->direction * this->whole() +
                    this->column;
        product<C, VB, N + 2 * C, PRECISE>(
            [&](int i, int m) {
                return m < C ? s.score[2][m][i] : m < C + N ? s.key[0][i][m - C] : s.score[0][m - C - N][i];
            },
            [&](int m, int j) {
                return m < C       ? s.product_grad[1][m][j]
                       : m < C + N ? s.grad_state[m - C][j]
                                   : s.product_grad[0][m - C - N][j];
            },
            [&](int i, int j, float x) {
                if (chunk * C + i < this->length)
                    grad_v[this->row(chunk * C + i) + j] = from_float<T>(x);
            });
        product<2 * C, 2 * C, VB, PRECISE>(
            [&](int i, int m) { return s.product_grad[i / C][i % C][m]; },
            [&](int m, int j) { return s.value[j / C][j % C][m]; },
            [&](int i, int j, float x) { s.grad_score[i % C][j % C][i / C * 2 + j / C] = x; }, 1);
        product<2 * C, N, VB, PRECISE>(
            [&](int i, int m) { return s.product_grad[i / C][i % C][m]; },
            [&](int m, int n) { return s.state[n][m]; },
            [&](int i, int n, float x) { s.grad_query[i / C][i % C][n] = x; }, 2);
        product<2 * C, N, VB, PRECISE>(
            [&](int i, int m) { return s.value[i / C][i % C][m]; },
            [&](int m, int n) { return s.grad_state[n][m]; },
            [&](int i, int n, float x) { s.grad_key[i / C][i % C][n] = x; }, 2);
        for (int n = thread(); n < N; n += THREADS) {
            float sum = 0.f;
            for (int j = 0; j < VB; ++j) sum += s.state[n][j] * s.grad_state[n][j];
            s.grad_total[n] = sum * s.total[n];
        }
    }

    // One channel a thread: through the decays to the inputs. Gradients of decays are those of
    // their logarithms, so a decay of 0 needs no care.
    // A call of its own, since it wants all registers. `offset`: of its part of the sum.
    DEVICE_CALL static void finish(S& s, const Arguments& args, int clip, int head, int length,
                                   int reversed_length, int64_t offset, int chunk) {
        for (int n = thread(); n < N; n += THREADS) {
            float k[C], b[C], grad_k[C], grad_b[C], by_decay[C];
            float after = 1.f;
            UNROLL for (int t = C - 1; t >= 0; --t) {
                const bool valid = chunk * C + t < length;
                const int64_t at = Base::row_of(args, clip, head, reversed_length, chunk * C + t) + n;
                k[t] = valid ? to_float(static_cast<const T*>(args.k)[at]) : 0.f;
                b[t] = valid ? to_float(static_cast<const T*>(args.b)[at]) : 0.f;
                grad_k[t] = s.grad_key[0][t][n] * after;
                grad_b[t] = s.grad_key[1][t][n] * after;
                after *= s.decay[t][n];
            }
            float sum = s.grad_total[n];
            UNROLL for (int t = 0; t < C; ++t) {  // keys before t pass through t's decay
                by_decay[t] = sum;
                sum += s.grad_key[0][t][n] * s.key[0][t][n] + s.grad_key[1][t][n] * s.key[1][t][n];
            }
            sum = 0.f;
            UNROLL for (int t = C - 1; t >= 0; --t) {  // and so do queries after t
                by_decay[t] += sum;
                sum += s.grad_query[0][t][n] * s.query[0][t][n] +
                       s.grad_query[1][t][n] * s.query[1][t][n];
            }
            float before = 1.f;
            UNROLL for (int t = 0; t < C; ++t) {
                const bool valid = chunk * C + t < length;
                const int64_t at = Base::row_of(args, clip, head, reversed_length, chunk * C + t) + n;
                const float a = valid ? to_float(static_cast<const T*>(args.a)[at]) : 0.f;
                const float r = valid ? to_float(static_cast<const T*>(args.r)[at]) : 0.f;
                const float decay = s.decay[t][n], decayed_r = r * decay;
                float grad_a = s.grad_query[0][t][n] * before;
                float grad_decayed_r = s.grad_query[1][t][n] * before;
                before *= decay;
                float weight = 1.f, pair[C];
                UNROLL for (int u = t - 1; u >= 0; --u) {
                    const float* g = s.grad_score[t][u];
                    const float by_a = g[0] * k[u] + g[1] * b[u], by_r = g[2] * k[u] + g[3] * b[u];
                    const float weighted_a = a * weight, weighted_r = decayed_r * weight;
                    grad_a += weight * by_a;
                    grad_decayed_r += weight * by_r;
                    grad_k[u] += g[0] * weighted_a + g[2] * weighted_r;
                    grad_b[u] += g[1] * weighted_a + g[3] * weighted_r;
                    pair[u] = weighted_a * by_a + weighted_r * by_r;
                    weight *= s.decay[u][n];
                }
                float below = 0.f;
                UNROLL for (int u = 0; u + 1 < t; ++u) {
                    below += pair[u];
                    by_decay[u + 1] += below;
                }
                const float* g = s.grad_score[t][t];
                by_decay[t] += grad_decayed_r * decayed_r;
                grad_k[t] += g[2] * r;
                grad_b[t] += g[3] * r;
                if (valid) {
                    static_cast<T*>(args.grads[0])[offset + at] =
                        from_float<T>(grad_decayed_r * decay + g[2] * k[t] + g[3] * b[t]);
                    static_cast<T*>(args.grads[4])[offset + at] = from_float<T>(grad_a);
                }
            }
            UNROLL for (int t = 0; t < C; ++t) {
                if (chunk * C + t >= length) continue;
                const int64_t at = Base::row_of(args, clip, head, reversed_length, chunk * C + t) + n;
                const float w = to_float(static_cast<const T*>(args.w)[at]);
                static_cast<T*>(args.grads[1])[offset + at] =
                    from_float<T>(by_decay[t] * Base::log_decay_of(w));
                static_cast<T*>(args.grads[2])[offset + at] = from_float<T>(grad_k[t]);
                static_cast<T*>(args.grads[5])[offset + at] = from_float<T>(grad_b[t]);
            }
        }
    }

    DEVICE void segment_back(S& s, int first, int last, float* scratch, bool only_state) {
        if (!only_state) {
            this->fetch(first);
            for (int chunk = first; chunk < last; ++chunk) {
                this->put(s, chunk, true);
                barrier();
                float* keep = scratch + int64_t(chunk - first) * N * VB;
                for (int i = thread(); i < N * VB; i += THREADS) keep[i] = s.state[i / VB][i % VB];
                if (chunk + 1 == last) break;  // what comes after it is not asked for
                this->fetch(chunk + 1);
                this->prepare(s);
                this->solve(s);
                this->advance(s, 0);
                barrier();
            }
            barrier();
        }
        for (int chunk = last - 1; chunk >= first; --chunk) {
            this->fetch(chunk);  // not ahead of time: `finish` needs the registers
            this->put(s, chunk, true);
            put_grad_y(s, chunk);
            if (!only_state) {
                const float* kept = scratch + int64_t(chunk - first) * N * VB;
                for (int i = thread(); i < N * VB; i += THREADS) s.state[i / VB][i % VB] = kept[i];
            }
            barrier();
            this->prepare(s);
            if (!only_state) this->solve(s);
            solve_back(s);
            if (!only_state) {
                spread(s, chunk);
                barrier();
                finish(s, this->args, this->clip, this->head, this->length,
                       this->reverse ? this->length : 0,
                       (int64_t(this->direction) * PARTS + part) * this->whole(), chunk);
            }
            advance_back(s);
            barrier();
        }
    }

    // WHOLE: all segments, last to first. CONTRIBUTION: what a segment adds to the gradient of its
    // entry state if that of its exit is zero, to `adjoints`. REPLAY: a segment, from `adjoints`.
    DEVICE void backward(S& s, Mode mode, int segment, int block) {
        const Arguments& args = this->args;
        const int per_segment = args.segment / C, chunks = this->chunks();
        const int count = (chunks + per_segment - 1) / per_segment;
        if (mode != WHOLE && segment >= count) return;
        float* scratch = args.scratch + int64_t(block) * per_segment * N * VB;
        const float* exit = mode == WHOLE    ? (args.grad_last ? args.grad_last + this->state_index() : nullptr)
                            : mode == REPLAY ? args.adjoints + this->state_index(segment)
                                             : nullptr;
        this->read(s.grad_state, exit, mode == WHOLE);
        const int top = mode == WHOLE ? count - 1 : segment, bottom = mode == WHOLE ? 0 : segment;
        for (int i = top; i >= bottom; --i) {
            if (mode != CONTRIBUTION)
                this->read(s.state, args.states + this->state_index(i), false);
            segment_back(s, i * per_segment, at_most(chunks, (i + 1) * per_segment), scratch,
                         mode == CONTRIBUTION);
        }
        barrier();
        if (mode == WHOLE) this->write(args.last + this->state_index(), s.grad_state, true);
        if (mode == CONTRIBUTION)
            this->write(args.adjoints + this->state_index(segment), s.grad_state, false);
    }
};

}  // namespace wkv7
