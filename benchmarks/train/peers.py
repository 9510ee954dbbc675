"""The peers' arms: other training stacks on the same job, from the same weights and batches, as fast as they can.

    python peers.py PEER SPEC.json

Runs in an environment of its own (``make bench-env``) and imports nothing of megapre. ``SPEC.json`` holds the shape of
the model, the folder of its first weights in Hugging Face's format, the file of all batches, the learning rates and
the optimizer's constants. Every peer has torch.compile over model and loss, AdamW in one fused kernel, clipping, and
fp32 weights under autocast for bf16 (nanoGPT's, litgpt's and transformers' own way; DeepSpeed keeps bf16 weights beside
fp32 ones, as megapre does).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from turns import Turns, run_arm

Spec = dict[str, Any]
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def weights(spec: Spec) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(spec["weights"]) / "model.safetensors")


def plain(spec: Spec) -> nn.Module:
    """This folder's plain GPT."""
    from plain import GPT

    m = spec["model"]
    model = GPT(m["vocab_size"], m["sequence"], m["layers"], m["hidden"], m["heads"])
    model.take(weights(spec))
    return model


def litgpt(spec: Spec) -> nn.Module:
    """litgpt's model."""
    from litgpt.model import GPT, Config

    m = spec["model"]
    config = Config(
        block_size=m["sequence"], padded_vocab_size=m["vocab_size"], vocab_size=m["vocab_size"], n_layer=m["layers"],
        n_head=m["heads"], n_query_groups=m["kv_heads"], n_embd=m["hidden"], intermediate_size=m["ffn_hidden"],
        norm_class_name="RMSNorm", norm_eps=m["norm_eps"], mlp_class_name="LLaMAMLP", bias=False,
        parallel_residual=False, rotary_percentage=1.0, rope_base=int(m["rope_theta"]),
    )  # fmt: skip
    found, model = weights(spec), GPT(config)
    named = {"transformer.wte.weight": "model.embed_tokens.weight", "transformer.ln_f.weight": "model.norm.weight"}
    state = {ours: found[theirs] for ours, theirs in named.items()} | {"lm_head.weight": found["lm_head.weight"]}
    parts = {"norm_1": "input_layernorm", "norm_2": "post_attention_layernorm", "attn.proj": "self_attn.o_proj",
             "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj"}  # fmt: skip
    for layer in range(m["layers"]):
        ours, theirs = f"transformer.h.{layer}", f"model.layers.{layer}"
        state |= {f"{ours}.{a}.weight": found[f"{theirs}.{b}.weight"] for a, b in parts.items()}
        qkv = [found[f"{theirs}.self_attn.{part}_proj.weight"] for part in "qkv"]
        state[f"{ours}.attn.qkv.weight"] = torch.cat(qkv)
    model.load_state_dict(state)
    return model


def transformers(spec: Spec) -> nn.Module:
    """transformers' model of the family, with torch's scaled dot-product attention."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    return AutoModelForCausalLM.from_pretrained(spec["weights"], attn_implementation="sdpa", dtype=torch.float32)


MODELS: dict[str, Callable[[Spec], nn.Module]] = {
    "plain": plain, "litgpt": litgpt, "transformers": transformers, "deepspeed": transformers
}  # fmt: skip


class WithLoss(nn.Module):
    """(tokens, targets), both [batch, seq], to the mean cross-entropy: one graph to compile."""

    def __init__(self, model: nn.Module, hugging_face: bool) -> None:
        super().__init__()
        self.model, self.hugging_face = model, hugging_face

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(tokens, use_cache=False).logits if self.hugging_face else self.model(tokens)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def groups(model: nn.Module, spec: Spec) -> list[dict[str, Any]]:
    """Matrices decay, norms and biases do not."""
    every = [p for p in model.parameters() if p.requires_grad]
    decay = spec["optimizer"]["weight_decay"]
    return [
        {"params": [p for p in every if p.dim() >= 2], "weight_decay": decay},
        {"params": [p for p in every if p.dim() < 2], "weight_decay": 0.0},
    ]


def adamw(model: nn.Module, spec: Spec) -> torch.optim.AdamW:
    o = spec["optimizer"]
    return torch.optim.AdamW(groups(model, spec), lr=o["lr"], betas=(o["beta1"], o["beta2"]), eps=o["eps"], fused=True)


def microbatches(spec: Spec, step: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """(tokens, targets) of this rank, as megapre's loader deals them out."""
    batch, micro = np.load(spec["batches"], mmap_mode="r")[step], spec["microbatch"]
    for first in range(RANK * micro, len(batch), WORLD * micro):
        rows = torch.from_numpy(batch[first : first + micro].astype(np.int64)).to(device)
        yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def steps(peer: str, spec: Spec) -> Callable[[int], float]:
    """The peer's optimizer step: number -> mean loss."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(spec["threads"])
    if WORLD > 1 and peer != "deepspeed":
        torch.distributed.init_process_group("gloo" if device.type == "cpu" else "nccl")
    model: nn.Module = WithLoss(MODELS[peer](spec), MODELS[peer] is transformers).to(device).train()
    if peer == "deepspeed":
        return deepspeed_step(model, spec, device)
    optimizer = adamw(model, spec)
    if WORLD > 1:
        model = nn.parallel.DistributedDataParallel(model)
    loss_of: Any = torch.compile(model, dynamic=False) if spec["compile"] else model
    mixed = spec["dtype"] == "bf16"
    parts = spec["global_batch"] // spec["microbatch"] // WORLD

    def step(number: int) -> float:
        total = torch.zeros((), device=device)
        for index, (tokens, targets) in enumerate(microbatches(spec, number, device)):
            last = WORLD == 1 or index == parts - 1
            with nullcontext() if last else model.no_sync():
                with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
                    loss = loss_of(tokens, targets) / parts
                loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), spec["optimizer"]["clip"])
        for group in optimizer.param_groups:
            group["lr"] = spec["rates"][number]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return mean(total)

    return step


def deepspeed_step(model: nn.Module, spec: Spec, device: torch.device) -> Callable[[int], float]:
    """ZeRO-1 over transformers' model."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"),
                        ("MASTER_PORT", spec["port"])):  # fmt: skip
        os.environ.setdefault(name, str(value))
    import deepspeed

    parts = spec["global_batch"] // spec["microbatch"] // WORLD
    config = {
        "train_micro_batch_size_per_gpu": spec["microbatch"], "gradient_accumulation_steps": parts,
        "gradient_clipping": spec["optimizer"]["clip"], "zero_optimization": {"stage": 1},
        "bf16": {"enabled": spec["dtype"] == "bf16"}, "zero_allow_untested_optimizer": True, "steps_per_print": 10**9,
    }  # fmt: skip
    deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl", verbose=False)
    engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=adamw(model, spec), config=config)
    if spec["compile"]:
        engine.compile()

    def step(number: int) -> float:
        total = torch.zeros((), device=device)
        for group in optimizer.param_groups:
            group["lr"] = spec["rates"][number]
        for tokens, targets in microbatches(spec, number, device):
            loss = engine(tokens, targets)
            engine.backward(loss)
            engine.step()
            total += loss.detach() / parts
        return mean(total)

    return step


def mean(loss: Tensor) -> float:
    """Over the ranks, which hold equally many tokens."""
    if WORLD > 1:
        torch.distributed.all_reduce(loss)
    return float(loss) / WORLD


def main(turns: Turns) -> None:
    peer, spec = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    step, result = steps(peer, spec), {}
    for number in range(len(spec["rates"])):
        turns.begin(**result)
        result = {"loss": step(number)}
    turns.begin(**result)


if __name__ == "__main__":
    run_arm(main)
