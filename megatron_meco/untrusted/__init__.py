"""Readers of files that a stranger may have written.

Nothing that a file names is imported or called, and nothing is allocated because a number in a file
asks for it. `text_file` reads text and strict JSON, `inert_pickle` reads pickles without running
them, and `checkpoint_index` reads the index of a torch_dist checkpoint. SECURITY.md lists which
command uses which reader.
"""
