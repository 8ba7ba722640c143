"""The architecture: layers, attention, router, balance, dispatch, experts, moe, and the transformer made of them."""
