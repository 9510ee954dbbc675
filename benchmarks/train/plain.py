"""A plain GPT in the shape of nanoGPT's: the peer of J1, written here so that it needs torch alone.

Fused qkv, torch's scaled dot-product attention, tanh GELU, learned positions, tied embeddings; everything else is left
to torch.compile.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Pre-norm attention and MLP on [batch, seq, hidden]."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.output = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, hidden = x.shape
        q, k, v = (
            part.view(batch, seq, self.heads, hidden // self.heads).transpose(1, 2)
            for part in self.qkv(self.ln_1(x)).split(hidden, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(y.transpose(1, 2).reshape(batch, seq, hidden))
        return x + self.down(F.gelu(self.up(self.ln_2(x)), approximate="tanh"))


class GPT(nn.Module):
    """Tokens [batch, seq] to logits [batch, seq, vocab]."""

    def __init__(self, vocab: int, sequence: int, layers: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, hidden), nn.Embedding(sequence, hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)

    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Copy the weights of a GPT-2 checkpoint of Hugging Face, whose linear layers are stored [in, out]."""
        parts = {"qkv": "attn.c_attn", "output": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
        with torch.no_grad():
            self.tokens.weight.copy_(weights["transformer.wte.weight"])
            self.positions.weight.copy_(weights["transformer.wpe.weight"])
            for kind in ("weight", "bias"):
                getattr(self.norm, kind).copy_(weights[f"transformer.ln_f.{kind}"])
            for number, block in enumerate(self.blocks):
                home = f"transformer.h.{number}"
                for name, theirs in parts.items():
                    layer = getattr(block, name)
                    layer.weight.copy_(weights[f"{home}.{theirs}.weight"].T)
                    layer.bias.copy_(weights[f"{home}.{theirs}.bias"])
                for norm in ("ln_1", "ln_2"):
                    for kind in ("weight", "bias"):
                        getattr(getattr(block, norm), kind).copy_(weights[f"{home}.{norm}.{kind}"])
