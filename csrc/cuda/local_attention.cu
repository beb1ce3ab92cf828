// Dilated local attention on the GPU (semantics: segops/reference/local_attention.py).
//
//   forward    S(p, n) = scale <q(p), k(p + off_n)>,  A = softmax_n S,  out(p) = sum_n A(p, n) v(p + off_n)
//   backward   dS(p, n) = A(p, n) (<g(p), v(p + off_n)> - delta(p)),   delta(p) = <g(p), out(p)> - g_lse(p)
//              dq(p) = scale sum_n dS(p, n) k(p + off_n)
//              dk(u) = scale sum_n dS(u - off_n, n) q(u - off_n),   dv(u) = sum_n A(u - off_n, n) g(u - off_n)
//
// query, key [N, heads * d, H, W], value, out [N, heads * d_v, H, W], lse [N, heads, H, W], any strides.
//
// All three kernels are made of two steps over a tile of one head: `dots`, products of a pixel's own channels with
// those of every tap, and `mix`, sums of the taps' channels with weights. Pixels one dilation apart form a dense
// problem (a phase) that shares nothing with the others. A tile is a rectangle of one row phase and, where pixels of
// a row are consecutive in memory, of several column phases side by side; shared memory holds it with its halo, as
// floats or doubles, `chunk` channels at a time. A thread owns a strip of P pixels below each other, so that a value
// read from shared memory serves up to P taps, and keeps the products with all taps of a BH x BW window in
// registers; where d is long and pixels are few, `split` neighbouring lanes share a strip and add up their channels.
// A larger window is visited in several blocks of BH x BW taps: products are then computed again for each chunk of
// output channels, partial sums waiting in shared memory. dk, dv gather: a key has the role of the pixel, queries
// that of the taps.
//
// Also considered: one thread per pixel without strips (bound by shared memory, 1 multiply-add per load against 2),
// and 16-bit shared memory (halves its traffic, but the conversions then cost as many instructions as they save).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <string>

#include "common/launch.h"
#include "common/scalar.h"
#include "common/window.h"
#include "schemas.h"

namespace segops {
namespace {

using torch::stable::Tensor;

enum class Pass { forward, query, key };

// Two blocks per multiprocessor leave a thread 168 registers.
constexpr int threads_limit = 192;

// What 16-byte accesses to a tensor run along.
enum class Vectors { none, channels, columns };

template <typename T>
struct View {
  T* data = nullptr;
  int64_t n = 0, c = 0, y = 0, x = 0;  // strides in elements
  Vectors vectors = Vectors::none;
  bool bfloat16 = false;
};

struct Plan {
  int heads, d, dv, h, w, kernel_h, kernel_w, dilation_h, dilation_w;
  Border border;
  double scale;
  int row_phases, column_groups;  // column phases go in groups of `together` neighbours
  int together, tiles_y, tiles_x, tile_y, tile_x;  // a tile: tile_y x tile_x positions of every phase of the group
  int chunk, split;
  // Shared memory, in elements: rows and channel planes of the tile with and without its halo.
  int halo_pitch, halo_plane, own_pitch, own_plane;
};

template <typename T>
struct Call {
  Plan plan;
  View<T> query, key, value, out, grad_out, grad_query, grad_key, grad_value;
  View<Accumulator<T>> lse, grad_lse, delta;
};

// A P-pixel strip against a BH x BW window; with Exact the kernel is that window, else it is visited in such blocks.
// With Alone a tile has one column phase, and the offsets of a row's taps are constants.
template <typename T_, int P_, int BH_, int BW_, bool Exact_, bool Alone_>
struct Shape {
  using T = T_;
  using A = Accumulator<T>;
  static constexpr int P = P_, BH = BH_, BW = BW_;
  static constexpr bool Exact = Exact_, Alone = Alone_;
};

template <typename S>
struct Weights {
  typename S::A at[S::P][S::BH][S::BW];
};

// Visits every weight, all indices known at compile time.
template <typename S, typename Function>
__device__ __forceinline__ void for_weights(Function function) {
  SEGOPS_UNROLL for (int p = 0; p < S::P; ++p)
    SEGOPS_UNROLL for (int i = 0; i < S::BH; ++i)
      SEGOPS_UNROLL for (int j = 0; j < S::BW; ++j) function(p, i, j);
}

// One block of threads at its tile.
template <typename S>
struct Block {
  using T = typename S::T;
  using A = typename S::A;
  static constexpr int P = S::P, BH = S::BH, BW = S::BW;

  // A rectangle of positions, and where it stands in shared memory. Rows are stored from a multiple of 16 bytes of the
  // tensor's row on, `slack` elements before the rectangle.
  struct Region {
    int y, x, rows, columns, pitch, plane, slack;
  };

  // BH x BW taps around the pixels moved by (side_y, side_x) windows.
  struct Visit {
    Region halo;
    int taps_y, taps_x;       // taps of the block that exist
    unsigned rows, columns;   // bit r: row r of the thread's halo is inside the map
    unsigned centres;         // bit p: pixel p is seen from there
  };

  const Plan& plan;
  int64_t image;
  int head, row_phase, column_phase, length_y, tile_y, tile_x;
  Region tile;
  int share, row, column;  // the thread's share of the channels, and the first pixel of its strip
  bool active;
  int sides_y[2], sides_x[2], blocks_y, blocks_x;
  A *halo, *own;

  __device__ __forceinline__ Block(const Plan& plan, bool gather) : plan(plan) {
    unsigned rest = blockIdx.x;
    const auto next = [&](int count) {
      const int index = rest % count;
      rest /= count;
      return index;
    };
    tile_x = next(plan.tiles_x) * plan.tile_x;
    column_phase = next(plan.column_groups) * together();
    tile_y = next(plan.tiles_y) * plan.tile_y;
    row_phase = next(plan.row_phases);
    head = next(plan.heads);
    image = rest;
    length_y = phase_length(plan.h, row_phase, plan.dilation_h);
    tile = region(tile_y, tile_x, plan.tile_y, plan.tile_x, plan.own_pitch, plan.own_plane);

    const int columns = plan.tile_x * together(), strip = threadIdx.x / plan.split;
    share = threadIdx.x % plan.split;
    active = strip < columns * (plan.tile_y / P);
    row = active ? strip / columns * P : 0;
    column = active ? strip % columns : 0;

    blocks_y = S::Exact ? 1 : (plan.kernel_h + BH - 1) / BH;
    blocks_x = S::Exact ? 1 : (plan.kernel_w + BW - 1) / BW;
    SEGOPS_UNROLL for (int i = 0; i < 2; ++i) sides_y[i] = sides_x[i] = 0;
    if (gather && plan.border == Border::shift) {
      // Keys seen around u - taps stand in [taps - taps / 2, taps), around u + taps in [length - taps, ... + taps / 2);
      // lengths of column phases differ by one.
      const int shortest = phase_length(plan.w, column_phase + together() - 1, plan.dilation_w);
      const int longest = phase_length(plan.w, column_phase, plan.dilation_w);
      sides_y[0] = -overlap(tile_y, plan.tile_y, plan.kernel_h - plan.kernel_h / 2, plan.kernel_h);
      sides_x[0] = -overlap(tile_x, plan.tile_x, plan.kernel_w - plan.kernel_w / 2, plan.kernel_w);
      sides_y[1] = overlap(tile_y, plan.tile_y, length_y - plan.kernel_h, length_y - plan.kernel_h + plan.kernel_h / 2);
      sides_x[1] = overlap(tile_x, plan.tile_x, shortest - plan.kernel_w, longest - plan.kernel_w + plan.kernel_w / 2);
    }
    halo = reinterpret_cast<A*>(shared_memory());
    own = halo + plan.chunk * plan.halo_plane;
  }

  __device__ __forceinline__ static int overlap(int start, int size, int from, int to) {
    return start < to && from < start + size ? 1 : 0;
  }

  // Distance of a row's taps in shared memory.
  __device__ __forceinline__ int together() const { return S::Alone ? 1 : plan.together; }

  __device__ __forceinline__ int visits() const {
    return (sides_y[1] - sides_y[0] + 1) * (sides_x[1] - sides_x[0] + 1) * blocks_y * blocks_x;
  }

  // The memory beyond the staged channels: plane by plane of `chunk` channels.
  __device__ __forceinline__ A* sums(int index) const { return own + (1 + index) * plan.chunk * plan.own_plane; }

  __device__ __forceinline__ Region region(int y, int x, int rows, int positions, int pitch, int plane) const {
    int slack = 0;
    if (together() == plan.dilation_w) {
      constexpr int64_t V = vector_length<T>;
      slack = static_cast<int>(((int64_t(x) * plan.dilation_w) % V + V) % V);
    }
    return {y, x, rows, positions * together(), pitch, plane, slack};
  }

  __device__ __forceinline__ Visit visit(int index) const {
    const auto next = [&](int count) {
      const int i = index % count;
      index /= count;
      return i;
    };
    const int first_x = next(blocks_x) * BW, first_y = next(blocks_y) * BH;
    const int side_x = sides_x[0] + next(sides_x[1] - sides_x[0] + 1), side_y = sides_y[0] + index;
    const int y = tile_y + side_y * plan.kernel_h + first_y - plan.kernel_h / 2;
    const int x = tile_x + side_x * plan.kernel_w + first_x - plan.kernel_w / 2;
    Visit v;
    v.halo = region(y, x, plan.tile_y + BH - 1, plan.tile_x + BW - 1, plan.halo_pitch, plan.halo_plane);
    v.taps_y = S::Exact ? BH : plan.kernel_h - first_y;
    v.taps_x = S::Exact ? BW : plan.kernel_w - first_x;
    const int position = column / together();
    const int length_x = phase_length(plan.w, column_phase + column % together(), plan.dilation_w);
    v.rows = v.columns = v.centres = 0;
    SEGOPS_UNROLL for (int r = 0; r < P + BH - 1; ++r)
      v.rows |= unsigned(tap_position(y + row + r, length_y, 1, Border::zero) >= 0) << r;
    SEGOPS_UNROLL for (int j = 0; j < BW; ++j)
      v.columns |= unsigned(tap_position(x + position + j, length_x, 1, Border::zero) >= 0) << j;
    SEGOPS_UNROLL for (int p = 0; p < P; ++p)
      v.centres |= unsigned(is_centre(tile_y + row + p, length_y, plan.kernel_h, side_y) &&
                            is_centre(tile_x + position, length_x, plan.kernel_w, side_x)) << p;
    return v;
  }

  __device__ __forceinline__ static bool exists(const Visit& v, int i, int j) {
    return S::Exact || (i < v.taps_y && j < v.taps_x);
  }
  // Does tap (i, j) of pixel p stand inside the map?
  __device__ __forceinline__ static bool inside(const Visit& v, int p, int i, int j) {
    return (v.rows >> (p + i) & 1) && (v.columns >> j & 1);
  }

  // The pixel column that column `index` of a region reads, -1: none.
  __device__ __forceinline__ int pixel_x(const Region& r, int index, Border border) const {
    const int phase = column_phase + index % together();
    if (phase >= plan.dilation_w) return -1;
    const int length = phase_length(plan.w, phase, plan.dilation_w);
    const int position = tap_position(r.x + index / together(), length, plan.kernel_w, border);
    return position < 0 ? -1 : position * plan.dilation_w + phase;
  }
  __device__ __forceinline__ int pixel_y(const Region& r, int index, Border border) const {
    const int position = tap_position(r.y + index, length_y, plan.kernel_h, border);
    return position < 0 ? -1 : position * plan.dilation_h + row_phase;
  }

  // Pixel p of the thread's strip; false where the tile reaches over the map.
  __device__ __forceinline__ bool pixel(int p, int& y, int& x) const {
    y = pixel_y(tile, row + p, Border::zero), x = pixel_x(tile, column, Border::zero);
    return active && y >= 0 && x >= 0;
  }

  // Calls wide(y, x, at) or single(y, x, at) for everything in a region, `at` its place in a plane of shared memory;
  // y or x is -1 outside the map, where only single() is called. A row's vectors may reach `beyond` a region that is
  // read.
  template <typename Wide, typename Single>
  __device__ __forceinline__ void for_region(const Region& r, Vectors along, Border border, bool beyond, Wide wide,
                                             Single single) const {
    if (along == Vectors::columns) {
      constexpr int V = vector_length<T>;
      const int units = (r.slack + r.columns + V - 1) / V;
      const int start = r.x * plan.dilation_w - r.slack;
      for (int unit = threadIdx.x; unit < r.rows * units; unit += blockDim.x) {
        const int row = unit / units, first = unit % units * V;
        const int y = pixel_y(r, row, border), x = start + first;
        const bool whole = beyond || (first >= r.slack && first + V <= r.slack + r.columns);
        if (whole && y >= 0 && x >= 0 && x + V <= plan.w) {
          wide(y, x, row * r.pitch + first);
        } else {
          for (int e = first; e < first + V; ++e)
            if (e >= r.slack && e < r.slack + r.columns)
              single(y, pixel_x(r, e - r.slack, border), row * r.pitch + e);
        }
      }
    } else {
      for (int unit = threadIdx.x; unit < r.rows * r.columns; unit += blockDim.x) {
        const int row = unit / r.columns, column = unit % r.columns;
        const int y = pixel_y(r, row, border), x = pixel_x(r, column, border), at = row * r.pitch + r.slack + column;
        along == Vectors::channels && y >= 0 && x >= 0 ? wide(y, x, at) : single(y, x, at);
      }
    }
  }

  // Copies channels [first, first + count) of the head to shared memory; zero outside the map.
  template <typename E>
  __device__ __forceinline__ void stage(A* to, const Region& r, const View<E>& from, int channels, int first, int count,
                                        Border border) const {
    const E* data = from.data + image * from.n + (int64_t(head) * channels + first) * from.c;
    for_region(
        r, from.vectors, border, true,
        [&](int y, int x, int at) {
          constexpr int V = vector_length<E>;
          const E* source = data + y * from.y + x * from.x;
          const bool along_channels = from.vectors == Vectors::channels;
          const int step = along_channels ? V : 1;
          SEGOPS_UNROLL_2 for (int c = 0; c < count; c += step) {
            Accumulator<E> part[V];
            unpack(load_vector(source + c * from.c), from.bfloat16, part);
            if (along_channels)
              SEGOPS_UNROLL for (int e = 0; e < V; ++e) to[(c + e) * r.plane + at] = part[e];
            else
              store_shared(to + c * r.plane + at, part);
          }
        },
        [&](int y, int x, int at) {
          const E* source = data + y * from.y + x * from.x;
          const bool in_map = y >= 0 && x >= 0;
          SEGOPS_UNROLL_2 for (int c = 0; c < count; ++c)
            to[c * r.plane + at] = in_map ? accumulator(source[c * from.c], from.bfloat16) : A(0);
        });
  }

  template <int V>
  __device__ __forceinline__ static void store_shared(A* to, const A (&x)[V]) {
    constexpr int wide = vector_length<A>;
    SEGOPS_UNROLL for (int e = 0; e < V; e += wide) {
      Vector<A> part;
      SEGOPS_UNROLL for (int i = 0; i < wide; ++i) part.at[i] = x[e + i];
      store_vector(to + e, part);
    }
  }

  // Writes channels [first, first + count) of the tile from shared memory.
  __device__ __forceinline__ void store(const A* from, const View<T>& to, int channels, int first, int count) const {
    T* data = to.data + image * to.n + (int64_t(head) * channels + first) * to.c;
    for_region(
        tile, to.vectors, Border::zero, false,
        [&](int y, int x, int at) {
          constexpr int V = vector_length<T>;
          T* target = data + y * to.y + x * to.x;
          const bool along_channels = to.vectors == Vectors::channels;
          const int step = along_channels ? V : 1, next = along_channels ? plan.own_plane : 1;
          for (int c = 0; c < count; c += step) {
            A part[V];
            SEGOPS_UNROLL for (int e = 0; e < V; ++e) part[e] = from[c * plan.own_plane + at + e * next];
            store_vector(target + c * to.c, pack<T>(part, to.bfloat16));
          }
        },
        [&](int y, int x, int at) {
          if (y < 0 || x < 0) return;
          T* target = data + y * to.y + x * to.x;
          for (int c = 0; c < count; ++c) target[c * to.c] = rounded<T>(from[c * plan.own_plane + at], to.bfloat16);
        });
  }

  // w(p, n) = <mine(p), theirs(p + off_n)> for the taps of a visit.
  __device__ __forceinline__ void dots(Weights<S>& w, const View<T>& mine, const View<T>& theirs, int channels,
                                       const Visit& v, Border border) const {
    for_weights<S>([&](int p, int i, int j) { w.at[p][i][j] = A(0); });
    for (int first = 0; first < channels; first += plan.chunk) {
      const int count = channels - first < plan.chunk ? channels - first : plan.chunk;
      __syncthreads();  // nobody reads what the last step left
      stage(own, tile, mine, channels, first, count, Border::zero);
      stage(halo, v.halo, theirs, channels, first, count, border);
      __syncthreads();
      const A* a = own + row * plan.own_pitch + tile.slack + column;
      const A* b = halo + row * plan.halo_pitch + v.halo.slack + column;
      for (int c = share; c < count; c += plan.split) {
        A x[P];
        SEGOPS_UNROLL for (int p = 0; p < P; ++p) x[p] = a[c * plan.own_plane + p * plan.own_pitch];
        SEGOPS_UNROLL for (int j = 0; j < BW; ++j) {
          if (!S::Exact && j >= v.taps_x) break;
          A y[P + BH - 1];
          SEGOPS_UNROLL for (int r = 0; r < P + BH - 1; ++r)
            y[r] = b[c * plan.halo_plane + r * plan.halo_pitch + j * together()];
          SEGOPS_UNROLL for (int i = 0; i < BH; ++i)
            if (S::Exact || i < v.taps_y)
              SEGOPS_UNROLL for (int p = 0; p < P; ++p) w.at[p][i][j] += x[p] * y[p + i];
        }
      }
    }
    for (int lane = plan.split / 2; lane > 0; lane /= 2)
      for_weights<S>([&](int p, int i, int j) {
        w.at[p][i][j] += __shfl_xor_sync(0xffffffffu, w.at[p][i][j], lane);
      });
  }

  // sums(p) (+)= factor * sum_n w(p, n) from(p + off_n) for channels [first, first + chunk); with `last`, stored.
  __device__ __forceinline__ void mix(A* sums, const Weights<S>& w, A factor, const View<T>& from, const View<T>& to,
                                      int channels, int first, const Visit& v, Border border, bool start,
                                      bool last) const {
    const int count = channels - first < plan.chunk ? channels - first : plan.chunk;
    if (count <= 0) return;
    __syncthreads();  // nobody reads what the last step left
    stage(halo, v.halo, from, channels, first, count, border);
    __syncthreads();
    const A* b = halo + row * plan.halo_pitch + v.halo.slack + column;
    A* target = sums + row * plan.own_pitch + tile.slack + column;
    for (int c = share; c < count && active; c += plan.split) {
      A sum[P] = {};
      SEGOPS_UNROLL for (int j = 0; j < BW; ++j) {
        if (!S::Exact && j >= v.taps_x) break;
        A y[P + BH - 1];
        SEGOPS_UNROLL for (int r = 0; r < P + BH - 1; ++r)
          y[r] = b[c * plan.halo_plane + r * plan.halo_pitch + j * together()];
        SEGOPS_UNROLL for (int i = 0; i < BH; ++i)
          if (S::Exact || i < v.taps_y)
            SEGOPS_UNROLL for (int p = 0; p < P; ++p) sum[p] += w.at[p][i][j] * y[p + i];
      }
      SEGOPS_UNROLL for (int p = 0; p < P; ++p) {
        A& place = target[c * plan.own_plane + p * plan.own_pitch];
        place = start ? factor * sum[p] : place + factor * sum[p];
      }
    }
    if (last) {
      __syncthreads();
      store(sums, to, channels, first, count);
    }
  }

  // A per-pixel number of the head, for pixel p of the strip; zero where the tile reaches over the map.
  __device__ __forceinline__ A number(const View<A>& from, int p) const {
    int y, x;
    if (from.data == nullptr || !pixel(p, y, x)) return A(0);
    return from.data[image * from.n + head * from.c + y * from.y + x * from.x];
  }
  __device__ __forceinline__ void set_number(const View<A>& to, int p, A number) const {
    int y, x;
    if (share == 0 && pixel(p, y, x)) to.data[image * to.n + head * to.c + y * to.y + x * to.x] = number;
  }

  // From products with the keys to logits, -inf where there is no tap.
  __device__ __forceinline__ void logits(Weights<S>& w, const Visit& v) const {
    const A scale = static_cast<A>(plan.scale);
    for_weights<S>([&](int p, int i, int j) {
      const bool tap = exists(v, i, j) && (plan.border != Border::mask || inside(v, p, i, j));
      w.at[p][i][j] = tap ? w.at[p][i][j] * scale : -A(INFINITY);
    });
  }
};

template <typename S>
__global__ void __launch_bounds__(threads_limit, 2)
    forward_kernel(const __grid_constant__ Call<typename S::T> call) {
  using A = typename S::A;
  const Block<S> block(call.plan, false);
  const Plan& plan = call.plan;
  const int visits = block.visits();
  Weights<S> w;
  A lse[S::P];
  // log-sum-exp of this visit's logits and of what `lse` holds.
  const auto add_to_lse = [&] {
    SEGOPS_UNROLL for (int p = 0; p < S::P; ++p) {
      A top = lse[p], sum = 0;
      for_weights<S>([&](int q, int i, int j) { if (q == p) top = w.at[p][i][j] > top ? w.at[p][i][j] : top; });
      if (isinf(top)) top = 0;
      for_weights<S>([&](int q, int i, int j) { if (q == p) sum += exponential(w.at[p][i][j] - top); });
      lse[p] = top + logarithm(sum + exponential(lse[p] - top));
    }
  };
  const auto logits = [&](const auto& visit) {
    block.dots(w, call.query, call.key, plan.d, visit, plan.border);
    block.logits(w, visit);
  };
  SEGOPS_UNROLL for (int p = 0; p < S::P; ++p) lse[p] = -A(INFINITY);
  if (!S::Exact && visits > 1)
    for (int i = 0; i < visits; ++i) logits(block.visit(i)), add_to_lse();
  A* sums = visits > 1 ? block.sums(0) : block.own;
  for (int first = 0; first < plan.dv; first += plan.chunk)
    for (int i = 0; i < visits; ++i) {
      const auto visit = block.visit(i);
      if (first == 0 || (!S::Exact && visits > 1)) {
        logits(visit);
        if (S::Exact || visits == 1) add_to_lse();
        for_weights<S>([&](int p, int i, int j) { w.at[p][i][j] = exponential(w.at[p][i][j] - lse[p]); });
      }
      block.mix(sums, w, A(1), call.value, call.out, plan.dv, first, visit, plan.border, i == 0, i == visits - 1);
    }
  SEGOPS_UNROLL for (int p = 0; p < S::P; ++p) block.set_number(call.lse, p, lse[p]);
}

// grad_query, and delta for the next kernel.
template <typename S>
__global__ void __launch_bounds__(threads_limit, 2)
    query_kernel(const __grid_constant__ Call<typename S::T> call) {
  using A = typename S::A;
  const Block<S> block(call.plan, false);
  const Plan& plan = call.plan;
  const int visits = block.visits();
  Weights<S> a, ds;
  A delta[S::P] = {};
  const auto products = [&](const auto& visit) {
    block.dots(a, call.query, call.key, plan.d, visit, plan.border);
    block.logits(a, visit);
    A lse[S::P];  // read here: it would not fit into registers beside the products
    SEGOPS_UNROLL for (int p = 0; p < S::P; ++p) lse[p] = block.number(call.lse, p);
    for_weights<S>([&](int p, int i, int j) { a.at[p][i][j] = exponential(a.at[p][i][j] - lse[p]); });
    block.dots(ds, call.grad_out, call.value, plan.dv, visit, plan.border);
  };
  // <g, out> = sum_n A(., n) <g, v(. + off_n)>: out itself is not read.
  const auto add_to_delta = [&] {
    for_weights<S>([&](int p, int i, int j) { delta[p] += a.at[p][i][j] * ds.at[p][i][j]; });
  };
  const auto finish_delta = [&] {
    SEGOPS_UNROLL for (int p = 0; p < S::P; ++p) delta[p] -= block.number(call.grad_lse, p);
  };
  if (!S::Exact && visits > 1) {
    for (int i = 0; i < visits; ++i) products(block.visit(i)), add_to_delta();
    finish_delta();
  }
  A* sums = visits > 1 ? block.sums(0) : block.own;
  for (int first = 0; first < plan.d; first += plan.chunk)
    for (int i = 0; i < visits; ++i) {
      const auto visit = block.visit(i);
      if (first == 0 || (!S::Exact && visits > 1)) {
        products(visit);
        if (S::Exact || visits == 1) add_to_delta(), finish_delta();
        for_weights<S>([&](int p, int i, int j) { ds.at[p][i][j] = a.at[p][i][j] * (ds.at[p][i][j] - delta[p]); });
      }
      block.mix(sums, ds, static_cast<A>(plan.scale), call.key, call.grad_query, plan.d, first, visit, plan.border,
                i == 0, i == visits - 1);
    }
  SEGOPS_UNROLL for (int p = 0; p < S::P; ++p) block.set_number(call.delta, p, delta[p]);
}

// grad_key and grad_value: the pixel is a key, the taps are the queries that see it.
template <typename S>
__global__ void __launch_bounds__(threads_limit, 2)
    key_kernel(const __grid_constant__ Call<typename S::T> call) {
  using A = typename S::A;
  const Block<S> block(call.plan, true);
  const Plan& plan = call.plan;
  const int visits = block.visits();
  Weights<S> a, ds;
  A* const value_sums = visits > 1 ? block.sums(0) : block.own;
  A* const key_sums = visits > 1 ? block.sums(1) : block.own;
  A* const lse = visits > 1 ? block.sums(2) : block.sums(0);
  A* const delta = lse + plan.halo_plane;
  const int longest = plan.d > plan.dv ? plan.d : plan.dv;
  for (int first = 0; first < longest; first += plan.chunk)
    for (int i = 0; i < visits; ++i) {
      const auto visit = block.visit(i);
      if (first == 0 || visits > 1) {
        block.dots(a, call.key, call.query, plan.d, visit, Border::zero);
        block.dots(ds, call.value, call.grad_out, plan.dv, visit, Border::zero);
        // The barriers of dots stand between this and the last visit's reads.
        block.stage(lse, visit.halo, call.lse, 1, 0, 1, Border::zero);
        block.stage(delta, visit.halo, call.delta, 1, 0, 1, Border::zero);
        __syncthreads();
        const int at = block.row * plan.halo_pitch + visit.halo.slack + block.column;
        for_weights<S>([&](int p, int i, int j) {
          const int tap = at + (p + i) * plan.halo_pitch + j * block.together();
          const bool sees = block.exists(visit, i, j) && block.inside(visit, p, i, j) && (visit.centres >> p & 1);
          const A logit = a.at[p][i][j] * static_cast<A>(plan.scale);
          a.at[p][i][j] = sees ? exponential(logit - lse[tap]) : A(0);
          ds.at[p][i][j] = sees ? a.at[p][i][j] * (ds.at[p][i][j] - delta[tap]) : A(0);
        });
      }
      block.mix(value_sums, a, A(1), call.grad_out, call.grad_value, plan.dv, first, visit, Border::zero, i == 0,
                i == visits - 1);
      block.mix(key_sums, ds, static_cast<A>(plan.scale), call.query, call.grad_key, plan.d, first, visit,
                Border::zero, i == 0, i == visits - 1);
    }
}

int ceil_div(int a, int b) { return (a + b - 1) / b; }
int round_up(int a, int b) { return ceil_div(a, b) * b; }

// A tensor of `channels` per head as the kernels see it. 16-byte accesses want every stride that is used, and the
// beginning, at multiples of 16 bytes.
template <typename T>
View<T> view(const Tensor& t, const Plan* plan = nullptr, int channels = 0) {
  View<T> v{static_cast<T*>(t.data_ptr()), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
  const auto whole = [&](int axis) { return t.size(axis) <= 1 || t.stride(axis) % vector_length<T> == 0; };
  v.bfloat16 = t.scalar_type() == torch::headeronly::ScalarType::BFloat16;
  if (plan == nullptr || !aligned(v.data) || !whole(0) || !whole(2)) return v;
  if (v.c == 1 && channels % vector_length<T> == 0 && whole(3)) v.vectors = Vectors::channels;
  if (v.x == 1 && plan->together == plan->dilation_w && whole(1)) v.vectors = Vectors::columns;
  return v;
}

// Column phases side by side make whole rows of pixels, which is how they lie in memory unless channels do.
bool rows_of_pixels(const Tensor& query, const Plan& p) { return query.stride(1) != 1 && p.dilation_w > 1; }

// Fills in the tile; returns the bytes of shared memory. The numbers aim at an H200: about 64 KB of shared memory, of
// which a multiprocessor has three times that, and tiles down to 8 x 8 until there are two blocks for each of the 132.
template <typename S, Pass pass>
std::size_t plan_tile(Plan& p, int64_t images, bool rows, int planes_of_sums, unsigned& blocks,
                      unsigned& threads) {
  using A = typename S::A;
  constexpr int V = vector_length<typename S::T>;
  const int length_y = phase_length(p.h, 0, p.dilation_h), length_x = phase_length(p.w, 0, p.dilation_w);
  p.together = rows ? std::min(p.dilation_w, 16) : 1;
  p.row_phases = std::min(p.dilation_h, p.h);
  p.column_groups = ceil_div(std::min(p.dilation_w, p.w), p.together);
  int most_y = 24, most_x = std::max(1, (rows ? 48 : 24) / p.together);
  const auto fit = [&] {
    p.tiles_x = ceil_div(length_x, most_x);
    p.tile_x = ceil_div(length_x, p.tiles_x);
    most_y = std::min(most_y, threads_limit / (p.tile_x * p.together) * S::P);
    p.tiles_y = ceil_div(length_y, most_y);
    p.tile_y = round_up(ceil_div(length_y, p.tiles_y), S::P);
    return images * p.heads * p.row_phases * p.column_groups * int64_t(p.tiles_y) * p.tiles_x;
  };
  int64_t count = fit();
  const int least_y = 8, least_x = std::max(1, 8 / p.together);
  while (count < 264 && (most_y > least_y || most_x > least_x)) {
    const bool shrink_y = most_y > least_y && (p.tile_y >= p.tile_x || most_x <= least_x);
    shrink_y ? most_y = std::max(least_y, most_y / 2) : most_x = std::max(least_x, most_x / 2);
    count = fit();
  }
  STD_TORCH_CHECK(count <= max_grid_x, "segops.local_attention: ", count, " tiles are more than a launch takes");
  const int strips = p.tile_y / S::P * p.tile_x * p.together, longest = std::max(p.d, p.dv);
  p.split = 1;
  while (p.split < 16 && p.split < longest && strips * p.split * 2 <= threads_limit && count * strips * p.split < 65536)
    p.split *= 2;
  // Lanes that share a strip read different planes: a plane's length spreads them over the banks.
  const auto plane = [&](int rows, int columns, int& pitch) {
    pitch = round_up(columns * p.together + (p.together == p.dilation_w ? V - 1 : 0), std::max(V, 4));
    const int size = rows * pitch, spread = std::max(4, 32 / p.split);
    return p.split == 1 ? size : size + ((spread - size) % 32 + 32) % 32;
  };
  p.halo_plane = plane(p.tile_y + S::BH - 1, p.tile_x + S::BW - 1, p.halo_pitch);
  p.own_plane = plane(p.tile_y, p.tile_x, p.own_pitch);
  const int per_channel = (p.halo_plane + (1 + planes_of_sums) * p.own_plane) * sizeof(A);
  const int numbers = pass == Pass::key ? 2 * p.halo_plane * sizeof(A) : 0;
  p.chunk = std::clamp((64 * 1024 - numbers) / per_channel, rows ? 1 : V, round_up(longest, V));
  if (p.chunk >= V) p.chunk -= p.chunk % V;
  blocks = static_cast<unsigned>(count);
  threads = round_up(strips * p.split, 32);
  return std::size_t(p.chunk) * per_channel + numbers;
}

struct Arguments {
  const Tensor &query, &key, &value, &lse;
  const Tensor *out = nullptr, *grad_out = nullptr, *grad_lse = nullptr, *delta = nullptr, *grad_query = nullptr,
               *grad_key = nullptr, *grad_value = nullptr;
};

template <typename S, Pass pass>
void launch_pass(Plan p, const Arguments& a) {
  using T = typename S::T;
  using A = typename S::A;
  const bool blocked = p.kernel_h > S::BH || p.kernel_w > S::BW;
  const bool pushed = pass == Pass::key && p.border == Border::shift;
  unsigned blocks = 0, threads = 0;
  const std::size_t shared = plan_tile<S, pass>(p, a.query.size(0), rows_of_pixels(a.query, p),
                                                blocked || pushed ? (pass == Pass::key ? 2 : 1) : 0, blocks, threads);
  Call<T> call{p};
  call.query = view<T>(a.query, &p, p.d), call.key = view<T>(a.key, &p, p.d), call.value = view<T>(a.value, &p, p.dv);
  call.lse = view<A>(a.lse);
  if (a.out) call.out = view<T>(*a.out, &p, p.dv);
  if (a.grad_out) call.grad_out = view<T>(*a.grad_out, &p, p.dv);
  if (a.grad_lse) call.grad_lse = view<A>(*a.grad_lse);
  if (a.delta) call.delta = view<A>(*a.delta);
  if (a.grad_query) call.grad_query = view<T>(*a.grad_query, &p, p.d);
  if (a.grad_key) call.grad_key = view<T>(*a.grad_key, &p, p.d);
  if (a.grad_value) call.grad_value = view<T>(*a.grad_value, &p, p.dv);
  if constexpr (pass == Pass::forward) launch(forward_kernel<S>, blocks, threads, shared, a.query, call);
  else if constexpr (pass == Pass::query) launch(query_kernel<S>, blocks, threads, shared, a.query, call);
  else launch(key_kernel<S>, blocks, threads, shared, a.query, call);
}

// Strips are as long as the registers allow: P * taps sums, twice that in backward.
template <typename T, Pass pass>
void launch_window(const Plan& p, const Arguments& a) {
  constexpr int P = pass == Pass::forward ? 3 : 2;
  if constexpr (std::is_same_v<T, double>)
    launch_pass<Shape<T, P - 1, 3, 3, false, false>, pass>(p, a);
  else if (p.kernel_h != 5 || p.kernel_w != 5)
    launch_pass<Shape<T, P, 3, 5, false, false>, pass>(p, a);
  else if (rows_of_pixels(a.query, p))
    launch_pass<Shape<T, P, 5, 5, true, false>, pass>(p, a);
  else
    launch_pass<Shape<T, P, 5, 5, true, true>, pass>(p, a);
}

Plan plan_of(const Arguments& a, const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& dilation,
             int64_t num_heads, double scale, int64_t border) {
  const auto narrow = [](int64_t size) {
    STD_TORCH_CHECK(size < (int64_t(1) << 30), "segops.local_attention: a size of ", size, " is too large");
    return static_cast<int>(size);
  };
  Plan p{};
  p.heads = narrow(num_heads);
  p.d = narrow(a.query.size(1) / num_heads), p.dv = narrow(a.value.size(1) / num_heads);
  p.h = narrow(a.query.size(2)), p.w = narrow(a.query.size(3));
  p.kernel_h = narrow(kernel_size[0]), p.kernel_w = narrow(kernel_size[1]);
  // From a dilation of the map's size on, only the centre tap is inside.
  p.dilation_h = static_cast<int>(std::min<int64_t>(dilation[0], p.h));
  p.dilation_w = static_cast<int>(std::min<int64_t>(dilation[1], p.w));
  p.scale = scale, p.border = static_cast<Border>(border);
  return p;
}

void local_attention(const Tensor& out, const Tensor& lse, const Tensor& query, const Tensor& key, const Tensor& value,
                     std::vector<int64_t> kernel_size, std::vector<int64_t> dilation, int64_t num_heads, double scale,
                     int64_t border) {
  Arguments a{query, key, value, lse};
  a.out = &out;
  const Plan p = plan_of(a, kernel_size, dilation, num_heads, scale, border);
  for_dtype(query.scalar_type(), [&](auto zero) { launch_window<decltype(zero), Pass::forward>(p, a); });
}

void local_attention_backward(const Tensor& grad_query, const Tensor& grad_key, const Tensor& grad_value,
                              const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& query,
                              const Tensor& key, const Tensor& value, const Tensor& /*out*/, const Tensor& lse,
                              std::vector<int64_t> kernel_size, std::vector<int64_t> dilation, int64_t num_heads,
                              double scale, int64_t border) {
  Arguments a{query, key, value, lse};
  a.grad_out = &grad_out, a.grad_lse = grad_lse ? &*grad_lse : nullptr;
  a.grad_query = &grad_query, a.grad_key = &grad_key, a.grad_value = &grad_value;
  const Plan p = plan_of(a, kernel_size, dilation, num_heads, scale, border);
  const Tensor delta = torch::stable::new_empty(lse, {query.size(0), num_heads, query.size(2), query.size(3)});
  a.delta = &delta;
  for_dtype(query.scalar_type(), [&](auto zero) {
    launch_window<decltype(zero), Pass::query>(p, a);
    launch_window<decltype(zero), Pass::key>(p, a);
  });
}

}  // namespace
}  // namespace segops

STABLE_TORCH_LIBRARY_IMPL(SEGOPS_NAMESPACE, SEGOPS_CUDA_KEY, m) {
  SEGOPS_IMPL(m, local_attention, segops::local_attention);
  SEGOPS_IMPL(m, local_attention_backward, segops::local_attention_backward);
}
