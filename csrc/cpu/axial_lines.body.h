// Lines of maps, of any strides and dtype, to packed lines and back, for one instruction set; see axial_attention.cpp.

// A copy of lines in the order they have in their map: [line][pixel][channel] where channels are innermost, else
// [line][channel][pixel].
template <typename A>
struct Packed {
  A* data = nullptr;
  bool rows = false;                 // a row is a pixel
  int64_t step = 0, line_step = 0;   // distances of rows, and of lines
  int64_t c() const { return rows ? 1 : step; }
  int64_t x() const { return rows ? step : 1; }
  A* line(int64_t i) const { return data + i * line_step; }
};

template <typename T, typename A = typename Sum<T>::type>
struct Lines {
  static constexpr int64_t L = Simd<A>::lanes;
  const Pass& p;

  struct Task {
    int64_t n, head, heads, line, lines, first, last;
  };

  // Rows whose distance is a multiple of 2048 bytes would share cache sets.
  static int64_t spread(int64_t length) { return length * int64_t(sizeof(A)) % 2048 ? length : length + L; }
  T* at(const Map& map, const Task& t, int64_t width, int64_t channel, int64_t pixel) const {
    return static_cast<T*>(map.data) + t.n * map.n + (t.head * width + channel) * map.c + t.line * map.line +
           pixel * map.pixel;
  }
  static Packed<A> pack(Arena& arena, bool rows, int64_t lines, int64_t channels, int64_t pixels) {
    Packed<A> packed{nullptr, rows};
    packed.step = spread(round_up(rows ? channels : pixels, L));
    packed.line_step = packed.step * (rows ? pixels : channels);
    packed.data = arena.take<A>(lines * packed.line_step + 2 * L);
    return packed;
  }

  // A task's part of a map: runs of elements that lie together, [outer][inner], in units of about a kilobyte.
  struct Region {
    const T* from = nullptr;
    Map map;
    int64_t lines = 0, channels = 0, count = 0;
    int64_t outer = 0, inner = 0, outer_step = 0, inner_step = 0, run = 0;  // run: length
    int64_t span = 1, per_outer = 0, units = 0;                             // span: runs of a unit

    Region() = default;
    Region(const T* from, const Map& map, int64_t lines, int64_t channels, int64_t count)
        : from(from), map(map), lines(lines), channels(channels), count(count) {
      if (map.innermost()) {
        outer = lines, outer_step = map.line, inner = count, inner_step = map.pixel, run = channels;
        span = most(1, 1024 / (channels * int64_t(sizeof(T))));
      } else if (map.interleaved()) {
        outer = channels, outer_step = map.c, inner = count, inner_step = map.pixel, run = lines;
        span = L;
      } else {
        outer = channels, outer_step = map.c, inner = lines, inner_step = map.line, run = map.pixel == 1 ? count : 1;
        span = lines;
      }
      per_outer = (inner + span - 1) / span, units = outer * per_outer;
    }
    // Distance of runs: if it divides the sets of the second cache, that holds few of them.
    bool crowded() const { return (map.innermost() ? map.pixel : map.c) * int64_t(sizeof(T)) % 65536 == 0; }

    const char* bytes(int64_t i, int64_t j) const {
      return reinterpret_cast<const char*>(from + i * outer_step + j * inner_step);
    }
    int64_t run_bytes() const { return run * int64_t(sizeof(T)); }
    int64_t cache_lines() const { return outer * inner * (run_bytes() / 64 + 1); }

    void ask(int64_t unit) const {
      const int64_t first = unit % per_outer * span, last = least(first + span, inner);
      for (int64_t j = first; j < last; ++j) {
        const char* at = bytes(unit / per_outer, j);
        for (int64_t i = 0; i < run_bytes(); i += 64) __builtin_prefetch(at + i);
        __builtin_prefetch(at + run_bytes() - 1);
      }
    }
    void copy(int64_t unit, A by, const Packed<A>& to) const {
      const int64_t first = unit % per_outer * span, last = least(first + span, inner), other = unit / per_outer;
      if (map.innermost()) {
        for (int64_t x = first; x < last; ++x) {
          const T* row = from + other * map.line + x * map.pixel;
          if (to.rows)
            copy_row(row, channels, by, to.line(other) + x * to.step);
          else
            for (int64_t c = 0; c < channels; ++c) to.line(other)[c * to.step + x] = widen(row + c, 1)[0] * by;
        }
      } else if (map.interleaved()) {
        columns(from + other * map.c, first, by, to.data + other * to.step, to.line_step);
      } else {
        for (int64_t line = 0; line < lines; ++line) {
          const T* row = from + other * map.c + line * map.line;
          A* in = to.line(line) + other * to.step;
          if (map.pixel == 1)
            copy_row(row, count, by, in);
          else
            for (int64_t x = 0; x < count; ++x) in[x] = widen(row + x * map.pixel, 1)[0] * by;
        }
      }
    }
    static void copy_row(const T* from, int64_t count, A by, A* to) {
      int64_t i = 0;
      for (; i + L <= count; i += L) store(to + i, widen(from + i) * by);
      if (i < count) store(to + i, widen_some(from + i, count - i) * by);
    }
    // A vector of pixels of one channel of lines that lie side by side.
    void columns(const T* in, int64_t x, A by, A* to, int64_t to_step) const {
      for (int64_t line = 0; line < lines; line += L) {
        const int64_t some = least(lines - line, L);
        Vec<A> square[L];
        if (some == L && x + L <= count) {
#pragma GCC unroll 16
          for (int64_t i = 0; i < L; ++i) square[i] = widen(in + (x + i) * map.pixel + line) * by;
        } else {
          for (int64_t i = 0; i < L; ++i)
            square[i] = x + i < count ? widen_some(in + (x + i) * map.pixel + line, some) * by : Vec<A>{};
        }
        transpose<A>(square);
        if (some == L) {
#pragma GCC unroll 16
          for (int64_t i = 0; i < L; ++i) store(to + (line + i) * to_step + x, square[i]);
        } else {
          for (int64_t i = 0; i < some; ++i) store(to + (line + i) * to_step + x, square[i]);
        }
      }
    }
  };
  Region region(const Map& map, const Task& t, int64_t width, int64_t channel, int64_t channels, int64_t first,
                int64_t count) const {
    return {at(map, t, width, channel, first), map, t.lines, channels, count};
  }

  static void copy(const Region& from, A by, const Packed<A>& to) {
    constexpr int64_t ahead = 2;  // units whose memory is asked for
    for (int64_t unit = 0; unit < from.units; ++unit) {
      if (unit + ahead < from.units) from.ask(unit + ahead);
      from.copy(unit, by, to);
    }
  }

  // What will be read next is asked of memory between blocks of products, a few cache lines at a time: more would keep
  // the products' own reads waiting.
  Region next[5];
  int regions = 0, current = 0;
  int64_t outer = 0, inner = 0, byte = 0, pace = 0;

  void forget() { regions = current = 0, outer = inner = byte = 0; }
  void later(const Region& r) {
    if (!r.crowded()) next[regions++] = r;
  }
  // Spreads them over so many blocks.
  void spread_over(int64_t count) {
    int64_t all = 0;
    for (int i = 0; i < regions; ++i) all += next[i].cache_lines();
    pace = (all + count - 1) / count;
  }
  void advance() {
    for (int64_t i = 0; i < pace && current < regions; ++i) {
      const Region& r = next[current];
      __builtin_prefetch(r.bytes(outer, inner) + least(byte, r.run_bytes() - 1), 0, 2);
      if ((byte += 64) < r.run_bytes() + 64) continue;
      byte = 0;
      if (++inner < r.inner) continue;
      inner = 0;
      if (++outer == r.outer) outer = 0, ++current;
    }
  }

  // Writes a block of sums to rows of a result: block * by (+ what is there * keep). by and keep are of pixels, which the
  // rows are, or the columns; none is 1, and nothing kept.
  template <bool Pixels, typename U>
  static void put(U* to, int64_t row, const A* block, int64_t block_row, int64_t n, int64_t columns, const A* by,
                  const A* keep) {
    for (int64_t i = 0; i < n; ++i, to += row, block += block_row)
      for (int64_t j = 0; j < columns; j += L) {
        const int64_t some = least(columns - j, L);
        const auto of = [&](const A* pixels) { return Pixels ? Vec<A>{} + pixels[i] : load(pixels + j); };
        Vec<A> sum = load(block + j);
        if (by) sum *= of(by);
        if (keep) sum += (some == L ? widen(to + j) : widen_some(to + j, some)) * of(keep);
        some == L ? narrow(sum, to + j) : narrow_some(sum, to + j, some);
      }
  }

  // Writes planar lines to a map, or adds them to it.
  void give(const Map& map, const Task& t, int64_t width, int64_t channel, int64_t channels, int64_t first,
            int64_t count, const Packed<A>& from, bool add) const {
    T* to = at(map, t, width, channel, first);
    if (map.interleaved())
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t x = 0; x < count; x += L) give_columns(map, t, to + c * map.c, x, count, from, c, add);
    else
      for (int64_t line = 0; line < t.lines; ++line)
        for (int64_t c = 0; c < channels; ++c) {
          T* row = to + line * map.line + c * map.c;
          const A* in = from.line(line) + c * from.step;
          for (int64_t x = 0; x < count; x += L) {
            const int64_t some = least(count - x, L);
            const Vec<A> v = load(in + x);
            if (map.pixel != 1)
              for (int64_t i = 0; i < some; ++i) {
                T* pixel = row + (x + i) * map.pixel;
                narrow(Vec<A>{} + v[i] + (add ? widen(static_cast<const T*>(pixel), 1)[0] : A(0)), pixel, 1);
              }
            else if (some == L)
              narrow(add ? v + widen(static_cast<const T*>(row + x)) : v, row + x);
            else
              narrow_some(add ? v + widen_some(static_cast<const T*>(row + x), some) : v, row + x, some);
          }
        }
  }
  static void give_columns(const Map& map, const Task& t, T* to, int64_t x, int64_t count, const Packed<A>& from,
                           int64_t c, bool add) {
    for (int64_t line = 0; line < t.lines; line += L) {
      const int64_t some = least(t.lines - line, L);
      for (int64_t i = x; i < least(x + L, count); ++i) {
        const T* next = to + map.c + i * map.pixel + line;
        __builtin_prefetch(next, 1, 2), __builtin_prefetch(next + some - 1, 1, 2);
      }
      Vec<A> square[L];
#pragma GCC unroll 16
      for (int64_t i = 0; i < L; ++i) square[i] = load(from.line(least(line + i, t.lines - 1)) + c * from.step + x);
      transpose<A>(square);
      for (int64_t i = 0; i < L && x + i < count; ++i) {
        T* pixel = to + (x + i) * map.pixel + line;
        if (some == L)
          narrow(add ? square[i] + widen(static_cast<const T*>(pixel)) : square[i], pixel);
        else
          narrow_some(add ? square[i] + widen_some(static_cast<const T*>(pixel), some) : square[i], pixel, some);
      }
    }
  }
};
