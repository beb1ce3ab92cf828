// Axial attention for one instruction set; see axial_attention.cpp for the formula and the plan.

#include "cpu/axial_products.body.h"
#include "cpu/axial_lines.body.h"

constexpr int64_t held_scores = 1 << 16;  // of a line's queries, backward

template <typename T, typename A = typename Sum<T>::type>
struct Worker : Lines<T, A> {
  using Base = Lines<T, A>;
  using typename Base::Task;
  using Base::L, Base::p, Base::at, Base::pack, Base::region, Base::give;
  using typename Base::Region;
  static constexpr A lowest = sizeof(A) == 4 ? A(-3e38f) : A(-1e300);

  // An operand's lines, in place or as a copy.
  struct Operand {
    Packed<A> copy, now;
    const Packed<A>* operator->() const { return &now; }
    const Packed<A>& operator*() const { return now; }
  };
  // A line and a head of a task.
  struct Part {
    int64_t index, line, head;
  };
  // One line, in both orders.
  struct Both {
    Vectors<A> planar, rows;
  };

  const bool is_backward;
  const int64_t d, chunk, cells;  // cells: pixels of a round, in whole tiles
  const int64_t strip, row;       // queries whose scores are held, and the length of a row of them
  Operand q, k, v, g, out;
  Packed<A> result, key_turned, value_turned;
  A *scores, *grads, *block, *strip_of, *q_turned, *g_turned, *out_turned, *dk, *dv;
  A *lse, *factor, *keep, *scales, *ones;

  Worker(const Pass& p, bool is_backward)
      : Base{p}, is_backward(is_backward), d(p.d), chunk(p.chunk), cells(round_up(least(p.round, p.length), tile)),
        strip(is_backward ? least(cells, round_up(most(held_scores / p.length, 1), tile)) : tile),
        row(strip == tile ? tile : Base::spread(strip)) {}

  bool chunked() const { return chunk < p.dv; }
  bool far() const { return cells * int64_t(sizeof(A)) >= 4096; }
  int64_t strips() const { return (cells + strip - 1) / strip; }
  A* of_part(A* all, const Part& m, int64_t x) const {
    return chunked() ? all + (m.line * strips() + x / strip) * p.length * row : all;
  }
  static int64_t row_of(int64_t channels) { return Base::spread(round_up(channels, L)); }

  void take_memory(Arena& arena) {
    const int64_t G = p.group(), H = p.head_group, parts = G * H;
    const int64_t held = (chunked() ? G * strips() : 1) * p.length * row;
    q.copy = pack(arena, p.query.innermost(), G, H * d, cells);
    k.copy = pack(arena, p.key.innermost(), G, H * d, p.length);
    v.copy = pack(arena, p.value.innermost(), G, H * chunk, p.length);
    lse = arena.take<A>(parts * cells), factor = arena.take<A>(parts * cells), keep = arena.take<A>(parts * cells);
    scales = arena.take<A>(cells), ones = arena.take<A>(cells);
    scores = arena.take<A>(held);
    block = arena.take<A>(max_rows * 2 * L);
    if (far()) strip_of = arena.take<A>((is_backward ? most(d, chunk) : d) * strip);
    const Map& to = is_backward ? p.grad_query : p.out;
    if (to.pixel != 1) result = pack(arena, false, G, H * (is_backward ? d : chunk), cells);
    const int64_t planar_cells = Base::spread(cells);
    if (arena.base)
      for (int64_t x = 0; x < cells; ++x) scales[x] = A(p.scale), ones[x] = 1;
    q_turned = arena.take<A>(most(d * planar_cells, cells * row_of(d)) + 2 * L);
    if (!is_backward) return;
    g_turned = arena.take<A>(most(chunk * planar_cells, cells * row_of(chunk)) + 2 * L);
    g.copy = pack(arena, p.grad_out.innermost(), G, H * chunk, cells);
    if (p.delta_of_out) {
      out.copy = pack(arena, p.out.innermost(), G, H * chunk, cells);
      out_turned = arena.take<A>(chunk * planar_cells + 2 * L);
    }
    grads = arena.take<A>(held);
    dk = arena.take<A>(p.length * row_of(d)), dv = arena.take<A>(p.length * row_of(chunk));
    key_turned = pack(arena, false, G, H * d, p.length), value_turned = pack(arena, false, G, H * chunk, p.length);
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

  // noipa: GCC 12, across functions, takes `now` of a bfloat16 operand for what it was before the call.
  [[gnu::noipa]] void read(Operand& operand, const Region& from, A by = 1) {
    operand.now = operand.copy;
    Base::copy(from, by, operand.copy);
  }
  // The same of an operand that stays where it is: if it may (no vector of its channels runs past them), if it is of
  // the sums' type, and if its rows are not all in the same cache sets.
  void refer(Operand& operand, const Region& from, bool may) {
    const Map& map = from.map;
    const int64_t step = map.innermost() ? map.pixel : map.c;
    if (!may || sizeof(T) != sizeof(A) || step * int64_t(sizeof(T)) % 4096 == 0)
      return read(operand, from);
    operand.now = {reinterpret_cast<A*>(const_cast<T*>(from.from)), map.innermost(), step, map.line};
  }
  void begin(const Task& t, int64_t first, int64_t channel) {
    if (!channel) {
      if (first == t.first) refer(k, keys_of(p.key, t), p.key.innermost() && d % L == 0);
      read(q, queries_of(p.query, t, first), A(p.scale));
    }
    const bool replaced = !is_backward && p.value.data == p.out.data;
    const bool fits = p.value.innermost() ? p.dv % L == 0 : p.value.pixel == 1 && !is_backward;
    refer(v, values_of(p.value, t, channel), fits && !replaced);
    if (!is_backward) return;
    refer(g, results_of(p.grad_out, t, first, channel), p.grad_out.innermost() && p.dv % L == 0);
    if (p.delta_of_out) read(out, results_of(p.out, t, first, channel));
  }
  // Asks for what comes next, in so many blocks of products.
  void ask_next(const Task& t, const Task* next, int64_t first, int64_t channel, int64_t count) {
    this->forget();
    const bool same_round = channel + chunk < p.dv, same_task = same_round || first + p.round < t.last;
    if (!same_task && !next) return;
    const Task& then = same_task ? t : *next;
    if (!same_round) first = same_task ? first + p.round : next->first;
    channel = same_round ? channel + chunk : 0;
    const auto later = [&](const Region& region) { this->later(region); };
    if (!same_round) later(keys_of(p.key, then)), later(queries_of(p.query, then, first));
    later(values_of(p.value, then, channel));
    if (is_backward) {
      later(results_of(p.grad_out, then, first, channel));
      if (p.delta_of_out) later(results_of(p.out, then, first, channel));
    }
    this->spread_over(count);
  }

  // Sums to rows `step` apart, by Base::put: by and keep are of the rows, or of the columns.
  template <bool Pixels, typename U>
  void product_put(Scalars<A> a, int64_t n, Vectors<A> b, int64_t width, int64_t depth, U* to, int64_t step,
                   const A* by, const A* keep) {
    for_blocks<A>(n, width, [&](int64_t i, int64_t some, int64_t x, int64_t columns) {
      U* place = to + i * step + x;
      const int64_t pixel = Pixels ? i : x;
      for (int64_t r = 0; r < some; ++r)
        __builtin_prefetch(place + r * step, 1), __builtin_prefetch(place + r * step + columns - 1, 1);
      multiply<A>(some, columns > L, {a.at + i * a.row, a.row, a.step}, {b.at + x, b.step}, depth, block, 2 * L, false);
      Base::template put<Pixels>(place, step, block, some, columns, by + pixel, keep ? keep + pixel : keep);
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
      for (int64_t i = 0; i < count; i += L) store(strip_of + c * strip + i, load(from.at + c * from.step + x + i));
    return {strip_of, strip};
  }
  Both both(const Packed<A>& packed, const Part& m, int64_t count, int64_t channels, A* space) const {
    const Vectors<A> as_it_is{part(packed, m, channels), packed.step};
    if (packed.rows) return {planar(packed, m, 0, count, channels, space), as_it_is};
    turn(as_it_is.at, packed.step, channels, count, space, row_of(channels));
    return {as_it_is, {space, row_of(channels)}};
  }

  A* lse_at(const Task& t, const Part& m, int64_t pixel) const {
    return static_cast<A*>(p.lse.data) + t.n * p.lse.n + (t.head + m.head) * p.lse.c + (t.line + m.line) * p.lse.line +
           pixel * p.lse.pixel;
  }
  A* delta_at(const Task& t, const Part& m, int64_t pixel) const {
    return static_cast<A*>(p.delta.data) + t.n * p.delta.n + (t.head + m.head) * p.delta.c +
           (t.line + m.line) * p.delta.line + pixel * p.delta.pixel;
  }

  // Scores of `count` queries, the line's from `first` on.
  void score(const Part& m, Vectors<A> queries, int64_t first, int64_t count, A* s) {
    product(pixels_of(*k, m, d), p.length, queries, count, d, s, row, false);
    if (p.skip_itself)
      for (int64_t i = 0; i < count; ++i) s[(first + i) * row + i] = -__builtin_inf();
  }

  // Scores to unnormalised weights; their factor, and what remains of the result in place.
  void softmax(const Task& t, const Part& m, int64_t first, int64_t x, int64_t count, A* s) {
    A log_total[tile], before[tile] = {};
    if (p.merge)
      for (int64_t i = 0; i < count; ++i) before[i] = *lse_at(t, m, first + x + i);
    for (int64_t i = 0; i < count; i += L) {
      Vec<A> top = Vec<A>{} + lowest, next = top, total = {};
      int64_t j = 0;
      for (; j + 2 <= p.length; j += 2) {
        const Vec<A> a = load(s + j * row + i), b = load(s + (j + 1) * row + i);
        top = a > top ? a : top, next = b > next ? b : next;
      }
      for (; j < p.length; ++j) top = load(s + j * row + i) > top ? load(s + j * row + i) : top;
      top = top > next ? top : next;
#pragma GCC unroll 2
      for (j = 0; j < p.length; ++j) {
        const Vec<A> weight = vexp<A>(load(s + j * row + i) - top);
        total += weight;
        store(s + j * row + i, weight);
      }
      const auto none = total == Vec<A>{};  // of a column without its pixel
      const Vec<A> safe = none ? Vec<A>{} + 1 : total;
      Vec<A> log = none ? Vec<A>{} + lowest : top + vlog<A>(safe);
      Vec<A> by = 1 / safe;
      if (p.merge) {
        const Vec<A> old = load(before + i), most = old > log ? old : log;
        const Vec<A> both = most + vlog<A>(vexp<A>(old - most) + vexp<A>(log - most));
        store(keep + m.index * cells + x + i, vexp<A>(old - both));
        by *= vexp<A>(log - both);
        log = both;
      }
      store(factor + m.index * cells + x + i, by);
      store(log_total + i, log);
    }
    for (int64_t i = 0; i < count; ++i) *lse_at(t, m, first + x + i) = log_total[i];
  }

  // Where the results' channels are innermost sums are of channels, elsewhere of pixels.
  bool by_channels() const { return v->rows && p.out.innermost(); }
  int64_t mix_blocks(int64_t channels) const {
    return by_channels() ? blocks<A>(tile, channels) : blocks<A>(channels, tile);
  }

  // Queries from x on of the round, which begins at `first`.
  void mix(const Task& t, const Part& m, int64_t first, int64_t x, int64_t count, int64_t channel, int64_t channels,
           const A* s) {
    const A *by = factor + m.index * cells + x, *old = p.merge ? keep + m.index * cells + x : p.add ? ones : nullptr;
    T* to = of_map(p.out, t, m, p.dv, channel, first + x);
    if (by_channels())
      return product_put<true>({s, 1, row}, count, {part(*v, m, channels), v->step}, channels, p.length, to,
                               p.out.pixel, by, old);
    const Scalars<A> values = channels_of(*v, m, channels);
    if (p.out.pixel == 1)
      product_put<false>(values, channels, {s, row}, count, p.length, to, p.out.c, by, old);
    else
      product_put<false>(values, channels, {s, row}, count, p.length, part(result, m, channels) + x, result.step, by,
                         old);
  }

  void forward(const Task& t, const Task* next) {
    for (int64_t first = t.first; first < t.last; first += p.round) {
      const int64_t count = least(p.round, t.last - first), tiles = (count + tile - 1) / tile;
      const auto weights = [&](const Part& m, int64_t x) {
        A* s = of_part(scores, m, x);
        const int64_t some = least(count - x, tile);
        score(m, near(planar(*q, m, x, some, d, q_turned), 0, some, d), first + x, some, s);
        softmax(t, m, first, x, some, s);
      };
      for (int64_t channel = 0; channel < p.dv; channel += chunk) {
        const int64_t channels = least(chunk, p.dv - channel);
        begin(t, first, channel);
        const bool staged = !by_channels() && p.out.pixel != 1;
        if (chunked() && !channel)
          for_parts(t, [&](const Part& m) {
            for (int64_t x = 0; x < count; x += tile) weights(m, x);
          });
        const int64_t score_blocks = chunked() ? 0 : blocks<A>(p.length, tile);
        ask_next(t, next, first, channel, t.lines * t.heads * tiles * (score_blocks + mix_blocks(channels)));
        if (staged && (p.merge || p.add)) Base::copy(results_of(p.out, t, first, channel), 1, result);
        for_parts(t, [&](const Part& m) {
          for (int64_t x = 0; x < count; x += tile) {
            if (!chunked()) weights(m, x);
            mix(t, m, first, x, least(count - x, tile), channel, channels, of_part(scores, m, x));
          }
        });
        if (staged) give(p.out, t, p.dv, channel, t.heads * channels, first, count, result, false);
      }
    }
  }

  // Backward's own: weights from the log-sum-exps.
  void weigh(const Part& m, int64_t x, int64_t count, A* s) const {
    for (int64_t i = 0; i < count; i += L) {
      const Vec<A> log = load(lse + m.index * cells + x + i);
#pragma GCC unroll 2
      for (int64_t j = 0; j < p.length; ++j) store(s + j * row + i, vexp<A>(load(s + j * row + i) - log));
    }
  }

  // Gradients of the scores in the place of those of the weights. Where one weight is nearly all, its gradient and
  // delta nearly cancel: delta is a mean, of weights whose sum is 1 but for the rounding of the log-sum-exp, and what
  // it is short of is taken from the differences.
  void differentiate(const Part& m, int64_t x, int64_t count, const A* s, A* e) const {
    for (int64_t i = 0; i < count; i += L) {
      Vec<A> delta = {}, rest = {};
      if (p.delta_of_out || p.delta_given) {
        delta = load(factor + m.index * cells + x + i);
      } else {
        Vec<A> next = {}, total = {};
        int64_t j = 0;
        for (; j + 2 <= p.length; j += 2) {
          const Vec<A> a = load(s + j * row + i), b = load(s + (j + 1) * row + i);
          delta += a * load(e + j * row + i), next += b * load(e + (j + 1) * row + i);
          total += a + b;
        }
        for (; j < p.length; ++j) {
          const Vec<A> a = load(s + j * row + i);
          delta += a * load(e + j * row + i), total += a;
        }
        delta = (delta + next) / total;
        Vec<A> other = {};
        for (j = 0; j + 2 <= p.length; j += 2) {
          rest += load(s + j * row + i) * (load(e + j * row + i) - delta);
          other += load(s + (j + 1) * row + i) * (load(e + (j + 1) * row + i) - delta);
        }
        if (j < p.length) rest += load(s + j * row + i) * (load(e + j * row + i) - delta);
        rest = (rest + other) / total;
      }
      for (int64_t j = 0; j < p.length; ++j) {
        A* at = e + j * row + i;
        store(at, load(s + j * row + i) * (load(at) - delta - rest));
      }
    }
  }

  // Of `count` queries from x on of the round.
  void grad_queries(const Task& t, const Part& m, int64_t first, int64_t x, int64_t count, const A* e) {
    T* to = of_map(p.grad_query, t, m, d, 0, first + x);
    const A* old = p.add ? ones : nullptr;
    if (k->rows && p.grad_query.innermost())
      return product_put<true>({e, 1, row}, count, {part(*k, m, d), k->step}, d, p.length, to, p.grad_query.pixel,
                               scales, old);
    const Scalars<A> keys = channels_of(*k, m, d);
    if (p.grad_query.pixel == 1)
      product_put<false>(keys, d, {e, row}, count, p.length, to, p.grad_query.c, scales, old);
    else
      product_put<false>(keys, d, {e, row}, count, p.length, part(result, m, d) + x, result.step, scales,
                         static_cast<const A*>(nullptr));
  }

  // delta of both axes, the part of a chunk of channels.
  void add_delta(const Part& m, int64_t channel, int64_t channels, int64_t count, Vectors<A> upstream) {
    const Vectors<A> results = planar(*out, m, 0, count, channels, out_turned);
    for (int64_t x = 0; x < count; x += L) {
      Vec<A> sum = channel ? load(factor + m.index * cells + x) : Vec<A>{};
      for (int64_t c = 0; c < channels; ++c)
        sum += load(results.at + c * results.step + x) * load(upstream.at + c * upstream.step + x);
      store(factor + m.index * cells + x, sum);
    }
  }

  void read_statistics(const Task& t, const Part& m, int64_t first, int64_t count) {
    for (int64_t x = 0; x < count; ++x) lse[m.index * cells + x] = *lse_at(t, m, first + x);
    if (p.delta_given)
      for (int64_t x = 0; x < count; ++x) factor[m.index * cells + x] = *delta_at(t, m, first + x);
  }

  // What the pieces and rounds of a line add to dk and dv, unless one task holds it.
  static int64_t partial_size(const Pass& p) { return p.length * (row_of(p.d) + row_of(p.dv)); }
  A* partial(const Task& t, const Part& m, int64_t piece) const {
    const int64_t index = ((t.n * p.heads + t.head + m.head) * p.lines + t.line + m.line) * p.pieces + piece;
    return static_cast<A*>(p.partial) + index * partial_size(p);
  }

  // Sums of a part, [pixel][step], to a gradient: at once, or turned for `give`.
  void give_part(const Map& map, const Task& t, const Part& m, int64_t width, int64_t channel, int64_t channels,
                 const A* sums, int64_t step, const Packed<A>& turned, bool add) {
    if (!map.innermost()) return turn(sums, step, p.length, channels, part(turned, m, channels), turned.step);
    T* to = of_map(map, t, m, width, channel, 0);
    for (int64_t x = 0; x < p.length; ++x)
      Base::template put<true>(to + x * map.pixel, 0, sums + x * step, 1, channels, static_cast<const A*>(nullptr),
                               add ? ones : nullptr);
  }
  void give_parts(const Map& map, const Task& t, int64_t width, int64_t channel, int64_t channels,
                  const Packed<A>& turned, bool add) {
    if (!map.innermost()) give(map, t, width, channel, t.heads * channels, 0, p.length, turned, add);
  }

  // to[key] (+)= sum of weights[strip][key][query] rows[query]: a block of sums stays in the nearest cache meanwhile.
  void sum_queries(const A* weights, Vectors<A> rows, int64_t width, int64_t count, A* to, int64_t to_step, bool add) {
    for_blocks<A>(p.length, width, [&](int64_t i, int64_t some, int64_t c, int64_t columns) {
      for (int64_t x = 0; x < count; x += strip)
        multiply<A>(some, columns > L, {weights + (x / strip * p.length + i) * row, row, 1},
                    {rows.at + x * rows.step + c, rows.step}, least(strip, count - x), to + i * to_step + c, to_step,
                    add || x);
      this->advance();
    });
  }

  void backward(const Task& t, const Task* next) {
    const bool whole = p.whole();
    const int64_t piece = t.first / p.piece_length(), depth = p.length;
    const auto grad_scores = [&](const Part& m, int64_t first, int64_t x, int64_t count) {
      differentiate(m, x, count, of_part(scores, m, x), of_part(grads, m, x));
      grad_queries(t, m, first, x, count, of_part(grads, m, x));
    };
    const auto grad_keys = [&](const Part& m, const Both& queries, int64_t x, int64_t count) {
      const Vectors<A> rows{queries.rows.at + x * queries.rows.step, queries.rows.step};
      sum_queries(of_part(grads, m, x), rows, d, count, whole ? dk : partial(t, m, piece), row_of(d), !whole || x);
    };
    const auto give_keys = [&](const Part& m) {
      if (whole) give_part(p.grad_key, t, m, d, 0, d, dk, row_of(d), key_turned, p.add);
    };
    for (int64_t first = t.first; first < t.last; first += p.round) {
      const int64_t count = least(p.round, t.last - first);
      for (int64_t channel = 0; channel < p.dv; channel += chunk) {
        const int64_t channels = least(chunk, p.dv - channel), step = whole ? row_of(channels) : row_of(p.dv);
        begin(t, first, channel);
        ask_next(t, next, first, channel, t.lines * t.heads * (blocks<A>(depth, count) + blocks<A>(depth, channels)));
        for_parts(t, [&](const Part& m) {
          if (!channel) read_statistics(t, m, first, count);
          const Both queries = both(*q, m, count, d, q_turned), upstream = both(*g, m, count, channels, g_turned);
          if (p.delta_of_out) add_delta(m, channel, channels, count, upstream.planar);
          A* value_sums = whole ? dv : partial(t, m, piece) + depth * row_of(d) + channel;
          for (int64_t x = 0; x < count; x += strip) {
            const int64_t some = least(strip, count - x);
            A *s = of_part(scores, m, x), *e = of_part(grads, m, x);
            if (!channel) {
              score(m, near(queries.planar, x, some, d), first + x, some, s);
              weigh(m, x, some, s);
            }
            product(pixels_of(*v, m, channels), depth, near(upstream.planar, x, some, channels), some, channels, e, row,
                    channel > 0);
            if (chunked()) continue;
            const Vectors<A> rows{upstream.rows.at + x * upstream.rows.step, upstream.rows.step};
            sum_queries(s, rows, channels, some, value_sums, step, !whole || x);
            grad_scores(m, first, x, some);
            grad_keys(m, queries, x, some);
          }
          if (chunked()) sum_queries(of_part(scores, m, 0), upstream.rows, channels, count, value_sums, step, !whole);
          if (whole) give_part(p.grad_value, t, m, p.dv, channel, channels, dv, step, value_turned, p.add_value);
          if (!chunked()) give_keys(m);
        });
        if (whole) give_parts(p.grad_value, t, p.dv, channel, channels, value_turned, p.add_value);
      }
      for_parts(t, [&](const Part& m) {
        if (p.delta_of_out)
          for (int64_t x = 0; x < count; ++x) *delta_at(t, m, first + x) = factor[m.index * cells + x];
        if (!chunked()) return;
        const Both queries = both(*q, m, count, d, q_turned);
        for (int64_t x = 0; x < count; x += strip) grad_scores(m, first, x, least(strip, count - x));
        grad_keys(m, queries, 0, count);
        give_keys(m);
      });
      const bool staged = p.grad_query.pixel != 1 && !(k->rows && p.grad_query.innermost());
      if (staged) give(p.grad_query, t, d, 0, t.heads * d, first, count, result, p.add);
    }
    if (whole) give_parts(p.grad_key, t, d, 0, d, key_turned, p.add);
  }

  // The pieces' sums of a line, in the place of the first.
  void add_pieces(const Task& t) {
    const Part m{0, 0, 0};
    A* sums = partial(t, m, 0);
    for (int64_t piece = 1; piece < p.pieces; ++piece)
      for (int64_t i = 0; i < partial_size(p); i += L) store(sums + i, load(sums + i) + load(partial(t, m, piece) + i));
    give_part(p.grad_key, t, m, d, 0, d, sums, row_of(d), key_turned, p.add);
    give_parts(p.grad_key, t, d, 0, d, key_turned, p.add);
    for (int64_t channel = 0; channel < p.dv; channel += chunk) {
      const int64_t channels = least(chunk, p.dv - channel);
      give_part(p.grad_value, t, m, p.dv, channel, channels, sums + p.length * row_of(d) + channel, row_of(p.dv),
                value_turned, p.add_value);
      give_parts(p.grad_value, t, p.dv, channel, channels, value_turned, p.add_value);
    }
  }

  // Calls function(task, the one after it) with the first one's loads on their way.
  template <typename Function>
  void for_tasks(int64_t begin, int64_t end, Function function) {
    Task now = task(begin);
    for (int64_t index = begin; index < end; ++index) {
      const Task next = task(least(index + 1, end - 1));
      function(now, index + 1 < end ? &next : nullptr);
      now = next;
    }
  }
};

template <typename Function>
[[gnu::always_inline]] inline void with_type(DType dtype, Function function) {
  switch (dtype) {
    case DType::float32: return function.template operator()<float>();
    case DType::float64: return function.template operator()<double>();
    case DType::bfloat16: return function.template operator()<bf16>();
    case DType::float16: return function.template operator()<fp16>();
  }
}

// Calls function(worker).
template <typename Function>
void work(const Pass& p, bool backward, Scratch& scratch, Function function) {
  with_type(p.dtype, [&]<typename T>() {
    Worker<T> worker(p, backward);
    Arena counted{nullptr};
    worker.take_memory(counted);
    Arena arena{scratch.zeroed(round_up(counted.used, 64))};
    if (!arena.base) return;
    worker.take_memory(arena);
    function(worker);
  });
}

void forward(const Pass& p, int64_t begin, int64_t end, Scratch& scratch) {
  work(p, false, scratch, [&](auto& worker) {
    worker.for_tasks(begin, end, [&](const auto& task, const auto* next) { worker.forward(task, next); });
  });
}
void backward(const Pass& p, int64_t begin, int64_t end, Scratch& scratch) {
  work(p, true, scratch, [&](auto& worker) {
    worker.for_tasks(begin, end, [&](const auto& task, const auto* next) { worker.backward(task, next); });
  });
}
void add_pieces(const Pass& p, int64_t begin, int64_t end, Scratch& scratch) {
  work(p, true, scratch, [&](auto& worker) {
    for (int64_t index = begin; index < end; ++index) worker.add_pieces(worker.task(index * p.pieces));
  });
}
int64_t partial_size(const Pass& p) {
  int64_t size = 0;
  with_type(p.dtype, [&]<typename T>() { size = Worker<T>::partial_size(p); });
  return size;
}
