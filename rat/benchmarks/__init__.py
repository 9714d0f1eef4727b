"""How fast the layers, the models and the kernels are, as ratios inside one run; and how much memory they take."""
