"""[model] of the job file: every architecture is a setting of the same block. ``docs/models.md`` names the families."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the network. GPT-2, Llama and BERT-like encoders are settings of the same block."""

    architecture: str = "decoder"
    """``decoder`` (causal attention), ``encoder`` (full attention) ``encoder_decoder`` (both, T5 and BART),
    ``two_stream`` (content and query in a random order of the tokens, XLNet) or ``replaced_token`` (two encoders, a
    generator and a discriminator, ELECTRA)."""
    layers: int = 2
    """Number of transformer blocks; with an encoder beside the decoder, the decoder's; of ``replaced_token``, the
    discriminator's."""
    encoder_layers: int = 0
    """Blocks of the encoder of ``encoder_decoder``."""
    generator_layers: int = 0
    """Blocks of the generator of ``replaced_token``."""
    generator_hidden: int = 0
    """Width of the generator, in features. Its heads are as wide as the discriminator's, and its MLP is as many times
    its width."""
    detection_loss: float = 50.0
    """``replaced_token``: factor of the discriminator's loss beside the generator's."""
    hidden: int = 64
    """Width of the residual stream, in features."""
    heads: int = 4
    """Number of query heads."""
    kv_heads: int = 0
    """Number of key/value heads (GQA; 1 is MQA). 0 means equal to ``heads`` (MHA)."""
    head_size: int = 0
    """Features per attention head. 0 means ``hidden`` / ``heads``."""
    ffn_hidden: int = 0
    """Width of the MLP, in features. 0 means 4 x ``hidden``."""
    vocab_size: int = 0
    """Number of token ids. 0 means: taken from the tokenizer recorded beside the training data."""
    sequence: int = 128
    """Tokens per sample; of an encoder-decoder model, of its decoder."""
    source_sequence: int = 0
    """Tokens that the encoder of an encoder-decoder model reads of a sample."""
    norm: str = "layernorm"
    """``layernorm`` (arXiv 1607.06450) or ``rmsnorm`` (arXiv 1910.07467)."""
    norm_placement: str = "pre"
    """``pre``: each sub-layer reads a norm, the head too (GPT-2, Llama, T5); ``post``: its sum with the residual stream
    is normed (the first Transformer, GPT-1, BERT)."""
    norm_eps: float = 1e-5
    """Added to the variance inside the norm."""
    activation: str = "gelu"
    """``gelu`` (tanh form, as GPT-2), ``gelu_exact`` (erf form, as BERT), ``relu``, or gated (arXiv 2002.05202)
    ``swiglu`` or ``geglu`` (tanh form)."""
    positions: str = "learned"
    """``learned`` (GPT-2), ``sinusoidal`` (arXiv 1706.03762), ``rope`` (arXiv 2104.09864), ``alibi`` (arXiv
    2108.12409), ``t5`` (a learned bias by distance, arXiv 1910.10683), ``transformer_xl`` (sinusoids of the distance
    meet the queries in every block, arXiv 1901.02860, XLNet) or ``none``."""
    relative_buckets: int = 32
    """``t5``: distances that are told apart."""
    relative_distance: int = 128
    """``t5``: distance from which all share the last bucket."""
    relative_clamp: int = 0
    """``transformer_xl``: distances beyond this one count as it. 0: none."""
    rope_theta: float = 10000.0
    """Base of the RoPE frequencies."""
    rope_interleaved: bool = False
    """Turn neighbouring features together, as the paper does (GPT-J), instead of the two halves (Llama)."""
    rope_scaling: str = "none"
    """How RoPE reaches beyond the length that its frequencies were made for: ``none``, ``linear`` (arXiv 2306.15595),
    ``ntk`` (a larger base), ``yarn`` (arXiv 2309.00071) or ``llama3`` (arXiv 2407.21783, by wavelength)."""
    rope_factor: float = 1.0
    """Target length over the original one."""
    rope_original: int = 0
    """Original length in tokens, for ``yarn`` and ``llama3``."""
    rope_low: float = 1.0
    """``yarn``, ``llama3``: turns over the original length below which a frequency is divided by ``rope_factor``."""
    rope_high: float = 0.0
    """``yarn``, ``llama3``: turns above which a frequency is kept. 0 means the papers' 32 and 4."""
    rope_attention: float = 0.0
    """``yarn``: factor of the rotated q and k. 0 means the paper's 0.1 ln(``rope_factor``) + 1."""
    bias: bool = True
    """Whether linear layers have a bias."""
    qkv_bias: bool = False
    """Whether q, k and v have a bias where ``bias`` is false (Qwen2)."""
    mlp_bias: bool = False
    """Whether the MLP has biases where ``bias`` is false (XLNet)."""
    qk_norm: bool = False
    """Normalise every head's q and k, before RoPE, with weights [head size] shared by the heads (Qwen3)."""
    window: int = 0
    """Sliding window: a token reads those less than this many places away (Mistral, arXiv 2310.06825). 0: all."""
    attention_scale: float = 0.0
    """Factor of the attention scores; 1 in T5. 0 means 1 / sqrt(head size)."""
    tied_embeddings: bool = True
    """Whether the output layer shares the token embedding."""
    output_bias: bool = False
    """Whether the output layer has a bias where there is no ``mlm_transform``, which brings one (XLNet)."""
    output_scale: float = 1.0
    """Factor of the features that the output layer reads; 1 / sqrt(hidden) in the first T5, whose embedding is tied."""
    embedding_size: int = 0
    """Width of the embeddings where it is not ``hidden``: a matrix leads from one to the other (ALBERT, ELECTRA)."""
    embedding_scale: float = 1.0
    """Factor of the token embeddings; sqrt(hidden) in the first Transformer."""
    embedding_norm: bool = False
    """Norm of the summed embeddings (BERT, BLOOM)."""
    token_types: int = 0
    """Segments of text that have an embedding of their own (2 in BERT); tokens without a type have type 0. With
    ``positions = "transformer_xl"`` scores know whether two tokens are of one type, instead (XLNet)."""
    mlm_transform: bool = False
    """Dense layer, activation and norm before the output layer, which then has a bias (BERT's masked-LM head); of
    ``replaced_token``, the generator's."""
    sentence_classes: int = 0
    """Classes of the sentence that its first token tells, by a tanh layer and a linear one (BERT, ALBERT). 0: none."""
    share_layers: bool = False
    """All blocks are one block, used ``layers`` times (ALBERT, arXiv 1909.11942)."""
    parallel_block: bool = False
    """Attention and MLP read the same norm and add to the residual together (PaLM, arXiv 2204.02311)."""
    dropout: float = 0.0
    """Probability of dropping a feature after the embedding, the attention output and the MLP."""
    attention_dropout: float = 0.0
    """Probability of dropping an attention weight."""
    init: str = "scaled"
    """Initial weights: ``scaled`` (projections into the residual stream over sqrt(2 x layers), GPT-2), ``normal``
    (BERT), ``depth`` (over sqrt(2 x the layer's number)), ``xavier``, ``he`` or ``tfixup``."""
    init_std: float = 0.02
    """Standard deviation of initial embeddings, and of matrices under ``scaled``, ``normal`` and ``depth``."""

    experts: int = 0
    """Experts of a mixture-of-experts block (arXiv 1701.06538); 0: every block has one MLP."""
    experts_per_token: int = 2
    """Experts that work on each token (top-k)."""
    expert_hidden: int = 0
    """Width of an expert, in features. 0 means ``ffn_hidden``."""
    shared_experts: int = 0
    """Experts of that width, held as one MLP, that work on every token (arXiv 2401.06066)."""
    moe_every: int = 1
    """Every n-th block has experts, starting with block ``moe_dense_first`` + n; the others have an MLP."""
    moe_dense_first: int = 0
    """First blocks that have an MLP, not experts."""
    capacity_factor: float = 0.0
    """Tokens that an expert takes from a sequence in training, over those of an even share. 0: all (dropless)."""
    router_scores: str = "softmax"
    """``softmax`` (Mixtral, Qwen-MoE) or ``sigmoid`` (DeepSeek-V3) of the router's logits."""
    router_normalize: bool = True
    """Divide the weights of a token's experts by their sum (Mixtral; with softmax: the softmax of the top k)."""
    router_scale: float = 1.0
    """Factor of the weights of a token's experts."""
    router_bias: bool = False
    """Balance by a bias on the scores that pick experts (arXiv 2408.15664), moved by ``optimizer.router_bias_rate``."""
    router_aux_loss: float = 0.0
    """Weight of the load-balance loss of each router (arXiv 2101.03961), taken over each sequence."""
    router_z_loss: float = 0.0
    """Weight of the mean squared logsumexp of each router's logits (arXiv 2202.08906)."""

    @property
    def blocks(self) -> int:
        """Blocks that the stages of a pipeline share out."""
        return self.layers + self.encoder_layers + self.generator_layers

    @property
    def generator(self) -> ModelConfig:
        """The generator of ``replaced_token`` as a model of its own, with the embeddings that both read."""
        return replace(
            self, architecture="encoder", layers=self.generator_layers, generator_layers=0, generator_hidden=0,
            hidden=self.generator_hidden, heads=self.generator_hidden // self.head_dim, kv_heads=0,
            head_size=self.head_dim, ffn_hidden=self.n_ffn * self.generator_hidden // self.hidden,
            embedding_size=self.n_embedding,
        )  # fmt: skip

    @property
    def discriminator(self) -> ModelConfig:
        """The discriminator of ``replaced_token`` as a model of its own; no job has this one."""
        return replace(
            self, architecture="discriminator", generator_layers=0, generator_hidden=0, tied_embeddings=False,
            mlm_transform=False,
        )  # fmt: skip

    def has_experts(self, layer: int) -> bool:
        """Whether block ``layer``, counted from 1, is a mixture of experts."""
        place = layer - self.moe_dense_first
        return self.experts > 0 and place > 0 and place % self.moe_every == 0

    @property
    def gathers_choices(self) -> bool:
        """Whether routers count the choices of whole sequences, which several ranks may hold."""
        return bool(self.router_aux_loss or self.capacity_factor)

    @property
    def n_expert_hidden(self) -> int:
        """Width of an expert with the default resolved."""
        return self.expert_hidden or self.n_ffn

    @property
    def n_kv_heads(self) -> int:
        """Key/value heads with the default resolved."""
        return self.kv_heads or self.heads

    @property
    def n_ffn(self) -> int:
        """MLP width with the default resolved."""
        return self.ffn_hidden or 4 * self.hidden

    @property
    def head_dim(self) -> int:
        """Features per attention head with the default resolved."""
        return self.head_size or self.hidden // self.heads

    @property
    def n_embedding(self) -> int:
        """Width of the embeddings with the default resolved."""
        return self.embedding_size or self.hidden

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies two products of its input."""
        return self.activation in ("swiglu", "geglu")

    @property
    def has_qkv_bias(self) -> bool:
        """Whether the projections to q, k and v have a bias."""
        return self.bias or self.qkv_bias

    @property
    def has_mlp_bias(self) -> bool:
        """Whether the MLP's matrices have biases."""
        return self.bias or self.mlp_bias

    @property
    def has_output_bias(self) -> bool:
        """Whether the output layer has a bias."""
        return self.mlm_transform or self.output_bias

    @property
    def n_rope_high(self) -> float:
        """``rope_high`` with the default resolved."""
        return self.rope_high or {"yarn": 32.0}.get(self.rope_scaling, 4.0)
