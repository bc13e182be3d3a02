import pytest
import torch
from torch import nn

from revseg.layers.blocks import ACTIVATIONS, BNAct, ConvBNAct, PooledBatchNorm2d, asymmetric_pairs
from revseg.layers.images import IMAGENET, image_pyramid, normalize_images


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_normalize_takes_the_mean_and_deviation_out_of_bytes():
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    before = images.clone()
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (IMAGENET.mean, IMAGENET.std))
    expected = (images.double() / 255 - mean) / std
    result = normalize_images(images)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, atol=2e-6, rtol=0)
    assert torch.equal(images, before)


def test_normalize_gives_the_layout_that_convolutions_of_a_cpu_want(monkeypatch):
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    result = normalize_images(images)
    assert result.is_contiguous(memory_format=torch.channels_last)
    monkeypatch.setenv("REVSEG_KERNELS", "0")
    plain = normalize_images(images)
    assert plain.is_contiguous()
    assert torch.equal(plain, result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_normalize_passes_floats_through(dtype):
    images = torch.randn(1, 3, 2, 2).to(dtype)
    assert normalize_images(images) is images


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.int8])
def test_normalize_refuses_other_dtypes(dtype):
    with pytest.raises(TypeError, match=f"uint8 or float, got {dtype}"):
        normalize_images(torch.zeros(1, 3, 2, 2, dtype=dtype))


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 1, 4, 4), (1, 4, 4, 3)])
def test_normalize_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"expected images \[N, 3, H, W\], got shape"):
        normalize_images(torch.zeros(shape, dtype=torch.uint8))


@pytest.mark.parametrize(("activation", "slopes"), [("prelu", 6), ("prelu_shared", 1), ("relu", 0)])
def test_block_counts(activation, slopes):
    block = ConvBNAct(4, 6, activation=activation)
    assert count(block) == 4 * 6 * 9 + 2 * 6 + slopes
    assert block[1].eps == 1e-3
    assert block[1].momentum == 0.1
    assert block[0].bias is None


@pytest.mark.parametrize("kernel", [1, 3, 5, (3, 1), (1, 7)])
@pytest.mark.parametrize("dilation", [1, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_only_the_stride_changes_the_size(kernel, dilation, stride):
    y = ConvBNAct(2, 3, kernel, dilation=dilation, stride=stride)(torch.randn(2, 2, 9, 13))
    assert y.shape == (2, 3, -(-9 // stride), -(-13 // stride))


def test_block_is_conv_then_norm_then_activation():
    block = ConvBNAct(2, 3)
    x = torch.randn(2, 2, 5, 5)
    expected = nn.functional.prelu(
        nn.functional.batch_norm(block[0](x), None, None, training=True, eps=1e-3), block[2].weight
    )
    torch.testing.assert_close(block(x), expected)


def test_pairs_are_tall_then_wide_with_their_dilations():
    pairs = asymmetric_pairs(4, (1, 8), kernel=5)
    convs = [m for m in pairs.modules() if isinstance(m, nn.Conv2d)]
    assert [c.kernel_size for c in convs] == [(5, 1), (1, 5)] * 2
    assert [c.dilation[0] for c in convs] == [1, 1, 8, 8]
    assert count(pairs) == 4 * (5 * 16 + 12)
    assert pairs(torch.randn(2, 4, 7, 3)).shape == (2, 4, 7, 3)


def test_dropout_comes_last_and_only_if_asked_for():
    assert not [m for m in asymmetric_pairs(4, (1,)).modules() if isinstance(m, nn.Dropout2d)]
    with_dropout = asymmetric_pairs(4, (1,), dropout=0.3)
    assert isinstance(with_dropout[-1], nn.Dropout2d)
    assert with_dropout.state_dict().keys() == asymmetric_pairs(4, (1,)).state_dict().keys()


def test_refusals():
    with pytest.raises(
        ValueError, match="unknown activation 'gelu'; choose one of " + ", ".join(ACTIVATIONS)
    ):
        ConvBNAct(2, 2, activation="gelu")
    with pytest.raises(ValueError, match="expected odd kernel sizes, got 4 x 1"):
        asymmetric_pairs(4, (1,), kernel=4)


def test_pooled_batch_norm_takes_a_single_value():
    """As in evaluation, which for a batch of one is all that is left to normalise by."""
    ours = PooledBatchNorm2d(4)
    for values in (ours.weight.data, ours.bias.data, ours.running_mean):
        values.normal_()
    plain = nn.BatchNorm2d(4)
    plain.load_state_dict(ours.state_dict())
    one, several = torch.randn(1, 4, 1, 1), torch.randn(2, 4, 1, 1)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        nn.BatchNorm2d(4)(one)
    assert torch.equal(ours(one), plain.eval()(one))
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), plain.buffers(), strict=True))
    assert torch.equal(ours(several), plain.train()(several))
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), plain.buffers(), strict=True))
    assert torch.equal(ours.eval()(several), plain.eval()(several))


@pytest.mark.parametrize("size", [(33, 49), (64, 32), (1, 1)], ids=str)
def test_image_pyramid_halves_again_and_again(size):
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    pool = nn.AvgPool2d(3, 2, 1)
    half = pool(normalize_images(images))
    expected = [half, pool(half), pool(pool(half))]
    torch.testing.assert_close(image_pyramid(images, 3), expected)
    torch.testing.assert_close(image_pyramid(normalize_images(images), 3), expected, rtol=0, atol=0)


def test_joined_maps_are_normed_together_in_the_dtype_of_the_first():
    join = BNAct(5, activation="relu").double()
    a, b = torch.randn(2, 2, 3, 3, dtype=torch.float64), torch.randn(2, 3, 3, 3)
    y = join(a, b)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, join[1](join[0](torch.cat((a, b.double()), 1))))


def test_groups_of_a_convolution():
    layer = ConvBNAct(8, 8, (3, 1), dilation=2, groups=8)
    assert count(layer) == 8 * 3 + 2 * 8 + 8
    assert layer(torch.randn(2, 8, 7, 5)).shape == (2, 8, 7, 5)
