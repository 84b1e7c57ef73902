"""From Megatron files to training samples.

`template` renders a prefix from metadata, `prefix_table` tokenises each distinct one once,
`packing` plans which documents make which pack, `phases` says which samples are conditioned,
`dataset` puts them behind Megatron's dataset classes. Everything but `dataset` and `report` runs in
a Python without torch and megatron.
"""
