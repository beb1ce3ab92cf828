// Cross-entropy of upsampled logits for one instruction set; see upsample_cross_entropy.cpp for the plan.
#include "cpu/bilinear.body.h"

// Logits that differ by more than this at a source pixel (as powers of 2) may leave the range of a product of powers.
constexpr double widest_spread = 90;
constexpr double largest_exact = 1 << 20;  // beyond, the rounding of lse may leave it too
constexpr int max_rows = 8;  // output rows that a pass of the backward takes

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

template <typename A>
[[gnu::always_inline]] inline void put_pairs(A* to, Vec<A> left, Vec<A> right, bool add) {
  constexpr int L = Simd<A>::lanes;
  const Vec<A> low = zip<A, false>(left, right), high = zip<A, true>(left, right);
  store(to, add ? load(to) + low : low), store(to + L, add ? load(to + L) + high : high);
}

// What the pixels of `rows` output rows give to their four neighbours: sums of (share of the neighbour) * 2^u_k times
// factors [rows][N][2] of vectors. The powers are products from one row to the next too, for 4 rows at a time.
template <typename A, int N>
[[gnu::noinline]] void spread_powers(const A* upper, const A* lower, const A* row_weights, A row_step, int64_t rows,
                                     int64_t classes, int64_t stride, int64_t right, const A* start, A step, A offset,
                                     const A* factors, A* upper_sum, A* lower_sum, int64_t sum_stride, bool add_upper,
                                     bool add_lower) {
  constexpr int L = Simd<A>::lanes;
  const Vec<A> first = load(start) + offset;
  for (int64_t k = 0; k < classes; ++k, upper += stride, lower += stride) {
    const Vec<A> left_upper = load(upper), left_lower = load(lower);
    const Vec<A> rise_upper = load(upper + right) - left_upper, rise_lower = load(lower + right) - left_lower;
    const Vec<A> first_upper = left_upper + first * rise_upper, first_lower = left_lower + first * rise_lower;
    Vec<A> growth = {}, ratio_growth = {};
    if (rows > 1) growth = vexp2(row_step * (first_lower - first_upper));
    if (rows > 1 && N > 1) ratio_growth = vexp2(row_step * step * (rise_lower - rise_upper));
    Vec<A> g00 = {}, g01 = {}, g10 = {}, g11 = {}, row_first = {}, ratio = {};
    const A* f = factors;
    for (int64_t y = 0; y < rows; ++y, f += 2 * N * L) {
      const Vec<A> w1 = Vec<A>{} + row_weights[y], w0 = 1 - w1;
      if (y % 4 == 0) {
        row_first = vexp2(first_upper * w0 + first_lower * w1);
        if (N > 1) ratio = vexp2(step * (rise_upper * w0 + rise_lower * w1));
      } else {
        row_first *= growth, ratio *= ratio_growth;
      }
      Vec<A> e = row_first, l = load(f) * e, r = load(f + L) * e;
#pragma GCC unroll 8
      for (int i = 1; i < N; ++i) {
        e *= ratio;
        l += load(f + 2 * i * L) * e, r += load(f + 2 * i * L + L) * e;
      }
      g00 += l * w0, g01 += r * w0, g10 += l * w1, g11 += r * w1;
    }
    put_pairs(upper_sum + k * sum_stride, g00, g01, add_upper);
    put_pairs(lower_sum + k * sum_stride, g10, g11, add_lower);
  }
}

// The same for any logits; factors [rows][N][5]: besides, the shares of the columns and what is added to u_k.
template <typename A, int N>
[[gnu::noinline]] void spread_any_powers(const A* upper, const A* lower, const A* row_weights, int64_t rows,
                                         int64_t classes, int64_t stride, int64_t right, const A* factors, A* upper_sum,
                                         A* lower_sum, int64_t sum_stride, bool add_upper, bool add_lower) {
  constexpr int L = Simd<A>::lanes;
  for (int64_t k = 0; k < classes; ++k, upper += stride, lower += stride) {
    Vec<A> g00 = {}, g01 = {}, g10 = {}, g11 = {};
    const A* f = factors;
    for (int64_t y = 0; y < rows; ++y) {
      const Vec<A> w1 = Vec<A>{} + row_weights[y], w0 = 1 - w1;
      const Vec<A> a = load(upper) * w0 + load(lower) * w1, b = load(upper + right) * w0 + load(lower + right) * w1;
      Vec<A> l = {}, r = {};
      for (int i = 0; i < N; ++i, f += 5 * L) {
        const Vec<A> u = a * load(f + 2 * L) + b * load(f + 3 * L) + load(f + 4 * L);
        const Vec<A> p = vexp2_any<A>(u > 0 ? Vec<A>{} : u);  // at most 1, however coarsely a huge lse is rounded
        const Vec<A> f0 = load(f), f1 = load(f + L), e = f0 + f1 != 0 ? p : Vec<A>{};
        l += f0 * e, r += f1 * e;
      }
      g00 += l * w0, g01 += r * w0, g10 += l * w1, g11 += r * w1;
    }
    put_pairs(upper_sum + k * sum_stride, g00, g01, add_upper);
    put_pairs(lower_sum + k * sum_stride, g10, g11, add_lower);
  }
}

template <typename A>
struct Worker {
  static constexpr int L = Simd<A>::lanes;
  using Pair = typename Pack<A, 2>::vec;

  const Problem& p;
  const int64_t planes;                 // of a row: the classes, and after them
  const int64_t top, weighted, spread;  // the largest logit; sum_k w_k u_k; the largest -u_k
  const int64_t tile_columns;           // backward
  const A *class_weight, own, shared, all_weights;
  Items<A> items;

  Worker(const Problem& p, bool backward)
      : p(p), planes(p.classes + 3), top(p.classes), weighted(p.classes + 1), spread(p.classes + 2),
        tile_columns(least(room(p, backward) - 1, p.horizontal.in)),
        class_weight(static_cast<const A*>(p.class_weight)), own(A(1 - p.smoothing)),
        shared(A(p.smoothing / double(p.classes))), all_weights(A(p.all_weights)),
        items(p.horizontal, room(p, backward)) {}

  // Items of a tile: the rows that a tile works on stay in a core's cache.
  static int64_t room(const Problem& p, bool backward) {
    constexpr int64_t cache = 1024 * 1024 / int64_t(sizeof(A));
    const int64_t sides = p.horizontal.in <= p.horizontal.out ? 1 : 2;
    const int64_t one = p.classes * (backward ? 2 * sides + 5 : 3 * sides) + 8;
    return most(cache / one / L * L, L) - 1;
  }

  // u_k = (z_k - top) log2(e) of the columns of all items, of one row of logits.
  struct Slot {
    A* data;
    int64_t held;
  };
  void fetch(Slot& slot, int64_t n, int64_t y) const {
    const int64_t key = n * p.vertical.in + y, stride = items.stride;
    if (slot.held == key) return;
    slot.held = key;
    with_storage<A>(p.dtype, [&]<typename T>() {
      const T* row = static_cast<const T*>(p.logits.data) + n * p.logits.n + y * p.logits.y;
      const int64_t ahead = y + 1 < p.vertical.in ? p.logits.y : 0;
      items.fetch(row, p.logits.c, p.logits.x, p.classes, ahead, slot.data);
    });
    for (int64_t x = 0; x < stride; x += L) {
      A* at = slot.data + x;
      Vec<A> largest = load(at), smallest = largest;
      for (int64_t k = 1; k < p.classes; ++k) {
        const Vec<A> z = load(at + k * stride);
        largest = z > largest ? z : largest;
        smallest = z < smallest ? z : smallest;
      }
      Vec<A> sum = {}, finite = {};  // finite: NaN if any logit is not, else 0
      const auto exact = largest < A(largest_exact) && largest > -A(largest_exact);
      for (int64_t k = 0; k < p.classes; ++k) {
        const Vec<A> u = (load(at + k * stride) - largest) * A(log2e);
        store(at + k * stride, u);
        finite += u * 0;
        if (shared != 0) sum += u * (class_weight ? class_weight[k] : A(1));
      }
      store(at + top * stride, largest);
      store(at + weighted * stride, sum);
      const Vec<A> width = (largest - smallest) * A(log2e) + finite;
      store(at + spread * stride, exact ? width : Vec<A>{} + A(__builtin_inf()));
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

  // What is added to a loss of 0 and a count of 0 where label < 0.
  Vec<A> weight_of(Ints<A> label) const {
    const Vec<A> counted = -__builtin_convertvector(label >= 0, Vec<A>);
    return class_weight ? counted * gather(class_weight, label > 0 ? label : 0) : counted;
  }
  void read_labels(int32_t* labels, int64_t n, int64_t y, FirstIndex* wrong) const {
    p.labels.read(n, y, items.pixel_begin, 1, items.pixels, labels, wrong);
  }

  struct Forward {
    Slot slots[2];
    A* v;  // [planes][stride]
    int32_t* labels;
  };
  Forward forward_scratch(Arena& arena) {
    Forward s;
    items.take(arena);
    for (Slot& slot : s.slots) slot = {arena.template take<A>(planes * items.stride + L), -1};
    s.v = arena.template take<A>(planes * items.stride + L);
    s.labels = arena.take<int32_t>(items.phases * items.room);
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
    read_labels(s.labels, n, y, p.wrong);
    const Vec<A> w = Vec<A>{} + A(p.vertical.weight[y]);
    for (int64_t x = top * items.stride; x < spread * items.stride; x += L)
      store(s.v + x, blend<A>(load(upper.data + x), load(lower.data + x), w));
    double sums[2][L] = {};
    for (int64_t j = 0; j < items.count; j += L) {
      const bool near = within_range(upper.data + j, lower.data + j);
      for (int64_t i = 0; i < items.phases; i += items.chunk)
        with_phases(items.chunk, [&]<int N>() { forward_block<N>(s, upper.data, lower.data, near, n, y, j, i, sums); });
    }
    double* row_sums = p.sums + 2 * (n * p.vertical.out + y);
    for (int l = 0; l < L; ++l) row_sums[0] += sums[0][l], row_sums[1] += sums[1][l];
  }

  // Phases i .. i + N - 1 of items j .. j + L - 1 of one output row.
  template <int N>
  [[gnu::noinline]] void forward_block(Forward& s, const A* upper, const A* lower, bool near, int64_t n, int64_t y,
                                       int64_t j, int64_t i, double (&sums)[2][L]) const {
    const int64_t stride = items.stride, right = items.right, place = i * items.width + j;
    const A *left_share = items.left_share + place, *right_share = items.right_share + place;
    const A w = A(p.vertical.weight[y]);
    A totals[N * L], tops[N * L] = {};
    if (near)
      sum_powers<A, N>(upper + j, lower + j, w, p.classes, stride, right, items.start + j, A(p.horizontal.step),
                       A(i * p.horizontal.step), s.v + j, totals, L);
    else
      sum_any_powers<A, N>(upper + j, lower + j, w, p.classes, stride, right, left_share, right_share, items.width,
                           s.v + j, totals, tops, L);
    Ints<A> label[N], column = {};
    for (int l = 0; l < L; ++l) column[l] = l;
    items.template by_item<N, int32_t>(s.labels, 1, j, i, -1, label);
    Vec<A> loss[N], lse[N], loss_sum = {}, count_sum = {};
    const A* v = s.v + j;
    for (int e = 0; e < N; ++e) {
      const Vec<A> l = load(left_share + e * items.width), r = load(right_share + e * items.width);
      const Vec<A> log = vlog<A>(load(totals + e * L)) + A(ln2) * load(tops + e * L);
      lse[e] = log + l * load(v + top * stride) + r * load(v + top * stride + right);
      const Ints<A> at = (label[e] > 0 ? label[e] : 0) * static_cast<int32_t>(stride) + column;
      const Vec<A> weight = weight_of(label[e]), u = l * gather(v, at) + r * gather(v + right, at);
      Vec<A> value = own * weight * (log - A(ln2) * u);
      if (shared != 0) {
        const A* sum = v + weighted * stride;
        value += shared * (all_weights * log - A(ln2) * (l * load(sum) + r * load(sum + right)));
      }
      loss[e] = __builtin_convertvector(label[e] >= 0, Vec<A>) != 0 ? value : Vec<A>{};
      loss_sum += loss[e], count_sum += weight;
    }
    for (int l = 0; l < L; ++l) sums[0][l] += loss_sum[l], sums[1][l] += count_sum[l];
    A* lse_row = static_cast<A*>(p.lse.data) + n * p.lse.n + y * p.lse.y + items.pixel_begin * p.lse.x;
    items.template by_pixel<N, A>(lse, j, i, lse_row, p.lse.x);
    if (!p.per_pixel) return;
    A* loss_row = static_cast<A*>(p.loss.data) + n * p.loss.n + y * p.loss.y + items.pixel_begin * p.loss.x;
    items.template by_pixel<N, A>(loss, j, i, loss_row, p.loss.x);
  }

  struct Backward {
    Slot slots[2];
    struct Sums {
      A* data;     // of a source row: [classes + 1][width][2], what its left and right columns get; last, of grad_loss
      bool empty;
    } sums[2];
    A *factors, *out;
    int32_t* labels;  // [max_rows][pixels]
  };
  Backward backward_scratch(Arena& arena) {
    Backward s;
    items.take(arena);
    for (Slot& slot : s.slots) slot = {arena.template take<A>(planes * items.stride + L), -1};
    for (auto& sums : s.sums) sums = {arena.template take<A>((p.classes + 1) * 2 * items.width), true};
    s.factors = arena.template take<A>(max_rows * items.chunk * 5 * L);
    s.out = arena.template take<A>((p.classes + 1) * round_up(tile_columns, L));
    s.labels = arena.take<int32_t>(max_rows * items.phases * items.room);
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
    s.sums[0].empty = s.sums[1].empty = true;
    for (int64_t q = begin; q <= end; ++q) {
      const int64_t above = most(q - 1, 0), below = least(q, p.vertical.in - 1), last = p.vertical.first[q + 1];
      if (items.count > 0)
        for (int64_t y = p.vertical.first[q]; y < last; y += max_rows)
          backward_rows_between(s, n, y, least(max_rows, last - y), above, below);
      if (q == begin) {
        if (q > 0) s.sums[above % 2].empty = true;  // a row of another task
        continue;
      }
      finish_row(s, s.sums[above % 2], n, above, column, columns);
      s.sums[above % 2].empty = true;
    }
  }

  // What `rows` output rows between two source rows give to both.
  void backward_rows_between(Backward& s, int64_t n, int64_t y, int64_t rows, int64_t above, int64_t below) {
    fetch(s.slots[above % 2], n, above), fetch(s.slots[below % 2], n, below);
    for (int64_t r = 0; r < rows; ++r) read_labels(s.labels + r * items.pixels, n, y + r, nullptr);
    auto &upper = s.sums[above % 2], &lower = s.sums[below % 2];
    for (int64_t j = 0; j < items.count; j += L)
      for (int64_t i = 0; i < items.phases; i += items.chunk) {
        const bool add_upper = i > 0 || !upper.empty, add_lower = i > 0 || !lower.empty || above == below;
        with_phases(items.chunk, [&]<int N>() {
          backward_block<N>(s, n, y, rows, j, i, s.slots[above % 2].data, s.slots[below % 2].data, upper.data,
                            lower.data, add_upper, add_lower);
        });
      }
    upper.empty = lower.empty = false;
  }

  // Phases i .. i + N - 1 of items j .. j + L - 1 of `rows` output rows.
  template <int N>
  [[gnu::noinline]] void backward_block(Backward& s, int64_t n, int64_t y, int64_t rows, int64_t j, int64_t i,
                                        const A* upper, const A* lower, A* upper_sum, A* lower_sum, bool add_upper,
                                        bool add_lower) const {
    const int64_t stride = items.stride, width = items.width, right = items.right, place = i * width + j;
    const bool near = within_range(upper + j, lower + j);
    A row_weights[max_rows], owns[max_rows * N * L], counts[max_rows * N * L];
    int32_t places[max_rows * N * L];
    Ints<A> label[N], column = {};
    Vec<A> lse[N], grad[N];
    for (int l = 0; l < L; ++l) column[l] = static_cast<int32_t>(2 * (j + l));
    A* f = s.factors;
    for (int64_t row = 0; row < rows; ++row) {
      row_weights[row] = A(p.vertical.weight[y + row]);
      const Vec<A> w = Vec<A>{} + row_weights[row];
      const int64_t t = top * stride + j, pixel = items.pixel_begin;
      const Vec<A> left_top = blend<A>(load(upper + t), load(lower + t), w);
      const Vec<A> right_top = blend<A>(load(upper + t + right), load(lower + t + right), w);
      const A* lses = static_cast<const A*>(p.lse.data) + n * p.lse.n + (y + row) * p.lse.y + pixel * p.lse.x;
      items.template by_item<N, int32_t>(s.labels + row * items.pixels, 1, j, i, -1, label);
      items.template by_item<N, A>(lses, p.lse.x, j, i, 0, lse);
      const A* grads = static_cast<const A*>(p.grad_loss.data);
      if (p.per_pixel) {
        grads += n * p.grad_loss.n + (y + row) * p.grad_loss.y + pixel * p.grad_loss.x;
        items.template by_item<N, A>(grads, p.grad_loss.x, j, i, 0, grad);
      } else {
        for (int e = 0; e < N; ++e) grad[e] = Vec<A>{} + *grads;
      }
      for (int e = 0; e < N; ++e) {
        const Vec<A> l = load(items.left_share + place + e * width), r = load(items.right_share + place + e * width);
        const auto counted = __builtin_convertvector(label[e] >= 0, Vec<A>) != 0;
        const Vec<A> g = counted ? grad[e] : Vec<A>{};
        const Vec<A> shift = (l * left_top + r * right_top - lse[e]) * A(log2e), g_own = own * g * weight_of(label[e]);
        Vec<A> weight = g_own + shared * all_weights * g;
        if (near) weight *= vexp2(counted ? shift : Vec<A>{});
        store(f, l * weight), store(f + L, r * weight);
        if (!near) store(f + 2 * L, l), store(f + 3 * L, r), store(f + 4 * L, shift);
        f += near ? 2 * L : 5 * L;
        const int64_t at = (row * N + e) * L;
        store(owns + at, g_own), store(counts + at, shared * g);
        const int32_t class_stride = static_cast<int32_t>(2 * width);
        Pack<int32_t, L>::put(places + at, (label[e] > 0 ? label[e] : 0) * class_stride + column);
      }
    }
    if (near)
      spread_powers<A, N>(upper + j, lower + j, row_weights, A(p.vertical.step), rows, p.classes, stride, right,
                          items.start + j, A(p.horizontal.step), A(i * p.horizontal.step), s.factors, upper_sum + 2 * j,
                          lower_sum + 2 * j, 2 * width, add_upper, add_lower);
    else
      spread_any_powers<A, N>(upper + j, lower + j, row_weights, rows, p.classes, stride, right, s.factors,
                              upper_sum + 2 * j, lower_sum + 2 * j, 2 * width, add_upper, add_lower);
    // The pixels' own classes, one by one: neighbours in the order of items touch different columns.
    for (int64_t row = 0; row < rows; ++row) {
      const A below = row_weights[row], above = 1 - below;
      for (int e = 0; e < N; ++e)
        for (int l = 0; l < L; ++l) {
          const int64_t at = (row * N + e) * L + l;
          const Pair share = Pack<A, 2>::at(items.shares + 2 * (place + e * width + l)) * owns[at];
          A *up = upper_sum + places[at], *low = lower_sum + places[at];
          Pack<A, 2>::put(up, Pack<A, 2>::at(up) - above * share);
          Pack<A, 2>::put(low, Pack<A, 2>::at(low) - below * share);
        }
    }
    if (shared == 0) return;
    A *up = upper_sum + p.classes * 2 * width + 2 * j, *low = lower_sum + p.classes * 2 * width + 2 * j;
    Vec<A> sums[4] = {};
    for (int64_t row = 0; row < rows; ++row)
      for (int e = 0; e < N; ++e) {
        const Vec<A> g = load(counts + (row * N + e) * L), below = g * row_weights[row], above = g - below;
        const Vec<A> l = load(items.left_share + place + e * width), r = load(items.right_share + place + e * width);
        sums[0] += l * above, sums[1] += r * above, sums[2] += l * below, sums[3] += r * below;
      }
    put_pairs(up, sums[0], sums[1], add_upper), put_pairs(low, sums[2], sums[3], add_lower);
  }

  // Sums by item become sums by column: the row's gradient.
  void finish_row(Backward& s, const typename Backward::Sums& sums, int64_t n, int64_t y, int64_t column,
                  int64_t columns) const {
    const int64_t out_width = round_up(tile_columns, L), pair_stride = 2 * items.width;
    A* counted = s.out + p.classes * out_width;
    if (shared != 0) finish_class(counted, sums, p.classes * pair_stride, column, columns);
    for (int64_t k = 0; k < p.classes; ++k) {
      A* out = s.out + k * out_width;
      finish_class(out, sums, k * pair_stride, column, columns);
      if (shared == 0) continue;
      const A weight = class_weight ? class_weight[k] : 1;
      for (int64_t x = 0; x < columns; ++x) out[x] -= weight * counted[x];
    }
    with_storage<A>(p.dtype, [&]<typename T>() {
      const Strided& grad = p.grad_logits;
      T* to = static_cast<T*>(grad.data) + n * grad.n + y * grad.y + column * grad.x;
      const int64_t ahead = y + 1 < p.vertical.in ? grad.y : 0;
      store_planes(s.out, out_width, p.classes, columns, to, grad.c, grad.x, ahead);
    });
  }
  void finish_class(A* out, const typename Backward::Sums& sums, int64_t at, int64_t column, int64_t columns) const {
    const A* pairs = sums.data + at;
    if (sums.empty || !items.upwards)
      for (int64_t x = 0; x < columns; ++x) out[x] = 0;
    if (sums.empty) return;
    if (items.upwards) {
      for (int64_t x = 0; x < columns; ++x) out[x] = pairs[2 * x + 1] + pairs[2 * x + 2];
      if (column == 0) out[0] += pairs[0];
      if (column + columns == p.horizontal.in) out[columns - 1] += pairs[2 * columns + 1];
      return;
    }
    for (int64_t j = 0; j < items.count; ++j) {
      const int64_t l = items.left_column(items.begin + j) - column, r = items.right_column(items.begin + j) - column;
      if (l >= 0) out[l] += pairs[2 * j];
      if (r < columns) out[r] += pairs[2 * j + 1];
    }
  }
};

template <typename A>
void run_as(const Problem& p, bool backward, int64_t begin, int64_t end, Scratch& scratch) {
  Worker<A> worker(p, backward);
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
  p.dtype == DType::float64 ? run_as<double>(p, backward, begin, end, scratch)
                            : run_as<float>(p, backward, begin, end, scratch);
}
