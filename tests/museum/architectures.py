"""Seeded bugs of models whose stages exchange several tensors."""

from __future__ import annotations

from tests.museum.mutant import Mutant

PAIRS = "tests/equivalence/test_encoder_decoder.py::test_layout_agrees_with_the_oracle"
STREAMS = "tests/equivalence/test_two_stream.py::test_layout_agrees_with_the_oracle"
EXECUTOR = "tests/parallel/test_executor.py::test_a_tuple_of_tensors_goes_through_any_schedule"

ARCHITECTURE_MUTANTS = (
    Mutant(
        "passed-tensor-freed-after-sending",
        "megapre/parallel/pipeline/executor.py",
        "[x for x in tensors if not _within(x, held)]",
        "tensors",
        f"{EXECUTOR}[False-1f1b-4-1]",
        "a stage frees what it has sent, though its own backward reads the encoder's output that it handed on",
    ),
    Mutant(
        "gradient-of-a-passed-tensor-lost-at-a-stage",
        "megapre/parallel/pipeline/executor.py",
        "both = [(y, g) for y, g in zip(outputs, gradients, strict=True) if g is not None]",
        "both = [(y, g) for y, g in zip(outputs, gradients) if g is not None and y.grad_fn]",
        f"{EXECUTOR}[False-1f1b-1-1]",
        "the encoder learns only from the decoder block next to it",
    ),
    Mutant(
        "unused-gradient-left-out-of-the-message",
        "megapre/parallel/pipeline/executor.py",
        "tuple(torch.zeros_like(x) if g is None else g for x, g in needed)",
        "tuple(g for x, g in needed if g is not None)",
        f"{EXECUTOR}[False-interleaved-2-4]",
        "a stage that reads one tensor of two sends back one gradient, and the stage before takes it for the other",
    ),
    Mutant(
        "cross-attention-reads-the-decoder",
        "megapre/models/encoder_decoder.py",
        "join_and_norm(ctx, last, y, *self.cross(ctx, h, memory))",
        "join_and_norm(ctx, last, y, *self.cross(ctx, h, memory[: len(h)] + h.mean()))",
        f"{PAIRS}[t5-1x2x2+zero3]",
        "keys and values of cross-attention that come from the decoder too",
    ),
    Mutant(
        "cross-attention-is-causal",
        "megapre/models/encoder_decoder.py",
        "            return Mask()\n",
        "            return Mask(causal=True)\n",
        f"{PAIRS}[bart-1x1x2+zero3]",
        "a decoder reads the encoder's output up to its own position only",
    ),
    Mutant(
        "cross-attention-crosses-documents",
        "megapre/models/encoder_decoder.py",
        "return Mask(documents=(asked.new_zeros(ctx.tokens.shape) if asking is None else asking, asked))",
        "return Mask()",
        f"{PAIRS}[t5-1x2x2+zero3]",
        "targets of one document read the source of another",
    ),
    Mutant(
        "encoder-and-decoder-embeddings-drop-alike",
        "megapre/models/build.py",
        '"encoder.embedding", 1)',
        '"encoder.embedding", 0)',
        f"{PAIRS}[t5-1x2x2+zero3]",
        "source and target share the site of a dropout mask",
    ),
    Mutant(
        "cross-attention-drops-as-self-attention",
        "megapre/models/encoder_decoder.py",
        "sites = [site(CROSS + self.layer, WEIGHTS",
        "sites = [site(self.layer, WEIGHTS",
        f"{PAIRS}[t5-1x2x2+zero3]",
        "two attentions of a block share their dropout masks",
    ),
    Mutant(
        "one-table-of-distances-for-both-stacks",
        "megapre/models/build.py",
        'home = "encoder" if name.startswith("encoder.") else "embedding"',
        'home = "embedding"',
        f"{PAIRS}[t5-4x1x1]",
        "T5's encoder uses the decoder's relative bias",
    ),
    Mutant(
        "encoders-norm-in-front-of-its-last-block",
        "megapre/models/encoder_decoder.py",
        "        (x,) = self.block(source_of(ctx), x)\n        return x if self.norm is None else self.norm(x), y\n",
        "        (x,) = self.block(source_of(ctx), x if self.norm is None else self.norm(x))\n        return x, y\n",
        f"{PAIRS}[t5-1x2x2+zero3]",
        "the encoder's output leaves it without its final norm",
    ),
    Mutant(
        "query-sees-its-own-token",
        "megapre/models/two_stream.py",
        "mask = Mask(causal=True, strict=strict,",
        "mask = Mask(causal=True, strict=False,",
        f"{STREAMS}[rope-4x1x1+sp]",
        "XLNet's query stream reads the content of the position that it predicts: a loss too good to be true",
    ),
    Mutant(
        "order-of-the-text-in-place-of-the-factorisation",
        "megapre/models/two_stream.py",
        "window=self.window, documents=documents, order=order)",
        "window=self.window, documents=documents)",
        f"{STREAMS}[rope-4x1x1+sp]",
        "two streams from left to right",
    ),
    Mutant(
        "query-reads-queries",
        "megapre/models/two_stream.py",
        "self._read(ctx, asking, k, v, distances, strict=True)",
        "self._read(ctx, asking, k, v.flip(1) + asking.mean(), distances, strict=True)",
        f"{STREAMS}[rope-4x1x1+sp]",
        "the query stream's values come from itself",
    ),
    Mutant(
        "streams-drop-alike",
        "megapre/models/two_stream.py",
        "layer = self.layer + (CROSS if query else 0)",
        "layer = self.layer",
        f"{STREAMS}[buckets-1x2x2+zero1]",
        "content and query share the dropout mask of their attention weights",
    ),
    Mutant(
        "head-reads-the-content",
        "megapre/models/two_stream.py",
        "return super().forward(ctx, g)",
        "return super().forward(ctx, h)",
        f"{STREAMS}[rope-4x1x1+sp]",
        "predictions from the stream that knows the token",
    ),
    Mutant(
        "loss-of-a-middle-layer-without-gradient",
        "megapre/parallel/pipeline/executor.py",
        "torch.autograd.backward([*ends, *losses], [*given, *[None] * len(losses)])",
        "torch.autograd.backward(ends or losses, given or None)",
        f"{EXECUTOR}[False-1f1b-2-1]",
        "ELECTRA's generator is told its loss and does not learn from it",
    ),
    Mutant(
        "loss-of-a-middle-layer-left-out-of-validation",
        "megapre/parallel/pipeline/executor.py",
        "self.results += held.loss(number, self.contexts[m], inputs)",
        "pass",
        f"{EXECUTOR}[False-1f1b-2-1]",
        "the loss of a validation is the last stage's part alone",
    ),
)
