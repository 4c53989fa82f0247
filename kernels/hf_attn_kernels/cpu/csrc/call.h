// The call as Python hands it over, and what its rows see.

#pragma once

#include <algorithm>
#include <cstdint>

extern "C" struct Call {
  const void* q;
  void *k, *v;
  const void *k_new, *v_new;  // [R, new_keys, Hkv, D | Dv], to be written first; or null
  void* out;   // [rows, queries, Hq, Dv] or packed [Tq, Hq, Dv]
  float* lse;
  const int32_t* table;         // [R, blocks] or null: each row is one page of its own
  const int32_t* page_of_row;   // [R] or null, of a cache without a table
  const int32_t* lengths;       // [R] keys before the new ones, or with first_query [R + 1] offsets
  const int32_t* first_query;   // [R + 1] or null: every row has `queries`
  const int32_t* leftpad;       // [R] or null
  const float* s_aux;           // [Hq] or null
  const float* slopes;          // [1 | R, Hq] or null
  int64_t dtype;                // 0 float32, 1 bfloat16, 2 float16
  int64_t rows, queries, new_keys, heads, heads_kv, dim, dim_v, pages, page_size, blocks;
  int64_t q_row, q_token, q_head;  // strides in elements
  int64_t k_page, k_token, k_head;
  int64_t v_page, v_token, v_head;
  int64_t k_new_row, k_new_token, k_new_head;
  int64_t v_new_row, v_new_token, v_new_head;
  int64_t lse_row, lse_head, lse_query;
  int64_t slopes_row;
  int64_t window_left, window_right, sink_tokens;  // -1: unbounded
  int64_t most_queries;  // rows with more are left alone
  int64_t threads;
  double scaling, softcap;
};

namespace {

constexpr int64_t SPLIT = 256;  // keys of a split

// Keys of one row that its queries see: sinks, then the window.
struct Row {
  int64_t number, token, queries;  // token: its first in q and out
  int64_t start, end;              // valid keys
  int64_t sinks_end, low, high;    // read are start <= j < sinks_end and low <= j < high
  int64_t first_split, splits;

  int64_t keys() const { return sinks_end - start + std::max<int64_t>(high - low, 0); }
};

Row row_of(const Call& c, int64_t number) {
  Row row{};
  row.number = number;
  int64_t length;
  if (c.first_query) {
    row.token = c.first_query[number];
    row.queries = c.first_query[number + 1] - row.token;
    length = c.lengths[number + 1] - c.lengths[number];
  } else {
    row.token = number * c.queries;
    row.queries = c.queries;
    length = c.lengths[number] + c.new_keys;
  }
  row.end = length;
  row.start = c.leftpad ? std::min<int64_t>(c.leftpad[number], length) : 0;
  const int64_t first = length - row.queries;  // where the first query stands
  row.low = row.start;
  row.high = length;
  if (c.window_right >= 0) row.high = std::min(length, length + c.window_right);
  row.sinks_end = row.start;
  if (c.window_left >= 0) {
    row.low = std::max(row.start, first - c.window_left);
    row.sinks_end = std::min(row.start + c.sink_tokens, row.low);
  }
  row.splits = row.high > row.low ? (row.high - row.low + SPLIT - 1) / SPLIT : row.keys() > 0;
  return row;
}

int64_t page_of(const Call& c, int64_t row, int64_t key) {
  if (c.table) return c.table[row * c.blocks + key / c.page_size];
  return c.page_of_row ? c.page_of_row[row] : row;
}

// Lengths and pages that lie within the cache; packed rows were looked at before.
bool within(const Call& c) {
  const int64_t capacity = c.table ? c.blocks * c.page_size : c.page_size;
  for (int64_t r = 0; r < c.rows && !c.first_query; ++r) {
    const int64_t length = c.lengths[r] + c.new_keys;
    if (c.lengths[r] < 0 || length > capacity) return false;
    if (c.leftpad && (c.leftpad[r] < 0 || c.leftpad[r] > length)) return false;
    if (c.page_of_row && (c.page_of_row[r] < 0 || c.page_of_row[r] >= c.pages)) return false;
  }
  return !c.table || std::all_of(c.table, c.table + c.rows * c.blocks,
                                 [&](int32_t page) { return page < c.pages; });
}

// For the keys that are read or written.
bool has_pages(const Call& c, const Row& row) {
  if (!c.table) return true;
  const int64_t spans[3][2] = {
      {row.start, row.sinks_end}, {row.low, row.high}, {row.end - c.new_keys, row.end}};
  for (const auto& span : spans) {
    for (int64_t key = span[0]; key < span[1]; key += c.page_size - key % c.page_size) {
      if (page_of(c, row.number, key) < 0) return false;
    }
  }
  return true;
}

}  // namespace
