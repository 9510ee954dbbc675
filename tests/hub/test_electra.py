"""ELECTRA's generator and discriminator against their two modules of ``transformers``, trained as one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from megapre.config.check import check
from megapre.config.schema import Config, DataConfig, ParallelConfig, PrecisionConfig, TrainConfig
from megapre.data.loader import Microbatch, count
from megapre.hub.export import export
from megapre.hub.families import differences, family_of
from megapre.hub.folder import SINGLE
from megapre.hub.load import Import
from megapre.models.context import Context
from megapre.models.replaced_token import Replacement
from megapre.parallel.comm import Axis
from megapre.parallel.grid import Grid
from megapre.parallel.tensor import Linear
from megapre.verify import threads
from megapre.verify.cells import parse
from tests.hub.test_families import BATCH, ENCODER, LENGTH, VOCAB, save, started

SMALL = {**ENCODER, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 20, "embedding_size": 24}
LARGE = {**ENCODER, "embedding_size": 24, "num_hidden_layers": 3}
FACTOR = 50.0
Pair = tuple[Any, Any, Path]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Generator and discriminator with one embedding, no bias or norm at its first value, and the folder of both."""
    folder = tmp_path_factory.mktemp("electra")
    torch.manual_seed(5)
    found = []
    for kind, settings in ((transformers.ElectraForMaskedLM, SMALL), (transformers.ElectraForPreTraining, LARGE)):
        config = transformers.ElectraConfig(**settings)
        config._attn_implementation = "eager"
        found.append(kind(config).eval())
        with torch.no_grad():
            for parameter in found[-1].parameters():
                parameter.normal_(std=0.2)
                if parameter.dim() == 1:
                    parameter.add_(0.7)
    generator, discriminator = found
    discriminator.electra.embeddings = generator.electra.embeddings
    discriminator.save_pretrained(folder)
    generator.save_pretrained(folder / "generator")
    return generator, discriminator, folder


def microbatch() -> tuple[Microbatch, Tensor]:
    """Texts, of which a third of the tokens are hidden, and what the generator is made to write in their places."""
    generator = torch.Generator().manual_seed(3)
    text, written = torch.randint(2, VOCAB, (2, LENGTH, BATCH), generator=generator)
    hidden = torch.rand(LENGTH, BATCH, generator=generator) < 0.33
    written[3] = text[3]  # a draw may be the token of the text
    hidden[3] = True
    positions = torch.arange(LENGTH).unsqueeze(1).expand(LENGTH, BATCH).contiguous()
    m = Microbatch(torch.where(hidden, 1, text), text, hidden.float(), positions, None, torch.arange(BATCH))
    m.token_types = (positions > 4).long()
    return m, written


def job(folder: Path, layout: str) -> Config:
    cell = parse(layout)
    model = replace(Import(folder).model, dropout=0.0, attention_dropout=0.0)
    config = Config(
        model=model, data=DataConfig(objective="replaced"), train=TrainConfig(global_batch=BATCH, microbatch=BATCH),
        precision=PrecisionConfig(dtype="fp32"), parallel=ParallelConfig(data=1),
    )  # fmt: skip
    return check(cell.apply(config), cell.world)


def run_one(
    grid: Grid, device: torch.device, config: Config, folder: Path
) -> tuple[dict[str, Tensor], float, dict[str, Tensor]]:
    """Of one rank: its parts of both models' logits, the loss, and gradients by tensor and offset."""
    engine = started(grid, device, config, folder)
    step, (m, written) = engine.step, microbatch()
    for layer in engine.model.layers:
        if isinstance(layer, Replacement):
            layer.fill = lambda ctx, x: written  # type: ignore[method-assign]
    logits: dict[str, Tensor] = {}

    def generators(output: Linear, x: Tensor, ctx: Context) -> Tensor:
        logits["generator"] = output(x)
        return x.new_zeros(())

    def discriminators(found: Tensor, replaced: Tensor, ctx: Context, axis: Axis) -> Tensor:
        logits["discriminator"] = found
        return found.new_zeros(())

    contexts = step._contexts([m], count([m]), 0, False, training=False)
    for context in contexts:
        context.loss, context.detection_loss = generators, discriminators
    with torch.no_grad():
        step.executor.run(step._plan(1, False), contexts, step._carried([m]), step.flat)
    loss, _ = step.compute_gradients([m], count([m]), 0)
    gradients = {}
    for bucket, shard in zip(step.flat.layout.buckets, step.flat.gradients.shards):
        for slot in bucket.slots:
            window = tuple(slice(n) for n in slot.size)
            gradients[f"{slot.spec.name}@{slot.offset}"] = shard[bucket.place(slot)].view(slot.shape)[window].clone()
    return logits, float(loss), gradients


@pytest.mark.parametrize("layout", ["1x1x1", "2x2x1+sp"])
def test_logits_and_gradients_of_both_are_theirs(layout: str, pair: Pair) -> None:
    generator, discriminator, folder = pair
    config = job(folder, layout)
    ranks = threads.run(config, parse(layout).world, run_one, config, folder)
    m, written = microbatch()
    assert m.token_types is not None
    for model in (generator, discriminator):
        model.zero_grad()
    types = m.token_types.T
    scores = generator(input_ids=m.tokens.T, token_type_ids=types).logits
    corrupted = torch.where(m.weights > 0, written, m.targets).T
    labels = (corrupted != m.targets.T).long()
    assert 0 < int(labels.sum()) < int(m.weights.sum())
    told = discriminator(input_ids=corrupted, token_type_ids=types, labels=labels)
    hidden = m.weights.T > 0
    loss = functional.cross_entropy(scores[hidden], m.targets.T[hidden]) + FACTOR * told.loss
    loss.backward()
    ours = torch.cat([part["generator"] for part, _, _ in ranks if "generator" in part], -1)[..., :VOCAB]
    torch.testing.assert_close(ours.transpose(0, 1), scores.detach(), rtol=0, atol=1e-4)
    p, q = scores.detach().double().log_softmax(-1), ours.transpose(0, 1).double().log_softmax(-1)
    assert float((p.exp() * (p - q)).sum(-1).max()) <= 1e-10
    rows = torch.cat([part["discriminator"] for part, _, _ in ranks if "discriminator" in part])
    torch.testing.assert_close(rows.T, told.logits.detach(), rtol=0, atol=1e-4)
    p, q = (torch.stack((x, -x)).double().sigmoid() for x in (told.logits.detach(), rows.T))
    assert float((p * (p / q).log()).sum(0).max()) <= 1e-10
    assert ranks[0][1] == pytest.approx(float(loss.detach()), rel=1e-5)
    links = Import(folder)
    theirs = {name: x.grad for name, x in discriminator.named_parameters()}
    theirs |= {f"generator/{name}": x.grad for name, x in generator.named_parameters()}
    seen: set[str] = set()
    for _, _, found in ranks:
        for key, gradient in found.items():
            name, _, at = key.partition("@")
            corner = [int(n) for n in at.strip("()").split(",") if n.strip()]
            box = tuple(slice(o, o + n) for o, n in zip(corner, gradient.shape))
            true = theirs[links.links[name].theirs][box]
            error = float((gradient - true).norm() / true.norm().clamp_min(1e-2))
            assert error < 1e-4, f"gradient of {key} is off by {error:.1e}"
            seen.add(name)
    assert seen == set(links.shapes)


def test_exports_are_bitwise_the_import_and_open_there(pair: Pair, tmp_path: Path) -> None:
    *models, folder = pair
    config = job(folder, "1x1x1")
    (checkpoint,) = threads.run(config, 1, save, config, folder, tmp_path / "checkpoints")
    out = tmp_path / "out"
    assert family_of(config.model, VOCAB).kind == "electra"
    assert export(checkpoint, out, config, VOCAB, shard_bytes=20_000).kind == "electra"
    m, _ = microbatch()
    for model, part in zip(models, ("generator", "")):
        assert len(list((out / part).glob("*.safetensors"))) > 1
        before = load_file(folder / part / SINGLE)
        after = {n: t for file in (out / part).glob("*.safetensors") for n, t in load_file(file).items()}
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        opened = type(model).from_pretrained(out / part, attn_implementation="eager").eval()
        with torch.no_grad():
            assert torch.equal(opened(m.tokens.T).logits, model(m.tokens.T).logits)
    assert not differences(Import(out).model, Import(folder).model)


def test_what_is_no_pair_is_refused(pair: Pair, tmp_path: Path) -> None:
    folder = shutil.copytree(pair[2], tmp_path / "copy")
    small = folder / "generator"
    config, tensors = json.loads((small / "config.json").read_text()), load_file(small / SINGLE)

    def changed(settings: dict[str, Any], **values: Tensor) -> Path:
        (small / "config.json").write_text(json.dumps(config | settings))
        save_file(tensors | values, small / SINGLE)
        return folder

    name = "electra.embeddings.word_embeddings.weight"
    cases = [
        ({}, {name: tensors[name] + 1}, "ties generator/electra.embeddings.word_embeddings.weight"),
        ({"num_attention_heads": 4}, {}, "heads = 4 .* this discriminator has 2"),
        ({"intermediate_size": 24}, {}, "n_ffn = 24 .* discriminator has 20"),
        ({"rotary": True}, {}, "folder 'generator', has settings .* rotary"),
        ({}, {"electra.more.weight": torch.zeros(2)}, "also has generator/electra.more.weight"),
    ]
    for settings, values, told in cases:
        with pytest.raises(ValueError, match=told):
            Import(changed(settings, **values))
    shutil.rmtree(small)
    with pytest.raises(ValueError, match="alone: put the folder of its generator"):
        Import(folder)
    shutil.copytree(pair[2] / "generator", folder / "generator" / "generator")
    shutil.copytree(pair[2] / "generator", folder / "generator", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="but is no ElectraForPreTraining"):
        Import(folder / "generator")
