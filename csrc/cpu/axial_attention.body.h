// Axial attention for one instruction set; see axial_attention.cpp for the formula and the plan.

#include "cpu/axial_products.body.h"
#include "cpu/axial_lines.body.h"

// What both directions share: a task's lines and heads, its operands, and its scores.
template <typename T, typename A = typename Sum<T>::type>
struct Worker : Lines<T, A> {
  using Base = Lines<T, A>;
  using typename Base::Region, typename Base::Task;
  using Base::L, Base::p, Base::at, Base::pack, Base::region;

  // A line and a head of a task.
  struct Part {
    int64_t index, line, head;
  };
  // Queries from `first` on, and a chunk of the values from `channel` on.
  struct Round {
    const Task* task;
    int64_t first, channel;
  };

  const int64_t d, chunk, cells;  // cells: pixels of a round, in whole tiles
  const int64_t strip, row;       // queries whose scores stand side by side, and the distance of their rows
  const int64_t strips;           // of a round
  Packed<A> q, k, v;              // a task's lines, in place or copied
  Packed<A> q_copy, k_copy, v_copy;
  Packed<A> result;               // planar, where sums cannot be written to the map
  A *scores, *strip_of, *q_turned, *ones;

  Worker(const Pass& p, int64_t strip, int64_t row, int64_t strips)
      : Base{p}, d(p.d), chunk(p.chunk), cells(cells_of(p)), strip(strip), row(row), strips(strips) {}

  static int64_t cells_of(const Pass& p) { return round_up(least(p.round, p.length), tile); }
  static int64_t row_of(int64_t channels) { return Base::spread(round_up(channels, L)); }
  bool chunked() const { return chunk < p.dv; }
  // Keys of a long line come in parts, which a core's cache holds while all strips of the round meet them. Walking all
  // keys with every strip took 1.7 times as long (channels innermost, 64 and 512 of them, 4096 pixels).
  static constexpr int64_t longest = 20 * 14;
  template <typename Function>
  void for_keys(Function function) const {
    const int64_t parts = (p.length + longest - 1) / longest;
    for (int64_t i = 0, first = 0; i < parts; ++i) {
      const int64_t end = p.length * (i + 1) / parts;
      function(first, end - first);
      first = end;
    }
  }
  bool far() const { return cells * int64_t(sizeof(A)) >= 4096; }
  int64_t held() const { return (chunked() ? p.group() * strips : 1) * p.length * row; }  // scores, in elements
  A* of_part(A* all, const Part& m, int64_t x) const {
    return chunked() ? all + (m.line * strips + x / strip) * p.length * row : all;
  }
  static int64_t turned_size(int64_t channels, int64_t cells) {
    return most(channels * Base::spread(cells), cells * row_of(channels)) + 2 * L;
  }

  // once: queries and keys are not read again after a task's scores, and leave their place to values and results.
  void take_memory(Arena& arena, bool once, const Map& results, int64_t result_channels, int64_t strip_channels) {
    const int64_t G = p.group(), H = p.head_group, start = arena.used;
    q_copy = pack(arena, p.query.innermost(), G, H * d, cells);
    k_copy = pack(arena, p.key.innermost(), G, H * d, p.length);
    const int64_t end = arena.used;
    if (once) arena.used = start;
    v_copy = pack(arena, p.value.innermost(), G, H * chunk, p.length);
    if (results.pixel != 1) result = pack(arena, false, G, H * result_channels, cells);
    arena.used = most(arena.used, end);
    scores = arena.take<A>(held());
    if (far()) strip_of = arena.take<A>(strip_channels * row);
    q_turned = arena.take<A>(turned_size(d, cells));
    ones = arena.take<A>(cells);
    if (arena.base)
      for (int64_t x = 0; x < cells; ++x) ones[x] = 1;
  }

  // Lines of a head follow one another; where channels are innermost, heads of a line do, for they share its pages.
  Task task(int64_t index) const {
    Task t;
    t.first = index % p.pieces * p.piece_length(), t.last = least(t.first + p.piece_length(), p.length);
    index /= p.pieces;
    const int64_t head_groups = p.heads / p.head_group;
    const bool heads_first = p.value.innermost();
    const int64_t group = heads_first ? index / head_groups % p.groups : index % p.groups;
    t.line = p.first_line(group), t.lines = p.first_line(group + 1) - t.line;
    t.head = (heads_first ? index % head_groups : index / p.groups % head_groups) * p.head_group;
    t.heads = p.head_group, t.n = index / (head_groups * p.groups);
    return t;
  }
  template <typename Function>
  static void for_parts(const Task& t, Function function) {
    for (int64_t i = 0; i < t.lines * t.heads; ++i) function(Part{i, i / t.heads, i % t.heads});
  }

  // What a round reads of every map: its queries, a chunk of the values, and all keys.
  Region keys_of(const Map& map, const Task& t) const { return region(map, t, d, 0, t.heads * d, 0, p.length); }
  Region values_of(const Map& map, const Task& t, int64_t channel) const {
    return region(map, t, p.dv, channel, chunked() ? least(chunk, p.dv - channel) : t.heads * p.dv, 0, p.length);
  }
  Region queries_of(const Map& map, const Task& t, int64_t first) const {
    return region(map, t, d, 0, t.heads * d, first, least(p.round, t.last - first));
  }
  Region results_of(const Map& map, const Task& t, int64_t first, int64_t channel) const {
    const int64_t channels = chunked() ? least(chunk, p.dv - channel) : t.heads * p.dv;
    return region(map, t, p.dv, channel, channels, first, least(p.round, t.last - first));
  }

  Packed<A> read(const Region& from, const Packed<A>& copy, A by = 1) {
    Base::copy(from, by, copy);
    return copy;
  }
  // An operand that stays where it is: if it may (no vector of its channels runs past them), if it is of the sums'
  // type, and if its rows are not all in the same cache sets.
  Packed<A> refer(const Region& from, const Packed<A>& copy, bool may) {
    const Map& map = from.map;
    const int64_t step = map.innermost() ? map.pixel : map.c;
    if (!may || sizeof(T) != sizeof(A) || step * int64_t(sizeof(T)) % 4096 == 0) return read(from, copy);
    return {reinterpret_cast<A*>(const_cast<T*>(from.from)), map.innermost(), step, map.line};
  }
  void read_keys_and_queries(const Round& r) {
    const Task& t = *r.task;
    if (r.first == t.first) k = refer(keys_of(p.key, t), k_copy, p.key.innermost() && d % L == 0);
    q = read(queries_of(p.query, t, r.first), q_copy, A(p.scale));
  }

  // The round after this one, which may be the next task's first; of no task after the last.
  Round after(const Round& r, const Task* next) const {
    if (r.channel + chunk < p.dv) return {r.task, r.first, r.channel + chunk};
    if (r.first + p.round < r.task->last) return {r.task, r.first + p.round, 0};
    return {next, next ? next->first : 0, 0};
  }
  void later_operands(const Round& r) {
    if (!r.channel) this->later(keys_of(p.key, *r.task)), this->later(queries_of(p.query, *r.task, r.first));
    this->later(values_of(p.value, *r.task, r.channel));
  }

  // What a product of some keys holds until the last ones are there: [n][width], or a block.
  int64_t sums_size(int64_t n, int64_t width) const {
    return p.length > longest ? round_up(n, 2 * L) * round_up(width, 2 * L) : max_rows * 2 * L;
  }
  // Sums over `count` keys from `first` on, with the last ones to rows `step` apart, by Base::put: by and keep are of the
  // rows, or of the columns.
  template <bool Pixels, typename U>
  void product_put(Scalars<A> a, int64_t n, Vectors<A> b, int64_t width, int64_t first, int64_t count, A* sums, U* to,
                   int64_t step, const A* by, const A* keep) {
    const bool whole = count == p.length;
    const int64_t sums_step = whole ? 2 * L : round_up(width, 2 * L);
    a.at += first * a.step, b.at += first * b.step;
    if (first + count < p.length) return product(a, n, b, width, count, sums, sums_step, first > 0);
    for_blocks<A>(n, width, [&](int64_t i, int64_t some, int64_t x, int64_t columns) {
      U* place = to + i * step + x;
      A* block = whole ? sums : sums + i * sums_step + x;
      const int64_t pixel = Pixels ? i : x;
      for (int64_t r = 0; r < some; ++r)
        __builtin_prefetch(place + r * step, 1), __builtin_prefetch(place + r * step + columns - 1, 1);
      multiply<A>(some, columns > L, {a.at + i * a.row, a.row, a.step}, {b.at + x, b.step}, count, block, sums_step,
                  first > 0);
      Base::template put<Pixels>(place, step, block, sums_step, some, columns, by + pixel, keep ? keep + pixel : keep);
      this->advance();
    });
  }
  void product(Scalars<A> a, int64_t n, Vectors<A> b, int64_t width, int64_t depth, A* to, int64_t to_step, bool add) {
    for_blocks<A>(n, width, [&](int64_t i, int64_t some, int64_t x, int64_t columns) {
      multiply<A>(some, columns > L, {a.at + i * a.row, a.row, a.step}, {b.at + x, b.step}, depth,
                  to + i * to_step + x, to_step, add);
      this->advance();
    });
  }
  T* of_map(const Map& map, const Task& t, const Part& m, int64_t width, int64_t channel, int64_t pixel) const {
    return at(map, t, width, channel, pixel) + m.head * width * map.c + m.line * map.line;
  }
  static A* part(const Packed<A>& packed, const Part& m, int64_t width) {
    return packed.line(m.line) + m.head * width * packed.c();
  }
  static Scalars<A> pixels_of(const Packed<A>& packed, const Part& m, int64_t width) {
    return {part(packed, m, width), packed.x(), packed.c()};
  }
  static Scalars<A> channels_of(const Packed<A>& packed, const Part& m, int64_t width) {
    return {part(packed, m, width), packed.c(), packed.x()};
  }

  // `count` pixels from x on.
  Vectors<A> planar(const Packed<A>& packed, const Part& m, int64_t x, int64_t count, int64_t channels,
                    A* space) const {
    const A* from = part(packed, m, channels) + x * packed.x();
    if (!packed.rows) return {from, packed.step};
    const int64_t step = Base::spread(round_up(count, tile));
    turn(from, packed.step, count, channels, space, step);
    return {space, step};
  }
  // Channels of long lines are pages apart, more of them than a core finds at once: a strip is taken out.
  Vectors<A> near(Vectors<A> from, int64_t x, int64_t count, int64_t channels) const {
    if (!far()) return {from.at + x, from.step};
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < count; i += L) store(strip_of + c * row + i, load(from.at + c * from.step + x + i));
    return {strip_of, row};
  }

  A* lse_at(const Task& t, const Part& m, int64_t pixel) const { return of_pixel(p.lse, t, m, pixel); }
  static A* of_pixel(const Map& map, const Task& t, const Part& m, int64_t pixel) {
    return static_cast<A*>(map.data) + t.n * map.n + (t.head + m.head) * map.c + (t.line + m.line) * map.line +
           pixel * map.pixel;
  }

  // Scores of `count` queries with `keys` keys.
  void score(const Part& m, Vectors<A> queries, int64_t count, int64_t first_key, int64_t keys, A* s) {
    Scalars<A> from = pixels_of(k, m, d);
    from.at += first_key * from.row;
    product(from, keys, queries, count, d, s + first_key * row, row, false);
  }
  // The queries are the line's from `first` on.
  void skip(int64_t first, int64_t count, A* s) const {
    if (p.skip_itself)
      for (int64_t i = 0; i < count; ++i) s[(first + i) * row + i] = -__builtin_inf();
  }
};

#include "cpu/axial_forward.body.h"
#include "cpu/axial_backward.body.h"

// Calls function(a worker of the pass's dtype, with its memory).
template <template <typename> class Direction, typename Function>
void work(const Pass& p, Scratch& scratch, Function function) {
  const auto of_type = [&]<typename T>() {
    Direction<T> worker(p);
    Arena counted{nullptr};
    worker.take_memory(counted);
    Arena arena{scratch.zeroed(round_up(counted.used, 64))};
    if (!arena.base) return;
    worker.take_memory(arena);
    function(worker);
  };
  switch (p.dtype) {
    case DType::float32: return of_type.template operator()<float>();
    case DType::float64: return of_type.template operator()<double>();
    case DType::bfloat16: return of_type.template operator()<bf16>();
    case DType::float16: return of_type.template operator()<fp16>();
  }
}

// Calls run(task, the one after it).
template <typename Any, typename Function>
void for_tasks(const Any& worker, int64_t begin, int64_t end, Function run) {
  auto now = worker.task(begin);
  for (int64_t index = begin; index < end; ++index) {
    const auto next = worker.task(least(index + 1, end - 1));
    run(now, index + 1 < end ? &next : nullptr);
    now = next;
  }
}

void forward(const Pass& p, int64_t begin, int64_t end, Scratch& scratch) {
  work<Forward>(p, scratch, [&](auto& worker) {
    for_tasks(worker, begin, end, [&](const auto& task, const auto* next) { worker.run(task, next); });
  });
}
void backward(const Pass& p, int64_t begin, int64_t end, Scratch& scratch) {
  work<Backward>(p, scratch, [&](auto& worker) {
    for_tasks(worker, begin, end, [&](const auto& task, const auto* next) { worker.run(task, next); });
  });
}
void add_pieces(const Pass& p, int64_t begin, int64_t end, Scratch& scratch) {
  work<Backward>(p, scratch, [&](auto& worker) {
    for (int64_t index = begin; index < end; ++index) worker.add_pieces(worker.task(index * p.pieces));
  });
}
int64_t partial_size(const Pass& p) {
  return p.dtype == DType::float64 ? Backward<double>::partial_size(p) : Backward<float>::partial_size(p);
}
