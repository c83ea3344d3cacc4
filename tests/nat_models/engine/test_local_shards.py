from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from two_processes import run_two

from nat_models.engine.local_shards import LocalShards
from nat_models.engine.non_finite import clip_or_skip

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, fused=False),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "sgd without state": lambda p: torch.optim.SGD(p, lr=0.1),
}
STEPS, CONVERTED_AT, SKIPPED, SAVED_AT = 6, 1, 3, 4
BATCHES = 2  # of a step and process


def groups(model):
    """Weights and biases, which are not decayed."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim == 1]
    return [{"params": weights}, {"params": biases, "weight_decay": 0.0}]


def backward(model, batches):
    for batch in batches:
        (model(batch).square().mean() / len(batches)).backward()


def state_of(model, optimizer):
    """As nested lists, by the parameters' names."""
    options = StateDictOptions(full_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)["state"]
    return {k: {n: v.tolist() for n, v in s.items()} for k, s in state.items()}


def train(rank, name):
    """One of two: a model whose rows, 5 and 1, the processes share unequally, beside a whole one.

    Returns:
        For both models: norms, optimizer's state, parameters.
    """
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    sharded = deepcopy(whole)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    optimizers = [OPTIMIZERS[name](groups(model)) for model in (sharded, whole)]
    norms, states = [[], []], []
    for step in range(STEPS):
        if step == CONVERTED_AT:
            shards = LocalShards(optimizers[0])
            assert LocalShards.of(optimizers[0]) is shards
        batches = torch.randn(2, BATCHES, 3, 4)
        backward(sharded, batches[rank])
        backward(whole, batches.flatten(0, 1))
        if step == SKIPPED:
            whole[0].weight.grad[0, 0] = torch.nan
            if rank == 0:
                with torch.no_grad():
                    sharded[0].weight.grad.to_local()[0, 0] = torch.nan
        for optimizer, found in zip(optimizers, norms, strict=True):
            found.append(clip_or_skip(optimizer, 0.01).item())
            optimizer.step()
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] *= 0.9
        if step == SAVED_AT:
            with shards.as_dtensors():
                parameters = [p for g in optimizers[0].param_groups for p in g["params"]]
                assert all(isinstance(parameter, DTensor) for parameter in parameters)
                states.append(state_of(sharded, optimizers[0]))
            states.append(state_of(whole, optimizers[1]))
    assert not any(isinstance(p, DTensor) for g in optimizers[0].param_groups for p in g["params"])
    weights = [[p.full_tensor().tolist() for p in sharded.parameters()]]
    weights.append([p.tolist() for p in whole.parameters()])
    return [
        {"norms": n, "state": s, "w": w} for n, s, w in zip(norms, states, weights, strict=True)
    ]


def flat(value):
    """All numbers of nested containers."""
    if isinstance(value, dict):
        return [x for key in sorted(value) for x in flat(value[key])]
    return [x for v in value for x in flat(v)] if isinstance(value, list) else [value]


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_shards_train_as_the_whole_model(name):
    for ours, theirs in run_two(train, name).values():
        assert [norm > 0.01 for norm in theirs["norms"]] == [
            step != SKIPPED for step in range(STEPS)
        ]
        for part, expected in theirs.items():
            close = pytest.approx(flat(expected), rel=1e-4, abs=1e-6, nan_ok=True)
            assert flat(ours[part]) == close, part
        assert ours["state"].keys() == theirs["state"].keys()


def test_optimizers_that_look_at_whole_tensors_are_refused():
    optimizer = torch.optim.RMSprop(nn.Linear(2, 2).parameters())
    with pytest.raises(TypeError, match="optimizer=RMSprop: expected one of"):
        LocalShards(optimizer)
    assert LocalShards.of(optimizer) is None


def test_whole_tensors_are_refused():
    with pytest.raises(TypeError, match="expected DTensors"):
        LocalShards(torch.optim.SGD(nn.Linear(2, 2).parameters()))
