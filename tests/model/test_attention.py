"""Attention equals the plain formula in float64, with every kernel that this machine can run."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from slm.hardware.block_sizes import ATTENTION_BLOCK
from slm.model import attention
from slm.model.attention import attend, kernel

SHAPES = [
    (2, 3, 200, 16, 50),
    (1, 2, 3 * ATTENTION_BLOCK, 8, ATTENTION_BLOCK),
    (1, 2, 2 * ATTENTION_BLOCK + 1, 8, 2 * ATTENTION_BLOCK - 1),
    (2, 1, 70, 8, 200),
    (1, 2, 70, 8, 1),
    (1, 2, 65, 8, 0),
    (1, 1, 65, 4, 64),
    (1, 1, 65, 4, 63),
    (3, 2, 1, 8, 0),
    (2, 2, 5, 8, 2),
]
"""Rows, heads, tokens, head size, window: ragged blocks; windows of zero, of all tokens and more;
one token."""


def inputs(rows: int, heads: int, length: int, head_dim: int, scale: float = 1.0) -> list[Tensor]:
    """Return query, key, value and the gradient of the output (B, h, T, q), laid out as in the
    trainer: (B, T, h, q).
    """
    draw = torch.Generator().manual_seed(1)
    shape = (rows, length, heads, head_dim)
    return [
        scale * torch.randn(shape, generator=draw, dtype=torch.float64).transpose(1, 2)
        for _ in range(4)
    ]


def plain(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """Return attention computed for one query at a time, over the keys that it sees."""
    outputs = []
    for position in range(query.size(2)):
        visible = slice(max(0, position - window), position + 1)
        scores = (query[:, :, position, None] * key[:, :, visible]).sum(-1)
        weights = torch.softmax(scores / math.sqrt(query.size(3)), -1)
        outputs.append((weights[..., None] * value[:, :, visible]).sum(2))
    return torch.stack(outputs, dim=2)


def outcome(attention: Callable[..., Tensor], tensors: list[Tensor], window: int) -> list[Tensor]:
    """Return the output and the gradients of query, key and value."""
    *arguments, grad = tensors
    leaves = [x.detach().clone().requires_grad_() for x in arguments]
    output = attention(*leaves, window)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def assert_close(results: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for result, reference in zip(results, expected, strict=True):
        error = (result.double().cpu() - reference).abs().max().item()
        assert error <= tolerance * max(1.0, reference.abs().max().item())


def force(monkeypatch: pytest.MonkeyPatch, device: str, kind: str, dtype: torch.dtype) -> None:
    monkeypatch.setitem(attention._kernels, (device, dtype), kind)


@pytest.mark.parametrize("kind", ["banded", "sdpa"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
@pytest.mark.parametrize("shape", SHAPES)
def test_cpu_kernels_equal_the_plain_formula(
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    tolerance: float,
    kind: str,
) -> None:
    *shape, window = shape
    force(monkeypatch, "cpu", kind, dtype)
    tensors = inputs(*shape)
    assert_close(
        outcome(attend, [x.to(dtype) for x in tensors], window),
        outcome(plain, tensors, window),
        tolerance,
    )


@pytest.mark.parametrize("kind", ["flash3", "flex", "sdpa"])
@pytest.mark.parametrize(
    "shape", [(2, 3, 300, 64, 100), (1, 2, 1024, 128, 256), (1, 2, 256, 64, 256)]
)
def test_gpu_kernels_equal_the_plain_formula(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], kind: str
) -> None:
    if not torch.cuda.is_available():
        pytest.skip(f"no CUDA device to run {kind} on")
    major, _ = torch.cuda.get_device_capability()
    module = {"flash3": "flash_attn_interface", "flex": "triton"}.get(kind, "torch")
    if (kind == "flash3" and major != 9) or find_spec(module) is None:
        pytest.skip(f"{kind} is not for sm_{major}0, or {module} is not installed")
    force(monkeypatch, "cuda", kind, torch.bfloat16)
    *shape, window = shape
    tensors = [x.bfloat16() for x in inputs(*shape)]
    expected = outcome(plain, [x.double() for x in tensors], window)
    assert_close(outcome(attend, [x.cuda() for x in tensors], window), expected, 0.03)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("length", "window"), [(300, 100), (256, 128), (130, 0)])
def test_the_block_mask_of_flex_attention_is_the_window(length: int, window: int) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    query, key, value, _ = inputs(1, 2, length, 16)
    mask = attention._flex_mask(length, window, torch.device("cpu"))
    output = flex_attention(query, key, value, block_mask=mask)
    assert isinstance(output, Tensor)
    assert_close([output], [plain(query, key, value, window)], 1e-10)


@pytest.mark.parametrize("window", [30, 100])
def test_large_scores_do_not_overflow(window: int) -> None:
    tensors = inputs(1, 2, 100, 8, scale=100.0)
    assert_close(outcome(attend, tensors, window), outcome(plain, tensors, window), 1e-7)


def test_results_are_the_same_bits_in_every_call_and_without_gradients() -> None:
    tensors = [x.float() for x in inputs(4, 4, 300, 32)]
    first, second = (outcome(attend, tensors, 100) for _ in range(2))
    with torch.no_grad():
        alone = attend(*tensors[:3], 100)
    assert all(torch.equal(x, y) for x, y in zip(first, second))
    assert torch.equal(alone, first[0])
    assert not alone.requires_grad


def test_saved_weights_grow_with_the_window_and_not_with_the_square_of_the_length() -> None:
    query, key, value, _ = inputs(2, 3, 1000, 8)
    attended, weights = torch.ops.slm.banded(query, key, value, 100)
    assert weights.numel() <= 2 * 3 * 1000 * (100 + ATTENTION_BLOCK)
    assert attended.transpose(1, 2).is_contiguous()


def test_the_custom_operator_passes_torch_s_checks() -> None:
    """Check its schema, its shapes without data, its gradients, and both under tracing."""
    tensors = [x.requires_grad_() for x in inputs(2, 2, 100, 8)[:3]]
    torch.library.opcheck(torch.ops.slm.banded.default, (*tensors, 30))


def test_compiling_breaks_no_graph_and_changes_no_bit() -> None:
    tensors = [x.float() for x in inputs(2, 2, 150, 16)]
    kernel(torch.device("cpu"), torch.float32)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for window in (40, 150):
        results, expected = outcome(compiled, tensors, window), outcome(attend, tensors, window)
        assert all(torch.equal(x, y) for x, y in zip(results, expected))


def test_cpus_use_banded_attention_and_apple_gpus_sdpa() -> None:
    assert kernel(torch.device("cpu"), torch.float32) == "banded"
    assert kernel(torch.device("mps"), torch.float16) == "sdpa"
