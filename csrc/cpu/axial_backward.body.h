// Axial attention backward for one instruction set; see axial_attention.cpp.

constexpr int64_t held_scores = 1 << 16;  // of a line's queries

template <typename T>
struct Backward : Worker<T> {
  using Base = Worker<T>;
  using A = typename Sum<T>::type;
  using typename Base::Part, typename Base::Round, typename Base::Task;
  using Base::L, Base::p, Base::d, Base::chunk, Base::cells, Base::strip, Base::row, Base::q, Base::k, Base::v;
  using Base::result, Base::scores, Base::ones, Base::chunked, Base::of_part, Base::row_of, Base::part;

  Packed<A> g, out, g_copy, out_copy;
  Packed<A> key_turned, value_turned;
  A *grads, *g_turned, *out_turned, *dk, *dv;
  A *lse, *delta, *scales;  // of the queries
  A* sums;

  explicit Backward(const Pass& p)
      : Backward(p, least(Base::cells_of(p), round_up(most(held_scores / p.length, 1), tile))) {}
  Backward(const Pass& p, int64_t strip)
      : Base(p, strip, Base::spread(strip), (Base::cells_of(p) + strip - 1) / strip) {}

  void take_memory(Arena& arena) {
    const int64_t G = p.group(), H = p.head_group;
    Base::take_memory(arena, false, p.grad_query, d, most(d, chunk));
    g_copy = this->pack(arena, p.grad_out.innermost(), G, H * chunk, cells);
    g_turned = arena.take<A>(Base::turned_size(chunk, cells));
    if (p.delta_of_out) {
      out_copy = this->pack(arena, p.out.innermost(), G, H * chunk, cells);
      out_turned = arena.take<A>(chunk * Base::spread(cells) + 2 * L);
    }
    grads = arena.take<A>(this->held());
    dk = arena.take<A>(p.length * row_of(d)), dv = arena.take<A>(p.length * row_of(chunk));
    key_turned = this->pack(arena, false, G, H * d, p.length);
    value_turned = this->pack(arena, false, G, H * chunk, p.length);
    lse = arena.take<A>(G * H * cells), delta = arena.take<A>(G * H * cells), scales = arena.take<A>(cells);
    sums = arena.take<A>(this->sums_size(d, strip));
    if (arena.base)
      for (int64_t x = 0; x < cells; ++x) scales[x] = A(p.scale);
  }

  // `count` pixels of a part, a row each.
  Vectors<A> rows(const Packed<A>& packed, const Part& m, int64_t count, int64_t channels, A* space) const {
    const A* from = part(packed, m, channels);
    if (packed.rows) return {from, packed.step};
    turn(from, packed.step, channels, count, space, row_of(channels));
    return {space, row_of(channels)};
  }

  void read_statistics(const Round& r, const Part& m, int64_t count) {
    for (int64_t x = 0; x < count; ++x) lse[m.index * cells + x] = *this->lse_at(*r.task, m, r.first + x);
    if (!p.delta_given) return;
    for (int64_t x = 0; x < count; ++x) delta[m.index * cells + x] = *Base::of_pixel(p.delta, *r.task, m, r.first + x);
  }

  template <typename Function>
  void for_strips(int64_t first, int64_t count, Function function) const {
    for (int64_t x = first; x < first + count; x += strip) function(x, least(strip, first + count - x));
  }
  void weights(const Round& r, const Part& m, Vectors<A> queries, int64_t first, int64_t count) {
    this->for_keys([&](int64_t key, int64_t keys) {
      for_strips(first, count, [&](int64_t x, int64_t some) {
        this->score(m, this->near(queries, x, some, d), some, key, keys, of_part(scores, m, x));
      });
    });
    for_strips(first, count, [&](int64_t x, int64_t some) {
      this->skip(r.first + x, some, of_part(scores, m, x));
      weigh(m, x, some, of_part(scores, m, x));
    });
  }
  void grad_weights(const Round& r, const Part& m, Vectors<A> upstream, int64_t channels, int64_t first, int64_t count) {
    this->for_keys([&](int64_t key, int64_t keys) {
      Scalars<A> values = Base::pixels_of(v, m, channels);
      values.at += key * values.row;
      for_strips(first, count, [&](int64_t x, int64_t some) {
        this->product(values, keys, this->near(upstream, x, some, channels), some, channels,
                      of_part(grads, m, x) + key * row, row, r.channel > 0);
      });
    });
  }

  // Scores to weights, from the log-sum-exps.
  void weigh(const Part& m, int64_t x, int64_t count, A* s) const {
    for (int64_t i = 0; i < count; i += L) {
      const Vec<A> log = load(lse + m.index * cells + x + i);
#pragma GCC unroll 2
      for (int64_t j = 0; j < p.length; ++j) store(s + j * row + i, vexp<A>(load(s + j * row + i) - log));
    }
  }

  // delta of both axes, the part of a chunk of channels.
  void add_delta(const Part& m, int64_t channel, int64_t channels, int64_t count, Vectors<A> upstream) {
    const Vectors<A> results = this->planar(out, m, 0, count, channels, out_turned);
    for (int64_t x = 0; x < count; x += L) {
      Vec<A> sum = channel ? load(delta + m.index * cells + x) : Vec<A>{};
      for (int64_t c = 0; c < channels; ++c)
        sum += load(results.at + c * results.step + x) * load(upstream.at + c * upstream.step + x);
      store(delta + m.index * cells + x, sum);
    }
  }

  // Gradients of the scores in the place of those of the weights. Where one weight is nearly all, its gradient and
  // delta nearly cancel: delta is a mean, of weights whose sum is 1 but for the rounding of the log-sum-exp, and what
  // it is short of is taken from the differences.
  void differentiate(const Part& m, int64_t x, int64_t count, const A* s, A* e) const {
    for (int64_t i = 0; i < count; i += L) {
      Vec<A> mean = {}, rest = {};
      if (p.delta_of_out || p.delta_given) {
        mean = load(delta + m.index * cells + x + i);
      } else {
        Vec<A> next = {}, total = {};
        int64_t j = 0;
        for (; j + 2 <= p.length; j += 2) {
          const Vec<A> a = load(s + j * row + i), b = load(s + (j + 1) * row + i);
          mean += a * load(e + j * row + i), next += b * load(e + (j + 1) * row + i);
          total += a + b;
        }
        for (; j < p.length; ++j) {
          const Vec<A> a = load(s + j * row + i);
          mean += a * load(e + j * row + i), total += a;
        }
        mean = (mean + next) / total;
        Vec<A> other = {};
        for (j = 0; j + 2 <= p.length; j += 2) {
          rest += load(s + j * row + i) * (load(e + j * row + i) - mean);
          other += load(s + (j + 1) * row + i) * (load(e + (j + 1) * row + i) - mean);
        }
        if (j < p.length) rest += load(s + j * row + i) * (load(e + j * row + i) - mean);
        rest = (rest + other) / total;
      }
      for (int64_t j = 0; j < p.length; ++j) {
        A* at = e + j * row + i;
        store(at, load(s + j * row + i) * (load(at) - mean - rest));
      }
    }
  }

  // Of `count` queries from x on of the round.
  void grad_queries(const Task& t, const Part& m, int64_t first, int64_t x, int64_t count, const A* e) {
    T* to = this->of_map(p.grad_query, t, m, d, 0, first + x);
    const A* old = p.add ? ones : nullptr;
    const Scalars<A> channels = Base::channels_of(k, m, d);
    this->for_keys([&](int64_t key, int64_t keys) {
      if (k.rows && p.grad_query.innermost())
        this->template product_put<true>({e, 1, row}, count, {part(k, m, d), k.step}, d, key, keys, sums, to,
                                         p.grad_query.pixel, scales, old);
      else if (p.grad_query.pixel == 1)
        this->template product_put<false>(channels, d, {e, row}, count, key, keys, sums, to, p.grad_query.c, scales,
                                          old);
      else
        this->template product_put<false>(channels, d, {e, row}, count, key, keys, sums, part(result, m, d) + x,
                                          result.step, scales, static_cast<const A*>(nullptr));
    });
  }

  // to[key] (+)= sum of weights[strip][key][query] rows[first + query]: a block of sums stays in the nearest cache
  // meanwhile.
  void sum_queries(const A* weights, Vectors<A> rows, int64_t first, int64_t width, int64_t count, A* to,
                   int64_t to_step, bool add) {
    const A* from = rows.at + first * rows.step;
    this->for_keys([&](int64_t key, int64_t keys) {
      for_blocks<A>(keys, width, [&](int64_t j, int64_t some, int64_t c, int64_t columns) {
        for (int64_t i = key + j, x = 0; x < count; x += strip)
          multiply<A>(some, columns > L, {weights + (x / strip * p.length + i) * row, row, 1},
                      {from + x * rows.step + c, rows.step}, least(strip, count - x), to + i * to_step + c, to_step,
                      add || x);
        this->advance();
      });
    });
  }

  // What the pieces and rounds of a line add to dk and dv, unless one task holds it.
  static int64_t partial_size(const Pass& p) { return p.length * (row_of(p.d) + row_of(p.dv)); }
  A* partial(const Round& r, const Part& m) const {
    const Task& t = *r.task;
    const int64_t line = (t.n * p.heads + t.head + m.head) * p.lines + t.line + m.line;
    const int64_t index = line * p.pieces + t.first / p.piece_length();
    return static_cast<A*>(p.partial) + index * partial_size(p);
  }

  // Sums of a part, [pixel][step], to a gradient: at once, or turned for `give`.
  void give_part(const Map& map, const Task& t, const Part& m, int64_t width, int64_t channel, int64_t channels,
                 const A* sums, int64_t step, const Packed<A>& turned, bool add) {
    if (!map.innermost()) return turn(sums, step, p.length, channels, part(turned, m, channels), turned.step);
    T* to = this->of_map(map, t, m, width, channel, 0);
    for (int64_t x = 0; x < p.length; ++x)
      Base::template put<true>(to + x * map.pixel, 0, sums + x * step, 0, 1, channels, static_cast<const A*>(nullptr),
                               add ? ones : nullptr);
  }
  void give_parts(const Map& map, const Task& t, int64_t width, int64_t channel, int64_t channels,
                  const Packed<A>& turned, bool add) {
    if (!map.innermost()) this->give(map, t, width, channel, t.heads * channels, 0, p.length, turned, add);
  }

  void read_round(const Round& r) {
    const Task& t = *r.task;
    if (!r.channel) this->read_keys_and_queries(r);
    v = this->refer(this->values_of(p.value, t, r.channel), this->v_copy, p.value.innermost() && p.dv % L == 0);
    g = this->refer(this->results_of(p.grad_out, t, r.first, r.channel), g_copy,
                    p.grad_out.innermost() && p.dv % L == 0);
    if (p.delta_of_out) out = this->read(this->results_of(p.out, t, r.first, r.channel), out_copy);
  }
  void later_round(const Round& r) {
    this->forget();
    if (!r.task) return;
    this->later_operands(r);
    this->later(this->results_of(p.grad_out, *r.task, r.first, r.channel));
    if (p.delta_of_out) this->later(this->results_of(p.out, *r.task, r.first, r.channel));
  }

  // Once the gradients of a strip's weights are there.
  void finish_strip(const Round& r, const Part& m, int64_t x, int64_t count) {
    A* e = of_part(grads, m, x);
    differentiate(m, x, count, of_part(scores, m, x), e);
    grad_queries(*r.task, m, r.first, x, count, e);
  }

  // A round's queries with a chunk of the values. All chunks are summed up before a gradient of a weight is complete.
  void run_part(const Round& r, const Part& m, int64_t count, int64_t channels) {
    const bool whole = p.whole();
    const int64_t sums_step = row_of(whole ? channels : p.dv);
    A* key_sums = whole ? dk : partial(r, m);
    A* value_sums = whole ? dv : key_sums + p.length * row_of(d) + r.channel;
    const Vectors<A> upstream = this->planar(g, m, 0, count, channels, g_turned);
    const Vectors<A> upstream_rows = rows(g, m, count, channels, g_turned);
    Vectors<A> queries{}, query_rows{};
    if (!r.channel) queries = this->planar(q, m, 0, count, d, this->q_turned), read_statistics(r, m, count);
    if (!chunked()) query_rows = rows(q, m, count, d, this->q_turned);
    if (p.delta_of_out) add_delta(m, r.channel, channels, count, upstream);
    for (int64_t x = 0, some; x < count; x += some) {
      some = least(chunked() ? count : strip, count - x);
      if (!r.channel) weights(r, m, queries, x, some);
      grad_weights(r, m, upstream, channels, x, some);
      sum_queries(of_part(scores, m, x), upstream_rows, x, channels, some, value_sums, sums_step, !whole || x);
      if (chunked()) continue;
      finish_strip(r, m, x, some);
      sum_queries(of_part(grads, m, x), query_rows, x, d, some, key_sums, row_of(d), !whole || x);
    }
    if (!whole) return;
    give_part(p.grad_value, *r.task, m, p.dv, r.channel, channels, dv, sums_step, value_turned, p.add_value);
    if (!chunked()) give_part(p.grad_key, *r.task, m, d, 0, d, dk, row_of(d), key_turned, p.add);
  }

  void finish_part(const Round& r, const Part& m, int64_t count) {
    if (p.delta_of_out)
      for (int64_t x = 0; x < count; ++x)
        *Base::of_pixel(p.delta, *r.task, m, r.first + x) = delta[m.index * cells + x];
    if (!chunked()) return;
    for (int64_t x = 0; x < count; x += strip) finish_strip(r, m, x, least(strip, count - x));
    const Vectors<A> query_rows = rows(q, m, count, d, this->q_turned);
    sum_queries(of_part(grads, m, 0), query_rows, 0, d, count, p.whole() ? dk : partial(r, m), row_of(d), !p.whole());
    if (p.whole()) give_part(p.grad_key, *r.task, m, d, 0, d, dk, row_of(d), key_turned, p.add);
  }

  void run(const Task& t, const Task* next) {
    for (Round r{&t, t.first, 0}; r.task == &t; r = this->after(r, next)) {
      const int64_t count = least(p.round, t.last - r.first), channels = least(chunk, p.dv - r.channel);
      read_round(r);
      later_round(this->after(r, next));
      this->spread_over(t.lines * t.heads * (blocks<A>(p.length, count) + blocks<A>(p.length, channels)));
      Base::for_parts(t, [&](const Part& m) { run_part(r, m, count, channels); });
      if (p.whole()) give_parts(p.grad_value, t, p.dv, r.channel, channels, value_turned, p.add_value);
      if (r.channel + channels < p.dv) continue;
      Base::for_parts(t, [&](const Part& m) { finish_part(r, m, count); });
      const bool staged = p.grad_query.pixel != 1 && !(k.rows && p.grad_query.innermost());
      if (staged) this->give(p.grad_query, t, d, 0, t.heads * d, r.first, count, result, p.add);
    }
    if (p.whole()) give_parts(p.grad_key, t, d, 0, d, key_turned, p.add);
  }

  // The pieces' sums of a line, in the place of the first.
  void add_pieces(const Task& t) {
    const Part m{0, 0, 0};
    A* sums = partial({&t, 0, 0}, m);
    for (int64_t piece = 1; piece < p.pieces; ++piece) {
      const A* more = sums + piece * partial_size(p);
      for (int64_t i = 0; i < partial_size(p); i += L) store(sums + i, load(sums + i) + load(more + i));
    }
    give_part(p.grad_key, t, m, d, 0, d, sums, row_of(d), key_turned, p.add);
    give_parts(p.grad_key, t, d, 0, d, key_turned, p.add);
    for (int64_t channel = 0; channel < p.dv; channel += chunk) {
      const int64_t channels = least(chunk, p.dv - channel);
      give_part(p.grad_value, t, m, p.dv, channel, channels, sums + p.length * row_of(d) + channel, row_of(p.dv),
                value_turned, p.add_value);
      give_parts(p.grad_value, t, p.dv, channel, channels, value_turned, p.add_value);
    }
  }
};
