"""What a job with a mixture of experts must satisfy; rules as in ``check.py``."""

from __future__ import annotations

from megapre.config.schema import Config


def expert_mesh_fits(config: Config) -> str | None:
    """replicas x expert x expert_tensor are the ranks of a stage; experts are dealt out evenly."""
    model, parallel = config.model, config.parallel
    expert, cut = parallel.expert, parallel.expert_tensor
    if not model.experts:
        if expert > 1 or cut > 1:
            return (
                f"parallel.expert ({expert}) and parallel.expert_tensor ({cut}) must be 1 while model.experts is 0: "
                f"set model.experts or drop them"
            )
        return None
    if model.experts % expert:
        return f"model.experts ({model.experts}) must be a multiple of parallel.expert ({expert})"
    if parallel.tensor % cut:
        return f"parallel.tensor ({parallel.tensor}) must be a multiple of parallel.expert_tensor ({cut})"
    ranks = parallel.data * parallel.context * parallel.tensor
    if ranks % (expert * cut):
        return (
            f"parallel.expert x parallel.expert_tensor = {expert} x {cut} = {expert * cut} must divide parallel.data x "
            f"context x tensor = {parallel.data} x {parallel.context} x {parallel.tensor} = {ranks}"
        )
    if model.sequence % (parallel.tensor * parallel.context):
        return (
            f"model.experts needs model.sequence ({model.sequence}) to be a multiple of parallel.tensor x "
            f"parallel.context ({parallel.tensor} x {parallel.context}), as every rank routes its own tokens"
        )
    return None


def experts_fit(config: Config) -> str | None:
    """What a mixture of experts can be."""
    model, parallel = config.model, config.parallel
    if not model.experts:
        used = [name for name in ("shared_experts", "capacity_factor", "router_bias") if getattr(model, name)]
        return f"model.{used[0]} is set while model.experts is 0: set model.experts or drop it" if used else None
    if model.experts_per_token > model.experts:
        return f"model.experts_per_token ({model.experts_per_token}) must not exceed model.experts ({model.experts})"
    for key in ("bias", "mlp_bias"):
        if getattr(model, key):
            return f"experts have no biases but model.{key} is true: set model.{key} to false"
    if not any(model.has_experts(layer) for layer in range(1, model.layers + 1)):
        return (
            f"model.experts is {model.experts} but no block has experts: model.moe_dense_first "
            f"({model.moe_dense_first}) + model.moe_every ({model.moe_every}) must not exceed model.layers "
            f"({model.layers})"
        )
    width, cut = model.n_expert_hidden, parallel.expert_tensor
    if width % cut:
        return f"model.expert_hidden ({width}) must be a multiple of parallel.expert_tensor ({cut})"
    shared = model.shared_experts * width
    if shared % parallel.tensor:
        return (
            f"model.shared_experts x model.expert_hidden ({model.shared_experts} x {width}) must be a multiple of "
            f"parallel.tensor ({parallel.tensor})"
        )
    return None


EXPERT_RULES = (experts_fit, expert_mesh_fits)
