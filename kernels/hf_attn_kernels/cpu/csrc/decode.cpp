// Decode over a KV cache where it lies: contiguous in either layout, or in pages that are not
// gathered; new keys are written there first.
//
// The keys of a row are cut into splits of a fixed length, each one piece of work for one thread
// (Dao et al., "Flash-Decoding", 2023); a second pass combines them by their log-sum-exp. Within a
// split keys come in blocks: scores of all query heads of a group, online softmax, weights times
// values, sums in float32. What is summed with what depends on the row alone, so neither the number
// of threads nor the other rows change a bit.
//
// Plain C++17 with the vector extensions of GCC and Clang: no header of torch, so it compiles in
// seconds and fits every release of it. The struct `Call` is mirrored in extension_decode.py.
//
// R rows of the batch, G query heads per KV head, a line is one query of one head.

#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "attend.h"

namespace {

constexpr int64_t DONE = -1, NO_MEMORY = -2, NOT_WITHIN = -3;
constexpr int64_t GRAIN = 1 << 16;  // products below which a thread is not worth waking

// The new keys of all rows, behind those that a row holds; likewise the values.
template <typename T>
void append(const Call& c) {
  for (int64_t r = 0; r < c.rows; ++r) {
    for (int64_t i = 0; i < c.new_keys; ++i) {
      const int64_t key = c.lengths[r] + i;
      const int64_t page = page_of(c, r, key), place = key % c.page_size;
      for (int64_t h = 0; h < c.heads_kv; ++h) {
        std::copy_n((const T*)c.k_new + r * c.k_new_row + i * c.k_new_token + h * c.k_new_head,
                    c.dim, (T*)c.k + page * c.k_page + place * c.k_token + h * c.k_head);
        std::copy_n((const T*)c.v_new + r * c.v_new_row + i * c.v_new_token + h * c.v_new_head,
                    c.dim_v, (T*)c.v + page * c.v_page + place * c.v_token + h * c.v_head);
      }
    }
  }
}

template <typename T>
void run_split(const Call& c, const Row& row, int64_t split, float* memory) {
  const int64_t lines = c.heads * row.queries;
  const Part part = Part::at(memory, c, row.queries);
  std::fill_n(part.peak, lines, NOTHING);
  std::fill_n(part.total, lines, 0.0f);
  std::fill_n(part.acc, lines * c.dim_v, 0.0f);
  thread_local std::vector<float> q, scores;
  q.resize(lines * c.dim);
  scores.resize(lines / c.heads_kv * BLOCK);
  for (int64_t i = 0; i < lines; ++i) {
    const int64_t head = i / row.queries, query = i % row.queries;
    const int64_t token = c.first_query ? row.token + query : query;
    const T* from = (const T*)c.q + (c.first_query ? 0 : row.number) * c.q_row +
                    token * c.q_token + head * c.q_head;
    for (int64_t d = 0; d < c.dim; d += LANES) {
      store(q.data() + i * c.dim + d, load(from + d) * float(c.scaling));
    }
  }
  Worker<T> worker{c, row, part, q.data(), scores};
  if (split == 0) worker.span(row.start, row.sinks_end);
  const int64_t low = row.low + split * SPLIT;
  worker.span(low, std::min(low + SPLIT, row.high));
}

// One head of a row: its splits put together, the sink logit in the denominator.
template <typename T>
void finish(const Call& c, const Row& row, int64_t head, const float* memory) {
  const int64_t size = Part::floats(c, row.queries);
  std::vector<float> sum(c.dim_v);
  for (int64_t query = 0; query < row.queries; ++query) {
    const int64_t at = head * row.queries + query;
    const float sink = c.s_aux ? c.s_aux[head] : NOTHING;
    float peak = sink;
    for (int64_t s = 0; s < row.splits; ++s) {
      peak = std::max(peak, Part::at((float*)memory + s * size, c, row.queries).peak[at]);
    }
    const float safe = peak == NOTHING ? 0.0f : peak;
    float total = std::exp(sink - safe);
    std::fill(sum.begin(), sum.end(), 0.0f);
    for (int64_t s = 0; s < row.splits; ++s) {
      const Part part = Part::at((float*)memory + s * size, c, row.queries);
      const float weight = std::exp(part.peak[at] - safe);
      if (weight == 0.0f) continue;  // it saw nothing
      total += part.total[at] * weight;
      const float* acc = part.acc + at * c.dim_v;
      for (int64_t d = 0; d < c.dim_v; ++d) sum[d] += acc[d] * weight;
    }
    const float scale = total > 0.0f ? 1.0f / total : 0.0f;
    T* out = (T*)c.out + ((row.token + query) * c.heads + head) * c.dim_v;
    for (int64_t d = 0; d < c.dim_v; ++d) store_one(out + d, sum[d] * scale);
    c.lse[(c.first_query ? row.token : 0) * c.lse_query + row.number * c.lse_row +
          head * c.lse_head + query * c.lse_query] = std::log(total) + peak;
  }
}

template <typename T>
int64_t run(const Call& c) {
  std::vector<Row> rows;
  struct Unit { int64_t row, split; };
  std::vector<Unit> units;
  std::vector<int64_t> memory_at;
  int64_t floats = 0, elements = 0;
  for (int64_t r = 0; r < c.rows; ++r) {
    Row row = row_of(c, r);
    if (row.queries == 0 || row.queries > c.most_queries) continue;
    if (!has_pages(c, row)) return r;
    memory_at.push_back(floats);
    for (int64_t s = 0; s < row.splits; ++s) units.push_back({int64_t(rows.size()), s});
    floats += row.splits * Part::floats(c, row.queries);
    elements += row.keys() * c.heads_kv * c.dim * row.queries;
    rows.push_back(row);
  }
  const std::unique_ptr<float[]> memory(new float[floats]);
  append<T>(c);
  const int threads = int(std::max<int64_t>(1, std::min(c.threads, elements / GRAIN)));
  (void)threads;  // without OpenMP
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic)
    for (int64_t u = 0; u < int64_t(units.size()); ++u) {
      const Row& row = rows[units[u].row];
      run_split<T>(c, row, units[u].split,
                   memory.get() + memory_at[units[u].row] +
                       units[u].split * Part::floats(c, row.queries));
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < int64_t(rows.size()) * c.heads; ++i) {
      const int64_t r = i / c.heads;
      finish<T>(c, rows[r], i % c.heads, memory.get() + memory_at[r]);
    }
  }
  return DONE;
}

}  // namespace

// DONE, or NO_MEMORY, or NOT_WITHIN: lengths or pages lie outside of the cache, or the number of a
// row for some of whose keys the table has no page. Unless it is DONE nothing is written.
extern "C" int64_t hf_attn_decode(const Call* call) {
  if (!within(*call)) return NOT_WITHIN;
  try {
    if (call->dtype == 0) return run<float>(*call);
    if (call->dtype == 1) return run<Bfloat16>(*call);
    return run<Float16>(*call);
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  }
}
