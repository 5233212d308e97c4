"""How right a model computes, and how good its songs are."""
