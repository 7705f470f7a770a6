"""The journey of eight tokens: two stages, a shared expert; every line of it, computed by hand.

 Q  Q  <|analysis|>  a  <|endofanalysis|>  <|response|>  s  <|endofresponse|>
-1 -1       0        0         0                1        1         1            stage_ids
"""

import pytest
import torch

K, N, RANK = 4, 3, 2
STAGE_IDS = [-1, -1, 0, 0, 0, 1, 1, 1]
QUESTION, ANALYSIS, RESPONSE = slice(0, 2), slice(2, 5), slice(5, 8)


@pytest.fixture
def chain(backend):
    """x[t] counts the tokens; each expert multiplies by a number of its own: a wrong route shows in the value."""
    device = backend.device
    number = torch.arange(1.0, 9.0, device=device)  # of the token
    x = number[:, None] * torch.tensor([1.0, 0, 0, 0], device=device)
    lora_A = torch.zeros(3, RANK, K, device=device)
    lora_A[:, :, 0] = torch.tensor([[1.0, 2], [10, 20], [100, 200]], device=device)  # analysis, response, shared
    lora_B = torch.zeros(3, N, RANK, device=device)
    lora_B[:, 0, 0] = 1
    lora_B[:, 1, 1] = 1
    scales = torch.tensor([1.0, 1.0, 0.5], device=device)
    return x, lora_A, lora_B, torch.tensor(STAGE_IDS, device=device), scales


def test_z_has_a_stage_half_and_a_shared_half(backend, chain):
    x, lora_A, _, stage_ids, scales = chain
    z = backend.ops.lora_shrink(x, lora_A, stage_ids, scales, True).cpu()
    number = torch.arange(1.0, 9.0)[:, None]
    assert z.shape == (8, 2 * RANK)
    stage, shared = z[:, :RANK], z[:, RANK:]
    assert torch.equal(stage[QUESTION], torch.zeros(2, RANK))
    assert torch.equal(stage[ANALYSIS], number[ANALYSIS] * torch.tensor([1.0, 2]))
    assert torch.equal(stage[RESPONSE], number[RESPONSE] * torch.tensor([10.0, 20]))
    assert torch.equal(shared, number * torch.tensor([50.0, 100]))  # half of 100 and of 200


def test_y_is_the_sum_of_the_two_halves(backend, chain):
    x, lora_A, lora_B, stage_ids, scales = chain
    delta = backend.lora_delta(x, lora_A, lora_B, stage_ids, scales).cpu()
    number = torch.arange(1.0, 9.0)
    per_token = torch.tensor([50.0, 50, 51, 51, 51, 60, 60, 60])
    assert delta[:, 0].tolist() == (number * per_token).tolist()
    assert delta[:, 1].tolist() == (number * 2 * per_token).tolist()
    assert delta[:, 2].count_nonzero() == 0


def test_the_base_comes_on_top(backend, chain):
    x, lora_A, lora_B, stage_ids, scales = chain
    weight, bias = torch.ones(N, K, device=x.device), torch.full((N,), 1000.0, device=x.device)
    y = backend.mote_linear(x, weight, bias, lora_A, lora_B, stage_ids, scales).cpu()
    assert y[:, 2].tolist() == [1000 + number for number in range(1, 9)]
    assert y[0].tolist() == [1000 + 1 + 50, 1000 + 1 + 100, 1001]
    assert y[7].tolist() == [1000 + 8 + 8 * 60, 1000 + 8 + 8 * 120, 1008]


def test_each_expert_learns_from_its_own_tokens(backend, chain):
    x, lora_A, lora_B, stage_ids, scales = chain
    lora_A, lora_B = lora_A.requires_grad_(), lora_B.requires_grad_()
    backend.lora_delta(x, lora_A, lora_B, stage_ids, scales).sum().backward()
    # dz is the scale (the columns of B sum to one), so dA is the scaled sum of the x of the expert's tokens:
    # 3 + 4 + 5 of the analysis, 6 + 7 + 8 of the response, half of all eight.
    assert lora_A.grad[:, :, 0].tolist() == [[12.0, 12], [21, 21], [18, 18]]
    assert lora_A.grad[:, :, 1:].count_nonzero() == 0
    # dB sums z: every output row gets the same.
    expected = [[12.0, 24], [210, 420], [1800, 3600]]
    assert lora_B.grad.tolist() == [[row] * N for row in expected]


def test_disabled_experts_are_the_base(backend, chain):
    x, lora_A, lora_B, stage_ids, scales = chain
    weight = torch.eye(N, K, device=x.device)
    y = backend.mote_linear(x, weight, None, lora_A, lora_B, torch.full_like(stage_ids, -2), scales)
    assert torch.equal(y, x[:, :N])


def test_names_of_the_special_ids(cpu):
    assert (cpu.package.BASE_ONLY, cpu.package.SHARED_ONLY) == (-2, -1)
    assert cpu.package.reference.mote_linear.__doc__
