// Lines of maps, of any strides and dtype, to packed lines and back, for one instruction set; see axial_attention.cpp.

template <typename T, typename A = typename Sum<T>::type>
struct Lines {
  static constexpr int64_t L = Simd<A>::lanes;

  const Pass& p;
  const int64_t long_row;  // length of a packed row of a line
  A *planar, *rows;        // what fetch hands on

  // Rows whose distance is a multiple of 2048 bytes would share cache sets.
  static int64_t spread(int64_t length) { return length * int64_t(sizeof(A)) % 2048 ? length : length + L; }

  explicit Lines(const Pass& p) : p(p), long_row(spread(round_up(p.length, tile) + L)) {}

  struct Task {
    int64_t n, head, line, lines, first, last;
  };
  T* at(const Map& map, const Task& t, int64_t width, int64_t channel, int64_t pixel) const {
    return static_cast<T*>(map.data) + t.n * map.n + (t.head * width + channel) * map.c + t.line * map.line +
           pixel * map.pixel;
  }

  // Hands on every line of `channels` channels of `count` pixels, times `by`: function(line, planar, rows), planar
  // [channels][long_row] and, where wanted, rows [pixels][round_up(channels, L)]. Pixels up to a whole tile are 0.
  template <bool Planar, bool Rows, typename Function>
  void fetch(const Map& map, const Task& t, int64_t width, int64_t channel, int64_t channels, int64_t first,
             int64_t count, A by, Function function) {
    const T* from = at(map, t, width, channel, first);
    const int64_t padded = round_up(count, tile), step = round_up(channels, L);
    if (map.interleaved())
      for (int64_t c = 0; c < channels; ++c)
        columns(map, from + c * map.c, t.lines, count, by, planar + c * long_row, channels * long_row);
    for (int64_t line = 0; line < t.lines; ++line, from += map.line) {
      A* plane = planar;
      if (map.pixel == 1) {
        for (int64_t c = 0; c < channels; ++c) {
          const T* in = from + c * map.c;
          A* to = plane + c * long_row;
          int64_t x = 0;
          for (; x + L <= count; x += L) store(to + x, widen(in + x) * by);
          if (x < count) store(to + x, widen_some(in + x, count - x) * by), x += L;
          for (; x < padded; x += L) store(to + x, Vec<A>{});
        }
      } else if (map.c == 1) {
        for (int64_t x = 0; x < count; ++x) {
          const T* in = from + x * map.pixel;
          int64_t c = 0;
          for (; c + L <= channels; c += L) store(rows + x * step + c, widen(in + c) * by);
          if (c < channels) store(rows + x * step + c, widen_some(in + c, channels - c) * by);
        }
        zero(rows + count * step, (padded - count) * step);
        if constexpr (Planar) turn(rows, step, padded, channels, plane, long_row);
        function(line, plane, rows);
        continue;
      } else if (map.interleaved()) {
        plane = planar + line * channels * long_row;
      } else {
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t x = 0; x < padded; ++x)
            plane[c * long_row + x] = x < count ? widen(from + c * map.c + x * map.pixel, 1)[0] * by : A(0);
      }
      if constexpr (Rows) turn(plane, long_row, channels, padded, rows, step);
      function(line, plane, rows);
    }
  }

  // One channel of lines that lie side by side: to[line][pixel].
  void columns(const Map& map, const T* from, int64_t lines, int64_t count, A by, A* to, int64_t to_step) {
    const int64_t padded = round_up(count, tile);
    for (int64_t x = 0; x < padded; x += L)
      for (int64_t line = 0; line < lines; line += L) {
        const int64_t some = least(lines - line, L);
        Vec<A> square[L];
        for (int64_t i = x; i < least(x + L, count); ++i) {
          const T* next = from + map.c + i * map.pixel + line;
          __builtin_prefetch(next, 0, 2), __builtin_prefetch(next + some - 1, 0, 2);
        }
        if (some == L && x + L <= count) {
#pragma GCC unroll 16
          for (int64_t i = 0; i < L; ++i) square[i] = widen(from + (x + i) * map.pixel + line) * by;
        } else {
          for (int64_t i = 0; i < L; ++i)
            square[i] = x + i < count ? widen_some(from + (x + i) * map.pixel + line, some) * by : Vec<A>{};
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

  // Writes from[line][channel][pixel], rows `step` apart and with a vector's room behind the last pixel.
  void give(const Map& map, const Task& t, int64_t width, int64_t channel, int64_t channels, int64_t first,
            int64_t count, const A* from, int64_t step, int64_t line_step) {
    T* to = at(map, t, width, channel, first);
    if (map.interleaved()) {
      for (int64_t c = 0; c < channels; ++c, to += map.c, from += step)
        for (int64_t x = 0; x < count; x += L)
          for (int64_t line = 0; line < t.lines; line += L) {
            const int64_t some = least(t.lines - line, L);
            Vec<A> square[L];
            for (int64_t i = x; i < least(x + L, count); ++i) {
              const T* next = to + map.c + i * map.pixel + line;
              __builtin_prefetch(next, 1, 2), __builtin_prefetch(next + some - 1, 1, 2);
            }
#pragma GCC unroll 16
            for (int64_t i = 0; i < L; ++i) square[i] = load(from + least(line + i, t.lines - 1) * line_step + x);
            transpose<A>(square);
            for (int64_t i = 0; i < L && x + i < count; ++i) {
              T* pixel = to + (x + i) * map.pixel + line;
              some == L ? narrow(square[i], pixel) : narrow_some(square[i], pixel, some);
            }
          }
      return;
    }
    for (int64_t line = 0; line < t.lines; ++line, to += map.line, from += line_step) {
      if (map.pixel == 1) {
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t x = 0; x < count; x += L) {
            const Vec<A> v = load(from + c * step + x);
            count - x >= L ? narrow(v, to + c * map.c + x) : narrow_some(v, to + c * map.c + x, count - x);
          }
      } else if (map.c == 1) {
        for (int64_t x = 0; x < count; x += L)
          for (int64_t c = 0; c < channels; c += L) {
            const int64_t some = least(channels - c, L);
            Vec<A> square[L];
#pragma GCC unroll 16
            for (int64_t i = 0; i < L; ++i) square[i] = load(from + least(c + i, channels - 1) * step + x);
            transpose<A>(square);
            for (int64_t i = 0; i < L && x + i < count; ++i) {
              T* pixel = to + (x + i) * map.pixel + c;
              some == L ? narrow(square[i], pixel) : narrow_some(square[i], pixel, some);
            }
          }
      } else {
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t x = 0; x < count; ++x)
            narrow(Vec<A>{} + from[c * step + x], to + c * map.c + x * map.pixel, 1);
      }
    }
  }

  // Writes a line's keys from[line][pixel][step] to a gradient, or adds them to it.
  void give_rows(const Map& map, const Task& t, int64_t width, int64_t channel, int64_t channels, A* from,
                 int64_t step, int64_t line_step, bool add) {
    if (add)
      fetch<false, true>(map, t, width, channel, channels, 0, p.length, A(1), [&](int64_t line, A*, const A* old) {
        const int64_t old_step = round_up(channels, L);
        for (int64_t x = 0; x < p.length; ++x)
          for (int64_t c = 0; c < channels; c += L) {
            A* to = from + line * line_step + x * step + c;
            store(to, load(to) + load(old + x * old_step + c));
          }
      });
    if (map.c == 1 && map.pixel != 1) {
      for (int64_t line = 0; line < t.lines; ++line)
        for (int64_t x = 0; x < p.length; ++x) {
          T* to = at(map, t, width, channel, x) + line * map.line;
          const A* in = from + line * line_step + x * step;
          int64_t c = 0;
          for (; c + L <= channels; c += L) narrow(load(in + c), to + c);
          if (c < channels) narrow_some(load(in + c), to + c, channels - c);
        }
      return;
    }
    for (int64_t line = 0; line < t.lines; ++line)
      turn(from + line * line_step, step, p.length, channels, planar + line * channels * long_row, long_row);
    give(map, t, width, channel, channels, 0, p.length, planar, long_row, channels * long_row);
  }
};
