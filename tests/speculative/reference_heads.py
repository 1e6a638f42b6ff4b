"""What draft heads must compute: PyTorch modules whose state dicts are the published checkpoints.

They follow EAGLE's `cnets.py` and MiMo's `modeling_mimo.py`, and share nothing with the code under test.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional


class Norm(nn.Module):
    """Root-mean-square normalisation."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon)


class SelfAttention(nn.Module):
    """Causal, grouped, rotary; over whole sequences."""

    def __init__(self, config: dict[str, Any], in_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.size = config.get("head_dim", config["hidden_size"] // self.heads)
        self.theta = config["rope_theta"]
        self.q_proj = nn.Linear(in_features, self.heads * self.size, bias=bias)
        self.k_proj = nn.Linear(in_features, self.kv_heads * self.size, bias=bias)
        self.v_proj = nn.Linear(in_features, self.kv_heads * self.size, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.size, config["hidden_size"], bias=False)

    def forward(self, x: torch.Tensor, allowed: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        count = len(x)
        q = self._rotated(self.q_proj(x).view(count, self.heads, self.size), positions)
        k = self._rotated(self.k_proj(x).view(count, self.kv_heads, self.size), positions)
        v = self.v_proj(x).view(count, self.kv_heads, self.size)
        k, v = (a.repeat_interleave(self.heads // self.kv_heads, dim=1) for a in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / self.size**0.5
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        return self.o_proj(torch.einsum("hqk,khd->qhd", weights, v).reshape(count, -1))

    def _rotated(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        frequencies = self.theta ** (-torch.arange(0, self.size, 2) / self.size)
        angles = (positions[:, None] * frequencies).repeat(1, 2)[:, None]
        half = self.size // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
        return x * angles.cos() + turned * angles.sin()


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.gate_proj, self.up_proj = nn.Linear(hidden, inner, bias=False), nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class MidLayer(nn.Module):
    """EAGLE-3's decoder layer."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, epsilon = config["hidden_size"], config["rms_norm_eps"]
        self.self_attn = SelfAttention(config, 2 * hidden)
        self.mlp = FeedForward(config)
        self.hidden_norm, self.input_layernorm = Norm(hidden, epsilon), Norm(hidden, epsilon)
        self.post_attention_layernorm = Norm(hidden, epsilon)
        self.norm_first = bool(config.get("norm_before_residual"))

    def forward(self, embedded: torch.Tensor, x: torch.Tensor, *where: torch.Tensor) -> torch.Tensor:
        normed = self.hidden_norm(x)
        residual = normed if self.norm_first else x
        x = residual + self.self_attn(torch.cat([self.input_layernorm(embedded), normed], dim=-1), *where)
        return x + self.mlp(self.post_attention_layernorm(x))


class Eagle3Reference(nn.Module):
    """EAGLE-3's head; its state dict is the published checkpoint, but for the embedding, which is the model's."""

    def __init__(self, config: dict[str, Any], embedding: torch.Tensor, token_ids: torch.Tensor) -> None:
        """`token_ids`: those of its vocabulary, ascending."""
        super().__init__()
        hidden = config["hidden_size"]
        self.fc = nn.Linear(3 * hidden, hidden, bias=False)
        self.midlayer = MidLayer(config)
        self.norm = Norm(hidden, config["rms_norm_eps"])
        self.lm_head = nn.Linear(hidden, len(token_ids), bias=False)
        self.embedding = [embedding]  # in a list: no part of the state
        self.register_buffer("d2t", token_ids - torch.arange(len(token_ids)))
        self.register_buffer("t2d", torch.isin(torch.arange(config["vocab_size"]), token_ids))

    def combine(self, features: torch.Tensor) -> torch.Tensor:
        return self.fc(features)

    def advance(self, x: torch.Tensor, token_ids: torch.Tensor, *where: torch.Tensor) -> torch.Tensor:
        return self.midlayer(self.embedding[0][token_ids], x, *where)

    def draft_logits(self, states: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.norm(states))

    def to_model(self, draft_ids: torch.Tensor) -> torch.Tensor:
        return draft_ids + self.d2t[draft_ids]


class MiMoReference(nn.Module):
    """MiMo's head; its state dict is `model.mtp_layers.0`."""

    def __init__(self, config: dict[str, Any], embedding: torch.Tensor, head: torch.Tensor) -> None:
        super().__init__()
        hidden, epsilon = config["hidden_size"], config["rms_norm_eps"]
        self.token_layernorm, self.hidden_layernorm = Norm(hidden, epsilon), Norm(hidden, epsilon)
        self.input_proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.input_layernorm, self.post_attention_layernorm = Norm(hidden, epsilon), Norm(hidden, epsilon)
        self.self_attn = SelfAttention(config, hidden, bias=True)
        self.mlp = FeedForward(config)
        self.final_layernorm = Norm(hidden, epsilon)
        self.shared = [embedding, head]

    def combine(self, features: torch.Tensor) -> torch.Tensor:
        return features

    def advance(
        self, x: torch.Tensor, token_ids: torch.Tensor, allowed: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        embedded = self.shared[0][token_ids] * (positions > 0)[:, None]
        x = self.input_proj(torch.cat([self.hidden_layernorm(x), self.token_layernorm(embedded)], dim=-1))
        x = x + self.self_attn(self.input_layernorm(x), allowed, positions)
        return self.final_layernorm(x + self.mlp(self.post_attention_layernorm(x)))

    def draft_logits(self, states: torch.Tensor) -> torch.Tensor:
        return states @ self.shared[1].T

    def to_model(self, draft_ids: torch.Tensor) -> torch.Tensor:
        return draft_ids


Reference = Eagle3Reference | MiMoReference


def causal(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Who may see whom in one sequence, and the positions."""
    return torch.ones(count, count, dtype=torch.bool).tril(), torch.arange(count)


@torch.no_grad()
def reference_drafts(head: Reference, features: torch.Tensor, token_ids: list[int], count: int) -> list[int]:
    """The greedy drafts behind a sequence, of the model's features of all its tokens but the last.

    Everything is computed again for each draft: what a cache must amount to.
    """
    inputs = head.combine(features[: len(token_ids) - 1])
    read = token_ids[1:]
    drafts: list[int] = []
    for _ in range(count):
        states = head.advance(inputs, torch.tensor(read), *causal(len(read)))
        drafts.append(int(head.to_model(head.draft_logits(states[-1]).argmax())))
        inputs, read = torch.cat([inputs, states[-1:]]), [*read, drafts[-1]]
    return drafts
