import pytest
import torch

from nnunetv2.training.optimization import EagerSGD, build_sgd, load_optimizer_state_, portable_optimizer_state

CPU = torch.device("cpu")


def make_trained(**options):
    torch.manual_seed(0)
    network = torch.nn.Conv2d(2, 3, 3)
    network.weight.data = network.weight.data.contiguous(memory_format=torch.channels_last)
    optimizer = EagerSGD(network.parameters(), 0.1, momentum=0.9, nesterov=True, **options)
    network(torch.ones(1, 2, 4, 4)).sum().backward()
    optimizer.step()
    return network, optimizer


def test_the_stored_state_says_what_to_compute_and_not_how():
    _, optimizer = make_trained(fused=True)
    group = portable_optimizer_state(optimizer)["param_groups"][0]
    assert group["fused"] is None and group["foreach"] is None and group["momentum"] == 0.9
    assert optimizer.param_groups[0]["fused"] is True
    make_trained()[1].load_state_dict(portable_optimizer_state(optimizer))


def test_a_loaded_state_computes_as_here_and_lies_in_memory_as_the_weights():
    network, optimizer = make_trained(fused=True)
    momentum = optimizer.state[network.weight]["momentum_buffer"].clone()
    state = portable_optimizer_state(make_trained()[1])
    for entry in state["state"].values():
        entry["momentum_buffer"] = entry["momentum_buffer"].contiguous()
    load_optimizer_state_(optimizer, state)
    loaded = optimizer.state[network.weight]["momentum_buffer"]
    assert optimizer.param_groups[0]["fused"] is True
    torch.testing.assert_close(loaded, momentum)
    assert loaded.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("is_finite", [True, False])
def test_a_fused_step_with_a_gradient_scaler_is_skipped_on_overflow(is_finite):
    network, optimizer = make_trained(fused=True)
    load_optimizer_state_(optimizer, portable_optimizer_state(optimizer))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = network.weight.detach().clone()
    optimizer.zero_grad()
    scaler.scale(network(torch.full((1, 2, 4, 4), 1.0 if is_finite else float("inf"))).sum()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(network.weight, before) is not is_finite


def test_the_default_optimizer_is_the_one_of_the_plans_trainer():
    group = build_sgd(torch.nn.Linear(1, 1), initial_lr=0.01, weight_decay=3e-5, device=CPU).param_groups[0]
    assert (group["lr"], group["weight_decay"], group["momentum"], group["nesterov"]) == (0.01, 3e-5, 0.99, True)


def test_the_optimizer_without_the_compiler_steps_as_that_of_torch():
    trained = []
    for sgd in (torch.optim.SGD, EagerSGD):
        torch.manual_seed(0)
        network = torch.nn.Conv2d(2, 3, 3)
        optimizer = sgd(network.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
        steps = []
        optimizer.register_step_post_hook(lambda *_, steps=steps: steps.append(1))
        for _ in range(3):
            optimizer.zero_grad()
            network(torch.ones(1, 2, 4, 4)).square().sum().backward()
            optimizer.step()
        assert len(steps) == 3
        trained.append((network.weight, optimizer.state_dict()))
    assert torch.equal(trained[0][0], trained[1][0])
    torch.testing.assert_close(trained[0][1], trained[1][1], rtol=0, atol=0)
