"""How fast the layers are, as ratios inside one run."""
