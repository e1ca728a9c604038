"""How bytes lie on disk: one module a container, none of which knows a model."""
