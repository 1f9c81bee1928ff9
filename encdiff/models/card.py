"""The model card that lies beside the weights."""

CARD = """---
{{ card_data }}
---

# An EncDiff model

Disentangled concepts from images, without labels: an encoder gives {{ config.concepts }} concepts of an image, a
diffusion model draws pictures of {{ config.image_size }}x{{ config.image_size }} from them. The method is that of
[EncDiff](https://arxiv.org/abs/2402.09712); `config.json` is the configuration, `model.safetensors` the weights.

```python
from encdiff import EncDiff

model = EncDiff.from_pretrained("FOLDER OR NAME ON THE HUB")  # of this card
scalars = model.encode(images)  # (B, 3, {{ config.image_size }}, {{ config.image_size }}) in [-1, 1]
```

What it was trained on and how well it does, whoever shares it has to say here.
"""
