// One RMSprop step in one pass: 12 bytes read and 8 written per fp32 weight.
#pragma once

namespace wandapp {
namespace {

constexpr int64_t kPiece = 1 << 14;  // weights of one task

template <class Lanes, class T>
void rmsprop_piece(float* weight, const T* gradient, float* mean_square, int64_t count, RmspropRates rates) {
  using Floats = typename Lanes::Floats;
  const Floats decay = Lanes::fill(rates.decay), rest = Lanes::fill(1.0f - rates.decay);
  const Floats lr = Lanes::fill(rates.lr), epsilon = Lanes::fill(rates.epsilon);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const Floats g = Lanes::load(gradient + i);
    const Floats v = Lanes::add(Lanes::mul(decay, Lanes::load(mean_square + i)), Lanes::mul(rest, Lanes::mul(g, g)));
    Lanes::store(mean_square + i, v);
    const Floats step = Lanes::div(Lanes::mul(lr, g), Lanes::add(Lanes::sqrt(v), epsilon));
    Lanes::store(weight + i, Lanes::sub(Lanes::load(weight + i), step));
  }
  if (i == count) return;
  float tail_weight[16] = {}, tail_mean_square[16] = {};
  T tail_gradient[16] = {};
  std::copy_n(weight + i, count - i, tail_weight);
  std::copy_n(mean_square + i, count - i, tail_mean_square);
  std::copy_n(gradient + i, count - i, tail_gradient);
  rmsprop_piece<Lanes>(tail_weight, tail_gradient, tail_mean_square, 16, rates);
  std::copy_n(tail_weight, count - i, weight + i);
  std::copy_n(tail_mean_square, count - i, mean_square + i);
}

template <class Lanes>
void rmsprop(float* weight, const void* gradient, Dtype dtype, float* mean_square, int64_t count, RmspropRates rates,
             int threads) {
  auto run = [&](auto* typed) {
    parallel((count + kPiece - 1) / kPiece, threads, [=](int64_t task) {
      const int64_t start = task * kPiece;
      rmsprop_piece<Lanes>(weight + start, typed + start, mean_square + start, std::min(kPiece, count - start), rates);
    });
  };
  if (dtype == kFloat32) run(static_cast<const float*>(gradient));
  if (dtype == kBfloat16) run(static_cast<const Bf16*>(gradient));
  if (dtype == kFloat16) run(static_cast<const Half*>(gradient));
}

}  // namespace
}  // namespace wandapp
