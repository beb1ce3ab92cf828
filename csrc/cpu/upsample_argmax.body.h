// Argmax of upsampled logits for one instruction set; see upsample_argmax.cpp for the formula and the plan.
#include "cpu/bilinear.body.h"

constexpr int64_t pixel_block = 64;  // of a mean of softmaxes, at a time

// The largest of the blends of four neighbours at each phase, the lowest class that has it, and, if asked for,
// sum_k exp(z_k - largest).
template <typename A, int N>
[[gnu::noinline]] void largest(const A* upper, const A* lower, A row_weight, int64_t classes, int64_t stride,
                               int64_t right, const A* right_share, int64_t width, Ints<A>* label, Vec<A>* total) {
  using B = typename Simd<A>::bits;
  using Index = decltype(B{}[0] + 0);
  const Vec<A> w = Vec<A>{} + row_weight;
  Vec<A> best[N], share[N];
  B index[N] = {};
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) share[i] = load(right_share + i * width), best[i] = Vec<A>{} - A(__builtin_inf());
  for (int64_t k = 0; k < classes; ++k) {
    const int64_t at = k * stride;
    const Vec<A> a = blend<A>(load(upper + at), load(lower + at), w);
    const Vec<A> rise = blend<A>(load(upper + at + right), load(lower + at + right), w) - a;
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      const Vec<A> z = a + share[i] * rise;
      const auto more = z > best[i];
      best[i] = more ? z : best[i];
      index[i] = more ? B{} + Index(k) : index[i];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) label[i] = __builtin_convertvector(index[i], Ints<A>);
  if (!total) return;
  Vec<A> sum[N] = {};
  for (int64_t k = 0; k < classes; ++k) {
    const int64_t at = k * stride;
    const Vec<A> a = blend<A>(load(upper + at), load(lower + at), w);
    const Vec<A> rise = blend<A>(load(upper + at + right), load(lower + at + right), w) - a;
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) sum[i] += vexp2_any<A>((a + share[i] * rise - best[i]) * A(log2e));
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) total[i] = sum[i];
}

template <typename A>
struct Worker {
  static constexpr int L = Simd<A>::lanes;

  const Problem& p;
  const int64_t tile;  // output pixels of a row that are worked on at a time
  explicit Worker(const Problem& p) : p(p), tile(tile_pixels(p)) {}

  static int64_t tile_pixels(const Problem& p) {
    constexpr double cache = 1024 * 1024 / sizeof(A);
    double one = p.maps > 1 ? 1 : 0;
    for (int64_t m = 0; m < p.maps; ++m)
      one += p.horizontal[m].in <= p.horizontal[m].out ? 3 * p.horizontal[m].step : 6;
    const int64_t pixels = int64_t(cache / (one * double(p.classes) + 8)) / pixel_block * pixel_block;
    return least(most(pixels, pixel_block), p.horizontal[0].out);
  }

  // One of the maps: its items of the tile, and their columns in two rows of it.
  struct Map {
    Items<A> items;
    A* slots[2];
    int64_t held[2];
    int64_t first;  // the tile's first pixel among the items'
  };
  struct Scratches {
    Map* maps;
    A *v, *z, *mean;  // [classes][stride], [classes][pixel_block], [classes][tile]
    A* confidence;  // of the items' pixels in one row
    int32_t* labels;
  };
  Scratches scratches(Arena& arena) const {
    Scratches s;
    s.maps = arena.take<Map>(p.maps);
    int64_t v = 0, pixels = round_up(tile, pixel_block);
    for (int64_t m = 0; m < p.maps; ++m) {
      const Line& line = p.horizontal[m];
      Map map;
      map.items = Items<A>(line, line.in <= line.out ? int64_t(double(tile) * line.step) + 3 : tile);
      map.items.take(arena);
      for (A*& slot : map.slots) slot = arena.template take<A>(p.classes * map.items.stride + L);
      v = most(v, p.classes * map.items.stride + L), pixels = most(pixels, map.items.phases * map.items.room);
      if (arena.base) s.maps[m] = map;
    }
    const bool several = p.maps > 1;
    s.v = arena.template take<A>(several ? v : 0);
    s.z = arena.template take<A>(several ? p.classes * pixel_block : 0);
    s.mean = arena.template take<A>(several ? p.classes * round_up(tile, pixel_block) : 0);
    s.confidence = arena.template take<A>(pixels), s.labels = arena.take<int32_t>(pixels);
    return s;
  }

  // Output rows begin .. end - 1 of all images.
  void run(Scratches& s, int64_t begin, int64_t end) const {
    for (int64_t x = 0; x < p.horizontal[0].out; x += tile) {
      const int64_t pixels = least(tile, p.horizontal[0].out - x);
      for (int64_t m = 0; m < p.maps; ++m) {
        Map& map = s.maps[m];
        const Line& line = p.horizontal[m];
        map.items.upwards ? map.items.set(line.interval[x], line.interval[x + pixels - 1] + 1)
                          : map.items.set(x, x + pixels);
        map.first = x - map.items.pixel_begin;
        map.held[0] = map.held[1] = -1;
      }
      for (int64_t r = begin; r < end; ++r) {
        const int64_t n = r / p.vertical[0].out, y = r % p.vertical[0].out;
        p.maps > 1 ? of_mean(s, n, y, pixels) : of_one(s, n, y);
        put(s, n, y, x, pixels, p.maps > 1 ? 0 : s.maps[0].first);
      }
    }
  }

  // The columns of one row of a map; finite, so that differences are: NaN counts as infinity.
  const A* fetch(Map& map, int64_t m, int64_t n, int64_t y) const {
    const int64_t key = n * p.vertical[m].in + y;
    A* slot = map.slots[y % 2];
    if (map.held[y % 2] == key) return slot;
    map.held[y % 2] = key;
    const Strided& logits = p.logits[m];
    with_storage<A>(p.dtype, [&]<typename T>() {
      const T* row = static_cast<const T*>(logits.data) + n * logits.n + y * logits.y;
      map.items.fetch(row, logits.c, logits.x, p.classes, y + 1 < p.vertical[m].in ? logits.y : 0, slot);
    });
    const Vec<A> bound = Vec<A>{} + (sizeof(A) == 8 ? A(1e300) : A(1e38));
    for (int64_t x = 0; x < p.classes * map.items.stride; x += L) {
      const Vec<A> z = load(slot + x), below = z < bound ? z : bound;
      store(slot + x, below > -bound ? below : -bound);
    }
    return slot;
  }

  void of_one(Scratches& s, int64_t n, int64_t y) const {
    Map& map = s.maps[0];
    const Items<A>& items = map.items;
    const Line& line = p.vertical[0];
    const A* upper = fetch(map, 0, n, most(line.interval[y] - 1, 0));
    const A* lower = fetch(map, 0, n, least(line.interval[y], line.in - 1));
    for (int64_t j = 0; j < items.count; j += L)
      for (int64_t i = 0; i < items.phases; i += items.chunk)
        with_phases(items.chunk, [&]<int N>() {
          Ints<A> label[N] = {};
          Vec<A> total[N] = {};
          largest<A, N>(upper + j, lower + j, A(line.weight[y]), p.classes, items.stride, items.right,
                        items.right_share + i * items.width + j, items.width, label,
                        p.with_confidence ? total : nullptr);
          items.template by_pixel<N, int32_t>(label, j, i, s.labels, 1);
          if (!p.with_confidence) return;
          for (int e = 0; e < N; ++e) total[e] = 1 / total[e];
          items.template by_pixel<N, A>(total, j, i, s.confidence, 1);
        });
  }

  void of_mean(Scratches& s, int64_t n, int64_t y, int64_t pixels) const {
    const int64_t padded = round_up(tile, pixel_block);
    for (int64_t m = 0; m < p.maps; ++m) {
      Map& map = s.maps[m];
      const Items<A>& items = map.items;
      const Line& line = p.vertical[m];
      const A* upper = fetch(map, m, n, most(line.interval[y] - 1, 0));
      const A* lower = fetch(map, m, n, least(line.interval[y], line.in - 1));
      const Vec<A> w = Vec<A>{} + A(line.weight[y]);
      for (int64_t x = 0; x < p.classes * items.stride; x += L)
        store(s.v + x, blend<A>(load(upper + x), load(lower + x), w));
      for (int64_t x = 0; x < pixels; x += pixel_block) {
        const int64_t first = map.first + x, count = least(pixel_block, pixels - x);
        add_softmax(s, items, p.horizontal[m], first, count, m == 0, s.mean + x, padded);
      }
    }
    for (int64_t x = 0; x < pixels; x += L) {
      using B = typename Simd<A>::bits;
      using Index = decltype(B{}[0] + 0);
      Vec<A> best = Vec<A>{} - 1;
      B index = {};
      for (int64_t k = 0; k < p.classes; ++k) {
        const Vec<A> mean = load(s.mean + k * padded + x);
        const auto more = mean > best;
        best = more ? mean : best, index = more ? B{} + Index(k) : index;
      }
      for (int l = 0; l < L; ++l) s.labels[x + l] = static_cast<int32_t>(index[l]);
      store(s.confidence + x, best / A(p.maps));
    }
  }

  // mean[k][stride] += the softmax of one map at a block of pixels.
  void add_softmax(Scratches& s, const Items<A>& items, const Line& line, int64_t first, int64_t count, bool fresh,
                   A* mean, int64_t stride) const {
    int32_t column[pixel_block];
    A weight[pixel_block];
    for (int i = 0; i < pixel_block; ++i) {
      const int64_t x = first + least(i, count - 1), pixel = items.pixel_begin + x;
      column[i] = static_cast<int32_t>(items.upwards ? line.interval[pixel] - items.begin : x);
      weight[i] = A(line.weight[pixel]);
    }
    for (int64_t k = 0; k < p.classes; ++k) {
      const A *left = s.v + k * items.stride, *right = left + items.right;
      A* z = s.z + k * pixel_block;
      for (int i = 0; i < pixel_block; i += L) {
        const Ints<A> at = Pack<int32_t, L>::at(column + i);
        const Vec<A> a = gather(left, at), b = gather(right, at);
        store(z + i, a + load(weight + i) * (b - a));
      }
    }
    for (int64_t i = 0; i < pixel_block; i += L) {
      A* z = s.z + i;
      Vec<A> top = load(z), sum = {};
      for (int64_t k = 1; k < p.classes; ++k) {
        const Vec<A> other = load(z + k * pixel_block);
        top = other > top ? other : top;
      }
      for (int64_t k = 0; k < p.classes; ++k) {
        const Vec<A> e = vexp2_any<A>((load(z + k * pixel_block) - top) * A(log2e));
        sum += e;
        store(z + k * pixel_block, e);
      }
      const Vec<A> inverse = 1 / sum;
      for (int64_t k = 0; k < p.classes; ++k) {
        A* to = mean + k * stride + i;
        store(to, (fresh ? Vec<A>{} : load(to)) + load(z + k * pixel_block) * inverse);
      }
    }
  }

  void put(const Scratches& s, int64_t n, int64_t y, int64_t x, int64_t pixels, int64_t first) const {
    const Strided& labels = p.labels;
    const int64_t to = n * labels.n + y * labels.y + x * labels.x;
    const int32_t* from = s.labels + first;
    if (p.narrow_labels) {
      uint8_t* out = static_cast<uint8_t*>(labels.data) + to;
      for (int64_t i = 0; i < pixels; ++i) out[i * labels.x] = static_cast<uint8_t>(from[i]);
    } else {
      int64_t* out = static_cast<int64_t*>(labels.data) + to;
      for (int64_t i = 0; i < pixels; ++i) out[i * labels.x] = from[i];
    }
    if (!p.with_confidence) return;
    A* confidence = static_cast<A*>(p.confidence.data) + n * p.confidence.n + y * p.confidence.y + x * p.confidence.x;
    for (int64_t i = 0; i < pixels; ++i) confidence[i * p.confidence.x] = s.confidence[first + i];
  }
};

template <typename A>
void run_as(const Problem& p, int64_t begin, int64_t end, Scratch& scratch) {
  const Worker<A> worker(p);
  Arena arena{nullptr};
  worker.scratches(arena);
  arena = {scratch.zeroed(arena.used)};
  if (!arena.base) return;
  auto s = worker.scratches(arena);
  worker.run(s, begin, end);
}

inline void run(const Problem& p, int64_t begin, int64_t end, Scratch& scratch) {
  p.dtype == DType::float64 ? run_as<double>(p, begin, end, scratch) : run_as<float>(p, begin, end, scratch);
}
