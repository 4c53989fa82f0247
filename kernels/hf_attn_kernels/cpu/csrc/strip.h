// One block of keys for one strip of lines: scores, online softmax, weights times values.

#pragma once

#include "prefill.h"
#include "units.h"

namespace {

constexpr int64_t KEYS = 64;  // of a block
#if defined(__AVX512F__)
constexpr int TILE = 8;  // rows of a tile of products: keys, or columns of values
#else
constexpr int TILE = 4;  // half the registers
#endif
constexpr int WIDTH = 3;  // vectors of a strip at most: TILE * WIDTH sums and WIDTH factors
constexpr int64_t STRIP = WIDTH * LANES;  // its lines
constexpr int64_t ALIGNMENT = 16;  // floats
constexpr float NOTHING = -INFINITY;
constexpr double LOG2_E = 1.4426950408889634;

inline float* aligned(float* p) {
  const uintptr_t bytes = ALIGNMENT * sizeof(float);
  return (float*)(((uintptr_t)p + bytes - 1) / bytes * bytes);
}

// A thread's memory. Arrays of lines are [strip][row][lane], a strip's last vectors may be missing.
struct Scratch {
  float *queries, *acc, *peak, *total;  // [D units][lines], [Dv][lines], [lines], [lines]
  int32_t *first, *end;                 // [lines] keys that a line sees, sinks apart
  float *keys, *values, *scores;        // [KEYS][D units], [KEYS units][Dv], [KEYS][STRIP]
  float* zeros;                         // [Dv]
  bool seen[KEYS], holes;

  static int64_t lanes(int64_t lines) { return (lines + LANES - 1) / LANES * LANES; }

  static int64_t floats(int64_t lines, int64_t dim, int64_t dim_v) {
    return lanes(lines) * (dim + dim_v + 4) + KEYS * (dim + dim_v + STRIP) + dim_v;
  }

  Scratch(float* memory, int64_t lines, int64_t dim, int64_t dim_v) {
    const auto take = [&memory](int64_t floats) { return (memory += floats) - floats; };
    queries = take(lanes(lines) * dim);
    acc = take(lanes(lines) * dim_v);
    peak = take(lanes(lines));
    total = take(lanes(lines));
    first = (int32_t*)take(lanes(lines));
    end = (int32_t*)take(lanes(lines));
    keys = take(KEYS * dim);
    values = take(KEYS * dim_v);
    scores = take(KEYS * STRIP);
    zeros = take(dim_v);
    std::fill_n(zeros, dim_v, 0.0f);
  }
};

// sum[i][v] += left[i] * right[v] over `depth` units; each of left goes to all lanes
template <typename Unit, int VECTORS>
__attribute__((always_inline)) inline void multiply(Floats (&sum)[TILE][VECTORS], const float* left,
                                                    int64_t left_row, int64_t left_step,
                                                    const float* right, int64_t right_step,
                                                    int64_t depth) {
  for (int64_t d = 0; d < depth; ++d) {
    Ints factor[VECTORS];
    for (int v = 0; v < VECTORS; ++v) factor[v] = load_units(right + d * right_step + v * LANES);
    for (int i = 0; i < TILE; ++i) {
      const Ints one = every(left + i * left_row + d * left_step);
      for (int v = 0; v < VECTORS; ++v) sum[i][v] = Unit::add_product(sum[i][v], one, factor[v]);
    }
  }
}

template <typename Unit, int VECTORS>
struct Strip {
  static constexpr int64_t LINES = VECTORS * LANES;

  Scratch& memory;
  int64_t line;  // the first
  int64_t depth, dim_v;
  int64_t from = 0, to = 0;  // keys of the block, in whole tiles
  Floats high[VECTORS] = {}, decay[VECTORS] = {};

  // Scores in base 2, hidden ones -inf, and the largest of each line.
  void scores(int64_t key, int64_t seen_from, int64_t seen_to, int64_t sinks, const Prefill& c) {
    const float cap = float(c.softcap * LOG2_E);
    const float factor = float(c.softcap > 0 ? c.scaling / c.softcap : c.scaling * LOG2_E);
    const float* queries = memory.queries + line * depth;
    for (int v = 0; v < VECTORS; ++v) high[v] = load(memory.peak + line + v * LANES);
    for (int64_t j = from; j < to; j += TILE) {
      Floats sum[TILE][VECTORS] = {};
      multiply<Unit>(sum, memory.keys + j * depth, depth, 1, queries, LINES, depth);
      const bool all_seen = !memory.holes && key + j + TILE <= seen_to &&
                            (key + j >= seen_from || key + j + TILE <= sinks);
      for (int i = 0; i < TILE; ++i) {
        for (int v = 0; v < VECTORS; ++v) {
          Floats x = sum[i][v] * factor;
          if (c.softcap > 0) x = hyperbolic_tangent(x) * cap;
          if (!all_seen) x = hidden(x, v, int32_t(key + j + i), sinks, memory.seen[j + i]);
          store(memory.scores + (j + i) * LINES + v * LANES, x);
          high[v] = x > high[v] ? x : high[v];
        }
      }
    }
  }

  // The scores of one key by those lines that see it, -inf elsewhere.
  Floats hidden(Floats x, int v, int32_t key, int64_t sinks, bool seen) const {
    if (!seen) return all(NOTHING);
    Ints first, end;
    std::memcpy(&first, memory.first + line + v * LANES, sizeof first);
    std::memcpy(&end, memory.end + line + v * LANES, sizeof end);
    const Ints from = key < sinks ? Ints{} : first;
    return (from <= key) & (end > key) ? x : all(NOTHING);
  }

  // Scores become weights, in units; the sums so far are to be multiplied by `decay`.
  void soften() {
    for (int v = 0; v < VECTORS; ++v) {
      const int64_t at = line + v * LANES;
      const Floats safe = high[v] == NOTHING ? Floats{} : high[v];
      Floats sum{};
      for (int64_t j = from; j < to; j += Unit::ELEMENTS) {
        Floats weight[Unit::ELEMENTS];
        for (int e = 0; e < Unit::ELEMENTS; ++e) {
          weight[e] = power_of_two(load(memory.scores + (j + e) * LINES + v * LANES) - safe);
          sum += weight[e];
        }
        store_units(memory.scores + j * LINES + v * LANES, Unit::weights(weight));
      }
      decay[v] = power_of_two(load(memory.peak + at) - safe);
      store(memory.total + at, load(memory.total + at) * decay[v] + sum);
      store(memory.peak + at, high[v]);
    }
  }

  void add_values() {
    float* acc = memory.acc + line * dim_v;
    for (int64_t d = 0; d < dim_v; d += TILE) {
      Floats sum[TILE][VECTORS];
      for (int i = 0; i < TILE; ++i) {
        for (int v = 0; v < VECTORS; ++v) {
          sum[i][v] = load(acc + (d + i) * LINES + v * LANES) * decay[v];
        }
      }
      multiply<Unit>(sum, memory.values + from / Unit::ELEMENTS * dim_v + d, 1, dim_v,
                     memory.scores + from * LINES, Unit::ELEMENTS * LINES,
                     (to - from) / Unit::ELEMENTS);
      for (int i = 0; i < TILE; ++i) {
        for (int v = 0; v < VECTORS; ++v) store(acc + (d + i) * LINES + v * LANES, sum[i][v]);
      }
    }
  }
};

}  // namespace
