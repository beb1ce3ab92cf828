// Small sizes, and scratch memory in one piece, for one instruction set.

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Scratch memory is one allocation: each part takes what it needs, first to be counted, then for real.
struct Arena {
  char* base;
  int64_t used = 0;
  template <typename U>
  U* take(int64_t count) {
    U* at = base ? reinterpret_cast<U*>(base + used) : nullptr;
    used += round_up(count * int64_t(sizeof(U)), 64);
    return at;
  }
};
