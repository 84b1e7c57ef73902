"""From Megatron files to training samples.

`template` renders a prefix from metadata, `prefix_table` tokenizes each distinct prefix once,
`packing` plans the documents of each pack, `phases` computes the phase of each sample. `dataset` is
one corpus in one phase as a Megatron dataset, `opened_corpus` checks the corpus that it opens, and
`run_datasets` composes the datasets of a run. These three, `report`, `borders` and `packed_batches`
need torch.
"""
