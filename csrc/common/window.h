// Where the taps of a dilated window read, per axis. Positions p, p + dilation, p + 2 dilation, ... (a phase) see only
// each other, so everything is counted in steps of the dilation: a dense window on a phase of `length` positions.
#pragma once

#include <cstdint>

namespace segops {

enum class Border { zero, mask, shift };

// Positions of the phase that starts at pixel `phase` of an axis.
__host__ __device__ __forceinline__ int phase_length(int pixels, int phase, int dilation) {
  return phase < pixels ? (pixels - phase + dilation - 1) / dilation : 0;
}

// The position that a tap at `position` reads; -1: none. A window pushed back inside the map has, in place of each tap
// that fell outside, the position `taps` further in.
__host__ __device__ __forceinline__ int tap_position(int position, int length, int taps, Border border) {
  if (border == Border::shift) {
    if (position < 0) position += taps;
    if (position >= length) position -= taps;
  }
  // Two comparisons, never an integer abs: ptxas miscompiles window tests written with one.
  return position >= 0 && position < length ? position : -1;
}

// Seen from a key at position u, its taps' queries stand around u and, for border "shift", also around u - taps and
// u + taps, where the window of such a query reached over the edge. Is u + side * taps such a centre, side in -1, 0, 1?
__host__ __device__ __forceinline__ bool is_centre(int position, int length, int taps, int side) {
  const int centre = position + side * taps;
  if (side < 0) return centre < 0 && centre >= -(taps / 2);
  if (side > 0) return centre >= length && centre < length + taps / 2;
  return true;
}

}  // namespace segops
