"""The oracle itself against Hugging Face's GPT-2 and Llama: the same weights give the same loss and gradients.

Everything else is proven against the oracle, so this is where a shared misunderstanding would show.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from megapre.config.schema import Config, ModelConfig, ParallelConfig, PrecisionConfig
from megapre.data.loader import Counts, Microbatch
from megapre.parallel.grid import single
from megapre.training.engine import build
from megapre.verify import oracle, oracle_moe
from megapre.verify.oracle_moe import Ledger
from tests.models.test_moe import tensors

VOCAB, LENGTH, BATCH = 53, 12, 3


def microbatch() -> Microbatch:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(VOCAB, (LENGTH + 1, BATCH), generator=generator)
    positions = torch.arange(LENGTH).unsqueeze(1).expand(LENGTH, BATCH).contiguous()
    ones = torch.ones(LENGTH, BATCH)
    return Microbatch(tokens[:-1], tokens[1:], ones, positions, None, torch.arange(BATCH))


def window(name: str) -> tuple[str, tuple[slice | int, ...]]:
    """``a.b[3,0:8]`` as a name and an index; without brackets, all of it."""
    name, _, inside = name.rstrip("]").partition("[")
    bounds = [[int(bound) for bound in part.split(":")] for part in inside.split(",") if part]
    return name, tuple(slice(*bound) if len(bound) > 1 else bound[0] for bound in bounds)


def compare(config: Config, theirs: torch.nn.Module, names: dict[str, tuple[str, bool]]) -> None:
    """``names``: our tensor -> (their parameter, whether theirs is transposed)."""
    theirs = theirs.double().eval()
    parameters = dict(theirs.named_parameters())
    weights = {}
    for ours, (name, transposed) in names.items():
        name, part = window(name)
        value = parameters[name].detach()
        weights[ours] = (value.T if transposed else value)[part].clone().requires_grad_()
    m = microbatch()
    loss = oracle.loss_sum(config, weights, m, 0) / m.weights.sum()
    loss.backward()
    logits = theirs(input_ids=m.tokens.T, use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), m.targets.T.flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # theirs keeps cos and sin in fp32
    mine = oracle.logits(config, {name: w.detach() for name, w in weights.items()}, m).transpose(0, 1)
    torch.testing.assert_close(mine, logits.detach(), rtol=1e-5, atol=1e-6)
    for ours, (name, transposed) in names.items():
        name, part = window(name)
        gradient = parameters[name].grad
        assert gradient is not None and weights[ours].grad is not None
        found = (gradient.T if transposed else gradient)[part]
        error = float((weights[ours].grad - found).norm() / found.norm().clamp_min(1e-3))  # some are zero in theory
        assert error <= 1e-5, f"gradient of {ours} is off by {error:.1e}"  # theirs keeps cos and sin in fp32


def test_gpt2() -> None:
    model = ModelConfig(layers=2, hidden=24, heads=4, sequence=LENGTH)
    torch.manual_seed(1)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=LENGTH, n_embd=24, n_layer=2, n_head=4))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    names = {
        "embedding.tokens.weight": ("transformer.wte.weight", False),
        "embedding.positions.weight": ("transformer.wpe.weight", False),
        "head.norm.weight": ("transformer.ln_f.weight", False),
        "head.norm.bias": ("transformer.ln_f.bias", False),
    }
    for layer in range(2):
        ours, their = f"blocks.{layer}", f"transformer.h.{layer}"
        for kind in ("weight", "bias"):
            flip = kind == "weight"
            names[f"{ours}.attention_norm.{kind}"] = (f"{their}.ln_1.{kind}", False)
            names[f"{ours}.mlp_norm.{kind}"] = (f"{their}.ln_2.{kind}", False)
            for index, part in enumerate("qkv"):
                window = f"[{24 * index}:{24 * index + 24}]"
                names[f"{ours}.attention.{part}.{kind}"] = (f"{their}.attn.c_attn.{kind}{window}", flip)
            names[f"{ours}.attention.output.{kind}"] = (f"{their}.attn.c_proj.{kind}", flip)
            names[f"{ours}.mlp.up.{kind}"] = (f"{their}.mlp.c_fc.{kind}", flip)
            names[f"{ours}.mlp.down.{kind}"] = (f"{their}.mlp.c_proj.{kind}", flip)
    compare(Config(model=model), theirs, names)


def llama_names() -> dict[str, tuple[str, bool]]:
    """Where our tensors are in a model of Llama's family, but for the MLP."""
    names = {
        "embedding.tokens.weight": ("model.embed_tokens.weight", False),
        "head.norm.weight": ("model.norm.weight", False),
        "head.output.weight": ("lm_head.weight", False),
    }
    for layer in range(2):
        ours, their = f"blocks.{layer}", f"model.layers.{layer}"
        names[f"{ours}.attention_norm.weight"] = (f"{their}.input_layernorm.weight", False)
        names[f"{ours}.mlp_norm.weight"] = (f"{their}.post_attention_layernorm.weight", False)
        for part, name in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("output", "o_proj")):
            names[f"{ours}.attention.{part}.weight"] = (f"{their}.self_attn.{name}.weight", False)
    return names


def test_llama() -> None:
    model = ModelConfig(
        layers=2, hidden=24, heads=4, kv_heads=2, ffn_hidden=40, sequence=LENGTH, norm="rmsnorm", activation="swiglu",
        positions="rope", bias=False, tied_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(2)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=LENGTH, rms_norm_eps=1e-5, tie_word_embeddings=False,
            attn_implementation="eager",
        )
    )  # fmt: skip
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    names = llama_names()
    for layer in range(2):
        ours, their = f"blocks.{layer}", f"model.layers.{layer}"
        for part in ("gate", "up", "down"):
            names[f"{ours}.mlp.{part}.weight"] = (f"{their}.mlp.{part}_proj.weight", False)
    compare(Config(model=model), theirs, names)


MIXTRAL = ModelConfig(
    layers=2, hidden=24, heads=4, kv_heads=2, expert_hidden=40, sequence=LENGTH, norm="rmsnorm", activation="swiglu",
    positions="rope", bias=False, tied_embeddings=False, experts=5, experts_per_token=2,
)  # fmt: skip


def mixtral() -> tuple[MixtralForCausalLM, dict[str, tuple[str, bool]]]:
    """Theirs with random weights, and where ours are in it."""
    torch.manual_seed(3)
    theirs = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=LENGTH, rms_norm_eps=1e-5, tie_word_embeddings=False,
            attn_implementation="eager", num_local_experts=5, num_experts_per_tok=2, rope_theta=10000.0,
            router_jitter_noise=0.0, experts_implementation="eager",
        )
    )  # fmt: skip
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    names = llama_names()
    for layer in range(2):
        ours, their = f"blocks.{layer}", f"model.layers.{layer}"
        names[f"{ours}.mlp.router.weight"] = (f"{their}.mlp.gate.weight", False)
        for e in range(5):
            expert = f"{ours}.mlp.experts.{e}"
            names[f"{expert}.gate.weight"] = (f"{their}.mlp.experts.gate_up_proj[{e},0:40]", False)
            names[f"{expert}.up.weight"] = (f"{their}.mlp.experts.gate_up_proj[{e},40:80]", False)
            names[f"{expert}.down.weight"] = (f"{their}.mlp.experts.down_proj[{e}]", False)
    return theirs, names


def test_mixtral() -> None:
    theirs, names = mixtral()
    compare(Config(model=MIXTRAL), theirs, names)


def test_the_engine_itself_agrees_with_mixtral() -> None:
    """Not by way of the oracle: our layers with their weights, logits and every gradient."""
    theirs, names = mixtral()
    theirs = theirs.double().eval()
    parameters = dict(theirs.named_parameters())
    config = Config(model=MIXTRAL, parallel=ParallelConfig(data=1), precision=PrecisionConfig(dtype="fp64"))
    engine = build(config, single(), torch.device("cpu"), VOCAB)

    def part(name: str, gradients: bool) -> Tensor:
        name, index = window(names[name][0])
        value = parameters[name].grad if gradients else parameters[name].detach()
        assert value is not None
        return value[index]

    for name, weight in tensors(engine).items():
        weight.copy_(part(name, False))
    m = microbatch()
    targets = int(m.weights.sum())
    loss, _ = engine.step.compute_gradients([m], Counts(targets), 0)
    logits = theirs(input_ids=m.tokens.T, use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), m.targets.T.flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)
    for name, found in tensors(engine, "gradients").items():
        torch.testing.assert_close({name: found}, {name: part(name, True)}, rtol=1e-5, atol=1e-8)


def test_load_balance_is_theirs_over_k() -> None:
    """Theirs counts k choices a token, and all sequences at once: for one sequence it is k times ours."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(LENGTH, 5, generator=generator, dtype=torch.float64)
    model = ModelConfig(experts=5, experts_per_token=2, sequence=LENGTH, hidden=5, bias=False)
    weights = {"m.router.weight": torch.eye(5).double()} | {
        f"m.experts.{e}.{part}.weight": torch.zeros(5, 5).double() for e in range(5) for part in ("up", "down")
    }
    ledger = Ledger({})
    oracle_moe.apply(model, weights, "m", logits.unsqueeze(1), ledger)
    theirs = load_balancing_loss_func((logits,), 5, 2)
    assert isinstance(theirs, Tensor)
    torch.testing.assert_close(2 * ledger.balance, float(theirs))
