// Blocks of keys of one split: scores of all lines of a KV head, online softmax, weights times values.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "call.h"
#include "vectors.h"

namespace {

constexpr int BLOCK = 64;  // keys of a block at most
constexpr int BLOCK_TOKENS_FIRST = 16;
constexpr int TILE_KEYS = 4;     // keys of a tile of scores
constexpr int TILE_COLUMNS = 4;  // vectors of values that are summed together
constexpr float NOTHING = -INFINITY;

// What a split found: for each line the largest score, the sum of weights and weighted values.
struct Part {
  float *peak, *total, *acc;  // [Hq * queries], [Hq * queries], [Hq * queries, Dv]

  static int64_t floats(const Call& c, int64_t queries) {
    return c.heads * queries * (c.dim_v + 2);
  }
  static Part at(float* memory, const Call& c, int64_t queries) {
    const int64_t lines = c.heads * queries;
    return {memory, memory + lines, memory + 2 * lines};
  }
};

// scores[line][key] of LINES lines and KEYS keys
template <int LINES, int KEYS, typename T>
inline void score_tile(const float* q, int64_t dim, const T* k, int64_t stride, float* scores) {
  Floats acc[LINES][KEYS] = {};
  for (int64_t d = 0; d < dim; d += LANES) {
    Floats key[KEYS];
    for (int j = 0; j < KEYS; ++j) key[j] = load(k + j * stride + d);
    for (int i = 0; i < LINES; ++i) {
      const Floats query = load(q + i * dim + d);
      for (int j = 0; j < KEYS; ++j) acc[i][j] += query * key[j];
    }
  }
  for (int i = 0; i < LINES; ++i) {
    if constexpr (KEYS == 4) {
      const Four found = sums(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
      std::memcpy(scores + i * BLOCK, &found, sizeof found);
    } else {
      for (int j = 0; j < KEYS; ++j) scores[i * BLOCK + j] = sum(acc[i][j]);
    }
  }
}

template <int LINES, typename T>
inline void score_lines(const float* q, int64_t dim, const T* k, int64_t stride, int64_t keys,
                        float* scores) {
  int64_t j = 0;
  for (; j + TILE_KEYS <= keys; j += TILE_KEYS) {
    score_tile<LINES, TILE_KEYS>(q, dim, k + j * stride, stride, scores + j);
  }
  for (; j < keys; ++j) score_tile<LINES, 1>(q, dim, k + j * stride, stride, scores + j);
}

// acc[line][column] += weights[line][key] * v[key][column] of LINES lines, COLUMNS vectors
template <int LINES, int COLUMNS, typename T>
inline void value_tile(const float* weights, const T* v, int64_t stride, int64_t keys, float* acc,
                       int64_t dim) {
  Floats sum[LINES][COLUMNS];
  for (int i = 0; i < LINES; ++i) {
    for (int c = 0; c < COLUMNS; ++c) sum[i][c] = load(acc + i * dim + c * LANES);
  }
  for (int64_t j = 0; j < keys; ++j) {
    Floats value[COLUMNS];
    for (int c = 0; c < COLUMNS; ++c) value[c] = load(v + j * stride + c * LANES);
    for (int i = 0; i < LINES; ++i) {
      const Floats weight = all(weights[i * BLOCK + j]);
      for (int c = 0; c < COLUMNS; ++c) sum[i][c] += weight * value[c];
    }
  }
  for (int i = 0; i < LINES; ++i) {
    for (int c = 0; c < COLUMNS; ++c) store(acc + i * dim + c * LANES, sum[i][c]);
  }
}

template <int LINES, typename T>
inline void value_lines(const float* weights, const T* v, int64_t stride, int64_t keys, float* acc,
                        int64_t dim) {
  int64_t d = 0;
  for (; d + TILE_COLUMNS * LANES <= dim; d += TILE_COLUMNS * LANES) {
    value_tile<LINES, TILE_COLUMNS>(weights, v + d, stride, keys, acc + d, dim);
  }
  for (; d < dim; d += LANES) value_tile<LINES, 1>(weights, v + d, stride, keys, acc + d, dim);
}

// What one line sees of a block of keys: softcap, slope, and -inf where it sees nothing.
void change_scores(const Call& c, const Row& row, int64_t head, int64_t query, int64_t first,
                   int64_t keys, float* scores) {
  if (c.softcap > 0) {
    const float cap = float(c.softcap);
    for (int64_t j = 0; j < keys; j += LANES) {
      store(scores + j, hyperbolic_tangent(load(scores + j) / cap) * cap);
    }
  }
  const int64_t here = row.end - row.queries + query;
  if (c.slopes) {
    const float slope = c.slopes[row.number * c.slopes_row + head];
    for (int64_t j = 0; j < keys; ++j) scores[j] -= slope * float(std::abs(here - (first + j)));
  }
  if (c.window_left >= 0) {  // hidden from the first key that is no sink up to the window
    const int64_t from = std::max(row.start + c.sink_tokens - first, int64_t(0));
    const int64_t to = std::min(here - c.window_left - first, keys);
    for (int64_t j = from; j < to; ++j) scores[j] = NOTHING;
  }
  if (c.window_right >= 0) {
    const int64_t from = std::max(here + c.window_right + 1 - first, int64_t(0));
    for (int64_t j = from; j < keys; ++j) scores[j] = NOTHING;
  }
}

// Scores become weights; the sums so far are made to fit the new peak.
void soften(float* scores, int64_t keys, float& peak, float& total, float* acc, int64_t dim) {
  const int64_t padded = (keys + LANES - 1) / LANES * LANES;
  for (int64_t j = keys; j < padded; ++j) scores[j] = NOTHING;
  Floats high = load(scores);
  for (int64_t j = LANES; j < padded; j += LANES) {
    const Floats x = load(scores + j);
    high = x > high ? x : high;
  }
  float most = peak;
  for (int lane = 0; lane < LANES; ++lane) most = std::max(most, high[lane]);
  const float safe = most == NOTHING ? 0.0f : most;
  Floats sum_here{};
  for (int64_t j = 0; j < padded; j += LANES) {
    const Floats weight = exponential(load(scores + j) - safe);
    store(scores + j, weight);
    sum_here += weight;
  }
  if (most > peak && peak != NOTHING) {
    const float decay = std::exp(peak - safe);
    total *= decay;
    for (int64_t d = 0; d < dim; d += LANES) store(acc + d, load(acc + d) * decay);
  }
  total += sum(sum_here);
  peak = most;
}

template <typename T>
struct Block {
  int64_t keys;
  const T *k, *v;
};

template <typename T>
struct Worker {
  const Call& c;
  const Row& row;
  Part part;
  const float* q;  // [Hq * queries, D], scaled
  std::vector<float>& scores;  // [G * queries, BLOCK]

  // keys first <= j < end, block by block, all heads of a block while it is near
  void span(int64_t first, int64_t end) {
    Block<T> block = at(first, end);
    while (block.keys > 0) {
      const Block<T> next = at(first + block.keys, end);
      fetch(next.k, next.keys, c.k_token, c.k_head, c.heads_kv, c.dim);
      fetch(next.v, next.keys, c.v_token, c.v_head, c.heads_kv, c.dim_v);
      for (int64_t head = 0; head < c.heads_kv; ++head) {
        attend(head, first, block.keys, block.k + head * c.k_head, block.v + head * c.v_head);
      }
      first += block.keys;
      block = next;
    }
  }

 private:
  Block<T> at(int64_t first, int64_t end) const {
    if (first >= end) return {};
    const int64_t page = page_of(c, row.number, first), place = first % c.page_size;
    const int64_t most = c.k_token > c.k_head ? BLOCK_TOKENS_FIRST : BLOCK;
    return {std::min({end - first, c.page_size - place, most}),
            (const T*)c.k + page * c.k_page + place * c.k_token,
            (const T*)c.v + page * c.v_page + place * c.v_token};
  }

  // Where a token's heads lie together a head by itself is read in small steps, which the processor
  // does not foresee: the next block is asked for in the order of its addresses.
  static void fetch(const T* x, int64_t keys, int64_t token, int64_t head, int64_t heads,
                    int64_t dim) {
    if (token <= head) return;
    constexpr int64_t line = 64 / sizeof(T);
    for (int64_t j = 0; j < keys; ++j) {
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t d = 0; d < dim; d += line) __builtin_prefetch(x + j * token + h * head + d);
      }
    }
  }

  void attend(int64_t head, int64_t first, int64_t keys, const T* k, const T* v) {
    const int64_t lines = c.heads / c.heads_kv * row.queries, at = head * lines;
    const float* queries = q + at * c.dim;
    float* acc = part.acc + at * c.dim_v;
    int64_t i = 0;
    for (; i + TILE_LINES <= lines; i += TILE_LINES) {
      score_lines<TILE_LINES>(queries + i * c.dim, c.dim, k, c.k_token, keys, line(i));
    }
    for (; i < lines; ++i) {
      score_lines<1>(queries + i * c.dim, c.dim, k, c.k_token, keys, line(i));
    }
    for (i = 0; i < lines; ++i) {
      const int64_t of = at + i;
      change_scores(c, row, of / row.queries, of % row.queries, first, keys, line(i));
      soften(line(i), keys, part.peak[of], part.total[of], acc + i * c.dim_v, c.dim_v);
    }
    for (i = 0; i + TILE_LINES <= lines; i += TILE_LINES) {
      value_lines<TILE_LINES>(line(i), v, c.v_token, keys, acc + i * c.dim_v, c.dim_v);
    }
    for (; i < lines; ++i) {
      value_lines<1>(line(i), v, c.v_token, keys, acc + i * c.dim_v, c.dim_v);
    }
  }

  float* line(int64_t i) { return scores.data() + i * BLOCK; }
};

}  // namespace
