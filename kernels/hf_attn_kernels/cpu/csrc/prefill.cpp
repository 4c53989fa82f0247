// Attention of many queries: a whole prefill or a window, q and k and v where they lie.
//
// A line is one query of one head. Lines lie side by side in the lanes of vectors, all query heads
// of a KV head together, and keys come one after the other: scores are [key][line], sums of values
// [column][line]. So a key's or a value's element is broadcast to all lines, softmax needs no sum
// over lanes, and K and V serve every line of a piece of work in the layout they have (FlashAttention
// -2's loop, Dao 2023; register tiles as in Goto and van de Geijn, "Anatomy of High-Performance
// Matrix Multiplication", 2008).
//
// Keys are cut into blocks on a grid that begins at a piece's first key. What is summed with what
// depends on the line's own keys alone: hidden keys of a block add exact zeros. So neither threads
// nor other rows nor the cutting of queries change a bit.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "prefill.h"
#include "strip.h"

namespace {

constexpr int64_t STRIPS = 5;       // of a task at most: what they sum fits the second cache
constexpr int64_t GRAIN = 1 << 20;  // products below which a thread is not worth waking
constexpr double LN_2 = 0.6931471805599453;

// Some queries of a piece, all query heads of one KV head.
struct Task {
  const Piece* piece;
  int64_t head_kv, first, end;  // queries first <= i < end
  int64_t products;             // for each column
};

template <typename T>
struct Worker {
  using Unit = UnitOf<T>;

  const Prefill& c;
  const Task& task;
  Scratch& memory;
  const Sight sight = Sight(c, *task.piece);
  const int64_t group = c.group(), lines = (task.end - task.first) * group;
  const int64_t depth = c.dim / Unit::ELEMENTS;

  void run() {
    begin();
    const int64_t first = sight.first(task.first), end = sight.end(task.end - 1);
    for (int64_t key = 0; key < end; key += KEYS) {
      if (key >= sight.sinks && key + KEYS <= first) key = first / KEYS * KEYS;
      read_keys(key, first, end);
      for (int64_t line = 0; line < lines; line += STRIP) {
        if (width(line) == 3 * LANES) attend<3>(line, key);
        if (width(line) == 2 * LANES) attend<2>(line, key);
        if (width(line) == LANES) attend<1>(line, key);
      }
    }
    for (int64_t line = 0; line < lines; line += LANES) finish(line);
  }

 private:
  int64_t query_of(int64_t line) const { return task.first + line / group; }

  // How many lanes lie side by side in the strip of a line.
  int64_t width(int64_t line) const {
    return std::min(Scratch::lanes(lines) - line / STRIP * STRIP, STRIP);
  }
  // Where the column of a line begins in an array that has `rows` rows for each strip.
  int64_t column(int64_t line, int64_t rows) const {
    return line / STRIP * STRIP * rows + line % STRIP;
  }

  // The sink logit is a score without a value. Queries become columns of units.
  void begin() {
    const Piece& p = *task.piece;
    std::fill_n(memory.acc, Scratch::lanes(lines) * c.dim_v, 0.0f);
    for (int64_t line = 0; line < Scratch::lanes(lines); ++line) {
      const int64_t real = std::min(line, lines - 1), query = query_of(real);
      const float sink =
          c.s_aux ? float(c.s_aux[task.head_kv * group + real % group] * LOG2_E) : NOTHING;
      memory.peak[line] = sink;
      memory.total[line] = sink == NOTHING ? 0.0f : 1.0f;
      memory.first[line] = int32_t(sight.first(query));
      memory.end[line] = int32_t(sight.end(query));
    }
    const int64_t stride = (depth + LANES - 1) / LANES * LANES;
    for (int64_t line = 0; line < lines; line += LANES) {
      for (int64_t lane = 0; lane < LANES; ++lane) {
        float* row = memory.keys + lane * stride;  // not in use yet
        if (line + lane >= lines) {
          std::fill_n(row, depth, 0.0f);
          continue;
        }
        const int64_t token = p.query + query_of(line + lane);
        const int64_t head = task.head_kv * group + (line + lane) % group;
        Unit::row((const T*)c.q + p.q_row * c.q_row + token * c.q_token + head * c.q_head, c.dim,
                  row);
      }
      for (int64_t d = 0; d < depth; d += LANES) {
        const int64_t units = std::min<int64_t>(depth - d, LANES);
        Ints tile[LANES];
        for (int i = 0; i < LANES; ++i) tile[i] = load_units(memory.keys + i * stride + d);
        transpose(tile);
        float* to = memory.queries + column(line, depth) + d * width(line);
        for (int64_t i = 0; i < units; ++i) store_units(to + i * width(line), tile[i]);
      }
    }
  }

  // Keys and values of a block become rows of units; zeros where no line of the task sees a key.
  void read_keys(int64_t key, int64_t first, int64_t end) {
    const Piece& p = *task.piece;
    const T* k = (const T*)c.k + task.head_kv * c.k_head;
    const T* v = (const T*)c.v + task.head_kv * c.v_head;
    const uint8_t* keep = c.keep ? c.keep + p.k_row * c.k_length + p.key : nullptr;
    memory.holes = false;
    for (int64_t j = 0; j < KEYS; j += Unit::ELEMENTS) {
      const T* rows[Unit::ELEMENTS];
      for (int e = 0; e < Unit::ELEMENTS; ++e) {
        const int64_t at = key + j + e;
        bool seen = at < end && (at >= first || at < sight.sinks);
        if (seen && keep && !keep[at]) {
          seen = false;
          memory.holes = true;
        }
        memory.seen[j + e] = seen;
        float* to = memory.keys + (j + e) * depth;
        if (seen) {
          Unit::row(k + c.place(p.k_row, p.key + at, c.k_row, c.k_token), c.dim, to);
        } else {
          std::fill_n(to, depth, 0.0f);
        }
        rows[e] = seen ? v + c.place(p.k_row, p.key + at, c.v_row, c.v_token)
                       : (const T*)memory.zeros;
      }
      Unit::values(rows, c.dim_v, memory.values + j / Unit::ELEMENTS * c.dim_v);
    }
  }

  template <int VECTORS>
  void attend(int64_t line, int64_t key) {
    const int64_t last = std::min(line + VECTORS * LANES, lines) - 1;
    const int64_t first = key < sight.sinks ? key : std::max<int64_t>(memory.first[line], key);
    const int64_t end = std::min<int64_t>(memory.end[last], key + KEYS);
    if (first >= end) return;
    Strip<Unit, VECTORS> strip{memory, line, depth, c.dim_v};
    strip.from = (first - key) / TILE * TILE;
    strip.to = std::min<int64_t>((end - key + TILE - 1) / TILE * TILE, KEYS);
    strip.scores(key, memory.first[last], memory.end[line], sight.sinks, c);
    strip.soften();
    strip.add_values();
  }

  void finish(int64_t line) {
    const Piece& p = *task.piece;
    const Floats total = load(memory.total + line);
    const Floats scale = total > 0.0f ? 1.0f / total : Floats{};
    const int64_t count = std::min<int64_t>(lines - line, LANES);
    const float* acc = memory.acc + column(line, c.dim_v);
    for (int64_t d = 0; d < c.dim_v; d += LANES) {
      Ints tile[LANES];
      for (int i = 0; i < LANES; ++i) tile[i] = (Ints)(load(acc + (d + i) * width(line)) * scale);
      transpose(tile);
      for (int64_t i = 0; i < count; ++i) store(out(p, line + i) + d, (Floats)tile[i]);
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t head = task.head_kv * group + (line + i) % group;
      c.lse[(p.q_row * c.heads + head) * c.q_length + p.query + query_of(line + i)] =
          float(std::log(double(memory.total[line + i])) + memory.peak[line + i] * LN_2);
    }
  }

  T* out(const Piece& p, int64_t line) const {
    const int64_t token = p.q_row * c.q_length + p.query + query_of(line);
    return (T*)c.out + (token * c.heads + task.head_kv * group + line % group) * c.dim_v;
  }
};

std::vector<Task> tasks_of(const Prefill& c, int64_t lines) {
  const int64_t queries = std::max<int64_t>(lines / c.group(), 1);
  std::vector<Task> tasks;
  for (int64_t i = 0; i < c.count; ++i) {
    const Piece& p = c.pieces[i];
    const Sight sight(c, p);
    for (int64_t head = 0; head < c.heads_kv; ++head) {
      for (int64_t first = 0; first < p.queries; first += queries) {
        const int64_t end = std::min(first + queries, p.queries);
        const int64_t keys = std::max<int64_t>(sight.end(end - 1) - sight.first(first), 0);
        tasks.push_back({&p, head, first, end, (keys + sight.sinks) * (end - first) * c.group()});
      }
    }
  }
  return tasks;
}

template <typename T>
int64_t run(const Prefill& c) {
  for (int64_t i = 0; i < c.count; ++i) {
    if (!has_pages(c, c.pieces[i])) return i;
  }
  int64_t lines = STRIPS * STRIP;
  std::vector<Task> tasks = tasks_of(c, lines);
  while (int64_t(tasks.size()) < 4 * c.threads && lines > STRIP && lines > c.group()) {
    lines -= STRIP;
    tasks = tasks_of(c, lines);
  }
  lines = std::max(lines, c.group());
  int64_t products = 0;
  for (const Task& task : tasks) products += task.products * c.dim;
  // the longest first, so that none is waited for at the end
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task& a, const Task& b) { return a.products > b.products; });
  const int threads = int(std::clamp<int64_t>(
      products / GRAIN, 1, std::max<int64_t>(1, std::min<int64_t>(c.threads, tasks.size()))));
  const int64_t each = Scratch::floats(lines, c.dim, c.dim_v);
  const std::unique_ptr<float[]> memory(new float[each * threads + ALIGNMENT]);
#pragma omp parallel num_threads(threads)
  {
#if defined(_OPENMP)
    const int64_t thread = omp_get_thread_num();
#else
    const int64_t thread = 0;
#endif
    Scratch mine(aligned(memory.get()) + thread * each, lines, c.dim, c.dim_v);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < int64_t(tasks.size()); ++i) Worker<T>{c, tasks[i], mine}.run();
  }
  return -1;
}

}  // namespace

// -1, or the number of a piece that sees keys for which the table has no page, or -2: no memory.
extern "C" int64_t hf_attn_prefill(const Prefill* call) {
  try {
    if (call->dtype == 0) return run<float>(*call);
    if (call->dtype == 1) return run<Bfloat16>(*call);
    return run<Float16>(*call);
  } catch (const std::bad_alloc&) {
    return -2;
  }
}
