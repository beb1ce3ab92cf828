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
    packed.step = spread(rows ? round_up(channels, L) : round_up(pixels, tile));
    packed.line_step = packed.step * (rows ? pixels : channels);
    packed.data = arena.take<A>(lines * packed.line_step + 2 * L);
    return packed;
  }

  // A task's part of a map, in units of about a kilobyte that lies together.
  struct Region {
    const T* from = nullptr;
    Map map;
    int64_t lines = 0, channels = 0, count = 0;
    int64_t pixels = 0, per_line = 0, units = 0;  // of a unit, where a row is a pixel; units of a line or a channel

    Region() = default;
    Region(const T* from, const Map& map, int64_t lines, int64_t channels, int64_t count)
        : from(from), map(map), lines(lines), channels(channels), count(count) {
      pixels = map.innermost() ? most(1, 1024 / (channels * int64_t(sizeof(T)))) : map.interleaved() ? L : count;
      per_line = (count + pixels - 1) / pixels;
      units = per_line * (map.innermost() ? lines : channels);
    }
    // Distance of rows: if it divides the sets of the second cache, that holds few of them.
    bool crowded() const { return (map.innermost() ? map.pixel : map.c) * int64_t(sizeof(T)) % 65536 == 0; }

    // function(elements that lie together, how many)
    template <typename Function>
    void for_rows(int64_t unit, Function function) const {
      const int64_t first = unit % per_line * pixels, last = least(first + pixels, count), other = unit / per_line;
      if (map.innermost())
        for (int64_t x = first; x < last; ++x) function(from + other * map.line + x * map.pixel, channels);
      else if (map.interleaved())
        for (int64_t x = first; x < last; ++x) function(from + other * map.c + x * map.pixel, lines);
      else if (map.pixel == 1)
        for (int64_t line = 0; line < lines; ++line) function(from + other * map.c + line * map.line, count);
    }
    template <int Locality>
    void ask(int64_t unit) const {
      for_rows(unit, [](const T* row, int64_t length) {
        const char* bytes = reinterpret_cast<const char*>(row);
        for (int64_t i = 0; i < length * int64_t(sizeof(T)); i += 64) __builtin_prefetch(bytes + i, 0, Locality);
        __builtin_prefetch(bytes + length * sizeof(T) - 1, 0, Locality);
      });
    }
    void copy(int64_t unit, A by, const Packed<A>& to) const {
      const int64_t first = unit % per_line * pixels, last = least(first + pixels, count), other = unit / per_line;
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
    const int64_t ahead = from.map.interleaved() ? from.per_line : 2;  // units whose memory is asked for
    for (int64_t unit = 0; unit < from.units; ++unit) {
      if (unit + ahead < from.units) from.template ask<3>(unit + ahead);
      from.copy(unit, by, to);
    }
  }

  // What will be read next is asked of memory between blocks of products, a few cache lines at a time: more would keep
  // the products' own reads waiting.
  struct Rows {
    const char* at;
    int64_t outer, outer_step, inner, inner_step, bytes;
    int64_t lines() const { return outer * inner * (bytes / 64 + 1); }
  };
  Rows next[5];
  int regions = 0, current = 0;
  int64_t outer = 0, inner = 0, byte = 0, pace = 0;

  void later(const Region& r) {
    if (r.crowded()) return;
    const int64_t S = sizeof(T);
    const Map& map = r.map;
    const bool innermost = map.innermost(), interleaved = map.interleaved();
    Rows& rows = next[regions++];
    rows.at = reinterpret_cast<const char*>(r.from);
    rows.outer = innermost ? r.lines : r.channels, rows.outer_step = (innermost ? map.line : map.c) * S;
    rows.inner = innermost || interleaved ? r.count : r.lines;
    rows.inner_step = (innermost || interleaved ? map.pixel : map.line) * S;
    rows.bytes = (innermost ? r.channels : interleaved ? r.lines : r.count) * S;
  }
  // Spreads them over so many blocks.
  void spread_over(int64_t count) {
    int64_t lines = 0;
    for (int i = 0; i < regions; ++i) lines += next[i].lines();
    pace = (lines + count - 1) / count;
  }
  void advance() {
    for (int64_t i = 0; i < pace && current < regions; ++i) {
      const Rows& rows = next[current];
      const char* row = rows.at + outer * rows.outer_step + inner * rows.inner_step;
      __builtin_prefetch(row + least(byte, rows.bytes - 1), 0, 2);
      if ((byte += 64) < rows.bytes + 64) continue;
      byte = 0;
      if (++inner < rows.inner) continue;
      inner = 0;
      if (++outer == rows.outer) outer = 0, ++current;
    }
  }
  void forget() { regions = current = 0, outer = inner = byte = 0; }

  // Writes a block of sums, [n][two vectors], to rows of a result: block * by (+ what is there * keep). by and keep are
  // of pixels, which the rows are, or the columns; none is 1, and nothing kept.
  template <bool Pixels, typename U>
  static void put(U* to, int64_t row, const A* block, int64_t n, int64_t columns, const A* by, const A* keep) {
    for (int64_t i = 0; i < n; ++i, to += row, block += 2 * L)
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
