"""The arithmetic of PPO, on tensors only: masks, rewards of tokens, advantages, clipped losses, the KL coefficient.

Shapes: B answers of at most T tokens, padded at the end; `mask` (B, T) is true on an answer's own tokens. Padded
positions are never read. Logarithms are natural, so KL is in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def answer_mask(tokens: Tensor, ends: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Which tokens (B, T) belong to the answers, including the end token; and which answers (B,) have ended."""
    is_end = torch.isin(tokens, torch.tensor(list(ends), device=tokens.device))
    before = is_end.cumsum(1) - is_end.long()  # number of ends before each token
    return before == 0, is_end.any(1)


def log_probs_and_entropy(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Of logits (B, T, vocabulary): the log-probability of each token (B, T), and the entropy, without a gradient."""
    every = logits.float().log_softmax(-1)
    with torch.no_grad():
        entropy = -(every.exp() * every).sum(-1)
    return every.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), entropy


def final_scores(scores: Tensor, ended: Tensor, clip: float | None, penalty: float | None) -> Tensor:
    """Scores (B,) clipped to ±`clip`, then lowered by `penalty` for answers without an end."""
    if clip is not None:
        scores = scores.clamp(-clip, clip)
    return scores if penalty is None else torch.where(ended, scores, scores - penalty)


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Rewards (B, T): minus the KL penalty at each token, and the whole score (B,) at the last (Ziegler et al. 2019).

    `kl` (B, T) is log π/π_ref of the sampled tokens.
    """
    rewards = torch.where(mask, -kl_coef * kl, 0.0)
    last = mask.sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores.to(rewards.dtype).unsqueeze(1))


def advantages_and_returns(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), all (B, T), zero outside the answers.

    δ_t = r_t + γ V_{t+1} − V_t and A_t = δ_t + γλ A_{t+1}; after the last token, value and advantage are zero. `values`
    (B, T) are those of the states in which the tokens were chosen. Returns: A + V.
    """
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(values)
    later_value = later_advantage = torch.zeros_like(values[:, 0])
    for step in reversed(range(values.shape[1])):
        delta = rewards[:, step] + gamma * later_value - values[:, step]
        advantages[:, step] = later_advantage = (delta + gamma * lam * later_advantage) * mask[:, step]
        later_value = values[:, step]
    return advantages, advantages + values


def moments(values: Tensor, mask: Tensor, total: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance over the masked values of all processes; `total` sums a tensor over them."""
    chosen = values[mask].double()
    count, first = total(torch.stack([mask.sum().double(), chosen.sum()]))
    mean = first / count
    return mean, total((chosen - mean).square().sum()) / count


def whiten(
    values: Tensor,
    mask: Tensor,
    total: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    *,
    keep_mean: bool = False,
) -> Tensor:
    """The masked values with variance 1, and mean 0 or unchanged."""
    mean, variance = moments(values, mask, total)
    white = (values - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, white + mean if keep_mean else white, 0.0).to(values.dtype)


def policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, cliprange: float
) -> tuple[Tensor, Tensor]:
    """The clipped loss of each token (Schulman et al. 2017, eq. 7, negated), and where clipping was active."""
    ratio = (log_probs - old_log_probs).exp()
    free, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.max(free, clipped), clipped > free


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, cliprange: float) -> Tensor:
    """Half the squared error of each value, without a gain from moving more than `cliprange` from its old value."""
    clipped = old_values + (values - old_values).clamp(-cliprange, cliprange)
    return 0.5 * torch.max((values - returns).square(), (clipped - returns).square())


def next_kl_coef(kl_coef: float, kl: float, target: float | None, horizon: int, answers: int) -> float:
    """The KL coefficient after a batch of `answers` with a mean `kl` each (Ziegler et al. 2019, section 2.2).

    It changes in proportion to the distance of the KL from the target, by at most 20 % in `horizon` answers. Without a
    target it is constant.
    """
    if target is None:
        return kl_coef
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * answers / horizon)
