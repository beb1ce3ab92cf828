// Cross-entropy of upsampled logits for one instruction set; see upsample_cross_entropy.cpp for the formula and the plan.
#include "cpu/bilinear.body.h"

// Logits that differ by more than this at a source pixel (as powers of 2) may leave the range of a product of powers.
constexpr double widest_spread = 90;
constexpr int max_rows = 8;  // output rows that a pass of the backward takes
constexpr int coefficients = 5;

// total[i] = sum_k 2^u_k(i), u_k(i) the blend of four neighbours at phase i; the rows' blend is left in v.
template <typename A, int N>
[[gnu::noinline]] void sum_powers(const A* upper, const A* lower, A row_weight, int64_t classes, int64_t stride,
                                  int64_t right, const A* start, A step, A offset, A* v, A* total,
                                  int64_t total_stride) {
  const Vec<A> first = load(start) + offset, w = Vec<A>{} + row_weight;
  Vec<A> sum[N] = {};
  for (int64_t k = 0; k < classes; ++k, upper += stride, lower += stride, v += stride) {
    const Vec<A> a = blend<A>(load(upper), load(lower), w), b = blend<A>(load(upper + right), load(lower + right), w);
    store(v, a), store(v + right, b);
    Vec<A> e = vexp2(a + first * (b - a));
    const Vec<A> ratio = N > 1 ? vexp2(step * (b - a)) : Vec<A>{};
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      sum[i] += e;
      if (i + 1 < N) e *= ratio;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) store(total + i * total_stride, sum[i]);
}

// The same for any logits: sum_k 2^(u_k(i) - top(i)).
template <typename A, int N>
[[gnu::noinline]] void sum_any_powers(const A* upper, const A* lower, A row_weight, int64_t classes, int64_t stride,
                                      int64_t right, const A* left_share, const A* right_share, int64_t share_stride,
                                      A* v, A* total, A* top, int64_t total_stride) {
  const Vec<A> w = Vec<A>{} + row_weight;
  Vec<A> largest[N], sum[N] = {};
  for (int i = 0; i < N; ++i) largest[i] = Vec<A>{} - A(__builtin_inf());
  for (int64_t k = 0; k < classes; ++k) {
    const int64_t at = k * stride;
    const Vec<A> a = blend<A>(load(upper + at), load(lower + at), w);
    const Vec<A> b = blend<A>(load(upper + at + right), load(lower + at + right), w);
    store(v + at, a), store(v + at + right, b);
    for (int i = 0; i < N; ++i) {
      const Vec<A> u = a * load(left_share + i * share_stride) + b * load(right_share + i * share_stride);
      largest[i] = u > largest[i] ? u : largest[i];
    }
  }
  for (int64_t k = 0; k < classes; ++k) {
    const int64_t at = k * stride;
    const Vec<A> a = load(v + at), b = load(v + at + right);
    for (int i = 0; i < N; ++i) {
      const Vec<A> u = a * load(left_share + i * share_stride) + b * load(right_share + i * share_stride);
      sum[i] += vexp2_any<A>(u - largest[i]);
    }
  }
  for (int i = 0; i < N; ++i) store(total + i * total_stride, sum[i]), store(top + i * total_stride, largest[i]);
}

// What the pixels of `rows` output rows give to their four neighbours: sums of (share of the neighbour) * 2^u_k times
// coefficients [rows][N][coefficients] of vectors.
template <typename A, int N, bool Any>
[[gnu::noinline]] void gather_powers(const A* upper, const A* lower, const A* row_weights, int64_t rows,
                                     int64_t classes, int64_t stride, int64_t right, const A* start, A step, A offset,
                                     const A* factors, A* upper_sum, A* lower_sum, int64_t sum_stride,
                                     int64_t sum_right) {
  constexpr int L = Simd<A>::lanes;
  const Vec<A> first = load(start) + offset;
  for (int64_t k = 0; k < classes; ++k, upper += stride, lower += stride) {
    const Vec<A> u00 = load(upper), u01 = load(upper + right), u10 = load(lower), u11 = load(lower + right);
    Vec<A> g00 = {}, g01 = {}, g10 = {}, g11 = {};
    const A* f = factors;
    for (int64_t y = 0; y < rows; ++y) {
      const Vec<A> w1 = Vec<A>{} + row_weights[y], w0 = 1 - w1;
      const Vec<A> a = u00 * w0 + u10 * w1, b = u01 * w0 + u11 * w1;
      Vec<A> left = {}, other = {};
      if constexpr (Any) {
        for (int i = 0; i < N; ++i, f += coefficients * L) {
          const Vec<A> u = a * load(f + 2 * L) + b * load(f + 3 * L) + load(f + 4 * L), p = vexp2_any<A>(u);
          const Vec<A> f0 = load(f), f1 = load(f + L), e = f0 + f1 != 0 ? p : Vec<A>{};
          left += f0 * e, other += f1 * e;
        }
      } else {
        Vec<A> e = vexp2(a + first * (b - a));
        const Vec<A> ratio = N > 1 ? vexp2(step * (b - a)) : Vec<A>{};
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i, f += coefficients * L) {
          left += load(f) * e, other += load(f + L) * e;
          if (i + 1 < N) e *= ratio;
        }
      }
      g00 += left * w0, g01 += other * w0, g10 += left * w1, g11 += other * w1;
    }
    A *up = upper_sum + k * sum_stride, *low = lower_sum + k * sum_stride;
    store(up, load(up) + g00), store(up + sum_right, load(up + sum_right) + g01);
    store(low, load(low) + g10), store(low + sum_right, load(low + sum_right) + g11);
  }
}

template <typename T, typename A = typename Sum<T>::type>
struct Worker {
  static constexpr int L = Simd<A>::lanes;

  const Problem& p;
  const int64_t planes;  // rows of planes: the classes, and after them
  const int64_t top, weighted, spread;  // the largest logit; sum_k w_k u_k; the largest -u_k
  const int64_t tile_columns;  // backward
  Items<A> items;

  Worker(const Problem& p, bool backward)
      : p(p), planes(p.classes + 3), top(p.classes), weighted(p.classes + 1), spread(p.classes + 2),
        tile_columns(least(room(p, backward) - 1, p.horizontal.in)), items(p.horizontal, room(p, backward)) {}

  // Items of a tile: the rows that a tile works on stay in a core's cache.
  static int64_t room(const Problem& p, bool backward) {
    constexpr int64_t cache = 1024 * 1024 / int64_t(sizeof(A));
    const int64_t sides = p.horizontal.in <= p.horizontal.out ? 1 : 2, phases = sides > 1 ? 1 : p.horizontal.longest;
    const int64_t one = backward ? p.classes * (2 * sides + 5) + max_rows * 6 * phases : p.classes * 3 * sides + 8 * phases;
    return most(cache / one / L * L, L) - 1;
  }

  // u_k = (z_k - top) log2(e) of the columns of all items, of one row of logits.
  struct Slot {
    A* data;
    int64_t held;
  };
  void fetch(Slot& slot, int64_t n, int64_t y) const {
    const int64_t key = n * p.vertical.in + y;
    if (slot.held == key) return;
    slot.held = key;
    const T* row = static_cast<const T*>(p.logits.data) + n * p.logits.n + y * p.logits.y;
    items.fetch(row, p.logits.c, p.logits.x, p.classes, slot.data);
    const int64_t stride = items.stride;
    const A* weight = static_cast<const A*>(p.class_weight);
    for (int64_t x = 0; x < stride; x += L) {
      A* at = slot.data + x;
      Vec<A> largest = load(at), smallest = largest;
      for (int64_t k = 1; k < p.classes; ++k) {
        const Vec<A> z = load(at + k * stride);
        largest = z > largest ? z : largest;
        smallest = z < smallest ? z : smallest;
      }
      Vec<A> sum = {}, finite = {};  // finite: NaN if any logit is not, else 0
      for (int64_t k = 0; k < p.classes; ++k) {
        const Vec<A> u = (load(at + k * stride) - largest) * A(log2e);
        store(at + k * stride, u);
        finite += u * 0;
        if (p.smoothing != 0) sum += u * (weight ? weight[k] : A(1));
      }
      store(at + top * stride, largest);
      store(at + weighted * stride, sum);
      store(at + spread * stride, (largest - smallest) * A(log2e) + finite);
    }
  }

  bool within_range(const A* upper, const A* lower) const {
    const A *a = upper + spread * items.stride, *b = lower + spread * items.stride;
    bool good = true;
    for (int64_t i = 0; i < L; ++i)
      good &= a[i] <= A(widest_spread) && b[i] <= A(widest_spread) && a[i + items.right] <= A(widest_spread) &&
              b[i + items.right] <= A(widest_spread);
    return good;
  }

  struct Forward {
    Slot slots[2];
    A *v, *log, *lse, *rest;  // [planes][stride]; [padded_phases][width]
    int32_t* labels;
  };
  Forward forward_scratch(Arena& arena) {
    Forward s;
    items.take(arena);
    for (Slot& slot : s.slots) slot = {arena.template take<A>(planes * items.stride + L), -1};
    s.v = arena.template take<A>(planes * items.stride + L);
    const int64_t places = items.padded_phases() * items.width;
    s.log = arena.template take<A>(places), s.lse = arena.template take<A>(places);
    s.rest = arena.template take<A>(places);
    s.labels = arena.take<int32_t>(items.pixel_room());
    return s;
  }

  // Output rows begin .. end - 1 of all images.
  void forward(Forward& s, int64_t begin, int64_t end) {
    for (int64_t item = 0; item < items.items(); item += items.room) {
      items.set(item, least(item + items.room, items.items()));
      for (Slot& slot : s.slots) slot.held = -1;
      for (int64_t r = begin; r < end; ++r) forward_row(s, r / p.vertical.out, r % p.vertical.out);
    }
  }

  void forward_row(Forward& s, int64_t n, int64_t y) {
    const int64_t q = p.vertical.interval[y], above = most(q - 1, 0), below = least(q, p.vertical.in - 1);
    Slot &upper = s.slots[above % 2], &lower = s.slots[below % 2];
    fetch(upper, n, above), fetch(lower, n, below);
    const A w = A(p.vertical.weight[y]);
    const int64_t stride = items.stride, width = items.width;
    for (int64_t x = top * stride; x < spread * stride; x += L)
      store(s.v + x, blend<A>(load(upper.data + x), load(lower.data + x), Vec<A>{} + w));
    for (int64_t j = 0; j < items.count; j += L) {
      const A *a = upper.data + j, *b = lower.data + j, *v_top = s.v + top * stride + j;
      const bool near = within_range(a, b);
      for (int64_t i = 0; i < items.phases; i += items.chunk) {
        const int64_t at = i * width + j;
        with_phases(items.chunk, [&]<int N>() {
          if (near)
            sum_powers<A, N>(a, b, w, p.classes, stride, items.right, items.start + j, A(p.horizontal.step),
                             A(i * p.horizontal.step), s.v + j, s.log + at, width);
          else
            sum_any_powers<A, N>(a, b, w, p.classes, stride, items.right, items.left_share + at,
                                 items.right_share + at, width, s.v + j, s.log + at, s.lse + at, width);
        });
        for (int64_t e = at; e < at + items.chunk * width; e += width) {
          const Vec<A> left = load(items.left_share + e), right = load(items.right_share + e);
          const Vec<A> log = vlog<A>(load(s.log + e)) + (near ? Vec<A>{} : load(s.lse + e) * A(ln2));
          store(s.log + e, log);
          store(s.lse + e, log + left * load(v_top) + right * load(v_top + items.right));
          if (p.smoothing != 0)
            store(s.rest + e, A(p.all_weights) * log -
                                  A(ln2) * (left * load(v_top + stride) + right * load(v_top + stride + items.right)));
        }
      }
    }
    forward_pixels(s, n, y);
  }

  // Loss and lse of the tile's pixels of one output row.
  void forward_pixels(Forward& s, int64_t n, int64_t y) {
    read_labels(s.labels, n, y, p.wrong);
    A* lse = static_cast<A*>(p.lse.data) + n * p.lse.n + y * p.lse.y + items.pixel_begin * p.lse.x;
    A* loss = static_cast<A*>(p.loss.data);
    if (p.per_pixel) loss += n * p.loss.n + y * p.loss.y + items.pixel_begin * p.loss.x;
    const A* class_weight = static_cast<const A*>(p.class_weight);
    const A own = A(1 - p.smoothing), shared = A(p.smoothing / double(p.classes));
    const int32_t stride = int32_t(items.stride), right = int32_t(items.right);
    double loss_sum[L] = {}, count_sum[L] = {};
    for (int64_t x = 0; x < items.pixels; x += pixel_block) {
      A value[pixel_block], pixel_lse[pixel_block], weight[pixel_block];
      const int32_t *label = s.labels + x, *item = items.item + x, *place = items.place + x;
      const A* share = items.weight + x;
      for (int i = 0; i < pixel_block; ++i) {
        const int32_t at = (label[i] > 0 ? label[i] : 0) * stride + item[i];
        const A u = s.v[at] * (1 - share[i]) + s.v[at + right] * share[i];
        value[i] = own * (s.log[place[i]] - A(ln2) * u);
        pixel_lse[i] = s.lse[place[i]];
      }
      for (int i = 0; i < pixel_block; ++i) weight[i] = label[i] >= 0 ? 1 : 0;
      if (class_weight)
        for (int i = 0; i < pixel_block; ++i) weight[i] *= class_weight[label[i] > 0 ? label[i] : 0];
      for (int i = 0; i < pixel_block; ++i) value[i] = label[i] >= 0 ? weight[i] * value[i] : 0;
      if (shared != 0)
        for (int i = 0; i < pixel_block; ++i) value[i] += label[i] >= 0 ? shared * s.rest[place[i]] : 0;
      for (int i = 0; i < pixel_block; i += L)
        for (int l = 0; l < L; ++l) loss_sum[l] += value[i + l], count_sum[l] += weight[i + l];
      const int64_t pixels = least(pixel_block, items.pixels - x);
      put(lse + x * p.lse.x, p.lse.x, pixel_lse, pixels);
      if (p.per_pixel) put(loss + x * p.loss.x, p.loss.x, value, pixels);
    }
    double* sums = p.sums + 2 * (n * p.vertical.out + y);
    for (int l = 0; l < L; ++l) sums[0] += loss_sum[l], sums[1] += count_sum[l];
  }

  void read_labels(int32_t* labels, int64_t n, int64_t y, FirstIndex* wrong) const {
    p.labels.read(n, y, items.pixel_begin, 1, items.pixels, labels, wrong);
    for (int64_t x = items.pixels; x < round_up(items.pixels, pixel_block); ++x) labels[x] = -1;
  }
  static void put(A* to, int64_t stride, const A* from, int64_t count) {
    if (stride == 1) return (void)__builtin_memcpy(to, from, count * sizeof(A));
    for (int64_t i = 0; i < count; ++i) to[i * stride] = from[i];
  }

  struct Backward {
    Slot slots[2];
    A* sums[2];  // of a source row: [classes + 1][2][width], what its left and right columns get; last, of grad_loss
    A *factors, *out;
    // One output row by pixel, and max_rows of them by item.
    int32_t *labels, *places;
    A *weight, *own, *counted, *lse;
    A *item_weight, *item_own, *item_counted, *item_lse;
  };
  Backward backward_scratch(Arena& arena) {
    Backward s;
    items.take(arena);
    const int64_t pixels = items.pixel_room(), places = max_rows * items.padded_phases() * items.width;
    for (Slot& slot : s.slots) slot = {arena.template take<A>(planes * items.stride + L), -1};
    for (A*& sums : s.sums) sums = arena.template take<A>((p.classes + 1) * 2 * items.width + L);
    s.factors = arena.template take<A>(max_rows * items.chunk * coefficients * L);
    s.out = arena.template take<A>(p.classes * round_up(tile_columns, L));
    s.labels = arena.take<int32_t>(pixels), s.places = arena.take<int32_t>(places);
    for (A** part : {&s.weight, &s.own, &s.counted, &s.lse}) *part = arena.template take<A>(pixels);
    for (A** part : {&s.item_weight, &s.item_own, &s.item_counted, &s.item_lse})
      *part = arena.template take<A>(places);
    return s;
  }

  // Source rows begin .. end - 1 of all images.
  void backward(Backward& s, int64_t begin, int64_t end) {
    for (int64_t column = 0; column < p.horizontal.in; column += tile_columns) {
      const int64_t last = least(column + tile_columns, p.horizontal.in);
      items.upwards ? items.set(column, last + 1)
                    : items.set(p.horizontal.first[column], p.horizontal.first[last + 1]);
      for (Slot& slot : s.slots) slot.held = -1;
      for (int64_t r = begin; r < end;) {
        const int64_t n = r / p.vertical.in, y = r % p.vertical.in, stop = least(p.vertical.in, y + end - r);
        backward_rows(s, n, y, stop, column, last - column);
        r += stop - y;
      }
    }
  }

  void backward_rows(Backward& s, int64_t n, int64_t begin, int64_t end, int64_t column, int64_t columns) {
    for (A* sums : s.sums) clear(sums);
    for (int64_t q = begin; q <= end; ++q) {
      const int64_t above = most(q - 1, 0), below = least(q, p.vertical.in - 1);
      const int64_t last = p.vertical.first[q + 1];
      if (items.count > 0)
        for (int64_t y = p.vertical.first[q]; y < last; y += max_rows) {
          fetch(s.slots[above % 2], n, above), fetch(s.slots[below % 2], n, below);
          backward_interval(s, n, y, least(max_rows, last - y), above % 2, below % 2);
        }
      if (q > begin) finish_row(s, s.sums[above % 2], n, q - 1, column, columns);
      if (q > begin || q > 0) clear(s.sums[(q - 1) % 2]);
    }
  }
  void clear(A* sums) const {
    for (int64_t x = 0; x < (p.classes + 1) * 2 * items.width; x += L) store(sums + x, Vec<A>{});
  }

  // What `rows` output rows between two source rows give to both.
  void backward_interval(Backward& s, int64_t n, int64_t y0, int64_t rows, int64_t above, int64_t below) {
    const int64_t stride = items.stride, width = items.width, chunk = items.chunk;
    const int64_t places = items.padded_phases() * width;
    const A *upper = s.slots[above].data, *lower = s.slots[below].data;
    A *upper_sum = s.sums[above], *lower_sum = s.sums[below];
    A row_weights[max_rows];
    for (int64_t y = 0; y < rows; ++y) {
      row_weights[y] = A(p.vertical.weight[y0 + y]);
      backward_pixels(s, n, y0 + y, y * places);
    }
    for (int64_t j = 0; j < items.count; j += L) {
      const bool near = within_range(upper + j, lower + j);
      for (int64_t i = 0; i < items.phases; i += chunk) {
        A* f = s.factors;
        for (int64_t y = 0; y < rows; ++y) {
          const Vec<A> w = Vec<A>{} + row_weights[y];
          const int64_t t = top * stride + j;
          const Vec<A> left_top = blend<A>(load(upper + t), load(lower + t), w);
          const Vec<A> right_top = blend<A>(load(upper + t + items.right), load(lower + t + items.right), w);
          for (int64_t at = i * width + j; at < (i + chunk) * width + j; at += width, f += coefficients * L) {
            const Vec<A> left = load(items.left_share + at), right = load(items.right_share + at);
            const Vec<A> shift = (left * left_top + right * right_top - load(s.item_lse + y * places + at)) * A(log2e);
            Vec<A> weight = load(s.item_weight + y * places + at);
            if (near) weight *= vexp2(left + right != 0 ? shift : Vec<A>{});
            store(f, left * weight), store(f + L, right * weight);
            store(f + 2 * L, left), store(f + 3 * L, right), store(f + 4 * L, shift);
          }
        }
        with_phases(chunk, [&]<int N>() {
          const auto gather = near ? gather_powers<A, N, false> : gather_powers<A, N, true>;
          gather(upper + j, lower + j, row_weights, rows, p.classes, stride, items.right, items.start + j,
                 A(p.horizontal.step), A(i * p.horizontal.step), s.factors, upper_sum + j, lower_sum + j, 2 * width,
                 width);
        });
      }
    }
    // The pixels' own classes, one by one. Neighbours in the order of items touch different columns.
    for (int64_t y = 0; y < rows; ++y)
      for (int64_t i = 0; i < items.phases; ++i) {
        const A below_share = row_weights[y], above_share = 1 - below_share;
        const int64_t row = y * places + i * width;
        const A *left = items.left_share + i * width, *right = items.right_share + i * width;
        for (int64_t j = 0; j < items.count; ++j) {
          const A own = s.item_own[row + j], l = left[j] * own, r = right[j] * own;
          const int64_t at = s.places[row + j] + j;
          upper_sum[at] -= above_share * l, upper_sum[at + width] -= above_share * r;
          lower_sum[at] -= below_share * l, lower_sum[at + width] -= below_share * r;
        }
        if (p.smoothing == 0) continue;
        A *upper_count = upper_sum + p.classes * 2 * width, *lower_count = lower_sum + p.classes * 2 * width;
        for (int64_t j = 0; j < items.count; ++j) {
          const A l = left[j] * s.item_counted[row + j], r = right[j] * s.item_counted[row + j];
          upper_count[j] += above_share * l, upper_count[j + width] += above_share * r;
          lower_count[j] += below_share * l, lower_count[j + width] += below_share * r;
        }
      }
  }

  // One output row's factors of 2^(u - lse), of the pixel's own class and of all classes, in the order of items.
  void backward_pixels(Backward& s, int64_t n, int64_t y, int64_t at) const {
    read_labels(s.labels, n, y, nullptr);
    const A* class_weight = static_cast<const A*>(p.class_weight);
    const A own = A(1 - p.smoothing), shared = A(p.smoothing / double(p.classes)), all = shared * A(p.all_weights);
    const A* grad = static_cast<const A*>(p.grad_loss.data);
    const A* lse = static_cast<const A*>(p.lse.data) + n * p.lse.n + y * p.lse.y + items.pixel_begin * p.lse.x;
    if (p.per_pixel) grad += n * p.grad_loss.n + y * p.grad_loss.y + items.pixel_begin * p.grad_loss.x;
    take(s.counted, grad, p.grad_loss.x);
    take(s.lse, lse, p.lse.x);
    for (int64_t x = 0; x < items.pixels; ++x) {
      const int32_t label = s.labels[x];
      const A counted = label >= 0 ? s.counted[x] : 0, weight = class_weight ? class_weight[label > 0 ? label : 0] : 1;
      s.counted[x] = counted * shared;
      s.own[x] = counted * own * weight;
      s.weight[x] = counted * (own * weight + all);
    }
    const int64_t places = items.padded_phases() * items.width;
    const int32_t stride = int32_t(2 * items.width);
    for (int64_t e = 0; e < places; ++e) {
      const int32_t x = items.pixel[e];
      s.item_weight[at + e] = s.weight[x], s.item_lse[at + e] = s.lse[x], s.item_own[at + e] = s.own[x];
      s.places[at + e] = (s.labels[x] > 0 ? s.labels[x] : 0) * stride;
    }
    if (shared != 0)
      for (int64_t e = 0; e < places; ++e) s.item_counted[at + e] = s.counted[items.pixel[e]];
  }
  void take(A* to, const A* from, int64_t stride) const {
    if (stride == 1) return (void)__builtin_memcpy(to, from, items.pixels * sizeof(A));
    for (int64_t x = 0; x < items.pixels; ++x) to[x] = from[x * stride];
  }

  // Sums by item become sums by column: the row's gradient.
  void finish_row(Backward& s, const A* sums, int64_t n, int64_t y, int64_t column, int64_t columns) const {
    const int64_t width = items.width, out_width = round_up(tile_columns, L);
    const A* class_weight = static_cast<const A*>(p.class_weight);
    A* counted = s.counted;
    if (p.smoothing != 0) finish_class(counted, sums + p.classes * 2 * width, column, columns);
    for (int64_t k = 0; k < p.classes; ++k) {
      A* out = s.out + k * out_width;
      finish_class(out, sums + k * 2 * width, column, columns);
      if (p.smoothing == 0) continue;
      const A weight = class_weight ? class_weight[k] : 1;
      for (int64_t x = 0; x < columns; ++x) out[x] -= weight * counted[x];
    }
    store_planes(s.out, out_width, p.classes, columns,
                 static_cast<T*>(p.grad_logits.data) + n * p.grad_logits.n + y * p.grad_logits.y +
                     column * p.grad_logits.x,
                 p.grad_logits.c, p.grad_logits.x);
  }
  void finish_class(A* out, const A* sums, int64_t column, int64_t columns) const {
    const A *left = sums, *right = sums + items.width;
    if (items.upwards) {
      for (int64_t x = 0; x < columns; ++x) out[x] = right[x] + left[x + 1];
      if (column == 0) out[0] += left[0];
      if (column + columns == p.horizontal.in) out[columns - 1] += right[columns];
      return;
    }
    for (int64_t x = 0; x < columns; ++x) out[x] = 0;
    for (int64_t j = 0; j < items.count; ++j) {
      const int64_t l = items.left_column(items.begin + j) - column, r = items.right_column(items.begin + j) - column;
      if (l >= 0) out[l] += left[j];
      if (r < columns) out[r] += right[j];
    }
  }
};

template <typename T>
void run(const Problem& p, bool backward, int64_t begin, int64_t end, Scratch& scratch) {
  Worker<T> worker(p, backward);
  Arena arena{nullptr};
  backward ? (void)worker.backward_scratch(arena) : (void)worker.forward_scratch(arena);
  arena = {scratch.zeroed(arena.used)};
  if (!arena.base) return;
  if (backward) {
    auto s = worker.backward_scratch(arena);
    worker.backward(s, begin, end);
  } else {
    auto s = worker.forward_scratch(arena);
    worker.forward(s, begin, end);
  }
}

inline void run(const Problem& p, bool backward, int64_t begin, int64_t end, Scratch& scratch) {
  switch (p.dtype) {
    case DType::float32: return run<float>(p, backward, begin, end, scratch);
    case DType::float64: return run<double>(p, backward, begin, end, scratch);
    case DType::bfloat16: return run<bf16>(p, backward, begin, end, scratch);
    case DType::float16: return run<fp16>(p, backward, begin, end, scratch);
  }
}
