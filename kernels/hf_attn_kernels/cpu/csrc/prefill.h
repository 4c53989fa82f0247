// The call of a prefill as Python hands it over, and which keys a query sees.

#pragma once

#include <algorithm>
#include <cstdint>

// Queries and keys that belong together: a row of a batch or a packed sequence. Query i stands at
// key i + offset; keys count from the piece's first.
struct Piece {
  int64_t q_row, k_row, query, queries, key, keys, offset;
};

extern "C" struct Prefill {
  const void *q, *k, *v;
  void* out;             // [B, Q, Hq, Dv]
  float* lse;            // [B, Hq, Q]
  const Piece* pieces;
  const uint8_t* keep;   // [B, K] by row and token of k, 0: hidden; or null
  const float* s_aux;    // [Hq] or null
  const int32_t* table;  // [blocks] pages of the only k_row, or null: each k_row lies whole
  int64_t dtype;         // 0 float32, 1 bfloat16, 2 float16
  int64_t count, q_length, k_length, heads, heads_kv, dim, dim_v;
  int64_t q_row, q_token, q_head;  // strides in elements
  int64_t k_row, k_token, k_head;
  int64_t v_row, v_token, v_head;
  int64_t page_size;
  int64_t window_left, window_right, sink_tokens;  // -1: unbounded
  int64_t threads;
  double scaling, softcap;

  int64_t group() const { return heads / heads_kv; }

  // Where a key lies, in elements from the first of a k or v with these strides.
  int64_t place(int64_t row_of_k, int64_t key, int64_t row, int64_t token) const {
    if (!table) return row_of_k * row + key * token;
    return table[key / page_size] * row + key % page_size * token;
  }
};

namespace {

// Keys of a piece that its queries see: first <= j < end of each query, and the sinks before end.
struct Sight {
  int64_t left, right, offset, keys, sinks;

  Sight(const Prefill& c, const Piece& p)
      : left(c.window_left), right(c.window_right), offset(p.offset), keys(p.keys),
        sinks(left < 0 ? 0 : std::min(c.sink_tokens, keys)) {}

  int64_t first(int64_t query) const {
    return left < 0 ? 0 : std::clamp<int64_t>(query + offset - left, 0, keys);
  }
  int64_t end(int64_t query) const {
    return right < 0 ? keys : std::clamp<int64_t>(query + offset + right + 1, 0, keys);
  }
};

// Whether the table names a page for each key that some query sees.
bool has_pages(const Prefill& c, const Piece& p) {
  if (!c.table || p.queries == 0) return true;
  const Sight sight(c, p);
  const int64_t end = sight.end(p.queries - 1);
  const int64_t spans[2][2] = {{0, std::min(sight.sinks, end)}, {sight.first(0), end}};
  for (const auto& span : spans) {
    for (int64_t key = p.key + span[0]; key < p.key + span[1]; key += c.page_size - key % c.page_size)
      if (c.table[key / c.page_size] < 0) return false;
  }
  return true;
}

}  // namespace
