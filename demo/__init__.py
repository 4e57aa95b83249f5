"""Plain against aligned latents on a built-in world: python -m demo."""
