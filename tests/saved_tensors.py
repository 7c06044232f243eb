"""What torch keeps of a forward pass for the backward pass."""

import torch


def saved_bytes(network, config, images, dtype):
    """Return the bytes that torch keeps for the backward pass, without the network's own parameters."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # referenced, or its address is reused
        return tensor

    x, zero = torch.randn(images, config.in_channels, *config.latent_size), torch.zeros(images, dtype=torch.long)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        network(x, zero, zero)
    return sum(size for size, _ in kept.values())
