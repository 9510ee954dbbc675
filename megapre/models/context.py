"""What every layer may know of the microbatch it works on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from megapre.parallel.comm import Axis
from megapre.parallel.tensor import Linear

EMBEDDING, ATTENTION, MLP, WEIGHTS = range(4)
"""Kinds of dropout site."""
SAMPLE = WEIGHTS
"""Kind, in layer 0, of the draws of a generator's tokens: no attention is there."""
CROSS = 1 << 19
"""Added to a layer's number by the sites of its cross-attention."""


@dataclass
class KVCache:
    """Keys and values of the tokens seen so far, by layer."""

    length: int = 0
    """Tokens cached before the current forward pass."""
    layers: dict[int, Tensor] = field(default_factory=dict)
    """[2, room, batch, kv_heads, head_dim] of each layer; the room is doubled when it is used up."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens of a layer, those of the current pass included."""
        stop, held = self.length + k.shape[0], self.layers.get(layer)
        if held is None or held.shape[1] < stop:
            grown = k.new_empty((2, max(stop, 2 * self.length), *k.shape[1:]))
            if held is not None:
                grown[:, : self.length] = held[:, : self.length]
            self.layers[layer] = held = grown
        held[0, self.length : stop], held[1, self.length : stop] = k, v
        return held[0, :stop], held[1, :stop]


@dataclass(frozen=True)
class Routed:
    """What a router did with this rank's tokens of a microbatch, for balancing and for the log."""

    load: Tensor
    """fp64 [E]: choices of each expert, before any are dropped."""
    balance: Tensor
    """Load-balance loss, a sum over sequences."""
    z: Tensor
    """Router z-loss, a sum over sequences."""


@dataclass
class Context:
    """One microbatch on its way through the layers of a rank.

    Sequence tensors are [seq, batch]: this context rank's part of the sequence, whole on every tensor rank.
    """

    tokens: Tensor
    targets: Tensor
    weights: Tensor
    positions: Tensor
    segments: Tensor | None
    """Document numbers of the whole sequence."""
    samples: Tensor
    """int64 [batch]: number of each sample in the run; with the position it keys dropout."""
    places: Tensor
    """int64: places in the whole sequence of this part's tokens."""
    shard: slice
    """Rows of this part that this rank's activations hold: all of them, or fewer under sequence parallelism."""
    seed: int
    step: int
    training: bool
    encoder: Context | None = None
    """The same for the source of an encoder-decoder model: its tokens, positions and document or padding numbers."""
    token_types: Tensor | None = None
    """int64 [seq, batch]: segment of text of this part's tokens (BERT); the only one that is cut by context ranks."""
    prefix: Tensor | None = None
    """int64 [batch]: leading tokens of the whole sequence that see each other both ways; as all that follow, whole."""
    labels: Tensor | None = None
    """int64 [batch]: class of each sample."""
    label_weights: Tensor | None = None
    """float32 [batch]; there whenever ``labels`` are."""
    ranks: Tensor | None = None
    """int64 [seq, batch]: factorisation order of the whole sequence (XLNet)."""
    loss: Callable[[Linear, Tensor, Context], Tensor] | None = None
    """Output layer and its input to the scaled loss; None makes the head give logits."""
    sentence_loss: Callable[[Tensor, Context], Tensor] | None = None
    """Logits of the sentences' classes [batch, classes] to the scaled loss."""
    detection_loss: Callable[[Tensor, Tensor, Context, Axis], Tensor] | None = None
    """Logits [rows, batch], and whether these tokens are replaced, to the scaled loss; ranks of the axis hold different
    rows."""
    leads: bool = True
    """Whether the first of this rank's rows is the first token of the sequence."""
    rope: tuple[Tensor, Tensor] | None = None
    """Cosines and sines of this microbatch's positions."""
    cache: KVCache | None = None
    auxiliary: Callable[[Tensor, Tensor], Tensor] | None = None
    """Lets an auxiliary loss (second; a sum over sequences) into backward where an activation (first) passes."""
    routed: dict[int, Routed] = field(default_factory=dict)
    """Filled by every router, by layer, in training."""
    parts: dict[str, Tensor] = field(default_factory=dict)
    """Filled by the head with the losses that it adds up, by name (``training/loss.py``)."""
    rms: dict[int, Tensor] | None = None
    """Filled with the mean square of each block's output, when asked for."""


def site(layer: int, kind: int, head: int = 0) -> int:
    """Number of a place where dropout happens; at most 1,024 heads."""
    return layer << 12 | head << 2 | kind
