// Axial attention for one instruction set; see axial_attention.cpp for the formula and the plan.

#include "cpu/axial_products.body.h"
#include "cpu/axial_lines.body.h"

template <typename T, typename A = typename Sum<T>::type>
struct Worker : Lines<T, A> {
  using Base = Lines<T, A>;
  using typename Base::Task;
  using Base::L, Base::p, Base::long_row, Base::planar, Base::rows, Base::spread, Base::give, Base::give_rows;
  static constexpr A lowest = sizeof(A) == 4 ? A(-3e38f) : A(-1e300);

  const Panels keys, narrow_rows, wide_rows;  // of a line's keys; of the channels of q and k, and of a chunk of v
  const int64_t d, chunk, cells;              // cells: pixels of a round, in whole tiles
  const int64_t row, d_row, c_row;            // lengths of a row of queries, and of channels
  A *q, *q_rows, *k, *k_rows, *v, *g, *g_rows, *out;
  A *scores, *grads, *mixed, *dk, *dv;
  A *lse, *factor, *keep;

  explicit Worker(const Pass& p)
      : Base(p), keys(p.length), narrow_rows(p.d), wide_rows(p.chunk), d(p.d), chunk(p.chunk),
        cells(round_up(least(p.round, p.length), tile)), row(spread(cells)),
        d_row(round_up(p.d, L)), c_row(round_up(p.chunk, L)) {}

  bool chunked() const { return chunk < p.dv; }
  static int64_t width_of(int64_t queries) { return least(round_up(queries, L), tile); }  // of a tile, in whole vectors
  int64_t tiles() const { return cells / tile; }
  int64_t scores_at(int64_t line, int64_t x) const {
    return chunked() ? (line * tiles() + x / tile) * keys.rows() * tile : 0;
  }

  void take_memory(Arena& arena, bool backward) {
    const int64_t G = p.group(), C = most(d, chunk), slack = 2 * L, held = chunked() ? G * tiles() : 1;
    planar = arena.take<A>(G * C * long_row + slack), rows = arena.take<A>((long_row + L) * most(d_row, c_row) + slack);
    q = arena.take<A>(G * d * row), k = arena.take<A>(G * keys.rows() * d + slack);
    lse = arena.take<A>(G * row), factor = arena.take<A>(G * row), keep = arena.take<A>(G * row);
    scores = arena.take<A>(held * keys.rows() * tile);
    out = arena.take<A>(G * C * row);
    mixed = arena.take<A>((C + max_rows) * tile);
    if (!backward) {
      v = arena.take<A>(G * wide_rows.rows() * p.length + max_rows * p.length + slack);
      return;
    }
    grads = arena.take<A>(held * keys.rows() * tile);
    v = arena.take<A>(G * keys.rows() * chunk + slack);
    k_rows = arena.take<A>(G * narrow_rows.rows() * p.length + slack);
    q_rows = arena.take<A>(G * cells * d_row), g_rows = arena.take<A>(G * cells * c_row);
    g = arena.take<A>(G * chunk * row);
    if (p.whole()) dk = arena.take<A>(G * keys.rows() * d_row), dv = arena.take<A>(G * keys.rows() * c_row);
  }

  Task task(int64_t index) const {
    Task t;
    t.first = index % p.pieces * p.piece_length(), t.last = least(t.first + p.piece_length(), p.length);
    index /= p.pieces;
    t.line = p.first_line(index % p.groups), t.lines = p.first_line(index % p.groups + 1) - t.line;
    index /= p.groups;
    t.head = index % p.heads, t.n = index / p.heads;
    return t;
  }

  // Forward, where the channels of values and results lie side by side: sums are of channels, values are read in place.
  static constexpr bool in_place = sizeof(T) == sizeof(A);
  bool by_channels() const {
    return p.value.c == 1 && p.out.c == 1 && p.group() == 1 && p.dv % L == 0 && chunk % L == 0;
  }

  void mix_channels(const Task& t, int64_t x, int64_t some, int64_t channel, int64_t channels, const A* s) {
    const A* values = v;
    int64_t step = channels;
    if constexpr (in_place) values = this->at(p.value, t, p.dv, channel, 0), step = p.value.pixel;
    const int64_t parts = (some + max_rows - 1) / max_rows;
    for (int64_t c = 0; c < channels; c += 2 * L)
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t from = some * part / parts, to = some * (part + 1) / parts;
        with_width(to - from, [&]<int W>() {
          A* sums = out + (x + from) * channels + c;
          if (c + L < channels)
            multiply<A, W, 2, 1>(s + from, tile, values + c, step, p.length, sums, channels, false);
          else
            multiply<A, W, 1, 1>(s + from, tile, values + c, step, p.length, sums, channels, false);
        });
      }
  }

  void give_channels(const Task& t, int64_t channel, int64_t channels, int64_t first, int64_t count) {
    for (int64_t x = 0; x < count; ++x) {
      T* to = this->at(p.out, t, p.dv, channel, first + x);
      const A by = factor[x], before = p.merge ? keep[x] : A(1);
      for (int64_t c = 0; c < channels; c += L) {
        const Vec<A> sum = load(out + x * channels + c) * by;
        narrow(p.merge || p.add ? sum + widen(static_cast<const T*>(to) + c) * before : sum, to + c);
      }
    }
  }

  void fetch_value(const Task& t, int64_t channel, int64_t channels, bool backward) {
    if (!backward && by_channels()) {
      if constexpr (!in_place)
        for (int64_t x = 0; x < p.length; ++x)
          for (int64_t c = 0; c < channels; c += L)
            store(v + x * channels + c, widen(static_cast<const T*>(this->at(p.value, t, p.dv, channel, x)) + c));
      return;
    }
    if (backward)
      this->template fetch<true, false>(p.value, t, p.dv, channel, channels, 0, p.length, A(1),
                          [&](int64_t line, A* plane, A*) {
        to_panels(plane, long_row, channels, keys, v + line * keys.rows() * chunk);
      });
    else
      this->template fetch<false, true>(p.value, t, p.dv, channel, channels, 0, p.length, A(1),
                          [&](int64_t line, A*, A* in) {
        to_panels(in, round_up(channels, L), p.length, Panels(channels), v + line * wide_rows.rows() * p.length);
      });
  }

  void fetch_query(const Task& t, int64_t first, int64_t count, bool backward) {
    const auto keep_plane = [&](int64_t line, const A* plane) {
      for (int64_t c = 0; c < d; ++c)
        for (int64_t x = 0; x < round_up(count, tile); x += L)
          store(q + (line * d + c) * row + x, load(plane + c * long_row + x));
    };
    if (!backward)
      return this->template fetch<true, false>(p.query, t, d, 0, d, first, count, A(p.scale),
                                [&](int64_t line, A* plane, A*) { keep_plane(line, plane); });
    this->template fetch<true, true>(p.query, t, d, 0, d, first, count, A(p.scale), [&](int64_t line, A* plane, A* in) {
      keep_plane(line, plane);
      A* to = q_rows + line * cells * d_row;
      for (int64_t i = 0; i < round_up(count, tile) * d_row; i += L) store(to + i, load(in + i));
    });
  }

  A* lse_at(const Task& t, int64_t line, int64_t pixel) const {
    return static_cast<A*>(p.lse.data) + t.n * p.lse.n + t.head * p.lse.c + (t.line + line) * p.lse.line +
           pixel * p.lse.pixel;
  }
  A* delta_at(const Task& t, int64_t line, int64_t pixel) const {
    return static_cast<A*>(p.delta.data) + t.n * p.delta.n + t.head * p.delta.c + (t.line + line) * p.delta.line +
           pixel * p.delta.pixel;
  }

  // Scores of a tile of queries, x of the round and `first` + x of the line.
  void score(int64_t line, int64_t x, int64_t width, int64_t first, A* s) {
    product(keys, k + line * keys.rows() * d, d, q + line * d * row + x, row, width, s, false);
    if (p.skip_itself)
      for (int64_t i = 0; i < tile && first + x + i < p.length; ++i) s[(first + x + i) * tile + i] = -__builtin_inf();
  }

  // Scores to unnormalised weights; their factor, and what remains of the result in place.
  void softmax(const Task& t, int64_t line, int64_t x, int64_t width, int64_t first, int64_t count, A* s) {
    A log_total[tile], before[tile] = {};
    const int64_t some = least(count - x, tile);
    if (p.merge)
      for (int64_t i = 0; i < some; ++i) before[i] = *lse_at(t, line, first + x + i);
    for (int64_t i = 0; i < width; i += L) {
      Vec<A> top = Vec<A>{} + lowest, next = top, total = {};
      int64_t j = 0;
      for (; j + 2 <= p.length; j += 2) {
        const Vec<A> a = load(s + j * tile + i), b = load(s + (j + 1) * tile + i);
        top = a > top ? a : top, next = b > next ? b : next;
      }
      for (; j < p.length; ++j) top = load(s + j * tile + i) > top ? load(s + j * tile + i) : top;
      top = top > next ? top : next;
#pragma GCC unroll 2
      for (j = 0; j < p.length; ++j) {
        const Vec<A> weight = vexp<A>(load(s + j * tile + i) - top);
        total += weight;
        store(s + j * tile + i, weight);
      }
      const auto none = total == Vec<A>{};  // of a column without its pixel
      const Vec<A> safe = none ? Vec<A>{} + 1 : total;
      Vec<A> log = none ? Vec<A>{} + lowest : top + vlog<A>(safe);
      Vec<A> by = 1 / safe;
      if (p.merge) {
        const Vec<A> old = load(before + i), most = old > log ? old : log;
        const Vec<A> both = most + vlog<A>(vexp<A>(old - most) + vexp<A>(log - most));
        store(keep + line * row + x + i, vexp<A>(old - both));
        by *= vexp<A>(log - both);
        log = both;
      }
      store(factor + line * row + x + i, by);
      store(log_total + i, log);
    }
    for (int64_t i = 0; i < some; ++i) *lse_at(t, line, first + x + i) = log_total[i];
  }

  void mix(const Task& t, int64_t line, int64_t x, int64_t count, int64_t channel, int64_t channels, const A* s) {
    if (by_channels()) return mix_channels(t, x, least(count - x, tile), channel, channels, s);
    const Panels panels(channels);
    const int64_t width = width_of(count - x);
    product(panels, v + line * wide_rows.rows() * p.length, p.length, s, tile, width, mixed, false);
    for (int64_t i = 0; i < width; i += L) {
      const Vec<A> by = load(factor + line * row + x + i);
      for (int64_t c = 0; c < channels; ++c)
        store(out + (line * channels + c) * row + x + i, load(mixed + c * tile + i) * by);
    }
  }

  void give_out(const Task& t, int64_t channel, int64_t channels, int64_t first, int64_t count) {
    if (by_channels()) return give_channels(t, channel, channels, first, count);
    if (p.add || p.merge)
      this->template fetch<true, false>(p.out, t, p.dv, channel, channels, first, count, A(1),
                          [&](int64_t line, A* old, A*) {
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t x = 0; x < count; x += L) {
            A* to = out + (line * channels + c) * row + x;
            const Vec<A> before = load(old + c * long_row + x);
            store(to, load(to) + (p.merge ? before * load(keep + line * row + x) : before));
          }
      });
    give(p.out, t, p.dv, channel, channels, first, count, out, row, channels * row);
  }

  void forward(const Task& t) {
    this->template fetch<true, false>(p.key, t, d, 0, d, 0, p.length, A(1), [&](int64_t line, A* plane, A*) {
      to_panels(plane, long_row, d, keys, k + line * keys.rows() * d);
    });
    if (!chunked()) fetch_value(t, 0, chunk, false);
    for (int64_t first = t.first; first < t.last; first += p.round) {
      const int64_t count = least(p.round, t.last - first);
      fetch_query(t, first, count, false);
      for (int64_t line = 0; line < t.lines; ++line)
        for (int64_t x = 0; x < count; x += tile) {
          A* s = scores + scores_at(line, x);
          const int64_t width = width_of(count - x);
          score(line, x, width, first, s);
          softmax(t, line, x, width, first, count, s);
          if (!chunked()) mix(t, line, x, count, 0, chunk, s);
        }
      if (!chunked()) {
        give_out(t, 0, chunk, first, count);
        continue;
      }
      for (int64_t channel = 0; channel < p.dv; channel += chunk) {
        const int64_t channels = least(chunk, p.dv - channel);
        fetch_value(t, channel, channels, false);
        for (int64_t line = 0; line < t.lines; ++line)
          for (int64_t x = 0; x < count; x += tile)
            mix(t, line, x, count, channel, channels, scores + scores_at(line, x));
        give_out(t, channel, channels, first, count);
      }
    }
  }

  // Backward's own: weights from the log-sum-exps.
  void weigh(int64_t line, int64_t x, int64_t width, A* s) {
    for (int64_t i = 0; i < width; i += L) {
      const Vec<A> log = load(lse + line * row + x + i);
#pragma GCC unroll 2
      for (int64_t j = 0; j < p.length; ++j) store(s + j * tile + i, vexp<A>(load(s + j * tile + i) - log));
    }
  }

  // Gradients of the scores in the place of those of the weights. Where one weight is nearly all, its gradient and delta
  // nearly cancel: delta is a mean, of weights whose sum is 1 but for the rounding of the log-sum-exp, and what it is
  // short of is taken from the differences.
  void differentiate(int64_t line, int64_t x, int64_t width, const A* s, A* e) {
    for (int64_t i = 0; i < width; i += L) {
      Vec<A> delta = {}, rest = {};
      if (p.delta_of_out || p.delta_given) {
        delta = load(factor + line * row + x + i);
      } else {
        Vec<A> next = {}, total = {};
        int64_t j = 0;
        for (; j + 2 <= p.length; j += 2) {
          const Vec<A> a = load(s + j * tile + i), b = load(s + (j + 1) * tile + i);
          delta += a * load(e + j * tile + i), next += b * load(e + (j + 1) * tile + i);
          total += a + b;
        }
        for (; j < p.length; ++j) {
          const Vec<A> a = load(s + j * tile + i);
          delta += a * load(e + j * tile + i), total += a;
        }
        delta = (delta + next) / total;
        for (j = 0; j < p.length; ++j) rest += load(s + j * tile + i) * (load(e + j * tile + i) - delta);
        rest /= total;
      }
      for (int64_t j = 0; j < p.length; ++j) {
        A* at = e + j * tile + i;
        store(at, load(s + j * tile + i) * (load(at) - delta - rest));
      }
    }
  }

  void grad_queries(int64_t line, int64_t x, int64_t width, const A* e) {
    product(narrow_rows, k_rows + line * narrow_rows.rows() * p.length, p.length, e, tile, width, mixed, false);
    for (int64_t c = 0; c < d; ++c)
      for (int64_t i = 0; i < width; i += L)
        store(out + (line * d + c) * row + x + i, load(mixed + c * tile + i) * A(p.scale));
  }
  void grad_keys(int64_t line, int64_t x, int64_t count, const A* e, A* to) {
    outer_product(keys, e, count, q_rows + (line * cells + x) * d_row, d_row, to, d_row);
  }

  // A chunk of grad_out, and the part of delta that goes through it.
  void fetch_grad(const Task& t, int64_t channel, int64_t channels, int64_t first, int64_t count) {
    this->template fetch<true, true>(p.grad_out, t, p.dv, channel, channels, first, count, A(1),
                        [&](int64_t line, A* plane, A* in) {
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t x = 0; x < round_up(count, tile); x += L)
          store(g + (line * chunk + c) * row + x, load(plane + c * long_row + x));
      A* to = g_rows + line * cells * c_row;
      for (int64_t i = 0; i < round_up(count, tile) * round_up(channels, L); i += L) store(to + i, load(in + i));
    });
    if (!p.delta_of_out) return;
    this->template fetch<true, false>(p.out, t, p.dv, channel, channels, first, count, A(1),
                        [&](int64_t line, A* plane, A*) {
      for (int64_t x = 0; x < round_up(count, tile); x += L) {
        Vec<A> sum = channel ? load(factor + line * row + x) : Vec<A>{};
        for (int64_t c = 0; c < channels; ++c)
          sum += load(plane + c * long_row + x) * load(g + (line * chunk + c) * row + x);
        store(factor + line * row + x, sum);
      }
    });
  }

  void fetch_rows(const Task& t, int64_t first, int64_t count) {
    for (int64_t line = 0; line < t.lines; ++line) {
      A* log = lse + line * row;
      A* delta = factor + line * row;
      for (int64_t x = 0; x < count; ++x) log[x] = *lse_at(t, line, first + x);
      if (p.delta_given)
        for (int64_t x = 0; x < count; ++x) delta[x] = *delta_at(t, line, first + x);
      for (int64_t x = count; x < round_up(count, tile); ++x) log[x] = delta[x] = 0;
    }
  }

  static int64_t partial_rows(const Pass& p) {
    return Panels(p.length).rows() * (round_up(p.d, L) + spread(round_up(p.dv, L)));
  }
  A* partial(const Task& t, int64_t line, int64_t piece) const {
    const int64_t index = ((t.n * p.heads + t.head) * p.lines + t.line + line) * p.pieces + piece;
    return static_cast<A*>(p.partial) + index * partial_rows(p);
  }

  void backward(const Task& t) {
    const bool whole = p.whole();
    const int64_t piece = t.first / p.piece_length(), v_row = spread(round_up(p.dv, L));
    const auto key_sums = [&](int64_t line) {
      return whole ? dk + line * keys.rows() * d_row : partial(t, line, piece);
    };
    const auto value_sums = [&](int64_t line, int64_t channel) {
      return whole ? dv + line * keys.rows() * c_row : partial(t, line, piece) + keys.rows() * d_row + channel;
    };
    const auto value_step = [&](int64_t channels) { return whole ? round_up(channels, L) : v_row; };
    this->template fetch<true, true>(p.key, t, d, 0, d, 0, p.length, A(1), [&](int64_t line, A* plane, A* in) {
      to_panels(plane, long_row, d, keys, k + line * keys.rows() * d);
      to_panels(in, d_row, p.length, narrow_rows, k_rows + line * narrow_rows.rows() * p.length);
    });
    if (!chunked()) fetch_value(t, 0, chunk, true);
    if (whole) zero(dk, p.group() * keys.rows() * d_row);
    for (int64_t first = t.first; first < t.last; first += p.round) {
      const int64_t count = least(p.round, t.last - first);
      fetch_query(t, first, count, true);
      fetch_rows(t, first, count);
      for (int64_t channel = 0; channel < p.dv; channel += chunk) {
        const int64_t channels = least(chunk, p.dv - channel), step = round_up(channels, L);
        if (chunked()) fetch_value(t, channel, channels, true);
        fetch_grad(t, channel, channels, first, count);
        if (whole) zero(dv, p.group() * keys.rows() * c_row);
        for (int64_t line = 0; line < t.lines; ++line) {
          A* values = value_sums(line, channel);
          const A* upstream = g_rows + line * cells * c_row;
          for (int64_t x = 0; x < count; x += tile) {
            A *s = scores + scores_at(line, x), *e = grads + scores_at(line, x);
            const int64_t width = width_of(count - x);
            if (!channel) score(line, x, width, first, s), weigh(line, x, width, s);
            product(keys, v + line * keys.rows() * chunk, channels, g + line * chunk * row + x, row, width, e,
                    channel > 0);
            if (chunked()) continue;
            outer_product(keys, s, width, upstream + x * step, step, values, value_step(channels));
            differentiate(line, x, width, s, e);
            grad_queries(line, x, width, e);
            grad_keys(line, x, width, e, key_sums(line));
          }
          if (chunked())
            outer_product(keys, scores + scores_at(line, 0), round_up(count, L), upstream, step, values,
                          value_step(channels));
        }
        if (whole)
          give_rows(p.grad_value, t, p.dv, channel, channels, dv, step, keys.rows() * c_row, p.add_value);
      }
      if (p.delta_of_out)
        for (int64_t line = 0; line < t.lines; ++line)
          for (int64_t x = 0; x < count; ++x) *delta_at(t, line, first + x) = factor[line * row + x];
      if (chunked())
        for (int64_t line = 0; line < t.lines; ++line) {
          for (int64_t x = 0; x < count; x += tile) {
            A* e = grads + scores_at(line, x);
            differentiate(line, x, width_of(count - x), scores + scores_at(line, x), e);
            grad_queries(line, x, width_of(count - x), e);
          }
          grad_keys(line, 0, round_up(count, L), grads + scores_at(line, 0), key_sums(line));
        }
      if (p.add)
        this->template fetch<true, false>(p.grad_query, t, d, 0, d, first, count, A(1), [&](int64_t line, A* old, A*) {
          for (int64_t c = 0; c < d; ++c)
            for (int64_t x = 0; x < count; x += L) {
              A* to = out + (line * d + c) * row + x;
              store(to, load(to) + load(old + c * long_row + x));
            }
        });
      give(p.grad_query, t, d, 0, d, first, count, out, row, d * row);
    }
    if (whole) give_rows(p.grad_key, t, d, 0, d, dk, d_row, keys.rows() * d_row, p.add);
  }

  // The pieces' sums of a line, in the place of the first.
  void add_pieces(const Task& t) {
    A* sums = partial(t, 0, 0);
    for (int64_t piece = 1; piece < p.pieces; ++piece)
      for (int64_t i = 0; i < partial_rows(p); i += L) store(sums + i, load(sums + i) + load(partial(t, 0, piece) + i));
    give_rows(p.grad_key, t, d, 0, d, sums, d_row, 0, p.add);
    for (int64_t channel = 0; channel < p.dv; channel += chunk)
      give_rows(p.grad_value, t, p.dv, channel, least(chunk, p.dv - channel), sums + keys.rows() * d_row + channel,
                spread(round_up(p.dv, L)), 0, p.add_value);
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

// Calls function(worker, index) for the tasks from begin to end.
template <typename Function>
void work(const Pass& p, bool backward, int64_t begin, int64_t end, Scratch& scratch, Function function) {
  with_type(p.dtype, [&]<typename T>() {
    Worker<T> worker(p);
    Arena counted{nullptr};
    worker.take_memory(counted, backward);
    Arena arena{scratch.zeroed(round_up(counted.used, 64))};
    if (!arena.base) return;
    worker.take_memory(arena, backward);
    for (int64_t index = begin; index < end; ++index) function(worker, index);
  });
}

void forward(const Pass& p, int64_t begin, int64_t end, Scratch& scratch) {
  work(p, false, begin, end, scratch, [](auto& worker, int64_t index) { worker.forward(worker.task(index)); });
}
void backward(const Pass& p, int64_t begin, int64_t end, Scratch& scratch) {
  work(p, true, begin, end, scratch, [](auto& worker, int64_t index) { worker.backward(worker.task(index)); });
}
void add_pieces(const Pass& p, int64_t begin, int64_t end, Scratch& scratch) {
  work(p, true, begin, end, scratch,
       [](auto& worker, int64_t index) { worker.add_pieces(worker.task(index * worker.p.pieces)); });
}
int64_t partial_rows(const Pass& p) {
  int64_t rows = 0;
  with_type(p.dtype, [&]<typename T>() { rows = Worker<T>::partial_rows(p); });
  return rows;
}
