"""Every family against its module of ``transformers``: logits, gradients, and folders both ways, in several layouts."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from megapre.checkpoint import store
from megapre.config.check import check
from megapre.config.schema import Config, DataConfig, ModelConfig, ParallelConfig, PrecisionConfig, TrainConfig
from megapre.data.loader import Counts, Microbatch
from megapre.hub.export import export
from megapre.hub.families import FAMILIES, differences
from megapre.hub.load import Import
from megapre.models.context import Context
from megapre.models.heads import Head
from megapre.models.two_stream import TwoStreamHead
from megapre.parallel.grid import Grid
from megapre.parallel.placement import Address
from megapre.parallel.tensor import Linear
from megapre.training.engine import Engine, build
from megapre.training.resume import start_from
from megapre.verify import threads
from megapre.verify.cells import parse

VOCAB, LENGTH, BATCH = 61, 12, 3
LLAMA = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": LENGTH,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**LLAMA, "tie_word_embeddings": True}),
    "llama3": ("llama", {**LLAMA, "rope_parameters": LLAMA3}),
    "mistral": ("mistral", {**LLAMA, "sliding_window": 5, "head_dim": 12}),
    "qwen2": ("qwen2", LLAMA),
    "qwen3": ("qwen3", {**LLAMA, "head_dim": 12, "rope_parameters": YARN, "tie_word_embeddings": True}),
    "mixtral": ("mixtral", {**LLAMA, "num_local_experts": 4}),
    "qwen3_moe": (
        "qwen3_moe",
        {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 2},
    ),
    "gpt2": ("gpt2", {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": LENGTH}),
}
ENCODER = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
    "max_position_embeddings": LENGTH, "pad_token_id": 0,
}  # fmt: skip
MODELS |= {
    "bert": ("bert", ENCODER),
    "bert-pairs": ("bert", {**ENCODER, "architectures": ["BertForPreTraining"], "hidden_act": "gelu_new"}),
    "bert-bare": ("bert", {**ENCODER, "architectures": ["BertModel"]}),
    "roberta": ("roberta", {**ENCODER, "max_position_embeddings": LENGTH + 2, "pad_token_id": 1, "type_vocab_size": 1}),
    "electra": ("electra", {**ENCODER, "embedding_size": 16}),
    "albert": ("albert", {**ENCODER, "embedding_size": 16}),
    "albert-pairs": ("albert", {**ENCODER, "embedding_size": 16, "architectures": ["AlbertForPreTraining"]}),
}
T5 = {
    "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16,
}  # fmt: skip
MODELS |= {
    "t5": ("t5", T5),
    "t5-gated": (
        "t5",
        {**T5, "d_kv": 12, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 3},
    ),
    "bart": (
        "bart",
        {
            "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40,
            "max_position_embeddings": LENGTH, "scale_embedding": True,
        },
    ),
}  # fmt: skip
XLNET = {"vocab_size": VOCAB, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 40, "mem_len": None}
MODELS |= {
    "xlnet": ("xlnet", XLNET),
    "xlnet-bare": ("xlnet", {**XLNET, "clamp_len": 5, "ff_activation": "relu", "architectures": ["XLNetModel"]}),
}
LAYOUTS = ["1x1x1", "2x2x1+sp"]


def theirs(name: str, folder: Path) -> Any:
    """A model of ``transformers`` with random weights, no bias or norm at its first value, saved in ``folder``."""
    kind, settings = MODELS[name]
    made = transformers.AutoConfig.for_model(kind, **settings)
    torch.manual_seed(sum(map(ord, name)))
    made._attn_implementation = "eager"
    model = getattr(transformers, settings.get("architectures", FAMILIES[kind][1:])[0])(made).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
            if parameter.dim() == 1:
                parameter.add_(0.7)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    found = {}
    for name in MODELS:
        folder = tmp_path_factory.mktemp(name)
        found[name] = (theirs(name, folder), folder)
    return found


def microbatch(model: ModelConfig) -> Microbatch:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(2, VOCAB, (LENGTH + 1, BATCH), generator=generator)  # padding (0, 1) has no gradient there
    positions = torch.arange(LENGTH).unsqueeze(1).expand(LENGTH, BATCH).contiguous()
    m = Microbatch(tokens[:-1], tokens[1:], torch.ones(LENGTH, BATCH), positions, None, torch.arange(BATCH))
    if model.token_types > 1:
        m.token_types = (positions > 4).long()
    if model.sentence_classes:
        m.labels, m.label_weights = torch.tensor([0, 1, 1]), torch.ones(BATCH)
    if model.architecture == "encoder_decoder":
        m.source = torch.randint(2, VOCAB, (LENGTH, BATCH), generator=generator)
    if model.architecture == "two_stream":  # the last 7 of a random order are predicted
        order = torch.stack([torch.randperm(LENGTH, generator=generator) for _ in range(BATCH)], 1)
        m.ranks = (order - (LENGTH - 8)).clamp_min(0)
        m.weights = (m.ranks > 0).float()
    return m


def their_outputs(model: Any, m: Microbatch) -> tuple[Tensor, Tensor | None]:
    """Logits of tokens [batch, seq, vocabulary] and of sentences."""
    if m.source is not None:
        out = model(input_ids=m.source.T, decoder_input_ids=m.tokens.T, use_cache=False)
    elif m.ranks is not None and m.ranks.any():  # as XLNet's authors: what is only read hides nothing from anyone
        asked, order = m.ranks.T.unsqueeze(2), m.ranks.T.unsqueeze(1)
        hidden = ((order >= asked) & (order > 0)).float()
        wanted = torch.eye(LENGTH).expand(BATCH, -1, -1)
        out = model(m.tokens.T, token_type_ids=m.token_types.T, perm_mask=hidden, target_mapping=wanted)
    elif m.token_types is not None:
        out = model(input_ids=m.tokens.T, token_type_ids=m.token_types.T)
    elif getattr(model.config, "type_vocab_size", 0):
        out = model(input_ids=m.tokens.T)
    else:
        out = model(input_ids=m.tokens.T, use_cache=False)
    if "last_hidden_state" in out:
        return out.last_hidden_state @ model.get_input_embeddings().weight.T, None
    sentence = out.get("seq_relationship_logits", out.get("sop_logits"))
    return out.get("logits", out.get("prediction_logits")), sentence


def counts(m: Microbatch) -> Counts:
    return Counts(int(m.weights.sum()), BATCH if m.labels is not None else 0, LENGTH * BATCH)


def job(folder: Path, layout: str, dtype: str = "fp32") -> Config:
    """A job that starts from ``folder``, without dropout."""
    cell = parse(layout)
    model = replace(Import(folder).model, dropout=0.0, attention_dropout=0.0)
    if model.architecture == "encoder_decoder":
        model = replace(model, sequence=LENGTH, source_sequence=LENGTH)
    train = TrainConfig(global_batch=BATCH, microbatch=BATCH)
    # the objective is the nearest one that the job's rules let through: the batch is our own
    nearest = {"encoder": "masked", "decoder": "causal", "two_stream": "permuted"}
    data = DataConfig(objective=nearest.get(model.architecture, "denoising"))
    if model.architecture == "encoder_decoder":
        data = replace(data, mask_span=1.0)
    if model.sentence_classes:
        data = replace(data, objective="next_sentence" if model.embedding_size == 0 else "sentence_order")
    config = Config(
        model=model, data=data, train=train, precision=PrecisionConfig(dtype=dtype), parallel=ParallelConfig(data=1)
    )
    return check(cell.apply(config), cell.world)


def started(grid: Grid, device: torch.device, config: Config, folder: Path) -> Engine:
    engine = build(config, grid, device, VOCAB)
    start_from(folder, config, engine.step)
    return engine


def run_one(
    grid: Grid, device: torch.device, config: Config, folder: Path, m: Microbatch
) -> tuple[Tensor | None, float, dict[str, Tensor]]:
    """Of one rank: its part of the logits, the loss, and gradients by tensor and offset."""
    engine = started(grid, device, config, folder)
    logits: list[Tensor] = []

    def keep(output: Linear, x: Tensor, ctx: Context) -> Tensor:
        logits.append(output(x))
        return x.new_zeros(())

    step = engine.step
    contexts = step._contexts([m], counts(m), 0, False, training=False)
    for context in contexts:
        context.loss = keep
    with torch.no_grad():
        step.executor.run(step._plan(1, False), contexts, step._carried([m]), step.flat)
    loss, _ = step.compute_gradients([m], counts(m), 0)
    gradients = {}
    for bucket, shard in zip(step.flat.layout.buckets, step.flat.gradients.shards):
        for slot in bucket.slots:
            window = tuple(slice(n) for n in slot.size)
            gradients[f"{slot.spec.name}@{slot.offset}"] = shard[bucket.place(slot)].view(slot.shape)[window].clone()
    return (logits[0] if logits else None), float(loss), gradients


def ends(offset: tuple[int, ...], size: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(o + n for o, n in zip(offset, size))


def gradient_in_their_module(gradients: dict[str, Tensor], name: str) -> Tensor:
    """The gradient of a tensor of the files; their modules keep experts as stacks, gate and up as one."""
    found = re.fullmatch(
        r"(model\.layers\.\d+)\.(?:block_sparse_moe|mlp)\.(?:experts\.(\d+)\.(\w+)|(gate))\.weight", name
    )
    if found is None:
        return gradients[name] if name in gradients else gradients[name.partition(".")[2]]  # a bare model has no prefix
    block, expert, part, router = found.groups()
    if router:
        return gradients[f"{block}.mlp.gate.weight"]
    if part in ("w2", "down_proj"):
        return gradients[f"{block}.mlp.experts.down_proj"][int(expert)]
    both = gradients[f"{block}.mlp.experts.gate_up_proj"][int(expert)]
    return both.chunk(2)[part in ("w3", "up_proj")]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_theirs(name: str, layout: str, folders: dict[str, tuple[Any, Path]]) -> None:
    model, folder = folders[name]
    config = job(folder, layout)
    hold_to(model, folder, config, layout, microbatch(config.model))


@pytest.mark.parametrize("types", [True, False], ids=["types", "no-types"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_xlnets_content_is_theirs_where_nothing_is_predicted(
    layout: str, types: bool, folders: dict[str, tuple[Any, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without perm_mask and target_mapping they have one stream, our content, and their head reads it."""
    monkeypatch.setattr(TwoStreamHead, "forward", lambda self, ctx, h, g: Head.forward(self, ctx, h))
    model, folder = folders["xlnet"]
    config = job(folder, layout)
    m = microbatch(config.model)
    m.ranks, m.weights = torch.zeros_like(m.tokens), torch.ones(m.tokens.shape)
    m.token_types = m.token_types if types else None
    hold_to(model, folder, config, layout, m)


def hold_to(model: Any, folder: Path, config: Config, layout: str, m: Microbatch) -> None:
    """Logits where a target counts, loss and every gradient of ``folder`` on ``layout`` are those of ``model``."""
    ranks = threads.run(config, parse(layout).world, run_one, config, folder, m)
    model.zero_grad()
    logits, sentences = their_outputs(model, m)
    counted = m.weights.T.bool()
    loss = torch.nn.functional.cross_entropy(logits[counted], m.targets.T[counted])
    if sentences is not None:
        loss = loss + torch.nn.functional.cross_entropy(sentences, m.labels)
    loss.backward()
    parts = [part for part, _, _ in ranks if part is not None]
    ours, logits = torch.cat(parts, -1)[..., :VOCAB].transpose(0, 1)[counted], logits[counted]
    torch.testing.assert_close(ours, logits.detach(), rtol=0, atol=1e-4)
    p, q = logits.detach().double().log_softmax(-1), ours.double().log_softmax(-1)
    assert float((p.exp() * (p - q)).sum(-1).max()) <= 1e-10
    assert ranks[0][1] == pytest.approx(float(loss), abs=1e-5)
    links = Import(folder)
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    seen: set[str] = set()
    for _, _, found in ranks:
        for key, gradient in found.items():
            ours_name, _, at = key.partition("@")
            link = links.links[ours_name]
            offset, size = link.box(links.shapes[ours_name])
            true = gradient_in_their_module(gradients, link.theirs)[tuple(map(slice, offset, ends(offset, size)))]
            true = true.flatten(1) if link.heads else true
            true = (true.T if link.transposed else true).reshape(links.shapes[ours_name])
            corner = tuple(int(n) for n in at.strip("()").split(",") if n.strip())
            true = true[tuple(map(slice, corner, ends(corner, gradient.shape)))]
            error = float((gradient - true).norm() / true.norm().clamp_min(1e-2))
            assert error < 1e-4, f"gradient of {key} is off by {error:.1e}"
            seen.add(ours_name)
    assert seen == set(links.shapes)


def test_a_box_may_begin_inside_a_head(folders: dict[str, tuple[Any, Path]]) -> None:
    """ZeRO cuts where it likes; their matrices have heads and features as two dimensions."""
    model, folder = folders["xlnet"]
    attention, shape = model.transformer.layer[1].rel_attn, (32, 32)
    for part, whole in (("q", attention.q.flatten(1).T), ("output", attention.o.flatten(1))):
        for start, stop in ((0, 1024), (5, 30), (37, 400), (350, 351), (100, 1023)):
            data = torch.empty(stop - start)
            address = Address(f"weight/blocks.1.attention.{part}.weight", shape, (0, 0), shape, start, stop)
            Import(folder).fill([(address, data)])
            assert torch.equal(data, whole.detach().reshape(-1)[start:stop]), (part, start, stop)


def save(grid: Grid, device: torch.device, config: Config, folder: Path, root: Path) -> Path:
    """A checkpoint of the imported weights."""
    engine = started(grid, device, config, folder)
    pieces = list(engine.step.pieces(share=True))
    return store.save(root, 1, pieces, {"vocab_size": VOCAB}, rank=0, world=1, sync=store.SingleProcess())


@pytest.mark.parametrize("name", MODELS)
def test_exports_are_bitwise_the_import_and_open_there(
    name: str, folders: dict[str, tuple[Any, Path]], tmp_path: Path
) -> None:
    model, folder = folders[name]
    config = job(folder, "1x1x1")
    (checkpoint,) = threads.run(config, 1, save, config, folder, tmp_path / "checkpoints")
    out = tmp_path / "out"
    kind = MODELS[name][0]
    assert export(checkpoint, out, config, VOCAB, kind=kind, shard_bytes=20_000).kind == kind
    assert len(list(out.glob("*.safetensors"))) > 1
    links = Import(folder)
    before, after = ({n: t for f in p.glob("*.safetensors") for n, t in load_file(f).items()} for p in (folder, out))
    zeros = links.family.zeros
    before = {
        full: before[held] for full, held in links.names.items() if held not in zeros
    }  # as one with heads is saved
    assert before.keys() == after.keys()
    for link in links.links.values():  # rows of position embeddings that nothing reads are not ours
        offset, size = link.box(links.shapes[link.ours])
        window = tuple(map(slice, offset, ends(offset, size)))
        assert torch.equal(before[link.theirs][window], after[link.theirs][window]), link.theirs
    opened = type(model).from_pretrained(out, attn_implementation="eager").eval()
    m = microbatch(config.model)
    with torch.no_grad():
        pair = [their_outputs(one, m)[0] for one in (model, opened)]
    torch.testing.assert_close(pair[0], pair[1], rtol=0, atol=1e-6)
    assert not differences(Import(out).model, Import(folder).model)
