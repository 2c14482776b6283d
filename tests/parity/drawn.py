"""Random numbers of a size that keeps a model lively. torch alone: the makers of oracles import it too."""

import torch


def drawn(model: torch.nn.Module, seed: int, trainable: bool = False) -> None:
    """New numbers for all parameters, or for the trainable ones, of a size that keeps a model lively."""
    random = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if id(parameter) in done or (trainable and not parameter.requires_grad):
                continue
            done.add(id(parameter))
            noise = torch.randn(parameter.shape, generator=random)
            if "ia3_l" in name or (("norm" in name.lower() or "ln_" in name) and name.endswith("weight")):
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.numel() == 1:  # DeLoRA's bound
                parameter.fill_(6.0)
            elif parameter.ndim == 1:
                parameter.copy_(0.2 * noise)
            elif "embed" in name or "shared" in name or "wte" in name or "wpe" in name or "prompt" in name:
                parameter.copy_(0.8 * noise)
            else:
                # Tuned weights are small beside the backbone's, as they are in life; else float32 itself is too coarse.
                parameter.copy_((0.5 if trainable else 1.0) * noise * parameter.shape[-1] ** -0.5)
