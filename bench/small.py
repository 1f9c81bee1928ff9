"""Every fused op once, small, on the GPU: what compute-sanitizer watches.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m bench.small

A training step and a few sampling steps of a small model in both precisions, and the attention of the paper's shapes.
"""

import sys

import torch

from bench.baselines import SMOKE, fresh_model
from encdiff.ops.cross_attention import cross_attention
from encdiff.ops.self_attention import self_attention
from encdiff.training import TrainConfig, Training

SHAPES = [(3, 256, 64, 20), (2, 63, 128, 20), (2, 17, 256, 20), (1, 5, 320, 77)]  # batch, queries, channels, tokens


def attention(batch: int, queries: int, channels: int, tokens: int, device: torch.device, dtype: torch.dtype) -> None:
    shapes = [(batch, queries, channels), (batch, tokens, 16), (channels, channels)]
    shapes += [(channels, 16)] * 2 + [(channels, channels)]
    x, tokens, *weights = (torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in shapes)
    cross_attention(x, tokens, *weights, heads=8).sum().backward()
    square = [torch.randn(channels, channels, device=device, dtype=dtype, requires_grad=True) for _ in range(4)]
    self_attention(x, *square, heads=8).sum().backward()


def model_step(device: torch.device, precision: str) -> None:
    model = fresh_model(SMOKE, device)
    config = TrainConfig(batch_size=3, precision=precision, engine="eager", gradient_clip=1.0)
    training = Training(model, config)
    size = SMOKE.image_size
    images = torch.randint(256, (3, size, size, 3), dtype=torch.uint8, device=device)
    loss = training.advance(images, torch.arange(3, device=device))["loss"]
    assert loss.isfinite(), loss
    assert model.sample(torch.randn(3, SMOKE.concepts, device=device), steps=3).isfinite().all()


def main() -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    for precision, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        model_step(device, precision)
        for shape in SHAPES:
            attention(*shape, device, dtype)
    print(f"every small case ran on {device}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
