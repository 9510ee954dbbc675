"""[data] of the job file: what is read, in which order, and what is asked of it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from and in which order they are read."""

    paths: list[str] = field(default_factory=list)
    """Prefixes of ``.bin``/``.idx`` pairs, e.g. ``data/corpus_text_document``, or manifests of numbered ones."""
    weights: list[float] = field(default_factory=list)
    """Share of samples drawn from each path; empty means one share per training token. With ``stages``: the shares of
    the first stage, then those of the second, and so on; 0 leaves a path out of a stage."""
    stages: list[int] = field(default_factory=list)
    """Samples at which the next stage's weights begin, ascending; empty: one stage."""
    split: list[float] = field(default_factory=lambda: [0.98, 0.02, 0.0])
    """Shares of documents (by stored order, each source alone) for training, validation and test."""
    fraction: float = 1.0
    """Share of the training documents that is read, the first of each source; validation and test stay the same."""
    tokenizer_type: str = "HuggingFaceTokenizer"
    """``HuggingFaceTokenizer``, ``SentencePieceTokenizer``, ``ByteTokenizer`` or ``NullTokenizer``."""
    tokenizer_model: str = ""
    """The tokenizer's file. Empty: none is loaded (``generate`` then needs ``--tokenizer``)."""
    packing: str = "concatenate"
    """``concatenate`` (documents back to back, cut every ``model.sequence`` tokens, as GPT) or ``best-fit`` (whole
    documents in rows, arXiv 2404.10830, from a plan that ``tools/pack_data.py`` made)."""
    objective: str = "causal"
    """``causal``, ``infill``, ``prefix`` (decoder); ``masked``, ``next_sentence``, ``sentence_order`` (encoder);
    ``span_corruption``, ``denoising`` (encoder_decoder); ``permuted`` (two_stream); ``replaced`` (replaced_token).
    Each is a file of ``megapre/objectives`` that names its paper."""
    mask_probability: float = 0.15
    """Share of tokens to find again: hidden ones (T5 and BERT 0.15, BART 0.3), or predicted ones of XLNet (1 / K)."""
    mask_unit: str = "token"
    """What is hidden as one: ``token``, ``word`` (all tokens of a word) or ``span`` (words; SpanBERT)."""
    mask_span: float = 3.0
    """Mean span: of ``span_corruption`` in tokens (T5), of ``denoising`` the Poisson mean in tokens (BART), of
    ``mask_unit = "span"`` the mean of the geometric distribution in words, before it is cut at 10."""
    delete_probability: float = 0.0
    """Share of tokens that ``denoising`` leaves out without a trace."""
    permute_sentences: float = 0.0
    """Share of samples whose sentences ``denoising`` shuffles inside their documents; needs sentences in the data
    (``preprocess_data.py --split-sentences``)."""
    rotate_documents: float = 0.0
    """Share of samples whose documents ``denoising`` begins at a random token."""
    fim_rate: float = 0.5
    """Share of documents that ``infill`` rearranges (arXiv 2207.14255); the others are learnt from left to right."""
    fim_spm_rate: float = 0.5
    """Share of those that have the suffix before the prefix."""
    mask_token: int = -1
    """Id that hides a token; -1 means the tokenizer's own, else the last id of the vocabulary."""
    cls_token: int = -1
    """Id that begins a row of sentences ([CLS]); -1, here and below: the tokenizer's own."""
    sep_token: int = -1
    """Id that ends a text of a pair ([SEP])."""
    pad_token: int = -1
    """Id of places that a row of sentences leaves empty."""
    start_token: int = -1
    """First id that a decoder reads; -1: the tokenizer's padding (T5), else its end of document (BART)."""
    sentinel_tokens: list[int] = field(default_factory=list)
    """First and last of the ids that stand for hidden spans, in order, down where the last is lower (T5: 32099, 32000).
    Empty: the tokenizer's ``<extra_id_0>``, ``<extra_id_1>``, ..."""
    fim_tokens: list[int] = field(default_factory=list)
    """Ids that announce the prefix, the suffix and the middle (``infill``). Empty: the tokenizer's."""
    eod_mask_loss: bool = False
    """Leave predictions made from an end-of-document token out of the loss (``causal``, ``infill``, ``prefix``)."""
    reset_positions: bool = False
    """Restart positions at every document inside a sample."""
    reset_attention: bool = False
    """Keep attention inside a document."""
    seed: int = 1234
    """Key of the sample order and of the objectives' randomness."""
    prefetch: int = 2
    """Steps read ahead by the loader's thread."""
    cache_dir: str = ""
    """Local folder for parts of remote paths (``s3://...``); empty: ``megapre-cache`` among the temporary files."""
    cache_gib: float = 8.0
    """Largest size of a rank's part of ``cache_dir``, in GiB."""
    stage: str = ""
    """Folder on the node's own disk that all of ``paths`` is copied to before the run, once a node; ``$NAME`` is a
    variable of the node. Empty: they are read where they are."""
    skip_batches: list[int] = field(default_factory=list)
    """Numbers of global batches to leave out of the run; batch n holds samples [n G, (n + 1) G) of the order."""
