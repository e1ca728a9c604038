"""Pictures of stored tensors: each drawn to scale, as the blocks of the logical tensors that it holds.

`geometry` says where the blocks lie, `scene` gathers the tensors of a source and a target as plain data, `page` makes
one HTML page of them and `svg` a single drawing for the documentation. They know layouts and groups, and no format.
"""
