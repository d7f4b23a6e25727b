"""Published checkpoints in formats of their own, turned into diffusers folders that families load."""
