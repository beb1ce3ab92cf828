// Axial attention forward for one instruction set; see axial_attention.cpp.

template <typename T>
struct Forward : Worker<T> {
  using Base = Worker<T>;
  using A = typename Sum<T>::type;
  using typename Base::Part, typename Base::Round, typename Base::Task;
  using Base::L, Base::p, Base::d, Base::chunk, Base::cells, Base::row, Base::q, Base::v, Base::result;
  using Base::scores, Base::chunked, Base::of_part, Base::lse_at;
  static constexpr A lowest = sizeof(A) == 4 ? A(-3e38f) : A(-1e300);

  A *factor, *keep;  // of the queries: what their sums are multiplied by, and what is there already
  A* sums;           // of tiles

  // Lines are often a few pixels longer than whole tiles: the last tile takes them.
  static constexpr int64_t widest = tile + Base::L;

  explicit Forward(const Pass& p)
      : Base(p, tile, widest, most(1, (least(p.round, p.length) - widest + 2 * tile - 1) / tile)) {}
  template <typename Function>
  static void for_tiles(int64_t count, Function function) {
    for (int64_t x = 0, some; x < count; x += some) function(x, some = count - x <= widest ? count - x : tile);
  }

  void take_memory(Arena& arena) {
    Base::take_memory(arena, chunked() && p.round >= p.piece_length(), p.out, chunk, d);
    const int64_t parts = p.group() * p.head_group;
    factor = arena.take<A>(parts * cells), keep = arena.take<A>(parts * cells);
    sums = arena.take<A>((chunked() ? parts * this->strips : 1) * this->sums_size(chunk, row));
  }

  // Scores to unnormalised weights; their factor, and what remains of the result in place.
  void softmax(const Task& t, const Part& m, int64_t first, int64_t x, int64_t count, A* s) {
    A log_total[widest], before[widest] = {};
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
  bool by_channels() const { return v.rows && p.out.innermost(); }
  int64_t mix_blocks(int64_t channels) const {
    return by_channels() ? blocks<A>(tile, channels) : blocks<A>(channels, tile);
  }

  // Queries from x on of the round, with `keys` keys.
  void mix(const Round& r, const Part& m, int64_t x, int64_t count, int64_t channels, int64_t key, int64_t keys) {
    const A* s = of_part(scores, m, x);
    A* so_far = sums + (chunked() ? m.index * this->strips + x / tile : 0) * this->sums_size(chunk, row);
    const A* by = factor + m.index * cells + x;
    const A* old = p.merge ? keep + m.index * cells + x : p.add ? this->ones : nullptr;
    T* to = this->of_map(p.out, *r.task, m, p.dv, r.channel, r.first + x);
    if (by_channels())
      return this->template product_put<true>({s, 1, row}, count, {Base::part(v, m, channels), v.step}, channels, key,
                                              keys, so_far, to, p.out.pixel, by, old);
    const Scalars<A> values = Base::channels_of(v, m, channels);
    if (p.out.pixel == 1)
      this->template product_put<false>(values, channels, {s, row}, count, key, keys, so_far, to, p.out.c, by, old);
    else
      this->template product_put<false>(values, channels, {s, row}, count, key, keys, so_far,
                                        Base::part(result, m, channels) + x, result.step, by, old);
  }

  void run(const Task& t, const Task* next) {
    // A value that is read where the output stands is copied: its line is replaced.
    const bool in_place = (p.value.innermost() ? p.dv % L == 0 : p.value.pixel == 1) && p.value.data != p.out.data;
    for (Round r{&t, t.first, 0}; r.task == &t; r = this->after(r, next)) {
      const int64_t count = least(p.round, t.last - r.first), tiles = (count + tile - 1) / tile;
      const int64_t channels = least(chunk, p.dv - r.channel);
      const auto weights = [&](const Part& m, int64_t x, int64_t some) {
        A* s = of_part(scores, m, x);
        this->score(m, this->near(this->planar(q, m, x, some, d, this->q_turned), 0, some, d), some, 0, p.length, s);
        this->skip(r.first + x, some, s);
        softmax(t, m, r.first, x, some, s);
      };
      if (!r.channel) this->read_keys_and_queries(r);
      if (chunked() && !r.channel)
        Base::for_parts(t, [&](const Part& m) {
          for_tiles(count, [&](int64_t x, int64_t some) { weights(m, x, some); });
        });
      v = this->refer(this->values_of(p.value, t, r.channel), this->v_copy, in_place);
      const bool staged = !by_channels() && p.out.pixel != 1;
      this->forget();
      if (const Round then = this->after(r, next); then.task) this->later_operands(then);
      const int64_t score_blocks = chunked() ? 0 : blocks<A>(p.length, tile);
      this->spread_over(t.lines * t.heads * tiles * (score_blocks + mix_blocks(channels)));
      if (staged && (p.merge || p.add)) Base::copy(this->results_of(p.out, t, r.first, r.channel), 1, result);
      if (chunked())
        this->for_keys([&](int64_t key, int64_t keys) {
          Base::for_parts(t, [&](const Part& m) {
            for_tiles(count, [&](int64_t x, int64_t some) { mix(r, m, x, some, channels, key, keys); });
          });
        });
      else
        Base::for_parts(t, [&](const Part& m) {
          for_tiles(count, [&](int64_t x, int64_t some) {
            weights(m, x, some);
            this->for_keys([&](int64_t key, int64_t keys) { mix(r, m, x, some, channels, key, keys); });
          });
        });
      if (staged) this->give(p.out, t, p.dv, r.channel, t.heads * channels, r.first, count, result, false);
    }
  }
};
