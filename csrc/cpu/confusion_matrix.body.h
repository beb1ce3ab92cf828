// Counting pairs of labels for one instruction set; see confusion_matrix.cpp for the plan.

constexpr int block = 256, group = 16;

// `count` pixels of one row from `first` on, counted into tables [ways][K * K + 1]; what does not count goes last.
inline void count_row(const Problem& p, int64_t n, int64_t y, int64_t first, int64_t count, int64_t* tables) {
  const int32_t classes = static_cast<int32_t>(p.classes), nowhere = classes * classes;
  int64_t* way[4];
  for (int i = 0; i < 4; ++i) way[i] = tables + i % p.ways * (nowhere + 1);
  for (int64_t done = 0; done < count; done += block) {
    const int64_t x = first + done, pixels = count - done < block ? count - done : block;
    int32_t target[block], prediction[block], pair[block];
    p.target.read(n, y, x, 1, pixels, target, p.wrong);
    p.prediction.read(n, y, x, 1, pixels, prediction, nullptr);
    for (int64_t i = pixels; i < block; ++i) target[i] = prediction[i] = -1;
    int32_t wrong = 0;
    for (int i = 0; i < block; ++i) {
      wrong |= target[i] >= 0 && prediction[i] < 0;
      pair[i] = target[i] >= 0 && prediction[i] >= 0 ? target[i] * classes + prediction[i] : nowhere;
    }
    for (int64_t i = 0; wrong && i < pixels; ++i)
      if (target[i] >= 0 && prediction[i] < 0) {
        const Labels& map = p.target;
        p.wrong->report(((p.images + n) * map.height + y) * map.width + x + i);
        break;
      }
    for (int g = 0; g < block; g += group) {
      int32_t differ = 0;
      for (int i = 1; i < group; ++i) differ |= pair[g + i] ^ pair[g];
      if (differ == 0)
        way[0][pair[g]] += group;
      else
#pragma GCC unroll 16
        for (int i = 0; i < group; ++i) ++way[i % 4][pair[g + i]];
    }
  }
}

// Stretches begin .. end - 1 of all rows.
inline void run(const Problem& p, int64_t begin, int64_t end, int64_t* tables) {
  for (int64_t s = begin; s < end; ++s) {
    const int64_t row = s / p.stretches, first = s % p.stretches * p.stretch, left = p.target.width - first;
    count_row(p, row / p.target.height, row % p.target.height, first, left < p.stretch ? left : p.stretch, tables);
  }
}
