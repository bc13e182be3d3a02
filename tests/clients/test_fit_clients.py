"""Networks of torchvision, timm and segmentation_models.pytorch fit as they come: `make test-clients`."""

import copy
import gc

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from revseg import fit
from revseg.memory import peak_bytes, predict
from tests.clients.models import CLIENTS


def loss_of(output):
    """Of whatever a network returns."""
    return sum(x.square().mean() for x in tree_leaves(output) if isinstance(x, Tensor))


def trained(model, images):
    """Outputs and buffers after a step; and gradients."""
    torch.manual_seed(1)
    output = model(images)
    outputs = [x.detach().clone() for x in tree_leaves(output)]
    loss_of(output).backward()
    gradients = [torch.zeros(()) if p.grad is None else p.grad for p in model.parameters()]
    return [*outputs, *model.buffers()], gradients


def measured(model, images):
    def step():
        loss_of(model(images)).backward()
        model.zero_grad()

    step()
    gc.collect()
    return peak_bytes(step, before=step)


@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_fits(name):
    client = CLIENTS[name]
    library = pytest.importorskip(client.library, reason="make test-clients sets up what these need")
    torch.manual_seed(0)
    model, images = client.make(library), torch.randn(client.shape)
    before = predict(model, images, loss_of)
    fitted = fit(model, images, loss_of, time=10)
    assert fitted.plan.parts
    assert list(fitted.state_dict()) == list(model.state_dict())
    assert [n for n, _ in fitted.named_parameters()] == [n for n, _ in model.named_parameters()]
    twin = copy.deepcopy(model)
    (values, gradients), (of_plain, plain_gradients) = trained(fitted, images), trained(twin, images)
    assert all(map(torch.equal, values, of_plain))
    if not client.skips:
        assert all(map(torch.equal, gradients, plain_gradients))
    for ours, plain in zip(gradients, plain_gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))
    fitted.zero_grad()
    assert fitted.plan.peak < before.peak
    planned = fitted.plan.peak - before.before
    assert measured(fitted, images) == pytest.approx(planned, rel=0.05)
    assert measured(fitted, images) < measured(model, images)
